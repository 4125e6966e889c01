"""A checkpoint of whatever layout as tensors by name: one file, or a folder as Hugging Face writes it.

A folder has ``model.safetensors``, or shards and ``model.safetensors.index.json``, which says in which of
them each tensor is. Where there is none of this name, a single file or index of another one will do.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._header import Tensor
from ._json import parsed, shown
from ._pieces import Computed
from ._plain import STATE
from ._replace import StrPath, new_folder, replacing
from ._source import Source, opened
from ._state import is_state

_FILE = ".safetensors"
_INDEX = ".safetensors.index.json"
EXTRA = "_extra_state"  # how names end of what modules of torch save beside their tensors
_MOST = 100_000_000  # bytes of an index, as of a header

# what is in no folder that is made of others: weights in other formats, and the state of a training
_WEIGHTS = (".bin", ".ckpt", ".distcp", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".pt", ".pth", _FILE)
_TRAINING = ("trainer_state.json", ".index.json")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors that can be read by name, without those that only an EMA reads.

    Attributes:
        path: As it was given.
        folder: Where it lies; None, if it is a single file.
        index: The name of its index; None, if it has none.
        extra: What the index says beside where tensors are.
        shards: Name of a file -> that file, in order.
        layout: Name of a tensor -> type, shape and place in its file.
        shard_of: Name of a tensor -> name of its file.
    """

    path: StrPath
    folder: Path | None
    index: str | None
    extra: Mapping[str, Any]
    shards: Mapping[str, Source]
    layout: Mapping[str, Tensor]
    shard_of: Mapping[str, str]

    @classmethod
    def at(cls, path: StrPath) -> "Checkpoint":
        """Read the headers of a file, a folder, or the index of a folder.

        Raises:
            ValueError: It is no whole checkpoint, or a folder with several.
            OSError: It cannot be read.
        """
        given = Path(path)
        entry = _entry(given) if given.is_dir() else given
        if not entry.name.endswith(_INDEX):
            shards = {entry.name: Source.at(entry if given.is_dir() else path)}
            return cls._of(path, given if given.is_dir() else None, shards)
        named, extra = _read_index(entry)
        shards = {name: Source.at(entry.with_name(name)) for name in dict.fromkeys(named.values())}
        return cls._of(path, entry.parent, shards, index=entry.name, named=named, extra=extra)

    @classmethod
    def _of(
        cls,
        path: StrPath,
        folder: Path | None,
        shards: Mapping[str, Source],
        *,
        index: str | None = None,
        named: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> "Checkpoint":
        found: dict[str, str] = {}
        for name, source in shards.items():
            for tensor in source.layout:
                if named is not None and named.get(tensor) != name:
                    raise ValueError(f"{source.path} has {shown(tensor)}, and {index} does not say so")
            found.update(dict.fromkeys(source.layout, name))
        for tensor, name in (named or {}).items():
            if tensor not in found:
                raise ValueError(f"{shards[name].path} must have {shown(tensor)}, by {index}, and has not")
        shard_of = {tensor: found[tensor] for tensor in named or found if not is_state(tensor)}
        layout = {tensor: shards[name].layout[tensor] for tensor, name in shard_of.items()}
        return cls(path, folder, index, extra or {}, shards, layout, shard_of)

    def place(self, name: str) -> StrPath:
        """Return the path of the file that a tensor is in."""
        return self.shards[self.shard_of[name]].path

    def read_piece(self, name: str, begin: int, target: np.ndarray) -> np.ndarray:
        """Fill an array with as many elements of a tensor, from one on, and return it.

        Raises:
            ValueError: Its file was changed.
            OSError: It cannot be read.
        """
        tensor = self.layout[name]
        self.shards[self.shard_of[name]].read(tensor.begin + begin * tensor.dtype.itemsize, target)
        return target

    def piece(self, name: str, begin: int, size: int) -> np.ndarray:
        """Return so many elements of a tensor, from one on; raises as `read_piece`."""
        return self.read_piece(name, begin, np.empty(size, self.layout[name].dtype))

    def write_alike(self, target: StrPath, computed: Computed) -> None:
        """Write what is computed as a checkpoint of this layout, all or nothing; see `average`.

        Raises:
            ValueError: The target is something else, or a file that is read was changed.
            OSError: A file cannot be read or written.
        """
        if self.folder is None:
            with replacing(target) as file:
                computed.write(file, self.layout)
                computed.check()
            return
        with new_folder(target) as folder:
            for name in self.shards:
                with open(folder / name, "xb") as file:
                    computed.write(file, [tensor for tensor, at in self.shard_of.items() if at == name])
            if self.index is not None:
                (folder / self.index).write_bytes(self._index_of(computed.sizes))
            for path in self.folder.iterdir():
                if _is_companion(path):
                    shutil.copyfile(path, folder / path.name)
            computed.check()

    def _index_of(self, sizes: Mapping[str, int]) -> bytes:
        """Return an index of the same shards, with tensors of so many bytes."""
        metadata = self.extra.get("metadata")
        old = metadata if isinstance(metadata, dict) else {}
        text = json.dumps(
            {
                **self.extra,
                "metadata": {**old, "total_size": sum(sizes.values())},
                "weight_map": {name: self.shard_of[name] for name in sizes},
            },
            indent=2,
            ensure_ascii=False,
        )
        return f"{text}\n".encode()


def check_fit(first: Checkpoint, other: Checkpoint) -> None:
    """Raise ValueError unless two checkpoints have tensors of the same names, shapes and types."""
    for name in sorted(first.layout.keys() ^ other.layout.keys()):
        if not name.endswith(EXTRA):
            has, lacks = (first, other) if name in first.layout else (other, first)
            raise ValueError(
                f"all files must have the same tensors: {has.path} has {name!r}, {lacks.path} has not"
            )
    for name, tensor in first.layout.items():
        for what in () if name.endswith(EXTRA) else ("shape", "dtype"):
            needed, got = getattr(tensor, what), getattr(other.layout[name], what)
            if needed != got:
                raise ValueError(
                    f"{name!r} must have one {what} in all files, "
                    f"got {needed} in {first.place(name)} and {got} in {other.place(name)}"
                )


def shared_metadata(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Return the metadata on which all files agree, but for an EMA's state."""
    sources = [source for checkpoint in checkpoints for source in checkpoint.shards.values()]
    shared = set.intersection(*(set(source.metadata.items()) for source in sources))
    return {key: text for key, text in shared if key != STATE}


def _is_companion(path: Path) -> bool:
    """Tell whether a file is one that whoever loads the weights beside it may need."""
    return path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS + _TRAINING)


def _entry(folder: Path) -> Path:
    """Return the file or index that stands for a folder.

    Raises:
        ValueError: There is none, or several may.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith((_FILE, _INDEX)))
    indexes = [name for name in names if name.endswith(_INDEX)]
    for found in ([name for name in names if name in (f"model{_FILE}", f"model{_INDEX}")], indexes or names):
        if len(found) == 1:
            return folder / found[0]
        if found:
            break
    needed = "must hold the weights of one model in safetensors files"
    if names:
        raise ValueError(
            f"{folder} {needed}, and several of {shown(names)} may be: give the right one itself"
        )
    raise ValueError(f"{folder} {needed}, with an index if they are several, and has none")


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return name of a tensor -> name of a file, and what else an index says.

    Raises:
        ValueError: It is no index, or names files elsewhere.
        OSError: It cannot be read.
    """
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size > _MOST:
            raise ValueError(f"{path} must be an index of at most {_MOST} bytes, and is larger")
        data = file.read(_MOST)
    try:
        index = parsed(data.decode(), "it")
        named = {tensor: entry.text() for tensor, entry in index.field("weight_map").fields()}
        for name in named.values():
            if os.path.basename(name) != name or not name.endswith(_FILE) or "\0" in name:
                raise ValueError(f"it must name safetensors files beside it, got {shown(name)}")
    except ValueError as reason:  # of UTF-8, too
        raise ValueError(f"{path} is no index of weights: {reason}") from None
    if not named:
        raise ValueError(f"{path} is no index of weights: it names no tensors")
    return named, {key: value for key, value in index.value.items() if key != "weight_map"}
