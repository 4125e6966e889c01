"""How much memory does an update or a swap take beside the arrays? The peak of a fresh process each.

python -m fastema.bench.bench_memory [--quick]
"""

import subprocess
import sys

from . import harness

PROGRAM = """
import resource, sys
import numpy as np
import fastema
from fastema.bench.lists import LISTS, arrays

name, verb = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
averages, values = arrays(LISTS[name], "f32", 1), arrays(LISTS[name], "f32", 2)
warm = [np.zeros(3_000_000, np.float32) for _ in range(2)]
first = fastema.Pairs(*warm)
first.update(0.9), first.swap()  # starts the threads, whose stacks are nobody's arrays
pairs = fastema.Pairs(averages, values)
before = peak()
for _ in range(3):
    pairs.update(0.999) if verb == "update" else pairs.swap()
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
    parser = harness.parser(__doc__)
    options = parser.parse_args(arguments)
    print("\nExtra memory at the peak, KiB")
    for name in ("ResNet-50",) if options.quick else ("ResNet-50", "GPT-2", "one of 64M"):
        for verb in ("update", "swap"):
            print(f"{name:<16}{verb:<8}{extra_kilobytes(name, verb):>8}")


if __name__ == "__main__":
    main()
