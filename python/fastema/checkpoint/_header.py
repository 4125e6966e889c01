"""The header of a safetensors file: which tensors it has, of which types and shapes, and where they lie.

8 bytes with the length of the header, the header in JSON, the tensors. It is written here, as the package
safetensors writes only what is in memory already; and read here, entry by entry, so that time and memory go
by its length, whoever wrote it.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from io import FileIO
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ._json import Entry, shown
from ._replace import StrPath

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
NAMES = {dtype: name for name, dtype in TYPES.items()}

_METADATA = "__metadata__"  # the header's own name, beside those of the tensors
_LONGEST_HEADER = 100_000_000  # bytes, by the format
_MOST_AXES = 32  # NumPy 1 has no more


class Tensor(NamedTuple):
    """A tensor's entry in a header: its type, its shape, and where its bytes begin."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int = 0  # bytes from the start of the file

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


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
            "dtype": NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _LONGEST_HEADER:
        raise ValueError(f"names and metadata must fit into {_LONGEST_HEADER} bytes, got {len(header)}")
    return len(header).to_bytes(8, "little") + header, names


def read_header(file: FileIO, path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors by name, in the header's order, and its metadata.

    Raises:
        ValueError: It is no whole safetensors file, or NumPy lacks the type of a tensor.
    """
    try:
        return _read_header(file)
    except TypeError as reason:
        raise ValueError(f"{path}: {reason}") from None
    except ValueError as reason:
        raise ValueError(f"{path} is no whole safetensors file: {reason}") from None


def _read_header(file: FileIO) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"of its {size} bytes a header of {length} must be there, up to {_LONGEST_HEADER}")
    header = file.read(length)
    if len(header) < length:
        raise ValueError(f"it must have a header of {length} bytes, got {len(header)}")
    tensors, metadata, end = {}, None, 8 + length
    for name, found in _entries(header, end):
        if name in tensors or (name == _METADATA and (metadata is not None or isinstance(found, Tensor))):
            raise ValueError(f"its header must have {shown(name)} once, got it twice")
        if isinstance(found, Tensor):
            tensors[name] = found
        else:
            metadata = found
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != end:
            raise ValueError(f"{shown(name)} must begin at byte {end}, where others end, got {tensor.begin}")
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"it must have {end} bytes by its header, got {size}")
    return tensors, metadata or {}


# --- entry by entry -------------------------------------------------------------------------------------

_SPACE = rb"[ \t\n\r]*+"
_PLAIN = rb'[^"\\\x00-\x1f]*+'
_STRING = _SPACE + rb'("' + _PLAIN + rb"(?:\\." + _PLAIN + rb')*+")' + _SPACE
_SIZE = rb"(?:0|[1-9][0-9]{0,18}+)"
_BEGIN = re.compile(rb"\{" + _SPACE + rb"(\})?")
_USUAL = re.compile(  # how most write a tensor; all other ways take three times as long
    b'"('
    + _PLAIN
    + rb')":\{"dtype":"([A-Z0-9_]++)","shape":\[((?:'
    + _SIZE
    + b"(?:,"
    + _SIZE
    + rb")*+)?+)\],"
    rb'"data_offsets":\[(' + _SIZE + b"),(" + _SIZE + rb")\]\}([,}])"
)
_KEY = re.compile(_STRING + b":" + _SPACE)
_TENSOR = re.compile(rb"\{[^{}]{0,4096}+\}")  # more than enough for 32 axes of 20 digits
_TEXTS = re.compile(b"(?:(null)|" + _BEGIN.pattern + b")")
_TEXT = re.compile(_STRING + b":" + _STRING + b"([,}])")
_NEXT = re.compile(_SPACE + b"([,}])")
_END = re.compile(_SPACE + rb"\Z")


def _matched(pattern: re.Pattern[bytes], header: bytes, at: int, needed: str) -> re.Match[bytes]:
    found = pattern.match(header, at)
    if found is None:
        raise ValueError(f"its header must have {needed} at byte {8 + at}, got {shown(header[at : at + 60])}")
    return found


def _entries(header: bytes, start: int) -> Iterator[tuple[str, Tensor | dict[str, str]]]:
    """Yield each tensor with its name, and the metadata with theirs.

    Args:
        header: Without its length.
        start: Where in the file the tensors begin.
    """
    found = _matched(_BEGIN, header, 0, "'{'")
    at, mark = found.end(), found[1] or b","
    while mark == b",":
        usual = _USUAL.match(header, at)
        if usual is not None:
            quoted, code, sizes, begin, end, mark = usual.groups()
            shape = tuple(map(int, sizes.split(b","))) if sizes else ()
            name, at = quoted.decode(), usual.end()
            yield name, _tensor(name, code.decode(), shape, (int(begin), int(end)), start)
            continue
        key = _matched(_KEY, header, at, "a name")
        name = _string(key[1])
        if name == _METADATA:
            texts, at = _texts(header, key.end())
            yield name, texts
        else:
            entry = _matched(_TENSOR, header, key.end(), f"an entry for {shown(name)}")
            yield name, _tensor(name, *_fields(name, entry[0]), start)
            at = entry.end()
        found = _matched(_NEXT, header, at, "',' or '}'")
        at, mark = found.end(), found[1]
    _matched(_END, header, at, "its end")


def _texts(header: bytes, at: int) -> tuple[dict[str, str], int]:
    """Return the metadata that begin at a byte, and where they end."""
    texts: dict[str, str] = {}
    found = _matched(_TEXTS, header, at, "an object of texts")
    at, mark = found.end(), found[1] or found[2] or b","
    while mark == b",":
        found = _matched(_TEXT, header, at, "a text with a name")
        key, at, mark = _string(found[1]), found.end(), found[3]
        if key in texts:
            raise ValueError(f"{_METADATA} must have {shown(key)} once, got it twice")
        texts[key] = _string(found[2])
    return texts, at


def _string(quoted: bytes) -> str:
    """Return a text of JSON."""
    text = quoted.decode()
    if "\\" not in text:
        return text[1:-1]
    unquoted: str = json.loads(text)
    unquoted.encode()  # refuses half of a surrogate pair, which no text has
    return unquoted


def _fields(name: str, entry: bytes) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Return type, shape and place of a tensor, of an entry in any order."""
    try:
        fields = json.loads(entry.decode())
        code, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        if type(code) is not str or type(shape) is not list:
            raise TypeError
        # bool is an int to Python, and no number of the format's
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise TypeError
        if not len(fields) == entry.count(b":") == 3:  # none is there twice
            raise TypeError
        if b"-" in entry:  # -0 is an int to Python, and a float to the format's own reader
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Entry(entry, shown(name)).refused("of dtype, shape and data_offsets, once each") from None
    return code, tuple(shape), (begin, end)


def _tensor(name: str, code: str, shape: tuple[int, ...], place: tuple[int, int], start: int) -> Tensor:
    """Return a tensor whose entry was checked, but for the places of all together.

    Raises:
        TypeError: NumPy lacks its type.
        ValueError: Its size is not by its type and shape.
    """
    dtype = TYPES.get(code)
    if dtype is None:
        raise TypeError(f"{shown(name)} has type {code[:100]}, which NumPy has not")
    nbytes, (begin, end) = math.prod(shape) * dtype.itemsize, place
    if begin + nbytes != end:
        needed, got = shown(nbytes), shown(end - begin)
        raise ValueError(f"{shown(name)} must have {needed} bytes by its type and shape, got {got}")
    if len(shape) > _MOST_AXES or (nbytes == 0 and not _fits(shape, dtype)):
        raise ValueError(f"{shown(name)} must have a shape that NumPy takes, got {shown(shape)}")
    return Tensor(dtype, shape, start + begin)


def _fits(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Tell whether NumPy takes a shape without elements: it multiplies the other sizes."""
    return math.prod(size or 1 for size in shape) * dtype.itemsize <= np.iinfo(np.intp).max
