"""How exact is an average after many steps, by the type that it is kept in?

    python -m fastema.bench.bench_accuracy [--quick]

Two experiments, both against float64: a value held at 1 with an average that starts at 0.5, and weights that
walk at random with a trend. Errors are relative to the average, and to how far the weights are from it.
"""

import ml_dtypes
import numpy as np

import fastema

from . import cli

SIZE = 256


class Kept:
    """An average as it is kept: of float32 values, seen as 16-bit ones where it has 16 bits itself."""

    def __init__(self, kind: tuple[str, str | None, str], start: float, values: np.ndarray) -> None:
        name, carry, self.rounding = kind
        dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
        self.values = values
        self.seen = values if dtype == values.dtype else np.zeros(SIZE, dtype)
        self.average = np.full(SIZE, start, dtype)
        self.carry = None if carry is None else np.zeros(SIZE, carry)
        self.pairs = fastema.Pairs(self.average, self.seen, carries=self.carry)

    def update(self, decay: float, step: int) -> None:
        """Average once."""
        if self.seen is not self.values:
            np.copyto(self.seen, self.values, casting="unsafe")
        self.pairs.update(decay, 1, rounding=self.rounding, step=step)

    def exactly(self) -> np.ndarray:
        """Return the average with its carry, in float64."""
        if self.carry is None:
            return self.average.astype(np.float64)
        if self.carry.dtype == np.float32:
            return self.average.astype(np.float64) + self.carry
        bits = (self.average.view(np.uint16).astype(np.uint32) << 16) + self.carry.astype(np.uint32)
        return bits.view(np.float32).astype(np.float64)


KINDS = {
    "float32": ("float32", None, "nearest"),
    "bfloat16, nearest": ("bfloat16", None, "nearest"),
    "float16, nearest": ("float16", None, "nearest"),
    "bfloat16, stochastic": ("bfloat16", None, "stochastic"),
    "float16, stochastic": ("float16", None, "stochastic"),
    "bfloat16 + int16 carry": ("bfloat16", "int16", "nearest"),
    "float32 + float32 carry": ("float32", "float32", "nearest"),
}


def held(decay: float, steps: int) -> dict[str, float]:
    """Return the relative error of each kind after a value was held at 1."""
    values = np.ones(SIZE, np.float32)
    kinds = {name: Kept(kind, 0.5, values) for name, kind in KINDS.items()}
    for kept in kinds.values():
        for step in range(steps):
            kept.update(decay, step)
    exact = 1 - 0.5 * decay**steps
    return {name: abs(kept.exactly().mean() / exact - 1) for name, kept in kinds.items()}


def walk(decay: float, steps: int) -> dict[str, float]:
    """Return the error of each kind, relative to (weight - average), for weights that walk."""
    rng = np.random.default_rng(1)
    values = (0.02 * rng.standard_normal(SIZE)).astype(np.float32)
    trend = (1e-6 * rng.standard_normal(SIZE)).astype(np.float32)
    exact = values.astype(np.float64)
    kinds = {name: Kept(kind, 0.0, values) for name, kind in KINDS.items()}
    for kept in kinds.values():
        kept.update(0.0, 0)
    for step in range(1, steps + 1):
        values += trend + np.float32(1e-5) * rng.standard_normal(SIZE, np.float32)
        exact += (1 - decay) * (values - exact)
        for kept in kinds.values():
            kept.update(decay, step)
    distance = np.sqrt(np.mean((values - exact) ** 2))
    return {
        name: float(np.sqrt(np.mean((kept.exactly() - exact) ** 2)) / distance)
        for name, kept in kinds.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the experiments."""
    options = cli.parser(__doc__, times=False).parse_args(arguments)
    steps = 2_000 if options.quick else 1_000_000
    columns = {
        f"held at 1, decay .999, {steps // 100:,} steps": held(0.999, steps // 100),
        f"held at 1, decay .99999, {steps:,} steps": held(0.99999, steps),
        f"random walk, decay .9999, {steps // 10:,} steps": walk(0.9999, steps // 10),
    }
    print("\nRelative error of the average\n")
    print("".ljust(26) + "".join(title.rjust(48) for title in columns))
    for name in KINDS:
        print(name.ljust(26) + "".join(f"{column[name]:48.1e}" for column in columns.values()))


if __name__ == "__main__":
    main()
