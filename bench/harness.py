"""How things are measured here: interleaved, in one process, medians with quartiles.

Absolute times drift with the machine's other tenants; ratios of times that were taken in turns do not.
"""

import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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

    @classmethod
    def of(cls, times: list[float]) -> "Timing":
        """Return what samples have in the middle."""
        return cls(*(float(q) for q in np.quantile(times, (0.5, 0.25, 0.75))))

    @property
    def spread(self) -> float:
        """Return half of what lies between the quartiles, as a share of the median."""
        return (self.upper - self.lower) / (2 * self.median)


Timings = dict[str, Timing]
Call = Callable[[], object]
Calls = Mapping[str, Call]


def warm_up(call: Call) -> None:
    """Call until its own threads are awake, and those of the contestant before it no longer spin."""
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP:
        call()


def _nothing() -> None:
    """Be called."""


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
        self.elapsed(_nothing, 1)  # so that what is ours in the time is not cold
        return self.elapsed(call, repeat) / repeat

    def elapsed(self, call: Call, repeat: int) -> float:
        """Return the time of all calls."""
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        return time.perf_counter() - start


WARM = Stopwatch()


@dataclass(frozen=True)
class Group:
    """Contestants that are called at the same moment."""

    stopwatch: Stopwatch
    contestants: Calls

    def repeats(self) -> dict[str, int]:
        """Return how often each that can run here is called in a sample."""
        found = {}
        for name, call in self.contestants.items():
            try:
                once = self.stopwatch.seconds(call, 1)  # the first call allocates, traces and compiles
                if self.stopwatch.most > 1:
                    once = self.stopwatch.seconds(call, 1)
            except self.stopwatch.refusals as reason:
                print(f"    {name} cannot run: {reason}", file=sys.stderr)
                continue
            found[name] = max(1, min(self.stopwatch.most, round(self.stopwatch.sample / max(once, 1e-9))))
        return found


def measure_groups(groups: Mapping[str, Group], samples: int) -> dict[str, Timings]:
    """Time each contestant of each group in turns: one sample of each, then again."""
    repeats = {title: group.repeats() for title, group in groups.items()}
    taken: dict[str, dict[str, list[float]]] = {
        title: {name: [] for name in names} for title, names in repeats.items()
    }
    order = random.Random(0)
    for sample in range(samples):
        _progress(f"    sample {sample + 1} of {samples}")
        for title, group in groups.items():
            names = list(repeats[title])
            order.shuffle(names)  # nobody always has the same one before it
            for name in names:
                call = group.contestants[name]
                group.stopwatch.settle(call)
                taken[title][name].append(group.stopwatch.seconds(call, repeats[title][name]))
    _progress("")
    return {title: {n: Timing.of(times) for n, times in named.items()} for title, named in taken.items()}


def measure(contestants: Calls, samples: int, stopwatch: Stopwatch = WARM) -> Timings:
    """Time each contestant in turns."""
    return measure_groups({"": Group(stopwatch, contestants)}, samples)[""]


def _progress(text: str) -> None:
    """Show how far a measurement is, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r{text:<40}\r", end="", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Result:
    """One list of arrays at one moment: what its update costs, whoever does it."""

    title: str
    bytes_moved: int  # by an update or swap in place, read and written
    timings: Timings
    ceiling: Timing | None  # back to back, whatever the moment
    moment: str = ""

    @property
    def ours(self) -> Timing:
        """Return fastema's time."""
        return self.timings["fastema"]

    def ratio(self, name: str) -> float:
        """Return a rival's time over fastema's."""
        return self.timings[name].median / self.ours.median

    @property
    def of_ceiling(self) -> float | None:
        """Return the share of the ceiling's speed that fastema has."""
        return self.ceiling and self.ceiling.median / self.ours.median


def run_at(
    moments: Mapping[str, Stopwatch],
    title: str,
    bytes_moved: int,
    contestants: Calls,
    *,
    ceiling: Calls,
    samples: int,
) -> list[Result]:
    """Measure one list at several moments, and say so; the ceiling in turns with calls back to back."""
    print(f"  {title} ...", file=sys.stderr, flush=True)
    groups = {
        moment: Group(stopwatch, {**contestants, **ceiling} if stopwatch is WARM else contestants)
        for moment, stopwatch in moments.items()
    }
    timings = measure_groups(groups, samples)
    loops = [named.pop(name) for named in timings.values() for name in ceiling if name in named]
    best = min(loops, key=lambda timing: timing.median, default=None)
    return [Result(title, bytes_moved, named, best, moment) for moment, named in timings.items()]


def run(title: str, bytes_moved: int, contestants: Calls, ceiling: Calls, samples: int) -> Result:
    """Measure one list, called back to back, and say so."""
    return run_at({"": WARM}, title, bytes_moved, contestants, ceiling=ceiling, samples=samples)[0]
