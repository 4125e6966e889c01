"""What does an update cost, against the memory's speed and against every rival?

python -m fastema.bench.bench_update [--quick] [--no-rivals] [--json FILE] [--picture FILE]
"""

import numpy as np

import fastema

from . import harness, rivals
from .lists import DTYPES, LISTS, arrays, elements

DECAY = 0.999
# list, averages, values, rounding: rivals have a try at the first ones only
Case = tuple[str, str, str, str]
AGAINST_RIVALS: list[Case] = [
    *((name, "f32", "f32", "nearest") for name in LISTS),
    ("GPT-2", "f32", "bf16", "nearest"),
]
AGAINST_CEILING: list[Case] = [
    (name, *types)
    for name in ("one of 64M", "GPT-2")
    for types in (
        ("f64", "f64", "nearest"),
        ("f32", "bf16", "nearest"),
        ("f32", "f16", "nearest"),
        ("f64", "f32", "nearest"),
        ("f64", "bf16", "nearest"),
        ("f64", "f16", "nearest"),
        ("bf16", "bf16", "nearest"),
        ("bf16", "bf16", "stochastic"),
        ("f16", "f16", "nearest"),
        ("f16", "f16", "stochastic"),
        ("bf16", "f32", "nearest"),
        ("bf16", "f32", "stochastic"),
        ("f16", "f32", "nearest"),
        ("f16", "f32", "stochastic"),
    )
]


def title_of(case: Case) -> str:
    """Return what a column is called."""
    name, average, value, rounding = case
    types = average if average == value else f"{average} <- {value}"
    return f"{name}, {types}" + (", stochastic" if rounding == "stochastic" else "")


def measure(case: Case, with_rivals: bool, samples: int) -> harness.Result:
    """Measure one list."""
    name, average, value, rounding = case
    shapes = LISTS[name]
    averages, values = arrays(shapes, average, 1), arrays(shapes, value, 2)
    pairs = fastema.Pairs(averages, values)
    calls = {"fastema": lambda: pairs.update(DECAY, rounding=rounding)}
    if with_rivals:
        calls |= rivals.contestants(averages, values, DECAY)
    size = elements(shapes)
    a, v = np.ones(size, DTYPES[average]), np.ones(size, DTYPES[value])
    ceiling = harness.ceilings("update", a, v) if size > 1_000_000 else {}
    moved = size * (2 * a.itemsize + v.itemsize)
    return harness.run(title_of(case), moved, calls, ceiling, samples)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = harness.parser(__doc__)
    parser.add_argument("--no-rivals", action="store_true", help="only the ceiling")
    options = parser.parse_args(arguments)
    cases = [("10 x 10", "f32", "f32", "nearest"), ("ResNet-50", "f32", "f32", "nearest")]
    if not options.quick:
        cases = AGAINST_RIVALS
    results = [measure(case, not options.no_rivals, options.samples) for case in cases]
    harness.report(results, "Update", options.json, options.picture)
    if not options.quick:
        others = [measure(case, False, options.samples) for case in AGAINST_CEILING]
        for i in range(0, len(others), 4):
            print(f"{harness.table(others[i : i + 4])}\n")


if __name__ == "__main__":
    main()
