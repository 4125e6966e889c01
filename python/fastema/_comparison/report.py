"""The comparison as a command: all trainings of all seeds, a table and a picture."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import tasks
from .network import Weights
from .protocol import RAW, SEARCHED, Judged, Score, chosen, judge

CHOSEN = "chosen"  # instead of a setting: the one that validation chose for each seed

_WIDTH = 38  # of what the table has of a task

# what papers compare: the chosen setting of a method with another's, or with the one that it goes on in
_PAIRS: tuple[tuple[str, str, str], ...] = (
    ("EMA", "decay phase", CHOSEN),
    ("SWA", "decay phase", CHOSEN),
    ("WSM", "decay phase", CHOSEN),
    ("PMA", "decay phase", CHOSEN),
    ("LAWA", "decay phase", CHOSEN),
    ("decay phase, LAWA", "decay phase", "last 20%"),
    ("decay phase, EMA", "decay phase", "last 20%"),
    ("BEMA", "EMA", CHOSEN),
    ("BEMA", "BEMA's EMA", CHOSEN),
    ("power EMA, post hoc", "EMA", CHOSEN),
)


class Row(NamedTuple):
    """What a setting came to with each seed.

    Attributes:
        method: Whose setting it is.
        setting: How it is called, or `CHOSEN`.
        test: By the data that chose nothing.
        less_raw: How much more that is than of the same training's raw weights.
    """

    method: str
    setting: str
    test: np.ndarray
    less_raw: np.ndarray

    def told(self, decimals: int) -> str:
        """Return it as a part of a line of the table."""
        beside = "" if (self.method, self.setting) == RAW else _told(self.less_raw, decimals)
        return f"{self.test.mean():<10.{decimals}f}{beside}".ljust(_WIDTH)


class Outcome(NamedTuple):
    """What came of one task, by all seeds."""

    name: str
    measure: tasks.Measure
    runs: list[Judged]

    def rows(self) -> list[Row]:
        """Return a row for each setting, and one for what was chosen of several."""
        rows = []
        for method in self._best()[0]:
            all_settings = [score.setting for score in self.runs[0].scores if score.method == method]
            settings = [] if method in SEARCHED else all_settings
            for setting in settings:
                rows.append(self._row(method, setting, self._test(method, setting)))
            if len(settings) != 1:
                rows.append(self._row(method, CHOSEN, self._chosen(method)))
        return rows

    def choices(self) -> dict[str, Counter[str]]:
        """Return for each method that has several settings how often each was chosen."""
        best = self._best()
        several = [row.method for row in self.rows() if row.setting == CHOSEN]
        return {method: Counter(each[method].setting for each in best) for method in several}

    def pair(self, method: str, other: str, setting: str) -> np.ndarray:
        """Return for each seed how much more the chosen setting of a method is than one of another."""
        others = self._chosen(other) if setting == CHOSEN else self._test(other, setting)
        less: np.ndarray = self._chosen(method) - others
        return less

    def reached(self, method: str) -> list[float | None]:
        """Return after which share of each training a method was as good as the raw weights at its end."""
        shares = []
        for run, best in zip(self.runs, self._best(), strict=True):
            course = run.courses[method, best[method].setting]
            there = np.flatnonzero(np.array(course) <= run.courses[RAW][-1])
            shares.append((there[0] + 1) / len(course) if len(there) else None)
        return shares

    def _best(self) -> list[dict[str, Score]]:
        return [chosen(run.scores) for run in self.runs]

    def _chosen(self, method: str) -> np.ndarray:
        return np.array([best[method].test for best in self._best()])

    def _test(self, method: str, setting: str) -> np.ndarray:
        return np.array(
            [s.test for run in self.runs for s in run.scores if (s.method, s.setting) == (method, setting)]
        )

    def _row(self, method: str, setting: str, test: np.ndarray) -> Row:
        return Row(method, setting, test, test - self._test(*RAW))


def _told(differences: np.ndarray, decimals: int) -> str:
    """Return the mean and the spread of differences, and how many of them are below zero."""
    spread = f"{differences.mean():+.{decimals}f} +- {differences.std(ddof=1):.{decimals}f}"
    return f"{spread:<20}{(differences < 0).sum()} of {len(differences)}"


def compare(seeds: int, quick: bool = False) -> list[Outcome]:
    """Run all trainings, and tell how far that is.

    Args:
        seeds: How many; each draws the split of the data, the first weights and the batches.
        quick: For tests: a hundred steps each.
    """
    outcomes: dict[str, Outcome] = {}

    def run(task: tasks.Task) -> Weights:
        begun = time.perf_counter()
        judged = judge(task)
        outcomes.setdefault(task.name, Outcome(task.name, task.measure, [])).runs.append(judged)
        print(
            f"seed {task.seed + 1} of {seeds}, {task.name}: {time.perf_counter() - begun:.0f} s", flush=True
        )
        return judged.decayed

    for seed in range(seeds):
        run(tasks.digits(seed, quick=quick))
        run(tasks.finetuning(seed, run(tasks.text(seed, quick=quick)), quick=quick))
    return list(outcomes.values())


def table(outcomes: Sequence[Outcome]) -> str:
    """Return all settings as a table: what they come to, and how much less that is than of raw weights."""
    lines = [
        f"{'':<43}" + "".join(f"{f'{each.name}: {each.measure.unit}':<{_WIDTH}}" for each in outcomes),
        f"{'method':<20}{'setting':<23}" + f"{'test':<10}{'less raw, +- s.d.':<20}better  " * len(outcomes),
    ]
    for rows in zip(*(outcome.rows() for outcome in outcomes), strict=True):
        parts = [row.told(outcome.measure.decimals) for row, outcome in zip(rows, outcomes, strict=True)]
        lines.append(f"{rows[0].method:<20}{rows[0].setting:<23}{''.join(parts)}")
    return "\n".join(line.rstrip() for line in lines)


def claims(outcomes: Sequence[Outcome]) -> str:
    """Return how methods compare that papers have compared, and how early they reach raw weights."""
    lines = [
        f"{'':<43}" + "".join(f"{each.name:<{_WIDTH - 10}}" for each in outcomes),
        f"{'chosen setting of':<20}{'less that of':<23}" + f"{'+- s.d.':<20}better  " * len(outcomes),
    ]
    for method, other, setting in _PAIRS:
        parts = [_told(each.pair(method, other, setting), each.measure.decimals) for each in outcomes]
        than = other if setting == CHOSEN else f"{other}, {setting}"
        lines.append(f"{method:<20}{than:<23}" + "".join(f"{part:<{_WIDTH - 10}}" for part in parts))
    lines += ["", "share of the training after which a method is as good as raw weights at its end:"]
    for method in (RAW[0], "EMA", "LAWA", "BEMA"):
        for each in outcomes:
            shares = each.reached(method)
            told = ", ".join("never" if share is None else f"{share:.0%}" for share in shares)
            lines.append(f"{method:<20}{each.name:<23}{told}")
    return "\n".join(line.rstrip() for line in lines)


def told_choices(outcomes: Sequence[Outcome]) -> str:
    """Return which settings validation chose, and how often."""
    lines = []
    for outcome in outcomes:
        lines.append(f"chosen for {outcome.name}:")
        for method, counts in outcome.choices().items():
            told = ", ".join(f"{setting} ({count})" for setting, count in counts.most_common())
            lines.append(f"  {method}: {told}")
    return "\n".join(lines)


def picture(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw how much better or worse than raw weights each method is, with its chosen and all its settings."""
    figure = Figure(figsize=(4.2 * len(outcomes), 5.4), layout="constrained")
    panels = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
    for axes, outcome in zip(panels, outcomes, strict=True):
        _draw(axes, outcome)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(
        f"Test data, less raw weights at a constant rate: lower is better ({len(outcomes[0].runs)} seeds)"
    )
    figure.savefig(path, dpi=110)


def _draw(axes: Any, outcome: Outcome) -> None:
    rows = [row for row in outcome.rows() if (row.method, row.setting) != RAW]
    methods = list(dict.fromkeys(row.method for row in rows))
    best = {row.method: row for row in rows}  # what was chosen is the last of a method
    place = {method: i for i, method in enumerate(methods)}
    mean = np.array([best[method].less_raw.mean() for method in methods])
    spread = np.array([best[method].less_raw.std(ddof=1) for method in methods])
    ends = min((mean - spread).min(), 0.0), max((mean + spread).max(), 0.0)
    low, high = ends[0] - 0.15 * (ends[1] - ends[0]), ends[1] + 0.15 * (ends[1] - ends[0])
    fixed = [(row.less_raw.mean(), place[row.method] + 0.25) for row in rows if row.setting != CHOSEN]
    for inside, marker, label in ((True, "o", "each setting"), (False, "x", "one beyond the axis")):
        drawn = [(np.clip(x, low, high), y) for x, y in fixed if (low <= x <= high) == inside]
        axes.plot(*np.array(drawn).reshape(-1, 2).T, marker, ms=3.5, color="0.6", label=label, clip_on=False)
    axes.errorbar(
        mean, range(len(methods)), xerr=spread, fmt="o", color="tab:blue", capsize=3, label="chosen"
    )
    axes.axvline(0.0, color="tab:orange", lw=1, label="raw weights")
    axes.set(title=outcome.name, xlabel=f"difference in {outcome.measure.unit},\nmean and standard deviation")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_yticks(range(len(methods)), labels=methods)
    axes.grid(alpha=0.3)


def main(seeds: int, path: Path, quick: bool = False) -> None:
    """Train, print the table and write the picture."""
    print(
        "Three trainings with each seed, each watched by all averages. Validation data choose settings;\n"
        "the table has test data, which choose nothing. Less is better: below 0, 'less raw' is better\n"
        "than the raw weights of the same training.\n"
    )
    outcomes = compare(seeds, quick)
    picture(outcomes, path)
    for part in (table(outcomes), claims(outcomes), told_choices(outcomes), f"All differences: {path}"):
        print(f"\n{part}")
