"""What does an update cost as training loops call it, against the memory's speed and every rival?

    python -m fastema.bench.bench_update [--quick] [--no-rivals] [--only PATTERN] [--json FILE] [--record]

A column for each moment: back to back; right after torch's operations, whose threads still spin; after a
pause; with cold caches; between allocations. Rivals are called in the same way, in turns. A full run takes
a quarter of an hour and 4 GB; --only measures the lists whose titles match, and adds them to
those that a record has.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import fastema

from . import cli, harness, rivals
from .ceiling import ceilings
from .lists import LISTS, block, elements, itemsize
from .moments import moments
from .report import report

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
    """Return what a list is called."""
    name, average, value, rounding = case
    types = average if average == value else f"{average} <- {value}"
    return f"{name}, {types}" + (", stochastic" if rounding == "stochastic" else "")


@dataclass(frozen=True)
class How:
    """How lists are measured."""

    moments: Mapping[str, harness.Stopwatch]
    samples: int
    rivals: tuple[str, ...] = ()
    huge_pages: bool = False


def measure(case: Case, how: How) -> list[harness.Result]:
    """Measure one list at each moment."""
    name, average, value, rounding = case
    shapes = LISTS[name]
    a = block(shapes, average, 1, huge_pages=how.huge_pages)
    v = block(shapes, value, 2, huge_pages=how.huge_pages)
    pairs = fastema.Pairs(a.arrays, v.arrays)
    calls = {
        "fastema": lambda: pairs.update(DECAY, rounding=rounding),
        **rivals.contestants(a.arrays, v.arrays, DECAY, how.rivals),
    }
    moved = elements(shapes) * (2 * itemsize(average) + itemsize(value))
    ceiling = ceilings("update", a.flat, v.flat)
    return harness.run_at(how.moments, title_of(case), moved, calls, ceiling=ceiling, samples=how.samples)


def cases(quick: bool, only: str) -> tuple[list[Case], list[Case]]:
    """Return the lists to measure against rivals and the ceiling, and those against the ceiling alone."""
    if quick:
        first, others = [("10 x 10", "f32", "f32", "nearest"), ("ResNet-50", "f32", "f32", "nearest")], []
    else:
        first, others = AGAINST_RIVALS, [case for case in AGAINST_CEILING if case not in AGAINST_RIVALS]
    return tuple([case for case in part if re.search(only, title_of(case))] for part in (first, others))


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = cli.parser(__doc__)
    parser.add_argument("--no-rivals", action="store_true", help="only the ceiling")
    parser.add_argument("--only", default="", metavar="PATTERN", help="only lists whose titles match")
    parser.add_argument("--huge-pages", action="store_true", help="ask for them, which torch does not")
    options = parser.parse_args(arguments)
    against_rivals, against_ceiling = cases(options.quick, options.only)
    if not against_rivals + against_ceiling:
        parser.error(f"no list's title matches {options.only!r}")
    names = () if options.no_rivals else rivals.FEW if options.quick else tuple(rivals.RIVALS)
    alone = How(moments(), options.samples, huge_pages=options.huge_pages)
    beside_rivals = replace(alone, rivals=names)
    results = [result for case in against_rivals for result in measure(case, beside_rivals)]
    results += [result for case in against_ceiling for result in measure(case, alone)]
    report(results, "update", "Update", options)


if __name__ == "__main__":
    main()
