"""Files that are computed from others: piece by piece, by several threads, and written in order."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .._types import narrowed
from ._header import REALS, Tensor, header_of
from ._source import Source

_PIECE = 1 << 18  # elements: what a thread holds of a tensor at a time
_BLOCK = 1 << 13  # elements: what is rounded at a time, so that what NumPy makes meanwhile is in caches
_MOST_THREADS = 4  # so many are faster than disks, and bound the memory

Progress = Callable[[int, int], None]
"""Is called with the bytes done and the bytes in all."""


class Piece(NamedTuple):
    """A part of a tensor that is computed at once.

    Attributes:
        name: Of the tensor.
        begin: Its first element.
        size: How many elements it has.
        dtype: What they are rounded to.
    """

    name: str
    begin: int
    size: int
    dtype: np.dtype


class Scratch(threading.local):
    """Arrays that a thread uses again for each piece: memory that is new takes longer than the arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[str, np.ndarray] = {}

    def array(self, use: str, size: int, dtype: np.dtype) -> np.ndarray:
        """Return an array with what it held before; nothing else may have the same use meanwhile."""
        nbytes = size * dtype.itemsize
        kept = self._kept.get(use)
        if kept is None or kept.nbytes < nbytes:
            kept = self._kept[use] = np.empty(nbytes, np.uint8)
        return kept[:nbytes].view(dtype)


class Writer(Protocol):
    """A file that is open for writing."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Write bytes."""
        ...


class Computed:
    """Tensors that are computed when they are written.

    Args:
        tensors: Name -> type and shape.
        metadata: Texts for the header of each file.
        compute: Returns a piece, in its type; called by several threads.
        sources: The files that it reads.
        progress: Called after each piece.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        compute: Callable[[Piece], np.ndarray],
        sources: Sequence[Source],
        progress: Progress | None,
    ) -> None:
        self.sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        self._tensors, self._metadata = tensors, dict(sorted(metadata.items()))
        self._compute, self._sources, self._progress = compute, sources, progress
        self._done, self._total = 0, sum(self.sizes.values())

    def write(self, file: Writer, names: Iterable[str]) -> None:
        """Write a file of some of the tensors.

        Raises:
            ValueError: A file that is read was changed.
            OSError: One cannot be read, or this one not be written.
        """
        header, ordered = header_of({name: self._tensors[name] for name in names}, self._metadata)
        file.write(header)
        pieces = (piece for name in ordered for piece in _pieces_of(name, self._tensors[name]))
        with closing(_computed(pieces, self._compute)) as arrays:
            for array in arrays:
                file.write(array.view(np.uint8).data)
                self._done += array.nbytes
                if self._progress:
                    self._progress(self._done, self._total)

    def check(self) -> None:
        """Raise ValueError if a file was changed since it was opened, though its pieces were read."""
        for source in self._sources:
            source.check()


def has_mean(dtype: np.dtype) -> bool:
    """Tell whether numbers of a type are averaged: reals and complex ones are, integers and booleans not."""
    return dtype in REALS.values() or dtype.kind == "c"


def real_type(dtype: npt.DTypeLike | None) -> np.dtype | None:
    """Return a type that averages are to have.

    Raises:
        TypeError: It is none of the format's real types.
    """
    narrow = None if dtype is None else np.dtype(dtype)
    if narrow and narrow not in REALS.values():
        raise TypeError(f"dtype must be one of {', '.join(map(str, REALS.values()))}, got {narrow}")
    return narrow


def wide_type(dtype: np.dtype) -> np.dtype:
    """Return what numbers of a type are added up in: float64, or complex128."""
    return np.result_type(dtype, np.float64)


def rounded(wide: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round numbers once to a type, by `narrowed`, whose temporary arrays are no larger than a block."""
    if dtype.isbuiltin == 1:
        return narrowed(wide, dtype)
    made = np.empty(wide.size, dtype)
    for begin in range(0, wide.size, _BLOCK):
        made[begin : begin + _BLOCK] = narrowed(wide[begin : begin + _BLOCK], dtype)
    return made


def in_type(tensor: Tensor, narrow: np.dtype | None) -> Tensor:
    """Return what a tensor is in another type: if it is real, and there is one."""
    return tensor._replace(dtype=narrow) if narrow and tensor.dtype in REALS.values() else tensor


def _pieces_of(name: str, tensor: Tensor) -> Iterator[Piece]:
    for begin in range(0, tensor.size, _PIECE):
        yield Piece(name, begin, min(_PIECE, tensor.size - begin), tensor.dtype)


def _computed(pieces: Iterable[Piece], compute: Callable[[Piece], np.ndarray]) -> Generator[np.ndarray]:
    """Yield what is computed of pieces, in their order; threads are as many pieces ahead as there are."""
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    ahead: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for piece in pieces:
                ahead.append(pool.submit(compute, piece))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody wants the others
