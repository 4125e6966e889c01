"""NumPy's arrays, which all others are viewed as in host memory."""

from collections.abc import Sequence

import numpy as np

from .._types import AnyArray, DType, compute_type
from .base import Descriptor, Leaf, Library, Storage, unmasked
from .dispatch import local_array, write
from .packing import cast_into


def plain(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array as NumPy's own, whose elements are as this machine has them.

    Raises:
        TypeError: It has a mask, or another byte order.
    """
    array = unmasked(array, name)
    if not array.dtype.isnative:
        raise TypeError(
            f"{name} must be in native byte order, got {array.dtype}; give a copy by "
            ".astype(array.dtype.newbyteorder('='))"
        )
    return array


class HostLeaf(Leaf):
    """A NumPy array, or something else with NumPy's view of its memory."""

    def __init__(self, given: AnyArray, array: np.ndarray, name: str) -> None:
        self._given, self._array, self._name = given, array, name
        self._is_derived = isinstance(given, np.ndarray) and type(given) is not np.ndarray

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        if self._is_derived:  # a view of it would stay behind where it is resized
            self._array = np.asarray(self._given)
        return [self._array if value is None else local_array(value, self._name)]

    def obstacle(self) -> str | None:
        return None if self.local_arrays()[0].flags.writeable else "is read-only"

    def in_place(self) -> bool:
        return True

    def assign(self, arrays: Sequence[AnyArray]) -> AnyArray:
        write(arrays[0], self.local_arrays()[0])
        return self._given

    def to_library(self, arrays: Sequence[AnyArray]) -> AnyArray:
        return arrays[0]


class HostStorage(Storage):
    """Memory that NumPy views."""

    def describe(self, array: np.ndarray) -> Descriptor:
        return Descriptor(array.dtype, array.shape, array.strides, array.ctypes.data, array.flags.writeable)

    def empty_like(self, array: np.ndarray, dtype: DType) -> np.ndarray:
        return np.empty_like(array, dtype)

    def host(self, array: np.ndarray) -> np.ndarray:
        return array

    def write(self, array: np.ndarray, target: np.ndarray) -> None:
        cast_into(target, np.asarray(array))  # no derived class interferes

    def clear(self, array: np.ndarray) -> None:
        array.fill(0)

    def quotient(self, average: np.ndarray, divisor: float) -> np.ndarray:
        compute = compute_type(average.dtype)
        with np.errstate(all="ignore"):  # whatever the weights are
            quotient = np.asarray(np.divide(average.astype(compute), compute.type(divisor)))
            return quotient.astype(average.dtype)


class _NumPy(Library):
    storage: Storage = HostStorage()

    def owns(self, value: object) -> bool:
        return isinstance(value, np.ndarray)

    def leaf(self, value: AnyArray, name: str) -> Leaf:
        return HostLeaf(value, plain(value, name), name)

    def view(self, array: AnyArray, name: str) -> np.ndarray:
        return plain(array, name)


library = _NumPy()
