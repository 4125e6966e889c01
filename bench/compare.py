"""Which calls of fastema got slower from one record to another?

    python -m fastema.bench.compare BEFORE.json AFTER.json

Times drift with a machine's other tenants. So what a call's time grew by is divided by what the others' on
the same list and at the same moment did, which were measured in turns with it: the median of the rivals
and the ceiling. What is left is noise up to a limit, which the quartiles tell. Exit status: 1 if a call got
slower, 2 if the records cannot be compared.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import record
from .harness import Result, Timing

LEAST = 0.05  # a change that is always noise
SPREADS = 2  # and so many times what lies between quartiles


@dataclass(frozen=True)
class Change:
    """What became of a call."""

    call: str
    ratio: float  # of the times, after and before, corrected by the others'
    noise: float  # by how much it may differ from 1

    @property
    def slower(self) -> bool:
        """Tell if it got slower, beyond noise."""
        return self.ratio > 1 + self.noise

    @property
    def faster(self) -> bool:
        """Tell if it got faster, beyond noise."""
        return self.ratio < 1 / (1 + self.noise)


def _others(result: Result) -> dict[str, Timing]:
    others = {name: timing for name, timing in result.timings.items() if name != "fastema"}
    return {**others, "ceiling": result.ceiling} if result.ceiling else others


def change(section: str, before: Result, after: Result) -> Change:
    """Compare a list's results at a moment."""
    old, new = _others(before), _others(after)
    drifts = [new[name].median / old[name].median for name in old.keys() & new.keys()]
    drift, apart = 1.0, 0.0
    if drifts:
        lower, drift, upper = np.quantile(drifts, (0.25, 0.5, 0.75))
        apart = (upper - lower) / (2 * drift * math.sqrt(len(drifts)))
    call = f"{section}: {': '.join(filter(None, (before.title, before.moment)))}"
    noise = max(LEAST, SPREADS * math.hypot(before.ours.spread, after.ours.spread, apart))
    return Change(call, float(after.ours.median / before.ours.median / drift), noise)


def changes(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[Change], list[str]]:
    """Compare two records; return what both have measured, and what only one of them has.

    Raises:
        ValueError: They are of different processors.
    """
    processors = [record.identity(content["processor"]) for content in (before, after)]
    if processors[0] != processors[1]:
        raise ValueError(f"the records are of different processors: {processors[0]} and {processors[1]}")
    old, new = (
        {
            (section, result.title, result.moment): result
            for section, kept in content["sections"].items()
            for result in record.results_of(kept)
        }
        for content in (before, after)
    )
    compared = [change(key[0], old[key], new[key]) for key in old if key in new]
    return compared, [
        ": ".join(filter(None, key)) for key in [*old, *new] if key not in old or key not in new
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print what changed; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="a record")
    parser.add_argument("after", type=Path, help="another one of the same processor")
    options = parser.parse_args(arguments)
    try:
        compared, alone = changes(record.read(options.before), record.read(options.after))
    except (OSError, ValueError) as reason:
        print(reason, file=sys.stderr)
        return 2
    for title, chosen in (
        ("slower", [c for c in compared if c.slower]),
        ("faster", [c for c in compared if c.faster]),
    ):
        for c in chosen:
            print(f"{title}: {c.call}: {c.ratio:.2f} of its time before, noise up to {1 + c.noise:.2f}")
    for call in alone:
        print(f"only in one record: {call}")
    slower = sum(c.slower for c in compared)
    print(f"{len(compared)} calls compared, {slower} slower, {sum(c.faster for c in compared)} faster")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
