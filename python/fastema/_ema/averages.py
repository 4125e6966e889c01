"""What is kept of the values: averages, carries and copies; of which types, where, and how it is shown."""

import operator
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Literal, NamedTuple, SupportsIndex

import ml_dtypes
import numpy as np

from .. import _arrays
from .._types import FLOATS, Array, DType, average_type
from .count import Count
from .values import Locals, Values


class Form(NamedTuple):
    """What averages are to be.

    Attributes:
        decays: How many averages there are of each value.
        dtype: Of averages. None: float32 for values of 16 bits, for others their own.
        rounding: How averages of 16 bits move, and whether carries are kept.
        on_host: Whether averages of values on a CUDA device are kept in host memory.
        memory: The path of a file to map for those in host memory.
    """

    decays: int
    dtype: DType | None
    rounding: Literal["nearest", "stochastic", "compensated"]
    on_host: bool
    memory: str | PathLike[str] | None


class Averages:
    """Averages of each decay, which start at the values.

    Attributes:
        averaged: The leaves that are averaged.
        copied: The leaves that are copied at each update; in order, and found as fast as in a set.
        alone: Those of the copied that are copied one by one, and never exchanged: of single bytes, which no
            kernel moves, nor the core where there are gaps between them.
        by_decay: For each decay, the arrays of each leaf. Those of what is copied are the same in all.
        carries: For each decay, what rounding would lose of each averaged leaf; none but with
            ``rounding="compensated"``.
        on_host: Whether those of values on a CUDA device are in host memory.
    """

    def __init__(self, values: Values, local_arrays: Sequence[Locals], form: Form) -> None:
        self.on_host = form.on_host
        self.averaged: list[int] = []
        self.copied: dict[int, None] = {}
        for i, name in enumerate(values.names):
            kind = _arrays.dtype_of(local_arrays[i][0])
            if kind not in FLOATS and kind.kind not in "iub":
                raise TypeError(
                    f"values[{name!r}] must be of float16, bfloat16, float32, float64, integers or booleans, "
                    f"got {kind}"
                )
            if kind in FLOATS and name not in values.copied:
                self.averaged.append(i)
            else:
                self.copied[i] = None
        self.alone = {i for i in self.copied if any(map(_is_alone, local_arrays[i]))}
        _check_places((x for local in local_arrays for x in local), form)
        copied = [x for i in self.copied for x in local_arrays[i]]
        moving = [x for i in self.averaged for x in local_arrays[i]]
        wide = [form.dtype or average_type(_arrays.dtype_of(x)) for x in moving]
        carried = [np.dtype(np.int16) if kind == ml_dtypes.bfloat16 else kind for kind in wide]
        carries = form.decays if form.rounding == "compensated" else 0
        arrays = [*copied, *moving * (form.decays + carries)]
        dtypes = [*map(_arrays.dtype_of, copied), *wide * form.decays, *carried * carries]
        on_host = [False] * len(copied) + [form.on_host] * (len(arrays) - len(copied))
        made = iter(_arrays.allocate_like(arrays, dtypes, on_host, form.memory))

        def taken(leaves: Iterable[int]) -> dict[int, Locals]:
            return {i: [next(made) for _ in local_arrays[i]] for i in leaves}

        shared = taken(self.copied)
        self.by_decay = [{**shared, **taken(self.averaged)} for _ in range(form.decays)]
        self.carries = [taken(self.averaged) for _ in range(carries)]
        for k, averages in enumerate(self.by_decay):
            for i in averages if k == 0 else self.averaged:
                for value, average in zip(local_arrays[i], averages[i], strict=True):
                    _arrays.write(value, average)
        for carries_of in self.carries:
            _clear(carries_of.values())
        self._rows = {i: _side_by_side([averages[i] for averages in self.by_decay]) for i in self.averaged}
        self._carry_rows = {i: _side_by_side([kept[i] for kept in self.carries]) for i in self.averaged}

    def rows(self, leaves: Iterable[int]) -> tuple[Locals, Locals]:
        """Return averages and carries of some leaves as the core takes them: of all decays side by side."""
        rows, carries = self._rows, self._carry_rows
        return [x for i in leaves for x in rows[i]], [x for i in leaves for x in carries[i]]

    def checked_index(self, k: SupportsIndex) -> int:
        """Return the number of a decay.

        Raises:
            IndexError: There is no such decay.
        """
        if not 0 <= (index := operator.index(k)) < len(self.by_decay):
            raise IndexError(f"k must be from 0 to {len(self.by_decay) - 1}, got {k}")
        return index

    def clear(self, k: int) -> None:
        """Let the k-th averages start at nothing."""
        _clear(self.by_decay[k][i] for i in self.averaged)

    def divisor(self, k: int, i: int, count: Count) -> float:
        """Return what a leaf's average is to be divided by; 1: it is shown as it is kept."""
        return 1.0 if i in self.copied else count.divisor(k)


def shown(kept: Locals, divisor: float) -> Locals:
    """Return an average as the user sees it."""
    return kept if divisor == 1.0 else [_arrays.quotient(average, divisor) for average in kept]


def _check_places(local_arrays: Iterable[Array], form: Form) -> None:
    if all(_arrays.device(array) is None for array in local_arrays):
        return
    if form.memory is not None and not form.on_host:
        raise ValueError("memory must be None where values lie on a CUDA device, unless device is 'cpu'")
    if form.on_host and form.rounding == "stochastic":
        raise ValueError(
            "rounding must be 'nearest' or 'compensated' where device is 'cpu' and values lie on a CUDA "
            "device, got 'stochastic'"
        )


def _is_alone(array: Array) -> bool:
    if _arrays.dtype_of(array).itemsize > 1:
        return False
    return _arrays.device(array) is not None or not _arrays.describe(array).is_dense()


def _side_by_side(lists: Sequence[Locals]) -> Locals:
    return [array for row in zip(*lists, strict=True) for array in row]


def _clear(arrays: Iterable[Locals]) -> None:
    for array in [x for local in arrays for x in local]:
        _arrays.clear(array)
