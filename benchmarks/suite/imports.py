"""What importing the package costs beyond what it is built on, for asv."""

import os
import statistics
import subprocess
import sys
import time

BELOW = "import torch, sklearn.pipeline, skorch"
N_PROCESSES = 5


def processor_seconds(statement, after=""):
    """Of one statement: the median of fresh processes, one after the other.

    One more process comes first and compiles the sources, as an installation does.
    """
    code = (
        f"import time\n{after}\nstart = time.process_time()\n{statement}\n"
        "print(time.process_time() - start)"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    runs = [
        float(subprocess.check_output(command, env=environment, text=True))
        for _ in range(1 + N_PROCESSES)
    ]
    return statistics.median(runs[1:])


def track_import_seconds():
    """Processor seconds of `import fishermask_sk` in a process that has the rest."""
    return processor_seconds("import fishermask_sk", after=BELOW)


def track_import_seconds_in_all():
    """Seconds of the clock for a process that imports the package and ends."""
    start = time.perf_counter()
    subprocess.check_call([sys.executable, "-c", "import fishermask_sk"])
    return time.perf_counter() - start


for track in (track_import_seconds, track_import_seconds_in_all):
    track.unit = "s"  # type: ignore[attr-defined]  # where asv looks for it
