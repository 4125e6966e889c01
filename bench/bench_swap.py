"""What does a swap cost, against the memory's speed and against other ways to swap?

    python -m fastema.bench.bench_swap [--quick] [--json FILE] [--picture FILE]

Swapping by additions and subtractions is measured too; it loses bits.
"""

from collections.abc import Callable

import numpy as np

import fastema

from . import cli, harness
from .ceiling import ceilings
from .lists import LISTS, block, elements
from .report import report
from .rivals import Arrays, tensors


def numpy_temporary(a: Arrays, b: Arrays) -> Callable[[], object]:
    """Swap through a new array."""

    def call() -> None:
        for x, y in zip(a, b, strict=True):
            t = x.copy()
            x[...] = y
            y[...] = t

    return call


def numpy_preallocated(a: Arrays, b: Arrays) -> Callable[[], object]:
    """Swap through an array that is kept."""
    buffers = [np.empty_like(x) for x in a]

    def call() -> None:
        for x, y, t in zip(a, b, buffers, strict=True):
            np.copyto(t, x)
            np.copyto(x, y)
            np.copyto(y, t)

    return call


def numpy_arithmetic(a: Arrays, b: Arrays) -> Callable[[], object]:
    """Swap by a+b, a-b, a-b, as TensorFlow Model Garden and Keras do; not exact."""

    def call() -> None:
        for x, y in zip(a, b, strict=True):
            np.add(x, y, out=x)
            np.subtract(x, y, out=y)
            np.subtract(x, y, out=x)

    return call


def torch_temporary(a: Arrays, b: Arrays) -> Callable[[], object]:
    """Swap through a clone."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))

    def call() -> None:
        for x, y in pairs:
            t = x.clone()
            x.copy_(y)
            y.copy_(t)

    return call


RIVALS = {
    "NumPy, a temporary": numpy_temporary,
    "NumPy, preallocated": numpy_preallocated,
    "NumPy a+b, a-b (not exact)": numpy_arithmetic,
    "torch, a temporary": torch_temporary,
}


def measure(name: str, samples: int) -> harness.Result:
    """Measure one list of float32 arrays."""
    shapes = LISTS[name]
    blocks = [block(shapes, "f32", seed) for seed in (1, 2)]
    a, b = (one.arrays for one in blocks)
    pairs = fastema.Pairs(a, b)
    calls: dict[str, Callable[[], object]] = {"fastema": pairs.swap}
    for rival, make in RIVALS.items():
        try:
            calls[rival] = make(a, b)
        except ImportError:
            continue
    size = elements(shapes)
    ceiling = ceilings("swap", *(one.flat for one in blocks))
    return harness.run(f"{name}, f32", 16 * size, calls, ceiling, samples)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = cli.parser(__doc__)
    options = parser.parse_args(arguments)
    names = ["10 x 10", "ResNet-50"] if options.quick else list(LISTS)
    results = [measure(name, options.samples) for name in names]
    report(results, "swap", "Swap", options)


if __name__ == "__main__":
    main()
