"""How things are measured here: interleaved, in one process, medians with quartiles.

Absolute times drift with the machine's other tenants; ratios of times that were taken in turns do not.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import fastema

THREADS = fastema.build_config()["threads"]
SAMPLE = 2e-3  # seconds that one sample takes at least: tiny calls are repeated within it
WARM_UP = 1e-2  # seconds before a sample


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    lower: float  # quartiles
    upper: float


Call = Callable[[], object]
Calls = Mapping[str, Call]


def warm_up(call: Call) -> None:
    """Call until its own threads are awake, and those of the contestant before it no longer spin."""
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP:
        call()


@dataclass(frozen=True)
class Stopwatch:
    """The host's clock, and how a sample is taken with it.

    Attributes:
        settle: Called with a contestant before each of its samples.
        sample: How many seconds one takes: tiny calls are repeated within it.
        most: How many calls it is at most.
        refusals: Errors by which a contestant says that it cannot run here.
    """

    settle: Callable[[Call], object] = warm_up
    sample: float = SAMPLE
    most: int = 10_000_000
    refusals: tuple[type[Exception], ...] = ()

    def seconds(self, call: Call, repeat: int) -> float:
        """Return the time of one call, of so many in a row."""
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - start) / repeat


WARM = Stopwatch()


def measure(contestants: Calls, samples: int, stopwatch: Stopwatch = WARM) -> dict[str, Timing]:
    """Time each contestant in turns: one sample of each, then again."""
    repeats = {}
    for name, call in contestants.items():
        try:
            stopwatch.seconds(call, 1)  # first calls allocate, trace and compile
            once = stopwatch.seconds(call, 1)
        except stopwatch.refusals as reason:
            print(f"    {name} cannot run: {reason}", file=sys.stderr)
            continue
        repeats[name] = max(1, min(stopwatch.most, round(stopwatch.sample / max(once, 1e-9))))
    taken: dict[str, list[float]] = {name: [] for name in repeats}
    for _ in range(samples):
        for name, repeat in repeats.items():
            stopwatch.settle(contestants[name])
            taken[name].append(stopwatch.seconds(contestants[name], repeat))
    return {
        name: Timing(*(float(q) for q in np.quantile(times, (0.5, 0.25, 0.75))))
        for name, times in taken.items()
    }


@cache
def _ceiling_library() -> ctypes.CDLL | None:
    """Compile ceiling.cpp for this machine; None where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    folder = tempfile.mkdtemp(prefix="fastema-ceiling-")
    target = Path(folder) / "ceiling.so"
    source = Path(__file__).with_name("ceiling.cpp")
    flags = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    done = subprocess.run(
        [compiler, *flags, source, "-o", target], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        print(f"no ceiling: {compiler} cannot compile it\n{done.stderr}", file=sys.stderr)
        return None
    library = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return library


def ceilings(kind: str, a: np.ndarray, b: np.ndarray) -> dict[str, Call]:
    """Return the candidates for this machine's ceiling on two flat arrays; the fastest one is it.

    Args:
        kind: ``"update"`` (read both, write `a`) or ``"swap"`` (read and write both).
        a: Averages.
        b: Values.
    """
    library = _ceiling_library()
    if library is None:
        return {}
    pointers = ctypes.c_void_p(a.ctypes.data), ctypes.c_void_p(b.ctypes.data)
    size = (
        [ctypes.c_size_t(a.size), a.itemsize, b.itemsize] if kind == "update" else [ctypes.c_size_t(a.nbytes)]
    )
    function = getattr(library, f"ceiling_{kind}")

    def candidate(chunk: int, distance: int) -> Call:
        return lambda: function(*pointers, *size, ctypes.c_size_t(chunk), ctypes.c_size_t(distance))

    return {
        f"ceiling, {chunk >> 10}k chunks, {distance} ahead": candidate(chunk, distance)
        for chunk in (1 << 16, 1 << 18)
        for distance in (0, 2048)
    }


def split_ceiling(timings: dict[str, Timing]) -> tuple[dict[str, Timing], Timing | None]:
    """Take the ceiling's candidates out of the timings; return the rest and the best of them."""
    candidates = [t for name, t in timings.items() if name.startswith("ceiling")]
    rest = {name: t for name, t in timings.items() if not name.startswith("ceiling")}
    return rest, min(candidates, key=lambda t: t.median, default=None)


@dataclass(frozen=True)
class Result:
    """One list of arrays: what its update costs, whoever does it."""

    title: str
    bytes_moved: int  # by an update or swap in place, read and written
    timings: dict[str, Timing]
    ceiling: Timing | None

    @property
    def ours(self) -> Timing:
        """Return fastema's time."""
        return self.timings["fastema"]

    def ratio(self, name: str) -> float:
        """Return a rival's time over fastema's."""
        return self.timings[name].median / self.ours.median

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            **asdict(self),
            "gigabytes_per_second": self.bytes_moved / self.ours.median / 1e9,
            "of_ceiling": self.ceiling and self.ceiling.median / self.ours.median,
            "ratios": {name: self.ratio(name) for name in self.timings},
        }


def run(
    title: str,
    bytes_moved: int,
    contestants: Calls,
    ceiling: Calls,
    samples: int,
    *,
    stopwatch: Stopwatch = WARM,
) -> Result:
    """Measure one list, and say so."""
    print(f"  {title} ...", file=sys.stderr, flush=True)
    timings, best = split_ceiling(measure({**contestants, **ceiling}, samples, stopwatch))
    return Result(title, bytes_moved, timings, best)


def table(results: list[Result]) -> str:
    """Return rivals' times over fastema's, a column for each list."""
    names = list(dict.fromkeys(name for result in results for name in result.timings))
    width = max(len(name) for name in [*names, "fastema, of the ceiling"]) + 2
    columns = [max(len(result.title), 8) + 2 for result in results]

    def row(name: str, cells: list[str]) -> str:
        padded = (cell.rjust(column) for cell, column in zip(cells, columns, strict=True))
        return name.ljust(width) + "".join(padded)

    def ratio(result: Result, name: str) -> str:
        return f"{result.ratio(name):.3g}" if name in result.timings else ""

    lines = [row("time / fastema's time", [result.title for result in results])]
    lines.append("-" * len(lines[0]))
    lines += [row(name, [ratio(r, name) for r in results]) for name in names if name != "fastema"]
    lines.append("-" * len(lines[0]))
    lines.append(row("fastema, us", [f"{r.ours.median * 1e6:.3g}" for r in results]))
    lines.append(row("fastema, GB/s", [f"{r.bytes_moved / r.ours.median / 1e9:.3g}" for r in results]))
    of_ceiling = [f"{r.ceiling.median / r.ours.median:.2f}" if r.ceiling else "" for r in results]
    lines.append(row("fastema, of the ceiling", of_ceiling))
    return "\n".join(lines)


def chart(results: list[Result], title: str, path: Path) -> None:
    """Draw the same ratios as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 2.2 * len(results)), layout="constrained")
    for axes, result in zip(np.atleast_1d(figure.subplots(len(results), 1)), results, strict=True):
        names = sorted(result.timings, key=lambda name: result.timings[name].median)
        ratios = [result.ratio(name) for name in names]
        colours = ["tab:blue" if name == "fastema" else "tab:gray" for name in names]
        bars = axes.barh(names, ratios, color=colours)
        axes.bar_label(bars, [f" {ratio:.3g}" for ratio in ratios], fontsize=7)
        axes.set_xscale("log")
        axes.set_xlim(left=0.5)
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)
        axes.set_title(result.title, fontsize=9, loc="left")
        if result.ceiling:
            axes.axvline(result.ceiling.median / result.ours.median, color="tab:red", lw=1, ls="--")
    figure.suptitle(f"{title}: time / fastema's time (dashed: this machine's ceiling)", fontsize=10)
    figure.savefig(path, dpi=130)


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that the benchmarks share."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--quick", action="store_true", help="small lists only, for a look or a test")
    arguments.add_argument("--samples", type=int, default=9, help="of each contestant, in turns")
    arguments.add_argument("--json", type=Path, help="where to write all numbers")
    arguments.add_argument("--picture", type=Path, help="where to draw them")
    return arguments


def report(results: list[Result], title: str, json_path: Path | None, picture: Path | None) -> None:
    """Print the table; write JSON and the chart where asked."""
    print(f"\n{title}, {THREADS} threads each\n\n{table(results)}\n")
    if json_path:
        content = {"build": fastema.build_config(), "results": [result.as_dict() for result in results]}
        json_path.write_text(json.dumps(content, indent=1))
        print(f"JSON: {json_path}")
    if picture:
        chart(results, title, picture)
        print(f"Chart: {picture}")
