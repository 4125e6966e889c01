"""NumPy's arrays, which all others are viewed as in host memory."""

from collections.abc import Sequence

import numpy as np

from .._types import AnyArray, DType, compute_type
from .base import Descriptor, Leaf, Library, Storage
from .dispatch import write


class HostLeaf(Leaf):
    """A NumPy array, or something else with NumPy's view of its memory."""

    def __init__(self, given: AnyArray, array: np.ndarray) -> None:
        self._given, self._array = given, array

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        return [self._array if value is None else value]

    def obstacle(self) -> str | None:
        return None if self._array.flags.writeable else "is read-only"

    def in_place(self) -> bool:
        return True

    def assign(self, arrays: Sequence[AnyArray]) -> AnyArray:
        write(arrays[0], self._array)
        return self._given

    def to_library(self, arrays: Sequence[AnyArray]) -> AnyArray:
        return arrays[0]


class _Storage(Storage):
    def describe(self, array: np.ndarray) -> Descriptor:
        return Descriptor(array.dtype, array.shape, array.strides, array.ctypes.data, array.flags.writeable)

    def empty_like(self, array: np.ndarray, dtype: DType) -> np.ndarray:
        return np.empty_like(array, dtype)

    def host(self, array: np.ndarray) -> np.ndarray:
        return array

    def write(self, array: np.ndarray, target: np.ndarray) -> None:
        with np.errstate(all="ignore"):  # one may well be too large for 16 bits, or a signalling NaN
            np.copyto(target, array, casting="same_kind")

    def clear(self, array: np.ndarray) -> None:
        array.fill(0)

    def quotient(self, average: np.ndarray, divisor: float) -> np.ndarray:
        compute = compute_type(average.dtype)
        with np.errstate(all="ignore"):  # whatever the weights are
            quotient = np.asarray(np.divide(average.astype(compute), compute.type(divisor)))
            return quotient.astype(average.dtype)


class _NumPy(Library):
    storage: Storage = _Storage()

    def owns(self, value: object) -> bool:
        return isinstance(value, np.ndarray)

    def leaf(self, value: AnyArray, name: str) -> Leaf:  # noqa: ARG002 - each has memory
        return HostLeaf(value, value)

    def _view(self, array: AnyArray) -> np.ndarray:
        view: np.ndarray = array
        return view


library = _NumPy()
