"""What is kept of the values: averages, carries and copies; of which types, where, and how it is shown."""

import operator
import os
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Literal, NamedTuple, SupportsIndex

import ml_dtypes
import numpy as np

from .. import _arrays
from .._types import FLOATS, Array, DType, average_type
from .count import Count
from .shown import Shown
from .tree import Buffers
from .values import Locals, Values

_REGISTERED = 2  # what NumPy's `isbuiltin` says of types of ml_dtypes


class Form(NamedTuple):
    """What averages are to be.

    Attributes:
        shown: What users see of the lists of averages.
        lists: How many of these there are.
        dtype: Of averages. None: float32 for values of 16 bits, for others their own.
        rounding: How averages of 16 bits move, and whether carries are kept.
        on_host: Whether averages of values on a CUDA device are kept in host memory.
        memory: The path of a file to map for those in host memory.
        buffers: Whether those of a module are averaged.
    """

    shown: Shown
    lists: int
    dtype: DType | None
    rounding: Literal["nearest", "stochastic", "compensated"]
    on_host: bool
    memory: str | PathLike[str] | None
    buffers: Buffers


class Averages:
    """Averages of each decay, which start at the values.

    Args:
        values: What is averaged.
        local_arrays: Of each leaf, the local arrays as they are now.
        form: What averages are to be.
        before: Values whose place these take, with their averages, which go on: they are taken over where
            they fit, and copied where not. They are left as they are.

    Attributes:
        averaged: The leaves that are averaged.
        copied: The leaves that are copied at each update; in order, and found as fast as in a set.
        carried: Those that have no local arrays, and are carried along.
        alone: Those of the copied that are copied one by one, and never exchanged: with gaps in memory, or on
            a CUDA device and of single bytes, which no kernel moves.
        by_decay: For each decay, the arrays of each leaf. Those of what is copied are the same in all.
        process: Where they lie in memory that forked processes share, the process that they are of.
        carries: For each decay, what rounding would lose of each averaged leaf; none but with
            ``rounding="compensated"``.
        on_host: Whether those of values on a CUDA device are in host memory.
        shown: What users see of them.
    """

    def __init__(
        self,
        values: Values,
        local_arrays: Sequence[Locals],
        form: Form,
        before: tuple[Values, "Averages"] | None = None,
    ) -> None:
        self.on_host, self.shown = form.on_host, form.shown
        self.process = None if form.memory is None else os.getpid()
        self.averaged: list[int] = []
        self.copied: dict[int, None] = {}
        self.carried: set[int] = set()
        for i, name in enumerate(values.names):
            if not local_arrays[i]:
                self.carried.add(i)
                continue
            kind = _arrays.dtype_of(local_arrays[i][0])
            if kind not in FLOATS and kind.kind not in "iub" and kind.isbuiltin != _REGISTERED:
                raise TypeError(
                    f"values[{name!r}] must be of float16, bfloat16, float32, float64, complex numbers, "
                    f"integers or booleans, got {kind}"
                )
            if kind in FLOATS and not (name in values.buffers and form.buffers == "copy"):
                self.averaged.append(i)
            else:
                self.copied[i] = None
        self.alone = {i for i in self.copied if any(map(_is_alone, local_arrays[i]))}
        _check_places((x for local in local_arrays for x in local), form)
        making = _Making(values, local_arrays, form, before)
        shared = {i: making.copies(i) for i in self.copied}
        nothing: dict[int, Locals] = {i: [] for i in self.carried}
        self.by_decay = [
            {**shared, **{i: making.averages(i, k) for i in self.averaged}, **nothing}
            for k in range(form.lists)
        ]
        carries = form.lists if form.rounding == "compensated" else 0
        self.carries = [{i: making.carries(i, k) for i in self.averaged} for k in range(carries)]
        making.finish()
        self._rows = {i: _side_by_side([averages[i] for averages in self.by_decay]) for i in self.averaged}
        self._carry_rows = {i: _side_by_side([kept[i] for kept in self.carries]) for i in self.averaged}

    def moving(self, count: Count | None) -> Sequence[int]:
        """Return which lists move by the update to a count; None: the first ones that do."""
        if not self.shown.is_sparse:
            return range(len(self.by_decay))
        return [0] if count is None else [k for k, decay in enumerate(count.decays) if decay != 1.0]

    def rows(self, leaves: Iterable[int], lists: Sequence[int]) -> tuple[Locals, Locals]:
        """Return averages and carries of some leaves as the core takes them: of those lists side by side."""
        if len(lists) < len(self.by_decay):
            return [x for i in leaves for x in _side_by_side([self.by_decay[k][i] for k in lists])], []
        rows, carries = self._rows, self._carry_rows
        return [x for i in leaves for x in rows[i]], [x for i in leaves for x in carries[i]]

    def averages_of(self, i: int | None, k: int) -> Locals | None:
        """Return the k-th average of a leaf, if it is averaged."""
        return self.by_decay[k][i] if i is not None and i in self._rows else None

    def copied_of(self, i: int | None) -> Locals | None:
        """Return the copy of a leaf, if it is copied."""
        return self.by_decay[0][i] if i is not None and i in self.copied else None

    def carries_of(self, i: int | None, k: int) -> Locals | None:
        """Return what rounding lost of the k-th average of a leaf, if it is averaged."""
        return self.carries[k][i] if i is not None and i in self._rows else None

    def checked_index(self, k: SupportsIndex) -> int:
        """Return the number of a decay.

        Raises:
            IndexError: There is no such decay.
        """
        if not 0 <= (index := operator.index(k)) < self.shown.lists:
            raise IndexError(f"k must be from 0 to {self.shown.lists - 1}, got {k}")
        return index

    def start_at(self, local_arrays: Sequence[Locals]) -> None:
        """Let all averages start again, at other local arrays of each leaf."""
        for averages in self.by_decay:
            for i, local in averages.items():
                for value, average in zip(local_arrays[i], local, strict=True):
                    _arrays.write(value, average)
        for carries in self.carries:
            _clear(carries.values())

    def clear(self, k: int) -> None:
        """Let the k-th averages start at nothing."""
        _clear(self.by_decay[k][i] for i in self.averaged)

    def is_kept(self, k: int, i: int, count: Count) -> bool:
        """Tell whether a leaf's k-th average is shown as it is kept."""
        return i not in self._rows or self.shown.is_kept(k, count)


class _Making:
    """Makes arrays of averages, all in one piece of memory, or takes them over.

    Each is returned before it has memory, as a list that `finish` fills.
    """

    def __init__(
        self,
        values: Values,
        local_arrays: Sequence[Locals],
        form: Form,
        before: tuple[Values, Averages] | None,
    ) -> None:
        self._values, self._local_arrays, self._form, self._before = values, local_arrays, form, before
        # arrays that were taken over already: weights that were one may be two now
        self._taken: set[int] = set()
        # of each new array what it lies beside, its type and whether it is kept on the host; then the list
        # that it goes to, and what it begins with
        self._wanted: list[tuple[Array, DType, bool]] = []
        self._fill: list[tuple[Locals, Array | None]] = []

    def copies(self, i: int) -> Locals:
        old = None if self._before is None else self._before[1].copied_of(self._old(i))
        return self._made(i, [_arrays.dtype_of(x) for x in self._local_arrays[i]], old, on_host=False)

    def averages(self, i: int, k: int) -> Locals:
        old = None if self._before is None else self._before[1].averages_of(self._old(i), k)
        dtypes = [_arrays.dtype_of(x) for x in old] if old else self._average_types(i)
        return self._made(i, dtypes, old, on_host=self._form.on_host)

    def carries(self, i: int, k: int) -> Locals:
        old = None if self._before is None else self._before[1].carries_of(self._old(i), k)
        kinds = [np.dtype(np.int16) if x == ml_dtypes.bfloat16 else x for x in self._average_types(i)]
        dtypes = [_arrays.dtype_of(x) for x in old] if old else kinds
        return self._made(i, dtypes, old, on_host=self._form.on_host, zeros=True)

    def _average_types(self, i: int) -> list[DType]:
        if self._form.shown.has_types_of_values:
            return [_arrays.dtype_of(x) for x in self._local_arrays[i]]
        return [self._form.dtype or average_type(_arrays.dtype_of(x)) for x in self._local_arrays[i]]

    def _old(self, i: int) -> int | None:
        assert self._before is not None
        return self._before[0].leaf_named(self._values.names[i])

    def _made(
        self, i: int, dtypes: list[DType], old: Locals | None, *, on_host: bool, zeros: bool = False
    ) -> Locals:
        made: Locals = []
        values = self._local_arrays[i]
        if old is not None and [*map(_arrays.shape_of, old)] != [*map(_arrays.shape_of, values)]:
            old = None  # a buffer that grew
        for j, (value, dtype) in enumerate(zip(values, dtypes, strict=True)):
            if old is not None and id(old[j]) not in self._taken and _fits(old[j], value, dtype, on_host):
                self._taken.add(id(old[j]))
                made.append(old[j])
                continue
            begin = old[j] if old is not None else None if zeros else value
            made.append(None)
            self._wanted.append((value, dtype, on_host))
            self._fill.append((made, begin))
        return made

    def finish(self) -> None:
        """Give all new arrays memory, and have them begin as they must."""
        arrays, dtypes, on_host = zip(*self._wanted, strict=True) if self._wanted else ((), (), ())
        memory = self._form.memory if self._before is None else None  # that file is the others'
        made = _arrays.allocate_like(arrays, dtypes, on_host, memory)
        for array, (target, begin) in zip(made, self._fill, strict=True):
            target[next(j for j, x in enumerate(target) if x is None)] = array
            if begin is None:
                _arrays.clear(array)
            else:
                _arrays.write(begin, array)


def _fits(average: Array, value: Array, dtype: DType, on_host: bool) -> bool:
    """Tell whether an average can go on beside another value."""
    if _arrays.dtype_of(average) != dtype:
        return False
    if _arrays.device(average) != (None if on_host else _arrays.device(value)):
        return False
    there, here = _arrays.describe(average), _arrays.describe(value)
    return there.shape == here.shape and there.dense_strides() == here.dense_strides()


def _check_places(local_arrays: Iterable[Array], form: Form) -> None:
    places = {_arrays.device(array) for array in local_arrays} - {None}
    if not places:
        return
    elsewhere = sorted(place for place in places if isinstance(place, str))
    for name, given in (("device", "cpu" if form.on_host else None), ("memory", form.memory)):
        if elsewhere and given is not None:
            raise ValueError(
                f"{name} must be None where values lie on device {elsewhere[0]}, beside which averages lie, "
                f"got {given!r}; to have them in host memory, average copies of the values there"
            )
    if form.memory is not None and not form.on_host:
        raise ValueError("memory must be None where values lie on a CUDA device, unless device is 'cpu'")
    if form.on_host and form.rounding == "stochastic":
        raise ValueError(
            "rounding must be 'nearest' or 'compensated' where device is 'cpu' and values lie on a CUDA "
            "device, got 'stochastic'"
        )


def _is_alone(array: Array) -> bool:
    if isinstance(_arrays.device(array), int):
        return _arrays.dtype_of(array).itemsize == 1
    return not _arrays.describe(array).is_dense()


def _side_by_side(lists: Sequence[Locals]) -> Locals:
    return [array for row in zip(*lists, strict=True) for array in row]


def _clear(arrays: Iterable[Locals]) -> None:
    for array in [x for local in arrays for x in local]:
        _arrays.clear(array)
