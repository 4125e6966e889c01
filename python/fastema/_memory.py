"""Where averages are kept, and what is done to them there besides averaging: one class for each place.

Averages lie where their values do. Whatever else of the library holds arrays goes through the functions here,
and knows no place.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from ._arrays import as_view, is_movable, is_on_cuda, packed


class Memory(ABC):
    """Arrays of one library in one kind of memory."""

    @abstractmethod
    def face(self, array: Any) -> np.ndarray:
        """Return a NumPy array of the same type, shape, strides and address, which must not be read."""

    def device(self, array: Any) -> int | None:  # noqa: ARG002 - host memory is one place
        """Return the CUDA device that an array lies on; None: it lies in host memory."""
        return None

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
            quotient = np.asarray(np.divide(average.astype(compute), compute(divisor)))
            return quotient.astype(average.dtype)


_HOST = _Host()


def of(array: Any) -> Memory:
    """Return what an array lies in, of those that `view` returns."""
    if isinstance(array, np.ndarray):
        return _HOST
    from .cuda import _memory as on_cuda  # noqa: PLC0415 - no CPU needs it

    return on_cuda.OfTorch() if is_movable(array) else on_cuda.OfCuPy()


def view(array: Any, name: str) -> Any:
    """Return a user's array as what is worked on where it lies; nothing is copied.

    Raises:
        TypeError: It is no array, or its memory cannot be viewed.
    """
    if isinstance(array, np.ndarray):
        return array
    if not is_on_cuda(array):
        return as_view(array, name)
    from .cuda._arrays import shown  # noqa: PLC0415 - no CPU needs it

    shown(array, name)
    return array


def face(array: Any) -> np.ndarray:
    """See `Memory.face`."""
    return of(array).face(array)


def device(array: Any) -> int | None:
    """See `Memory.device`."""
    return None if isinstance(array, np.ndarray) else of(array).device(array)  # most are, at every update


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


def beside(
    arrays: Sequence[Any],
    dtypes: Sequence[Any],
    on_host: Sequence[bool],
    file: str | PathLike[str] | None,
) -> list[Any]:
    """Return new memory for each array, in its shape and order.

    Args:
        arrays: Where it is to lie.
        dtypes: Of what is returned.
        on_host: For each, whether it is to lie in host memory instead.
        file: The path of a file to make and to map, instead of host memory.
    """
    hosted = [away or device(array) is None for array, away in zip(arrays, on_host, strict=True)]
    there = [(face(x), dtype) for x, dtype, host in zip(arrays, dtypes, hosted, strict=True) if host]
    made = iter(packed([x for x, _ in there], [dtype for _, dtype in there], file))
    return [
        next(made) if host else of(array).empty_like(array, dtype)
        for array, dtype, host in zip(arrays, dtypes, hosted, strict=True)
    ]


def copy(array: Any) -> Any:
    """Return a copy in the same place."""
    made = empty_like(array)
    write(array, made)
    return made


def host_copy(array: Any) -> np.ndarray:
    """Return a copy in host memory."""
    found = of(array).host(array)
    return found.copy(order="K") if found is array else found
