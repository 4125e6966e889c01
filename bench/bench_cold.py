"""What do threads bring to a list of a size, as training loops call it?

    python -m fastema.bench.bench_cold [--quick] [--json FILE] [--record]

Between two training steps threads fall asleep, and waking them takes longer than a small list does. Each
cell: one thread's time over that of all, and the time of all. `bench_update` has the same columns for
whole lists and rivals.
"""

from collections.abc import Mapping

import fastema

from . import cli, harness
from .lists import arrays
from .moments import moments
from .report import report

DECAY = 0.999
SIZES = [1 << shift for shift in range(14, 26)]


def measure(size: int, at: Mapping[str, harness.Stopwatch], samples: int) -> list[harness.Result]:
    """Measure one float32 array at each moment."""
    pairs = fastema.Pairs(arrays([(size,)], "f32", 1), arrays([(size,)], "f32", 2))
    calls = {
        "fastema": lambda: pairs.update(DECAY, harness.THREADS),
        "one thread": lambda: pairs.update(DECAY, 1),
    }
    return harness.run_at(at, f"{size:,} elements", 12 * size, calls, ceiling={}, samples=samples)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    options = cli.parser(__doc__).parse_args(arguments)
    sizes = [1 << 16, 1 << 20] if options.quick else SIZES
    at = moments()
    results = [result for size in sizes for result in measure(size, at, options.samples)]
    report(results, "threads", "Update of one float32 array", options)


if __name__ == "__main__":
    main()
