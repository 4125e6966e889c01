"""Complex values of any library, as pairs of real numbers: the average of each part."""

from collections.abc import Sequence

import numpy as np

from .._types import AnyArray
from .base import Leaf, unmasked


class ComplexLeaf(Leaf):
    """A complex value. Its local array has one more axis, of the real and the imaginary part."""

    def __init__(self, inner: Leaf, name: str) -> None:
        if inner.shards is not None:
            raise TypeError(f"{name} must be whole, and is complex and sharded: leave it out with only=")
        self._inner, self._name = inner, name
        self.stable, self.immutable = inner.stable, inner.immutable
        self.may_move, self.address = inner.may_move, inner.address

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        return [
            _parts_of(array, self._name)
            if isinstance(array, np.ndarray)
            else self._inner.parts(array, self._name)
            for array in self._inner.local_arrays(value)
        ]

    def in_place(self) -> bool:
        return self._inner.in_place()

    def obstacle(self) -> str | None:
        return self._inner.obstacle()

    def assign(self, arrays: Sequence[AnyArray]) -> AnyArray:
        return self._inner.assign(self._joined(arrays))

    def to_library(self, arrays: Sequence[AnyArray]) -> AnyArray:
        return self._inner.to_library(self._joined(arrays))

    def _joined(self, arrays: Sequence[AnyArray]) -> list[AnyArray]:
        return [_complex_of(x) if isinstance(x, np.ndarray) else self._inner.joined(x) for x in arrays]

    def to_state(self, array: AnyArray) -> AnyArray:
        return self._inner.to_state(array)

    def from_state(self, array: AnyArray, name: str) -> AnyArray:
        return self._inner.from_state(array, name)

    def written(self) -> None:
        self._inner.written()


def _parts_of(array: np.ndarray, name: str) -> np.ndarray:
    """Return a view of a complex array that has an axis of its parts."""
    array = unmasked(array, name)
    if array.dtype.kind != "c":
        raise TypeError(f"{name} must be complex, as it was at first, got {array.dtype}")
    real = array.real.dtype
    view: np.ndarray = np.lib.stride_tricks.as_strided(
        array.real, (*array.shape, 2), (*array.strides, real.itemsize), writeable=array.flags.writeable
    )
    return view


def _complex_of(parts: np.ndarray) -> np.ndarray:
    """Return a view of an array's last axis as one of complex numbers, or a copy of 16-bit ones."""
    if parts.dtype.itemsize < 4:
        parts = parts.astype(np.float32)
    kind = np.dtype(np.complex64 if parts.dtype == np.float32 else np.complex128)
    made: np.ndarray = parts.view(kind)[..., 0]
    return made
