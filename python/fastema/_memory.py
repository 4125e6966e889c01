"""Where averages are kept, and what is done to them there besides averaging: one class for each place.

Averages lie where their values do. Whatever else of the library holds arrays goes through the functions here,
and knows no place.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from ._arrays import as_view, packed


class Memory(ABC):
    """Arrays of one library in one kind of memory."""

    @abstractmethod
    def face(self, array: Any) -> np.ndarray:
        """Return a NumPy array of the same type, shape, strides and address, which must not be read."""

    @abstractmethod
    def empty_like(self, array: Any, dtype: Any) -> Any:
        """Return new memory beside an array, in its shape and order."""

    @abstractmethod
    def bits(self, array: Any) -> Any:
        """Return a view that can be copied and exchanged, of an array of 2, 4 or 8 bytes an element."""

    @abstractmethod
    def host(self, array: Any) -> np.ndarray:
        """Return contents as a NumPy array: the array itself, or a copy where that cannot be."""

    @abstractmethod
    def write(self, array: Any, target: Any) -> None:
        """Copy an array, from wherever it lies, rounded to nearest where the target is narrower."""

    @abstractmethod
    def clear(self, array: Any) -> None:
        """Set all elements to zero."""

    @abstractmethod
    def quotient(self, average: Any, divisor: float) -> Any:
        """Return an average divided by a number, rounded to its own type."""


class _Host(Memory):
    """NumPy arrays."""

    def face(self, array: Any) -> np.ndarray:
        face: np.ndarray = array
        return face

    def empty_like(self, array: Any, dtype: Any) -> Any:
        return np.empty_like(array, dtype)

    def bits(self, array: Any) -> Any:
        return array.view(f"f{array.dtype.itemsize}")

    def host(self, array: Any) -> np.ndarray:
        return self.face(array)

    def write(self, array: Any, target: Any) -> None:
        with np.errstate(all="ignore"):  # one may well be too large for 16 bits, or a signalling NaN
            np.copyto(target, of(array).host(array), casting="same_kind")

    def clear(self, array: Any) -> None:
        array.fill(0)

    def quotient(self, average: Any, divisor: float) -> Any:
        compute = np.float64 if average.dtype == np.float64 else np.float32
        with np.errstate(all="ignore"):  # whatever the weights are
            return np.divide(average.astype(compute), compute(divisor)).astype(average.dtype)


_HOST = _Host()


def of(array: Any) -> Memory:  # noqa: ARG001 - there is one place
    """Return what an array lies in, of those that `view` returns."""
    return _HOST


def view(array: Any, name: str) -> Any:
    """Return a user's array as what is worked on where it lies; nothing is copied.

    Raises:
        TypeError: It is no array, or its memory cannot be viewed.
    """
    return array if isinstance(array, np.ndarray) else as_view(array, name)


def face(array: Any) -> np.ndarray:
    """See `Memory.face`."""
    return of(array).face(array)


def bits(array: Any) -> Any:
    """See `Memory.bits`."""
    return of(array).bits(array)


def write(array: Any, target: Any) -> None:
    """See `Memory.write`."""
    of(target).write(array, target)


def clear(array: Any) -> None:
    """See `Memory.clear`."""
    of(array).clear(array)


def host(array: Any) -> np.ndarray:
    """See `Memory.host`."""
    return of(array).host(array)


def empty_like(array: Any) -> Any:
    """Return new memory beside an array, of its type."""
    return of(array).empty_like(array, face(array).dtype)


def beside(arrays: Sequence[Any], dtypes: Sequence[Any], file: str | PathLike[str] | None) -> list[Any]:
    """Return new memory for each array, in its place, shape and order.

    Args:
        arrays: Where it is to lie.
        dtypes: Of what is returned.
        file: The path of a file to make and to map, instead of host memory.
    """
    return list(packed([face(array) for array in arrays], dtypes, file))


def copy(array: Any) -> Any:
    """Return a copy in the same place."""
    made = empty_like(array)
    write(array, made)
    return made


def host_copy(array: Any) -> np.ndarray:
    """Return a copy in host memory."""
    found = of(array).host(array)
    return found.copy(order="K") if found is array else found
