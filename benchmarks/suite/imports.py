"""What importing the package costs beyond what it is built on, for asv."""

import subprocess
import sys
import time

BELOW = "import numpy, scipy, sklearn.pipeline, skorch, torch, tqdm"


def track_import_seconds():
    """Seconds of `import fishermask_sk` in a process that has the rest already."""
    code = (
        f"import time; {BELOW}; start = time.process_time(); import fishermask_sk; "
        "print(time.process_time() - start)"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.check_output(command, text=True) for _ in range(3)]
    return min(map(float, runs))


def track_import_seconds_in_all():
    """Seconds of the clock for a process that imports the package and ends."""
    start = time.perf_counter()
    subprocess.check_call([sys.executable, "-c", "import fishermask_sk"])
    return time.perf_counter() - start


track_import_seconds.unit = track_import_seconds_in_all.unit = "s"
