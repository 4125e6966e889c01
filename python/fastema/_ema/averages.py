"""What is kept of the values: averages, carries and copies; of which types, where, and how it is shown."""

import operator
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Literal, NamedTuple, SupportsIndex

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from .. import _memory
from .count import Count
from .tree import Array, Arrays
from .values import Values

Rounding = Literal["nearest", "stochastic", "compensated"]
FLOATS = tuple(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))


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
    dtype: np.dtype | None
    rounding: Rounding
    on_host: bool
    memory: str | PathLike[str] | None


class Averages:
    """Averages of each decay, which start at the values.

    Attributes:
        averaged: The leaves that are averaged.
        copied: The leaves that are copied at each update; in order, and found as fast as in a set.
        by_decay: For each decay, the arrays of each leaf. Those of what is copied are the same in all.
        carries: For each decay, what rounding would lose of each averaged leaf; none but with
            ``rounding="compensated"``.
        on_host: Whether those of values on a CUDA device are in host memory.
    """

    def __init__(self, values: Values, local_arrays: Sequence[Arrays], form: Form) -> None:
        self.on_host = form.on_host
        self._values = values
        views = [values.views(i, local) for i, local in enumerate(local_arrays)]
        self.averaged: list[int] = []
        self.copied: dict[int, None] = {}
        for i, name in enumerate(values.names):
            kind = _memory.face(views[i][0]).dtype
            if kind not in FLOATS and kind.kind not in "iub":
                raise TypeError(
                    f"values[{name!r}] must be of float16, bfloat16, float32, float64, integers or booleans, "
                    f"got {kind}"
                )
            if kind in FLOATS and name not in values.copied:
                self.averaged.append(i)
            else:
                self.copied[i] = None
        _check_places([x for local in views for x in local], form)
        copied = [view for i in self.copied for view in views[i]]
        moving = [view for i in self.averaged for view in views[i]]
        wide = [form.dtype or average_type(_memory.face(view).dtype) for view in moving]
        carried = [np.dtype(np.int16) if kind == ml_dtypes.bfloat16 else kind for kind in wide]
        carries = form.decays if form.rounding == "compensated" else 0
        arrays = [*copied, *moving * (form.decays + carries)]
        dtypes = [*(_memory.face(view).dtype for view in copied), *wide * form.decays, *carried * carries]
        on_host = [False] * len(copied) + [form.on_host] * (len(arrays) - len(copied))
        made = iter(_memory.beside(arrays, dtypes, on_host, form.memory))

        def taken(leaves: Iterable[int]) -> dict[int, Arrays]:
            return {i: [next(made) for _ in views[i]] for i in leaves}

        shared = taken(self.copied)
        self.by_decay = [{**shared, **taken(self.averaged)} for _ in range(form.decays)]
        self.carries = [taken(self.averaged) for _ in range(carries)]
        for k, averages in enumerate(self.by_decay):
            for i in averages if k == 0 else self.averaged:
                for view, average in zip(views[i], averages[i], strict=True):
                    _memory.write(view, average)
        for carries_of in self.carries:
            _clear(carries_of)

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
        _clear({i: self.by_decay[k][i] for i in self.averaged})

    def divisor(self, k: int, i: int, count: Count) -> float:
        """Return what a leaf's average is to be divided by; 1: it is shown as it is kept."""
        return 1.0 if i in self.copied else count.divisor(k)

    def shown(self, kept: Arrays, divisor: float) -> Arrays:
        """Return an average as the user sees it."""
        if divisor == 1.0:
            return kept
        return [_memory.of(average).quotient(average, divisor) for average in kept]


def average_type(dtype: np.dtype) -> np.dtype:
    """Return the type of averages of values of a type."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def checked_float_type(dtype: DTypeLike) -> np.dtype:
    """Return NumPy's type for averages, of its own or of torch's name.

    Raises:
        TypeError: Averages cannot be of it.
    """
    name = str(dtype)
    chosen = np.dtype(name.removeprefix("torch.") if name.startswith("torch.") else dtype)
    if chosen not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {chosen}")
    return chosen


def _check_places(views: Iterable[Array], form: Form) -> None:
    if all(_memory.device(view) is None for view in views):
        return
    if form.memory is not None and not form.on_host:
        raise ValueError("memory must be None where values lie on a CUDA device, unless device is 'cpu'")
    if form.on_host and form.rounding == "stochastic":
        raise ValueError(
            "rounding must be 'nearest' or 'compensated' where device is 'cpu' and values lie on a CUDA "
            "device, got 'stochastic'"
        )


def _clear(arrays: dict[int, Arrays]) -> None:
    for array in [x for local in arrays.values() for x in local]:
        _memory.clear(array)
