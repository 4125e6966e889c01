"""Results as tables, pictures and records."""

import argparse
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from . import record
from .harness import THREADS, Result

LEGEND = "time / fastema's time, time ± half of what lies between the quartiles"


def seconds(value: float) -> str:
    """Write a time with a unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


@dataclass(frozen=True)
class Table:
    """Cells with names above and beside them."""

    head: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]

    def text(self) -> str:
        """Return it for a terminal."""
        lines = [(self.head, self.columns), *self.rows]
        first = max(len(name) for name, _ in lines)
        widths = [max(map(len, column)) + 3 for column in zip(*(cells for _, cells in lines), strict=True)]
        text = [
            name.ljust(first) + "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            for name, cells in lines
        ]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:]])

    def markdown(self) -> str:
        """Return it for a page."""
        lines = [(self.head, self.columns), ("---", ["---"] * len(self.columns)), *self.rows]
        text = "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in lines)
        return text.replace("_", r"\_")  # or it would be emphasis


def _time(result: Result, name: str) -> str:
    timing = result.timings[name]
    return f"{seconds(timing.median)} ±{100 * timing.spread:.0f}%"


def _whole(head: str, columns: list[str], results: list[Result]) -> Table:
    """Make a table with a row for each contestant, and a column for each result."""

    def cell(result: Result, name: str) -> str:
        return f"{result.ratio(name):.3g}  {_time(result, name)}" if name in result.timings else ""

    names = dict.fromkeys(name for result in results for name in result.timings if name != "fastema")
    rows = [(name, [cell(result, name) for result in results]) for name in names]
    rows.append(("fastema", [_time(result, "fastema") for result in results]))
    rows.append(("GB/s", [f"{r.bytes_moved / r.ours.median / 1e9:.3g}" for r in results]))
    if any(result.ceiling for result in results):
        rows.append(("of the ceiling", [f"{r.of_ceiling:.2f}" if r.of_ceiling else "" for r in results]))
    return Table(head, columns, rows)


def _brief(lists: list[list[Result]]) -> Table:
    """Make a table with a row for each list, and a column for each moment."""

    def cell(result: Result) -> str:
        others = [f"{result.ratio(name):.3g}" for name in result.timings if name != "fastema"]
        return "  ".join([*others, _time(result, "fastema"), *_share(result)])

    def _share(result: Result) -> list[str]:
        return [f"{result.of_ceiling:.2f}"] if result.of_ceiling else []

    other = next((name for name in lists[0][0].timings if name != "fastema"), None)
    head = ", ".join(
        [
            *([f"{other} / fastema"] if other else []),
            "fastema",
            *(["of the ceiling"] if lists[0][0].ceiling else []),
        ]
    )
    rows = [(results[0].title, [cell(result) for result in results]) for results in lists]
    return Table(head, [result.moment for result in lists[0]], rows)


def tables(results: list[Result]) -> list[Table]:
    """Arrange results: by moments a table for each list that has rivals, and one for all others."""
    if not any(result.moment for result in results):
        parts = [results[i : i + 4] for i in range(0, len(results), 4)]
        return [_whole("", [result.title for result in part], part) for part in parts]
    lists = _by_list(results)
    long = [part for part in lists if len(part[0].timings) > 2]
    short = [part for part in lists if len(part[0].timings) <= 2]
    made = [_whole(part[0].title, [result.moment for result in part], part) for part in long]
    return [*made, _brief(short)] if short else made


def _by_list(results: list[Result]) -> list[list[Result]]:
    return [list(part) for _, part in groupby(results, key=lambda result: result.title)]


def chart(results: list[Result], title: str, path: Path) -> None:
    """Draw the ratios as bars: a row for each list, a column for each moment."""
    from matplotlib.figure import Figure

    lists = _by_list(results)
    across = max(map(len, lists))
    figure = Figure(figsize=(6 + 4 * across, 1.2 + 2.2 * len(lists)), layout="constrained")
    grid = figure.subplots(len(lists), across, squeeze=False)
    for axes, result in zip(grid.flat, (result for part in lists for result in part), strict=True):
        names = sorted(result.timings, key=lambda name: result.timings[name].median)
        ratios = [result.ratio(name) for name in names]
        colours = ["tab:blue" if name == "fastema" else "tab:gray" for name in names]
        bars = axes.barh(names, ratios, color=colours)
        axes.bar_label(bars, [f" {ratio:.3g}" for ratio in ratios], fontsize=7)
        axes.set_xscale("log")
        axes.set_xlim(0.5, 3 * max(ratios))  # with room for the numbers
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)
        axes.set_title(": ".join(filter(None, (result.title, result.moment))), fontsize=9, loc="left")
        if result.of_ceiling:
            axes.axvline(result.of_ceiling, color="tab:red", lw=1, ls="--")
    figure.suptitle(f"{title} (dashed: this machine's ceiling)", fontsize=10)
    figure.supxlabel("time / fastema's time", fontsize=9)
    figure.savefig(path, dpi=130)


def across_moments(results: list[Result], title: str, path: Path) -> None:
    """Draw a panel for each list that has rivals: each one's ratios from the best to the worst moment."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    lists = [part for part in _by_list(results) if len(part[0].timings) > 2]
    down = -(-len(lists) // 2)
    figure = Figure(figsize=(10, 0.6 + 2.7 * down), layout="constrained")
    panels = list(figure.subplots(down, 2, squeeze=False).flat)
    for axes, part in zip(panels, lists, strict=False):
        names = [name for name in part[0].timings if name != "fastema"]
        for at, name in enumerate(names):
            ratios = [result.ratio(name) for result in part]
            axes.plot([min(ratios), max(ratios)], [at, at], color="tab:gray", lw=3, solid_capstyle="round")
            for result, marker in zip(part, "o^sDv", strict=False):
                axes.plot(result.ratio(name), at, marker, color="black", ms=4, label=result.moment)
        axes.axvline(1, color="tab:blue", lw=2)
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(part[0].title, fontsize=10, loc="left")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(axis="x", alpha=0.3)
    for axes in panels[len(lists) :]:
        axes.remove()
    handles, labels = panels[0].get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend), fontsize=8)
    figure.suptitle(f"Update on {title} (blue: fastema)", fontsize=11)
    figure.supxlabel("time / fastema's time", fontsize=9)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastema"}):
        figure.savefig(path, metadata={"Date": None})


def report(results: list[Result], section: str, title: str, options: argparse.Namespace) -> None:
    """Print the tables; write the record and the chart where asked.

    Args:
        results: All of a script.
        section: What a record calls them.
        title: What they are of.
        options: Of `cli.parser`.
    """
    print(f"\n{title}, {THREADS} threads each: {LEGEND}\n")
    print("\n\n".join(table.text() for table in tables(results)), end="\n\n")
    for file in options.records:
        record.add(file, section, results)
        print(f"Record: {file}")
    if options.picture:
        chart(results, title, options.picture)
        print(f"Chart: {options.picture}")
