"""How are many arrays laid out in one piece of host memory?"""

import os
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from .._types import FLOATS, DType, narrowed


class Layout(Protocol):
    """What has a shape and an order in memory: a NumPy array, or a `Descriptor`."""

    @property
    def size(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...


_LINE = 64  # bytes: of a cache line, and of the widest vector
_PIECE = 1 << 16  # elements: what is computed at a time


def packed_copies(arrays: Sequence[np.ndarray], dtypes: Sequence[DTypeLike]) -> list[np.ndarray]:
    """Copy arrays, cast to other types, into memory as of `packed`."""
    copies = packed(arrays, dtypes)
    for copy, array in zip(copies, arrays, strict=True):
        cast_into(copy, array)
    return copies


def cast_into(target: np.ndarray, array: np.ndarray) -> None:
    """Write an array into one of another type of its kind."""
    # from bfloat16 to float16 NumPy has a cast, and takes them for two kinds
    is_float = target.dtype in FLOATS and array.dtype in FLOATS
    with np.errstate(all="ignore"):  # one may well be too large for 16 bits, or a signalling NaN
        np.copyto(target, array, casting="unsafe" if is_float else "same_kind")


def packed(
    likes: Sequence[Layout],
    dtypes: Sequence[DTypeLike],
    file: str | PathLike[str] | None = None,
) -> list[np.ndarray]:
    """Return new arrays end to end in one piece of memory, each from a cache line on.

    Small arrays that follow each other are read faster than scattered ones, and NumPy asks the system
    for huge pages where a piece of memory is large.

    Args:
        likes: What they have the shapes and the orders in memory of.
        dtypes: Of the new arrays.
        file: The path of a file to make and to map, instead of memory.
    """
    sizes = [like.size * np.dtype(dtype).itemsize for like, dtype in zip(likes, dtypes, strict=True)]
    begins = np.cumsum([0, *(-(-size // _LINE) * _LINE for size in sizes)])
    length = int(begins[-1]) + _LINE
    memory = np.empty(length, np.uint8) if file is None else _mapped(Path(file), length)
    memory = memory[-memory.ctypes.data % _LINE :]
    return [
        laid_out(memory[begin : begin + size].view(dtype), like)
        for like, dtype, begin, size in zip(likes, dtypes, begins[:-1], sizes, strict=True)
    ]


def _mapped(path: Path, length: int) -> np.ndarray:
    """Make a file anew and map it.

    Raises:
        OSError: It cannot be made, or the disk has no room for all of it, which would else be a bus error
            when it is written to. Then there is none.
    """
    path.unlink(missing_ok=True)  # whoever has it mapped keeps the old one
    try:
        with path.open("x+b") as file:
            allocate = getattr(os, "posix_fallocate", None)
            if allocate is None:  # not on macOS
                file.truncate(length)
            else:
                allocate(file.fileno(), 0, length)
            return np.asarray(np.memmap(file, np.uint8, "r+", shape=length))
    except OSError as reason:
        path.unlink(missing_ok=True)
        raise OSError(reason.errno, reason.strerror, str(path)) from None


def laid_out(flat: np.ndarray, like: Layout) -> np.ndarray:
    """Return a view of a flat array with the shape of another array, and its order in memory."""
    axes = axes_of(like)
    dense = flat.reshape([like.shape[axis] for axis in axes])
    return dense.transpose(np.argsort(axes)) if axes else dense


def axes_of(like: Layout) -> list[int]:
    """Return the axes in their order in memory, that of the farthest steps first."""
    return sorted(range(len(like.shape)), key=lambda axis: -abs(like.strides[axis]))


def elementwise(
    function: Callable[[Iterator[np.ndarray]], np.ndarray], arrays: Sequence[np.ndarray], dtype: DType
) -> np.ndarray:
    """Return a function of arrays of one shape, computed in float64 and rounded once.

    Args:
        function: Takes a piece of each array, one after the other, which it may change.
        arrays: One or more.
        dtype: Of what is returned.
    """
    axes = axes_of(arrays[0])
    flat = [array.transpose(axes).reshape(-1) for array in arrays]
    made = np.empty(arrays[0].size, dtype)
    with np.errstate(all="ignore"):  # infinities and NaN pass as they do in sums
        for begin in range(0, made.size, _PIECE):
            pieces = (array[begin : begin + _PIECE].astype(np.float64) for array in flat)
            made[begin : begin + _PIECE] = narrowed(function(pieces), dtype)
    return laid_out(made, arrays[0])
