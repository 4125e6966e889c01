"""What do threads bring to a list of a size? Updates right after each other, and each after a pause.

    python -m fastema.bench.bench_cold [--quick]

Between two training steps threads fall asleep, and waking them takes longer than a small list does.
"""

import time

import numpy as np

import fastema

from . import harness

PAUSE = 0.02  # seconds


def milliseconds(pairs: fastema.Pairs, threads: int, pause: float, samples: int) -> float:
    """Return the median time of an update."""
    taken = []
    for _ in range(samples):
        time.sleep(pause)
        start = time.perf_counter()
        pairs.update(0.999, threads)
        taken.append(time.perf_counter() - start)
    return 1e3 * float(np.median(taken))


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    options = harness.parser(__doc__).parse_args(arguments)
    sizes = [1 << 16, 1 << 20] if options.quick else [1 << shift for shift in range(16, 26)]
    print("\nOne update of float32 averages, ms\n")
    print(
        "elements".rjust(12)
        + "".join(f"{title:>26}" for title in ("in a row: 1, all threads", "after a pause"))
    )
    for size in sizes:
        pairs = fastema.Pairs(np.ones(size, np.float32), np.ones(size, np.float32))
        cells = [
            f"{milliseconds(pairs, threads, pause, 2 * options.samples):13.3f}"
            for pause in (0.0, PAUSE)
            for threads in (1, harness.THREADS)
        ]
        print(f"{size:12,}" + "".join(cells))


if __name__ == "__main__":
    main()
