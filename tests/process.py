"""Memory of a whole process, as the kernel counts it (Linux only)."""

import subprocess
import sys

PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(next(l for l in status if l.startswith("VmHWM")).split()[1])
"""


def grows_by(before: str, action: str) -> int:
    """Bytes by which a new process grows at most while ``action`` runs.

    ``VmHWM`` belongs to the new process alone. ``ru_maxrss`` does not: it starts at
    what the process that started it held, so a large one hides what is asked here.
    """
    code = "\n".join([PEAK, before, "start = peak()", action, "print(peak() - start)"])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return int(done.stdout)
