"""How much memory a process has taken, for programs in processes of their own."""

import resource
import sys
from pathlib import Path


def peak():
    """Return the most bytes of memory that this process had at a time.

    Linux' getrusage counts those of the process that began this one, too: beside pytest it sees nothing.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
