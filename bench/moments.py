"""When a training loop calls: what its caches, threads and memory went through just before.

A benchmark that calls again and again finds threads awake and short lists in caches. A training loop
calls once a step, after the framework's own operations, and between their allocations.
"""

import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .harness import THREADS, WARM, Call, Stopwatch

BACK_TO_BACK = "back to back"
PAUSE = 0.03  # seconds
ALLOCATED = [1 << shift for shift in range(12, 25)]  # bytes, each of them twice: 64 MiB together


def last_level_cache() -> int:
    """Return how many bytes the largest cache has; 64 MiB where the system does not say."""
    sizes = [
        int(file.read_text().strip().removesuffix("K")) << 10
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=64 << 20)


class Moment:
    """What happens between a contestant's call that is not timed and the one that is.

    The first one sees to it that all find what they need where they left it, and not where whoever was
    measured before them did.
    """

    def __call__(self, call: Call) -> None:
        """Prepare a timed call."""
        call()
        self.happen()

    def happen(self) -> None:
        """Be this moment."""
        raise NotImplementedError


class _Torch(Moment):
    """Operations of torch, whose threads still look out for the next one when they have returned."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(THREADS)
        self._torch = torch
        self._matrix = torch.ones(768, 768)
        self._weights = [torch.ones(1 << 18) for _ in range(8)]

    def happen(self) -> None:
        for _ in range(3):
            self._torch.mm(self._matrix, self._matrix)
        self._torch._foreach_mul_(self._weights, 1.0)


class _Caches(Moment):
    """Other data, four times what the caches hold."""

    def __init__(self) -> None:
        self._other = np.zeros(last_level_cache(), np.float32)

    def happen(self) -> None:
        np.add(self._other, 1, out=self._other)


class _Allocations(Moment):
    """Arrays that are made, and half of them given back: what the call allocates has fresh pages."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []

    def happen(self) -> None:
        made = [np.ones(size, np.uint8) for size in ALLOCATED for _ in range(2)]
        self._kept = made[::2]


class _Pause(Moment):
    """Nothing, for a while: threads fall asleep."""

    def happen(self) -> None:
        time.sleep(PAUSE)


def moments() -> dict[str, Stopwatch]:
    """Return how a sample is taken at each moment; all but one time single calls."""
    found: dict[str, Moment] = {}
    if find_spec("torch"):
        found["after torch"] = _Torch()
    else:
        print("not measured right after torch's operations: torch is not installed", file=sys.stderr)
    found |= {
        f"after {PAUSE * 1e3:.0f} ms": _Pause(),
        "cold caches": _Caches(),
        "fresh memory": _Allocations(),
    }
    return {BACK_TO_BACK: WARM, **{name: Stopwatch(settle, most=1) for name, settle in found.items()}}
