"""What do threads bring to a list of a size? Updates right after each other, and each after a pause.

    python -m fastema.bench.bench_cold [--quick]

Between two training steps threads fall asleep, and waking them takes longer than a small list does. The
second table is what an update costs in a training loop: each contestant after a pause, with cold caches.
"""

import time

import numpy as np

import fastema

from . import harness, rivals
from .lists import LISTS, arrays

PAUSE = 0.02  # seconds
CACHES = 512 << 20  # bytes, more than the caches hold


def milliseconds(pairs: fastema.Pairs, threads: int, pause: float, samples: int) -> float:
    """Return the median time of an update."""
    taken = []
    for _ in range(samples):
        time.sleep(pause)
        start = time.perf_counter()
        pairs.update(0.999, threads)
        taken.append(time.perf_counter() - start)
    return 1e3 * float(np.median(taken))


def cold(name: str, samples: int) -> harness.Result:
    """Measure one list: each contestant in turns, one call after caches were emptied and threads slept."""
    shapes = LISTS[name]
    averages, values = arrays(shapes, "f32", 1), arrays(shapes, "f32", 2)
    pairs = fastema.Pairs(averages, values)
    calls = {"fastema": lambda: pairs.update(0.999), **rivals.contestants(averages, values, 0.999)}
    other = np.zeros(CACHES // 4, np.float32)

    def settle(_: harness.Call) -> None:
        np.add(other, 1, out=other)
        time.sleep(PAUSE)

    moved = 3 * sum(a.nbytes for a in averages)
    once = harness.Stopwatch(settle, most=1)
    return harness.run(f"{name}, cold", moved, calls, {}, samples, stopwatch=once)


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
    lists = ["10 x 10"] if options.quick else ["1,000 x 1,000", "ResNet-50", "GPT-2"]
    results = [cold(name, options.samples) for name in lists]
    harness.report(results, "Cold update", options.json, options.picture)


if __name__ == "__main__":
    main()
