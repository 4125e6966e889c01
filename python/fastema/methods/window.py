"""The mean of the last snapshots: latest weight averaging (LAWA)."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from .. import _arrays
from .._ema.count import Count
from .._ema.shown import Kept, Shown
from .._ema.tree import Buffers, Nested, Only
from .._types import AnyArray, average_type, check_count
from ..checkpoint._replace import StrPath
from ._method import Method


class _Rule(NamedTuple):
    """When a snapshot is taken, and which list it takes the place of; see `Window`."""

    every: int
    start_step: int
    size: int
    several: bool = False

    def averages_at(self, step: int, clock: float) -> bool:  # noqa: ARG002 - each step is one of the clock's
        return step >= self.start_step and step % self.every == 0

    def decays_after(self, before: Count, clock: float) -> tuple[float, ...]:  # noqa: ARG002
        taken = (_newest(before) + 1) % self.size
        return tuple([0.0 if k == taken else 1.0 for k in range(self.size)])  # a copy, and others stay


def _newest(count: Count) -> int:
    """Return the list of the last snapshot, which was a copy; -1: there is none."""
    return count.decays.index(0.0) if 0.0 in count.decays else -1


class _Mean(Shown):
    """The mean of the lists that hold a snapshot; of none, the first values or those of now."""

    is_sparse = True
    has_types_of_values = True

    def is_kept(self, k: int, count: Count) -> bool:  # noqa: ARG002 - never, for one type is shown always
        return False

    def computed(self, k: int, kept: Kept, count: Count) -> list[AnyArray]:  # noqa: ARG002
        size, newest = len(count.products), _newest(count)
        oldest_first = [(newest + 1 + n) % size for n in range(size)]
        taken = [j for j in oldest_first if count.products[j] != 1.0] or [0]  # all are the first values
        lists = zip(*[kept(j) for j in taken], strict=True)
        return [_arrays.computed(_mean, x, average_type(_arrays.dtype_of(x[0]))) for x in lists]

    def obstacle(self, k: int, count: Count) -> str:  # noqa: ARG002
        return (
            "module() computes with averages as they are kept, and those of fastema.Window are made of its "
            "snapshots when they are shown: use swapped(), or copy_to() into another model"
        )


def _mean(snapshots: Iterator[np.ndarray]) -> np.ndarray:
    total, count = next(snapshots), 1
    for count, snapshot in enumerate(snapshots, 2):  # noqa: B007 - the number of all
        total += snapshot
    return total / count


class Window(Method):
    """The mean of the last few snapshots of weights, each with the same weight: LAWA.

    A snapshot is taken at every `every` updates, and takes the place of the oldest one: so none of the first,
    bad weights stays in the mean. J. Kaddour 2022, "Stop Wasting My Time!", arXiv 2209.14981, with snapshots
    at the ends of epochs; N. Ajroldi et al. 2025, "When, Where and Why to Average Weights?", arXiv
    2502.06761.

    All verbs are those of `EMA`. The mean is made when it is shown: the snapshots, which are kept in the
    values' own types, are added up in float64 from the oldest to the newest, divided by their number, and
    rounded once. No sum is kept, whose rounding would add up. Of 16-bit values it is shown in float32. Before
    the first snapshot, weights are shown as they are.

    Args:
        values: As for `EMA`.
        size: How many snapshots there are at most; each takes as much memory as the values.
        every: Take one at every so many updates only.
        start_step: The first update that takes one.
        buffers: As for `EMA`.
        device: As for `EMA`: ``"cpu"`` keeps snapshots in host memory.
        threads: As for `EMA`.
        memory: As for `EMA`: the path of a file to keep the snapshots in.
        only: As for `EMA`.

    Raises:
        ImportError: As for `EMA`.
        TypeError: As for `EMA`.
        ValueError: As for `EMA`.

    Example:
        >>> import fastema, numpy as np
        >>> weights = {"w": np.zeros(2)}
        >>> window = fastema.Window(weights, 3, every=10)
        >>> for step in range(1, 101):
        ...     weights["w"][:] = step  # a step of training
        ...     window.update()
        >>> window.averages["w"]  # (80 + 90 + 100) / 3
        array([90., 90.])
        >>> with window.swapped():
        ...     print(weights["w"])
        [90. 90.]
    """

    _method = "Window"

    def __init__(
        self,
        values: Nested,
        size: int,
        *,
        every: int = 1,
        start_step: int = 0,
        buffers: Buffers = "copy",
        device: Literal["cpu"] | None = None,
        threads: int = 0,
        memory: StrPath | None = None,
        only: Only | None = None,
    ) -> None:
        size = check_count(size, "size", 1)
        rule = _Rule(check_count(every, "every", 1), check_count(start_step, "start_step"), size)
        self._set_up(
            values,
            rule,
            _Mean(),
            Count.at_start(size, zeros=True),  # no list has a snapshot
            {"size": size},
            buffers=buffers,
            device=device,
            threads=threads,
            memory=memory,
            only=only,
        )

    @property
    def decay(self) -> None:
        """None: a window has no decay."""
