"""The safetensors format: a file is written from arrays, or read as views of it."""

from collections.abc import Iterator, Mapping

import numpy as np

from .._arrays import Remote, as_view, unmasked
from .._types import DType
from ._header import NAMES, TYPES, Tensor, header_of, read_header
from ._replace import StrPath, replacing
from ._source import opened


def write(path: StrPath, tensors: Mapping[str, object], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, all or nothing.

    A crash at any moment leaves the file that was there or the new one, each whole. The new one is written
    beside the old, as ``.<name>.<random>.partial`` (of a long name, a hash), with its rights, flushed to
    the disk and renamed. Of several writers of one file none waits, and the last one's stays. What a crash
    left is removed by the next call; where the file system has no locks, it stays.

    Args:
        path: The file; a symbolic link stays one, and what it leads to is replaced.
        tensors: Name -> array: NumPy's (in any byte order, without a mask), torch's (in CPU memory), or
            anything with ``__dlpack__``; any shape.
        metadata: Texts for the header.

    Raises:
        TypeError: A tensor is no array, has a mask or a type that the format lacks, or `metadata` is not of
            texts.
        ValueError: `path` is there and no file, or a tensor has the header's own name, ``__metadata__``.
        OSError: The file cannot be written. The old one is as it was, in all these cases. Only after Ctrl-C
            it may be the new one.

    Example:
        >>> import tempfile, numpy as np
        >>> from fastema import checkpoint
        >>> path = tempfile.mkdtemp() + "/averages.safetensors"
        >>> checkpoint.write(path, {"w": np.ones((2, 3), np.float32)}, {"step": "7"})
        >>> file = checkpoint.File(path)
        >>> file["w"].shape, file.metadata
        ((2, 3), {'step': '7'})
    """
    arrays: dict[str, np.ndarray | Remote] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors must have names that are texts, got {name!r}")
        array: np.ndarray | Remote
        if isinstance(tensor, Remote):
            array = tensor
        elif isinstance(tensor, np.ndarray | np.generic):  # also in another byte order
            array = unmasked(np.asanyarray(tensor), f"tensors[{name!r}]")
        else:
            array = as_view(tensor, f"tensors[{name!r}]")
        if array.dtype.newbyteorder("=") not in NAMES:
            raise TypeError(f"tensors[{name!r}] must be of {', '.join(TYPES)}, got {array.dtype}")
        arrays[name] = array
    layout = {name: Tensor(array.dtype.newbyteorder("="), array.shape) for name, array in arrays.items()}
    header, names = header_of(layout, metadata or {})
    with replacing(path) as file:
        file.write(header)
        for name in names:
            for piece in _pieces(arrays[name], layout[name].dtype):
                file.write(piece.view(np.uint8).data)


def _pieces(array: np.ndarray | Remote, dtype: DType) -> Iterator[np.ndarray]:
    if isinstance(array, Remote):
        yield from array.pieces()
    else:
        yield np.ascontiguousarray(array, dtype).reshape(-1)


class File(Mapping[str, np.ndarray]):
    """A safetensors file: name -> array, read-only views of the mapped file.

    Nothing is read before it is used. The views stay what they are when the file is replaced, as `write`
    does; a file that is cut off in place, by anyone, ends the process that touches what is gone (SIGBUS).
    `EMA.load`, `average` and `fastema.posthoc` read instead, and raise.

    Args:
        path: Of the file.

    Attributes:
        metadata: The header's texts.
        shapes: Name -> shape.
        dtypes: Name -> type; bfloat16 and the 8-bit types are those of ml_dtypes.

    Raises:
        ValueError: It is no whole safetensors file.
        OSError: It cannot be read.

    Example:
        >>> import tempfile, numpy as np
        >>> from fastema import checkpoint
        >>> path = tempfile.mkdtemp() + "/averages.safetensors"
        >>> checkpoint.write(path, {"w": np.arange(3.0), "b": np.zeros((), np.float16)})
        >>> file = checkpoint.File(path)
        >>> file.dtypes
        {'w': dtype('float64'), 'b': dtype('float16')}
        >>> file["w"]
        array([0., 1., 2.])
    """

    def __init__(self, path: StrPath) -> None:
        with opened(path) as file:
            self._layout, self.metadata = read_header(file, path)
            self._bytes = np.asarray(np.memmap(file, np.uint8, "r"))
        self.shapes = {name: tensor.shape for name, tensor in self._layout.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._layout.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._layout[name]
        part = self._bytes[tensor.begin : tensor.begin + tensor.nbytes]
        return part.view(tensor.dtype).reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)
