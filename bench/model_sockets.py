"""What would a machine of several sockets do? A simulation of threads that take pieces.

python -m fastema.bench.model_sockets [--sockets 2] [--cores 32] [--stream GB/S] [--memory GB/S] [--link GB/S]

What one core moves by itself is measured here, unless it is given; the rest is assumed, and printed. No core
moves more than that; all that use a socket's memory share its bandwidth evenly, and those that come from
another socket the link to it, whose longer way costs nothing else. A helper wakes some microseconds after the
one before. Values lie where averages lie. Pages lie where threads touched them first: all by one thread, by
whoever took a piece from one counter, or by the thread whose part it is.
"""

import argparse
import random
import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

import fastema

from .lists import LISTS, elements

PIECE = 512 << 10  # bytes of averages, as in the core
MOVED = 3  # times the bytes of an average: it is read and written, its value is read
MICROSECOND = 1e-6


@dataclass(frozen=True)
class Machine:
    """Rates in bytes a second, times in seconds."""

    sockets: int
    stream: float  # of one core
    memory: float  # of one socket's memory
    link: float  # into one socket's memory from others
    wake: float = 5 * MICROSECOND  # between one helper and the next

    def socket_of(self, thread: int, threads: int) -> int:
        """Return where a thread runs, if the system spreads them evenly and leaves them there."""
        return thread * self.sockets // threads


def taking(pieces: int, parts: int) -> "Taking":
    """Return the pieces in contiguous parts: one for each thread, as in the core, or one for all."""
    edges = [pieces * i // parts for i in range(parts + 1)]
    return Taking([list(range(a, b))[::-1] for a, b in pairwise(edges)])


class Taking:
    """Parts of a list of pieces: a thread takes from its own, and then from those that follow."""

    def __init__(self, parts: list[list[int]]) -> None:
        self._parts = parts

    def take(self, thread: int) -> int | None:
        """Return the next piece of a thread; None: all are taken."""
        for i in range(len(self._parts)):
            part = self._parts[(thread + i) % len(self._parts)]
            if part:
                return part.pop()
        return None


class Call:
    """A call under way.

    Args:
        machine: What it runs on.
        pieces: Who takes which; used up.
        homes: The socket in whose memory each piece lies; None: of who takes it first.
        threads: How many work.
    """

    def __init__(self, machine: Machine, pieces: Taking, homes: list[int | None], threads: int) -> None:
        self._machine, self._pieces, self._homes = machine, pieces, homes
        self._sockets = [machine.socket_of(thread, threads) for thread in range(threads)]
        self._asleep = [(thread * machine.wake, thread) for thread in reversed(range(threads))]
        self._at: dict[
            int, tuple[int, float]
        ] = {}  # where a thread's piece lies, and bytes that are left of it

    def seconds(self) -> float:
        """Return how long it takes."""
        now = 0.0
        while True:
            while self._asleep and self._asleep[-1][0] <= now:
                self._go_on(self._asleep.pop()[1])
            if not self._at:
                return now
            rates = self._rates()
            step = min(left / rates[thread] for thread, (_, left) in self._at.items())
            if self._asleep:
                step = min(step, self._asleep[-1][0] - now)
            now += step
            for thread, (home, left) in list(self._at.items()):
                self._at[thread] = home, left - step * rates[thread]
                if self._at[thread][1] < 1.0:
                    self._go_on(thread)

    def _go_on(self, thread: int) -> None:
        piece = self._pieces.take(thread)
        if piece is None:
            self._at.pop(thread, None)
            self._asleep.clear()  # who comes now finds nothing
            return
        home = self._homes[piece]
        if home is None:
            home = self._homes[piece] = self._sockets[thread]
        self._at[thread] = home, float(MOVED * PIECE)

    def _rates(self) -> dict[int, float]:
        machine, rates = self._machine, {}
        for socket in range(machine.sockets):
            users = [thread for thread, (home, _) in self._at.items() if home == socket]
            strangers = [thread for thread in users if self._sockets[thread] != socket]
            share = machine.memory / max(len(users), 1)
            slow = min(machine.stream, share, machine.link / max(len(strangers), 1))
            left = machine.memory - slow * len(strangers)
            fast = min(machine.stream, left / max(len(users) - len(strangers), 1))
            rates |= dict.fromkeys(users, fast) | dict.fromkeys(strangers, slow)
        return rates


def seconds(machine: Machine, pieces: int, threads: int, *, own_parts: bool, first_touch: str) -> float:
    """Return the time of a call, after one that has settled where pages lie.

    Args:
        machine: What it runs on.
        pieces: How long the list is.
        threads: How many work.
        own_parts: Whether each thread has a part, or all one counter.
        first_touch: ``"one"`` thread touched all, or ``"all"`` what they took.
    """
    parts = threads if own_parts else 1
    homes: list[int | None] = [0 if first_touch == "one" else None] * pieces
    Call(machine, taking(pieces, parts), homes, threads).seconds()
    if not own_parts and first_touch == "all":  # whoever takes a piece is another one at each call
        random.Random(0).shuffle(homes)
    return Call(machine, taking(pieces, parts), homes, threads).seconds()


def measured_stream() -> float:
    """Return what one core moves here by an update beyond the caches: the median of 9 calls."""
    pairs = fastema.Pairs(np.zeros(32_000_000, np.float32), np.ones(32_000_000, np.float32))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        pairs.update(0.999, threads=1)
        times.append(time.perf_counter() - start)
    return MOVED * 4 * 32_000_000 / float(np.median(times))


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sockets", type=int, default=2)
    parser.add_argument("--cores", type=int, default=32, help="of each socket")
    parser.add_argument("--stream", type=float, help="GB/s of one core (default: measured)")
    parser.add_argument("--memory", type=float, default=250.0, help="GB/s of one socket's memory")
    parser.add_argument("--link", type=float, default=100.0, help="GB/s into it from other sockets")
    options = parser.parse_args(arguments)
    stream = options.stream * 1e9 if options.stream else measured_stream()
    machine = Machine(options.sockets, stream, options.memory * 1e9, options.link * 1e9)
    print(
        f"\n{machine.sockets} sockets of {options.cores} cores, GB/s: one core {stream / 1e9:.3g}"
        f"{'' if options.stream else ' (measured here)'}, a socket's memory {options.memory:.3g}, "
        f"the link {options.link:.3g} (assumed); ms of an update"
    )
    ways = {
        "one counter, pages of one thread": (False, "one"),
        "one counter, pages of all": (False, "all"),
        "own parts, pages of one thread": (True, "one"),
        "own parts, pages of all": (True, "all"),
    }
    for name in ("ResNet-50", "GPT-2"):
        pieces = -(-4 * elements(LISTS[name]) // PIECE)
        print(f"\n{name:<36}" + "".join(f"{way:>36}" for way in ways))
        for threads in sorted({1, 2, 4, 8, 16, options.cores, machine.sockets * options.cores}):
            times = (
                seconds(machine, pieces, threads, own_parts=own, first_touch=touch)
                for own, touch in ways.values()
            )
            print(f"{threads:>4} threads{'':<24}" + "".join(f"{1e3 * t:>36.2f}" for t in times))


if __name__ == "__main__":
    main()
