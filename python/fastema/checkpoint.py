"""Files of averages: how does one replace another so that no crash breaks it, and what is their mean?

Safetensors files: 8 bytes with the length of a header, the header in JSON, the tensors. The header is ours
to write because the package writes only what is in memory already; reading trusts its checks.
"""

import errno
import fcntl
import json
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import reduce
from io import BufferedReader, BufferedWriter, FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from . import _shards, schedules
from ._arrays import as_view

__all__ = ["File", "average", "write"]

# the format's names, the reals first
_REALS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{
        code: np.dtype(getattr(ml_dtypes, name))
        for code, name in {
            "F8_E4M3": "float8_e4m3fn",
            "F8_E5M2": "float8_e5m2",
            "F8_E4M3FNUZ": "float8_e4m3fnuz",
            "F8_E5M2FNUZ": "float8_e5m2fnuz",
            "F8_E8M0": "float8_e8m0fnu",
        }.items()
        if hasattr(ml_dtypes, name)  # TensorFlow 2.16 and 2.17 insist on an ml_dtypes without the last
    },
}
_TYPES = {
    **_REALS,
    "C64": np.dtype(np.complex64),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _TYPES.items()}

_Path = str | os.PathLike[str]
_METADATA = "__metadata__"  # beside the tensors' names in the header
_OFFSETS = "DCP_SHARDING_INFO"  # in the metadata; torch.distributed.checkpoint reads it, too
_STATE = "fastema"  # in the metadata, and where names of tensors begin that are for an EMA alone
_VERSION = 1  # of what is kept there
_LONGEST_HEADER = 100_000_000  # bytes, by the format
_PIECE = 1 << 18  # elements: what `average` holds of a tensor at a time


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int = 0  # bytes from the start of the file

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def write(path: _Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, all or nothing.

    A crash at any moment leaves the file that was there or the new one, each whole. The new one is written
    beside the old, as ``.<name>.partial``, flushed to the disk and renamed; what a crash left under that
    name is overwritten by the next call. Of several writers of one file each waits for the one before.

    Args:
        path: The file; a symbolic link stays one, and what it leads to is replaced.
        tensors: Name -> array: NumPy's, torch's (in CPU memory), or anything with ``__dlpack__``; any shape.
        metadata: Texts for the header.

    Raises:
        TypeError: A tensor is no array or has a type that the format lacks, or `metadata` is not of texts.
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
        is_numpys = isinstance(tensor, np.ndarray | np.generic)
        array = np.asarray(tensor) if is_numpys else as_view(tensor, f"tensors[{name!r}]")
        if array.dtype.newbyteorder("=") not in _CODES:
            raise TypeError(f"tensors[{name!r}] must be of {', '.join(_TYPES)}, got {array.dtype}")
        arrays[name] = array
    layout = {name: _Tensor(array.dtype.newbyteorder("="), array.shape) for name, array in arrays.items()}
    header, names = _header(layout, metadata or {})
    with _replacing(path) as file:
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

    def __init__(self, path: _Path) -> None:
        with Path(path).open("rb") as file:
            self._layout, self.metadata = _read_header(file, path)
            self._bytes = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
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


def average(
    paths: Iterable[_Path],
    output: _Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write the mean of safetensors files, as `write` does: all or nothing.

    ``sum(weight * tensor) / sum(weights)`` in float64, in the order of `paths`, rounded once to the type in
    the file. Files are read piece by piece: about 10 MB of memory, whatever their number and size.

    Tensors of integers and booleans have no mean: they are taken from the last file. The metadata on which
    all files agree are kept. Of files of `EMA.save`, what only an EMA reads is left out.

    Args:
        paths: The files, one or more, with tensors of the same names, shapes and types.
        output: The file to write; may be one of `paths`.
        weights: A number for each file. None: all alike.
        dtype: Of the averages: one of the real types of the format. None: as in the files. Complex averages
            keep theirs.
        progress: Called with the bytes done and the bytes in all, after each piece.

    Returns:
        The names of the tensors that were taken from the last file.

    Raises:
        TypeError: `paths` is a single path, or `dtype` is none of the format's real types.
        ValueError: A file is no safetensors file or does not fit the first, or `weights` are not finite,
            not as many as the files, or add up to 0 or beyond float64; or a file is changed meanwhile.
        OSError: A file cannot be read, or `output` cannot be written. It is as it was, in all these cases.

    Example:
        >>> import tempfile, numpy as np
        >>> from fastema import checkpoint
        >>> paths = [f"{tempfile.mkdtemp()}/{i}.safetensors" for i in range(3)]
        >>> for i, path in enumerate(paths):
        ...     checkpoint.write(path, {"w": np.full(2, float(i)), "step": np.array(100 * i)})
        >>> checkpoint.average(paths[:2], paths[2], weights=[1, 3])
        ['step']
        >>> checkpoint.File(paths[2])["w"]
        array([0.75, 0.75])
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths must be a sequence of paths, got {paths!r}")
    paths = list(paths)
    if not paths:
        raise ValueError("paths must hold one path or more, got none")
    shares = [1.0] * len(paths) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(paths):
        raise ValueError(f"weights must hold a number for each of the {len(paths)} files, got {len(shares)}")
    if not np.isfinite([*shares, sum(shares)]).all() or sum(shares) == 0:
        raise ValueError(f"weights must be finite and not add up to 0 or to infinity, got {shares}")
    narrow = None if dtype is None else np.dtype(dtype)
    if narrow and narrow not in _REALS.values():
        raise TypeError(f"dtype must be one of {', '.join(map(str, _REALS.values()))}, got {narrow}")
    sources = [_Source.of(path) for path in paths]
    first = sources[0].layout
    for source in sources[1:]:
        _check_fit(sources[0], source)
    means = {
        name: replace(tensor, dtype=narrow) if narrow and tensor.dtype in _REALS.values() else tensor
        for name, tensor in first.items()
    }
    shared = set.intersection(*(set(source.metadata.items()) for source in sources))
    header, names = _header(means, {key: text for key, text in sorted(shared) if key != _STATE})
    done, total = 0, sum(tensor.nbytes for tensor in means.values())
    with _replacing(output) as written:
        written.write(header)
        for name in names:
            for begin in range(0, first[name].size, _PIECE):
                piece = _mean(sources, shares, name, begin, means[name].dtype)
                written.write(piece.view(np.uint8).data)
                done += piece.nbytes
                if progress:
                    progress(done, total)
    return [name for name, tensor in first.items() if not _has_mean(tensor.dtype)]


def write_state(
    path: _Path,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    shown: Sequence[Mapping[str, np.ndarray]],
    layout: _shards.Layout | None = None,
) -> None:
    """Write the state of an EMA, its first averages under the names of the values.

    Args:
        path: As for `write`.
        state: As `EMA.state_dict` returns it.
        config: The constructor's arguments, beside those in the state.
        shown: For each decay the averages as their users see them, where they are kept otherwise.
        layout: Of sharded values: the files to write are those of a set.

    Raises:
        ValueError: A value has a name that would be taken for the state.
    """
    decay = config["decay"]
    plain = {
        "version": _VERSION,
        **{key: state[key] for key in ("step", "decay", "products", "swapped")},
        "copied": list(dict.fromkeys(layout.names[part] if layout else part for part in state["copied"])),
        "config": {
            **state["config"],
            **config,
            "decay": [_described(d) for d in decay] if isinstance(decay, list) else _described(decay),
        },
    }
    # transformers refuses a file whose metadata lack a format; all other readers pass over it
    if layout is None:
        write(path, _tensors_of(state, shown), {"format": "pt", _STATE: json.dumps(plain)})
        return
    for number, blocks in layout.files.items():
        tensors = _tensors_of(
            {
                **state,
                **{key: [layout.of_file(number, x) for x in state[key]] for key in ("averages", "carries")},
                **{key: layout.of_file(number, state[key]) for key in ("copied", "values")},
            },
            [layout.of_file(number, arrays) for arrays in shown],
        )
        begins = {name: {"saved_offsets": blocks[_value_of(name)].begin} for name in tensors}
        shapes = {name: block.whole for name, block in blocks.items()}
        metadata = {"set": [number, layout.total], "shapes": shapes, **plain}
        write(
            _shards.path_of(Path(path), number, layout.total),
            tensors,
            {"format": "pt", _OFFSETS: json.dumps(begins), _STATE: json.dumps(metadata)},
        )


def _tensors_of(state: Mapping[str, Any], shown: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    tensors = _prefixed("", 0, state["copied"])
    for k, kept in enumerate(state["averages"]):
        tensors |= _prefixed("averages" if k else "", k, shown[k] or kept)
        tensors |= _prefixed("kept", k, kept if shown[k] else {})
    for k, carries in enumerate(state["carries"]):
        tensors |= _prefixed("carries", k, carries)
    return tensors | _prefixed("values", 0, state["values"])


def read_state(path: _Path, decay: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `write_state` wrote, the arrays as views of mapped files, and all of the configuration.

    Args:
        path: Of the file, or of a set of them, or of one of a set.
        decay: What takes the place of the file's. None: the file's.

    Returns:
        The state, of which the arrays are NumPy's, or `_shards.Pieces` from a set, and the configuration.

    Raises:
        ValueError: The file holds no state, or one of a later version, or of a schedule only the name; or a
            set holds files of more than one save.
        FileNotFoundError: The file, or one of the set, is not there.
    """
    path = Path(path)
    try:
        state, config = _parsed_state(path)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as reason:
        raise ValueError(f"{path} holds a state that EMA.save() did not write: {reason!r}") from None
    if decay is not None:
        config["decay"] = decay
    elif isinstance(config["decay"], list):
        config["decay"] = [_restored(d, path) for d in config["decay"]]
    else:
        config["decay"] = _restored(config["decay"], path)
    return state, config


def _parsed_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    # a name alone makes no set: a single file may have numbers in it, too
    alone = path.exists() and "set" not in _state_in(File(path), path)
    members = [] if alone and _shards.is_numbered(path) else _shards.set_of(path)
    is_set, paths = bool(members), members or [path]
    files = [File(one) for one in paths]
    states = [_state_in(file, one) for file, one in zip(files, paths, strict=True)]
    found: dict[tuple[str, int], dict[str, Any]] = defaultdict(dict)
    for number, (file, state) in enumerate(zip(files, states, strict=True), 1):
        place, shapes = state.pop("set", None), state.pop("shapes", {})
        if place != ([number, len(paths)] if is_set else None):
            raise ValueError(f"{paths[number - 1]} must have the name that it was saved under")
        for key in state:
            if state[key] != states[0][key]:
                raise ValueError(
                    f"{paths[0]} and {paths[number - 1]} must be of one save, and their {key} is "
                    f"{states[0][key]} and {state[key]}"
                )
        begins = json.loads(file.metadata[_OFFSETS]) if is_set else {}
        for name, array in file.items():
            own = _value_of(name)
            kind, k = ("copied" if own in state["copied"] else "averages"), 0
            if _is_state(name):
                kind, k = name.split(".", 3)[1], int(name.split(".", 3)[2])
            if is_set:
                pieces = found[kind, k].setdefault(own, _shards.Pieces(own, tuple(shapes[own])))
                pieces.add(tuple(begins[name]["saved_offsets"]), array)
            else:
                found[kind, k][own] = array
    state = states[0]
    lists, config = range(len(state["products"])), state["config"]
    state["averages"] = [found["kept", k] or found["averages", k] for k in lists]
    state["carries"] = [found["carries", k] for k in lists if config["rounding"] == "compensated"]
    state["copied"], state["values"] = found["copied", 0], found["values", 0]
    return state, config


def _state_in(file: File, path: _Path) -> dict[str, Any]:
    """Return the plain values of a state in a file's metadata."""
    if _STATE not in file.metadata:
        raise ValueError(f"{path} holds no state of an EMA: EMA.save() did not write it")
    state: dict[str, Any] = json.loads(file.metadata[_STATE])
    if state.pop("version") != _VERSION:
        raise ValueError(f"{path} was written by a later fastema, in a way that this one does not know")
    return state


def _value_of(name: str) -> str:
    """Return the name of the value that a tensor in a file is of."""
    return name.split(".", 3)[3] if _is_state(name) else name


def _is_state(name: str) -> bool:
    return name.startswith(f"{_STATE}.")


def _prefixed(kind: str, k: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name in arrays:
        if _is_state(name):
            raise ValueError(f"values must not have names that begin with '{_STATE}.', got {name!r}")
    return {f"{_STATE}.{kind}.{k}.{name}" if kind else name: array for name, array in arrays.items()}


def _described(decay: Any) -> Any:
    """Describe a decay in JSON: a schedule of the user's own only by its name."""
    if not callable(decay):
        return decay
    kind = type(decay)
    if kind.__module__ == schedules.__name__:
        return {"schedule": kind.__name__, **asdict(decay)}
    named = decay if hasattr(decay, "__qualname__") else kind
    return {"schedule": f"{named.__module__}.{named.__qualname__}"}


def _restored(decay: Any, path: _Path) -> Any:
    if not isinstance(decay, dict):
        return decay
    kind = decay.pop("schedule")
    if kind not in schedules.__all__:
        raise ValueError(f"decay must be given: of the schedule {kind} {path} holds only the name")
    return getattr(schedules, kind)(**decay)


def _has_mean(dtype: np.dtype) -> bool:
    return dtype in _REALS.values() or dtype.kind == "c"


@dataclass(frozen=True)
class _Source:
    """A file to average. It is opened for each piece: a process may have no more than 256 files open.

    Attributes:
        path: Of the file.
        layout: Its tensors, without those that only an EMA reads.
        metadata: The header's texts.
        identity: What is another if the file is another by then.
    """

    path: _Path
    layout: dict[str, _Tensor]
    metadata: dict[str, str]
    identity: tuple[int, ...]

    @classmethod
    def of(cls, path: _Path) -> "_Source":
        with Path(path).open("rb") as file:
            layout, metadata = _read_header(file, path)
            own = {name: tensor for name, tensor in layout.items() if not _is_state(name)}
            return cls(path, own, metadata, _identity(file))

    def piece(self, name: str, begin: int) -> np.ndarray:
        """Read a tensor from element `begin` on, as much as is held at a time."""
        tensor = self.layout[name]
        piece = np.empty(min(_PIECE, tensor.size - begin), tensor.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(tensor.begin + begin * tensor.dtype.itemsize)
            if _identity(file) != self.identity or _read_into(file, piece) != piece.nbytes:
                raise ValueError(f"{self.path} was changed while it was read")
        return piece


def _identity(file: BufferedReader | FileIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_into(file: FileIO, array: np.ndarray) -> int:
    """Fill an array from where a file is; return how many bytes there were, for one read may bring less."""
    rest = memoryview(array.view(np.uint8).data)
    while rest and (count := file.readinto(rest)):
        rest = rest[count:]
    return array.nbytes - len(rest)


def _mean(
    sources: Sequence[_Source], shares: Sequence[float], name: str, begin: int, dtype: np.dtype
) -> np.ndarray:
    """Return a piece of a tensor's mean, from element `begin` on; the last one's where there is no mean."""
    own = sources[0].layout[name].dtype
    if not _has_mean(own):
        return sources[-1].piece(name, begin)
    wide = np.result_type(own, np.float64)
    with np.errstate(all="ignore"):  # infinities and NaN pass as they do in sums
        terms = (
            np.multiply(source.piece(name, begin), share, dtype=wide)
            for source, share in zip(sources, shares, strict=True)
        )
        return _narrowed(reduce(np.add, terms) / sum(shares), dtype)


def _narrowed(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round float64 once; ml_dtypes rounds to float32 first, and so twice.

    Float32 is therefore rounded to odd: what was cut off stays visible in the last bit, on the right side
    of every tie of a narrower type.
    """
    if dtype.isbuiltin == 1:
        return x.astype(dtype)
    near = x.astype(np.float32)
    bits = near.view(np.uint32)
    bits -= np.abs(near) > np.abs(x)
    bits |= near != x
    return near.astype(dtype)


def _check_fit(first: _Source, other: _Source) -> None:
    for name in sorted(first.layout.keys() ^ other.layout.keys()):
        has, lacks = (first, other) if name in first.layout else (other, first)
        raise ValueError(
            f"all files must have the same tensors: {has.path} has {name!r}, {lacks.path} has not"
        )
    for name, tensor in first.layout.items():
        for what in ("shape", "dtype"):
            needed, got = getattr(tensor, what), getattr(other.layout[name], what)
            if needed != got:
                raise ValueError(
                    f"{name!r} must have one {what} in all files, "
                    f"got {needed} in {first.path} and {got} in {other.path}"
                )


def _header(tensors: Mapping[str, _Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """Return a file's first bytes, and the names in the order in which the tensors follow."""
    if _METADATA in tensors:
        raise ValueError(f"tensors must not have the name {_METADATA!r}: it is the header's")
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata must be texts, got {key!r}: {text!r}")
    # widest first: all are aligned then, with no gap between them, which the format forbids
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _LONGEST_HEADER:
        raise ValueError(f"names and metadata must fit into {_LONGEST_HEADER} bytes, got {len(header)}")
    return len(header).to_bytes(8, "little") + header, names


def _read_header(file: BufferedReader, path: _Path) -> tuple[dict[str, _Tensor], dict[str, str]]:
    """Return a file's tensors, as they are named in the header, and its metadata."""
    try:
        with safe_open(path, "numpy"):  # checks everything: lengths, shapes, gaps, overlaps
            pass
    except SafetensorError as reason:
        raise ValueError(f"{path} is no whole safetensors file: {reason}") from None
    length = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(length))
    metadata = entries.pop(_METADATA, None) or {}
    for name, entry in entries.items():
        if entry["dtype"] not in _TYPES:
            raise ValueError(f"{path}: {name!r} has type {entry['dtype']}, which NumPy has not")
    return {
        name: _Tensor(_TYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }, metadata


@contextmanager
def _replacing(path: _Path) -> Iterator[BufferedWriter]:
    """Open a file that takes the place of the one at `path` if the block ends well; else nothing changes."""
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} must be a file or not be there")
    if not target.parent.is_dir():  # said of the folder, and not of a file that nobody knows
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(target.parent))
    beside = target.with_name(f".{target.name}.partial")
    with _locked(beside) as file:
        try:
            file.truncate(0)  # what a crash left
            yield file
            file.flush()
            os.fsync(file.fileno())
            beside.replace(target)
        except BaseException:
            beside.unlink()
            raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name; without it the old file could be back after a power failure
    finally:
        os.close(folder)


def _locked(path: Path) -> BufferedWriter:
    """Open a file for writing that no other process or thread has open in this way."""
    while True:
        file = path.open("ab")
        with suppress(OSError):  # some network file systems have no locks: there, one writer at a time
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # the writer that had it is done, and has renamed it
