"""The safetensors format: how named arrays lie in a file, and how such a file is written and read.

8 bytes with the length of the header, the header in JSON, the tensors. The package safetensors writes only
what is in memory already, so the header is written here; of what is read, its checks come first.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from .._arrays import as_view, unmasked
from ._replace import StrPath, replacing

# the format's names of NumPy's types, the reals first
REALS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
TYPES = {
    **REALS,
    "C64": np.dtype(np.complex64),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in TYPES.items()}

_METADATA = "__metadata__"  # the header's own name, beside those of the tensors
_LONGEST_HEADER = 100_000_000  # bytes, by the format


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry in a header: its type, its shape, and where its bytes begin."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int = 0  # bytes from the start of the file

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def write(path: StrPath, tensors: Mapping[str, object], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, all or nothing.

    A crash at any moment leaves the file that was there or the new one, each whole. The new one is written
    beside the old, as ``.<name>.partial`` (of a long name, a hash), flushed to the disk and renamed; what a
    crash left under that name is overwritten by the next call. Of several writers of one file each waits for
    the one before.

    Args:
        path: The file; a symbolic link stays one, and what it leads to is replaced.
        tensors: Name -> array: NumPy's (in any byte order, without a mask), torch's (in CPU memory), or
            anything with ``__dlpack__``; any shape.
        metadata: Texts for the header.

    Raises:
        TypeError: A tensor is no array, has a mask or a type that the format lacks, or `metadata` is not of
            texts.
        ValueError: `path` is there and no file, or a tensor has the header's own name, ``__metadata__``.
        OSError: The file cannot be written. The old one is as it was, in all these cases.

    Example:
        >>> import tempfile, numpy as np
        >>> from fastema import checkpoint
        >>> path = tempfile.mkdtemp() + "/averages.safetensors"
        >>> checkpoint.write(path, {"w": np.ones((2, 3), np.float32)}, {"step": "7"})
        >>> file = checkpoint.File(path)
        >>> file["w"].shape, file.metadata
        ((2, 3), {'step': '7'})
    """
    arrays = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors must have names that are texts, got {name!r}")
        if isinstance(tensor, np.ndarray | np.generic):  # also in another byte order
            array = unmasked(np.asanyarray(tensor), f"tensors[{name!r}]")
        else:
            array = as_view(tensor, f"tensors[{name!r}]")
        if array.dtype.newbyteorder("=") not in _NAMES:
            raise TypeError(f"tensors[{name!r}] must be of {', '.join(TYPES)}, got {array.dtype}")
        arrays[name] = array
    layout = {name: Tensor(array.dtype.newbyteorder("="), array.shape) for name, array in arrays.items()}
    header, names = header_of(layout, metadata or {})
    with replacing(path) as file:
        file.write(header)
        for name in names:
            dense = np.ascontiguousarray(arrays[name], layout[name].dtype)
            file.write(dense.reshape(-1).view(np.uint8).data)


class File(Mapping[str, np.ndarray]):
    """A safetensors file: name -> array, read-only views of the mapped file.

    Nothing is read before it is used. The views stay what they are when the file is replaced.

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
        with Path(path).open("rb") as file:
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


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """Return a file's header, its length included, and the names in the order in which the tensors follow.

    Raises:
        TypeError: `metadata` is not of texts.
        ValueError: A tensor has the header's own name, or the header is longer than the format allows.
    """
    if _METADATA in tensors:
        raise ValueError(f"tensors must not have the name {_METADATA!r}: it is the header's")
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata must be texts, got {key!r}: {text!r}")
    # widest first: all are aligned then, with no gap between them, which the format forbids
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    entries: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _LONGEST_HEADER:
        raise ValueError(f"names and metadata must fit into {_LONGEST_HEADER} bytes, got {len(header)}")
    return len(header).to_bytes(8, "little") + header, names


def read_header(file: BufferedReader, path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors by name, in the header's order, and its metadata.

    Raises:
        ValueError: It is no whole safetensors file, or NumPy lacks the type of a tensor.
    """
    try:
        with safe_open(path, "numpy"):  # checks everything: lengths, shapes, gaps, overlaps
            pass
    except SafetensorError as reason:
        raise ValueError(f"{path} is no whole safetensors file: {reason}") from None
    length = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(length))
    metadata = entries.pop(_METADATA, None) or {}
    for name, entry in entries.items():
        if entry["dtype"] not in TYPES:
            raise ValueError(f"{path}: {name!r} has type {entry['dtype']}, which NumPy has not")
    return {
        name: Tensor(TYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }, metadata
