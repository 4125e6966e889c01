"""How much of a long work is done, and when the rest will be."""

import time
from collections.abc import Callable
from typing import TextIO


class Progress:
    """Shows how much is done: a bar with the time left on a terminal, elsewhere a line for every tenth.

    Args:
        stream: Where it is shown.
        clock: Tells the time in seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._start = clock()
        self._percent = -1
        self._width = 0

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done, if that is a percent more, or all."""
        percent = 100 * done // total
        if percent == self._percent:
            return
        left = "" if done in (0, total) else f", {_duration(self._seconds_left(done, total))} left"
        if self._stream.isatty():
            shown = f"[{'#' * (percent // 2):<50}] {percent:3} %{left}"
            end = "\n" if done == total else ""
            print(f"\r{shown:<{self._width}}", end=end, file=self._stream, flush=True)
            self._width = len(shown)  # of a shorter one next, the rest is blanked
        elif percent // 10 != self._percent // 10:
            print(f"{percent} %{left}", file=self._stream, flush=True)
        self._percent = percent

    def _seconds_left(self, done: int, total: int) -> float:
        return (self._clock() - self._start) / done * (total - done)


def _duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
