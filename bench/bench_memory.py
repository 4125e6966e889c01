"""How much memory does an update or a swap take beside the arrays? The peak of a fresh process each.

python -m fastema.bench.bench_memory [--quick]
"""

import subprocess
import sys

from . import cli

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import fastema
from fastema.bench.lists import LISTS, arrays

def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

name, verb = sys.argv[1:]
averages, values = arrays(LISTS[name], "f32", 1), arrays(LISTS[name], "f32", 2)
warm = fastema.Pairs(*(np.zeros(3_000_000, np.float32) for _ in range(2)))
warm.update(0.9)  # starts the threads, whose stacks are nobody's arrays
pairs = fastema.Pairs(averages, values)
Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
before = peak()
for _ in range(3):
    if verb == "update":
        pairs.update(0.999)
    elif verb == "swap":
        pairs.swap()
    else:
        for a, v in zip(averages, values):
            a += np.float32(0.001) * (v - a)
print(peak() - before)
"""


def extra_kilobytes(name: str, verb: str) -> int:
    """Return by how many KiB the peak of a process grows while it updates or swaps a list."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, verb], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = cli.parser(__doc__, times=False)
    options = parser.parse_args(arguments)
    print("\nExtra memory at the peak, KiB")
    for name in ("ResNet-50",) if options.quick else ("ResNet-50", "GPT-2", "one of 64M"):
        for verb in ("update", "swap", "NumPy"):
            print(f"{name:<16}{verb:<8}{extra_kilobytes(name, verb):>8}")


if __name__ == "__main__":
    main()
