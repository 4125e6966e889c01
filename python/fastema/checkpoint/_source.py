"""Reading files that may be anything, and may change meanwhile.

Only regular files are opened, and nothing waits for a pipe. What is copied is read, never mapped: to touch a
mapped file that was cut off is a bus error, to read it says so.
"""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from io import FileIO

import numpy as np
import numpy.typing as npt

from .. import _system
from ._header import Tensor, read_header
from ._replace import StrPath

_PIECE = 1 << 22  # bytes: what is read at a time of which only a part is wanted


def opened(path: StrPath) -> FileIO:
    """Open a file for reading, without a buffer.

    Raises:
        ValueError: It is a pipe, a device or a socket. Nothing is read from it, nor waited for.
        OSError: It cannot be opened.
    """
    unwaited = _system.flags_of("O_NONBLOCK", "O_NOCTTY")
    file = FileIO(os.fspath(path), opener=lambda name, flags: os.open(name, flags | unwaited))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path} must be a file, and is a pipe, a device or something else")
    return file


@dataclass(frozen=True)
class Source:
    """A file whose header was read and checked, to read parts of its tensors from.

    Attributes:
        path: Of the file.
        layout: Its tensors.
        metadata: The header's texts.
        identity: Tells this file, as it is, from what may be there later.
        held: The open file, which stays this one where another takes its place. None: it is opened anew for
            each part, as a process may have no more than 256 open.
    """

    path: StrPath
    layout: dict[str, Tensor]
    metadata: dict[str, str]
    identity: tuple[int, ...]
    held: FileIO | None

    @classmethod
    def at(cls, path: StrPath, holder: ExitStack | None = None) -> "Source":
        """Open a file and read its header.

        Args:
            path: Of the file.
            holder: Keeps it open, until that is closed. None: nothing does.

        Raises:
            ValueError: It is no whole safetensors file.
            OSError: It cannot be read.
        """
        with ExitStack() as stack, _named(path):
            file = stack.enter_context(opened(path))
            layout, metadata = read_header(file, path)
            source = cls(path, layout, metadata, _identity(file.fileno()), file if holder else None)
            if holder:
                holder.push(stack.pop_all())
            return source

    def read(self, begin: int, target: np.ndarray) -> None:
        """Fill a contiguous array with the bytes from one of the file's on.

        Raises:
            ValueError: The file was changed.
            OSError: It cannot be read.
        """
        rest = memoryview(target.reshape(-1).view(np.uint8).data)
        with opened(self.path) if self.held is None else nullcontext(self.held) as file, _named(self.path):
            while rest and (count := _system.read_at(file, begin, rest)):
                rest, begin = rest[count:], begin + count
            if rest or _identity(file.fileno()) != self.identity:
                raise self._changed()

    def check(self) -> None:
        """Raise ValueError if the file was changed since its header was read; OSError if it is gone."""
        with opened(self.path) if self.held is None else nullcontext(self.held) as file:
            if _identity(file.fileno()) != self.identity:
                raise self._changed()

    def _changed(self) -> ValueError:
        return ValueError(f"{self.path} was changed while it was read")


@contextmanager
def _named(path: StrPath) -> Iterator[None]:
    """Name a file in errors of the system, which knows its number alone."""
    try:
        yield
    except OSError as reason:
        raise OSError(reason.errno, reason.strerror, os.fspath(path)) from None


def _identity(descriptor: int) -> tuple[int, ...]:
    """Return what changes when a file is changed or replaced."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Stored:
    """A tensor in a file, or a part of it: NumPy reads it where it is used, and nothing is kept.

    Args:
        source: The file.
        tensor: Its entry.
        begin: Where the part begins. None: it is all of the tensor.
        shape: Of the part.

    Attributes:
        shape: Of the part.
        dtype: Of the tensor.
    """

    __slots__ = ("_begin", "_source", "_tensor", "dtype", "shape")

    def __init__(
        self,
        source: Source,
        tensor: Tensor,
        begin: tuple[int, ...] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self._source, self._tensor, self._begin = source, tensor, begin
        self.shape = tensor.shape if shape is None else shape
        self.dtype = tensor.dtype

    def __getitem__(self, slices: tuple[slice, ...]) -> "Stored":
        """Return a part, by a slice with both ends for each axis."""
        ours = self._begin or (0,) * len(slices)
        begin = tuple(at + span.start for at, span in zip(ours, slices, strict=True))
        return Stored(self._source, self._tensor, begin, tuple(span.stop - span.start for span in slices))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        self.read_into(array)
        return array if dtype is None else array.astype(dtype, copy=False)

    def read_into(self, target: np.ndarray) -> None:
        """Fill an array of this type and shape, of any order in memory.

        Raises:
            ValueError: The file was changed.
            OSError: It cannot be read.
        """
        begin = self._begin or (0,) * len(self.shape)
        spans = [slice(at, at + size) for at, size in zip(begin, self.shape, strict=True)]
        if target.size:
            self._fill(self._tensor.begin, self._tensor.shape, spans, target)

    def flat(self, begin: int, size: int) -> np.ndarray:
        """Read so many elements of a whole tensor, from one on, in a row.

        Raises:
            ValueError: The file was changed.
            OSError: It cannot be read.
        """
        array = np.empty(size, self.dtype)
        self._source.read(self._tensor.begin + begin * self.dtype.itemsize, array)
        return array

    def _fill(self, begin: int, shape: tuple[int, ...], spans: list[slice], target: np.ndarray) -> None:
        """Fill an array with the part that spans are of one in the file that begins at a byte."""
        row = math.prod(shape[1:]) * self.dtype.itemsize
        if not shape:
            shape, spans, target = (1,), [slice(0, 1)], target.reshape(1)
        first, stop = spans[0].start, spans[0].stop
        whole = all(span == slice(0, n) for span, n in zip(spans[1:], shape[1:], strict=True))
        if whole and target.flags.c_contiguous:
            self._source.read(begin + first * row, target)
            return
        if len(shape) > 1 and row > _PIECE:
            for i in range(first, stop):
                self._fill(begin + i * row, shape[1:], spans[1:], target[i - first])
            return
        rows = max(1, _PIECE // row)
        for i in range(first, stop, rows):
            piece = np.empty((min(rows, stop - i), *shape[1:]), self.dtype)
            self._source.read(begin + i * row, piece)
            target[i - first : i - first + len(piece)] = piece[(slice(None), *spans[1:])]
