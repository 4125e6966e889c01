"""Sets of files, which hold sharded values: which file holds which block, and how are blocks put together?

A sharded value lies in several processes or on several devices, and nobody has all of it. Its blocks are
saved where they lie, and loaded by whoever needs a part of them, however it is cut by then.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._arrays.shards import Block, Shards
from ._json import shown
from ._source import Stored


class Layout(NamedTuple):
    """Which files of a set hold which local arrays.

    Attributes:
        files: For each file that this process writes, by its number from 1 on: name of a local array -> name
            and block of the value that it is of.
        values: Name of a local array -> name of its value; of all that are here, saved by whomever.
        total: How many files the set has.
    """

    files: dict[int, dict[str, tuple[str, Block]]]
    values: dict[str, str]
    total: int


def layout(values: Iterable[tuple[str, Mapping[str, tuple[int, ...]], Shards | None]]) -> Layout | None:
    """Decide which file holds what; None: all values are whole, and a single file holds them.

    There is a file for each owner of shards, so that no two blocks of a value are in one file and its tensors
    have the names of values. What is whole in every process is in the first file.

    Args:
        values: For each value its name, the names and shapes of its local arrays, and how it is sharded.
    """
    values = list(values)
    sharded = [shards for _, _, shards in values if shards is not None]
    if not sharded:
        return None
    owners = sorted(frozenset[int]().union(*(shards.owners for shards in sharded)))
    mine = frozenset[int]().union(*(shards.mine for shards in sharded))
    numbers = {owner: number for number, owner in enumerate(owners, 1)}
    made = Layout({numbers[owner]: {} for owner in owners if owner in mine}, {}, len(owners))
    for name, shapes, shards in values:
        blocks = shards.blocks if shards else [Block.all_of(shape) for shape in shapes.values()]
        writers = shards.writers if shards else owners[:1]
        for local, block, writer in zip(shapes, blocks, writers, strict=True):
            made.values[local] = name
            is_filled = math.prod(block.shape) > 0 or math.prod(block.whole) == 0
            if writer in mine and is_filled:
                made.files[numbers[writer]][local] = name, block
    return made


class Blocks:
    """An array whose blocks lie in several files; any block can be cut out of it.

    Args:
        name: What errors call it.
        shape: Of the whole array.
    """

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self._name, self.shape = name, shape
        self._arrays: dict[Block, np.ndarray | Stored] = {}

    @property
    def dtype(self) -> np.dtype:
        return next(iter(self._arrays.values())).dtype

    def add(self, begin: tuple[int, ...], array: np.ndarray | Stored) -> None:
        """Add the block that begins there; one that is added twice is of replicas, and alike.

        Raises:
            ValueError: It is not within the array, or of another type than the others.
        """
        called, first = shown(self._name), next(iter(self._arrays.values()), array)
        if not len(begin) == len(array.shape) == len(self.shape) or any(
            at + n > whole for at, n, whole in zip(begin, array.shape, self.shape, strict=True)
        ):
            raise ValueError(f"{called} must be within {self.shape}, got {array.shape} at {begin}")
        if first.dtype != array.dtype:
            raise ValueError(
                f"{called} must have one dtype in all files, got {first.dtype} and {array.dtype}"
            )
        self._arrays[Block(self.shape, begin, array.shape)] = array

    def cut(self, block: Block) -> "np.ndarray | Stored | Region":
        """Return the array at a block: what lies in one file as a view of that.

        Raises:
            ValueError: The files hold it in part only, or overlap.
        """
        if math.prod(block.shape) == 0:
            return np.empty(block.shape, self.dtype)
        found = [
            (shared, array[shared.within(saved)])
            for saved, array in self._arrays.items()
            if (shared := block.meeting(saved)) is not None
        ]
        if not _tile([shared for shared, _ in found], block):
            raise ValueError(f"{self._name!r} must be there in whole, and its blocks leave gaps or overlap")
        if len(found) == 1:
            return found[0][1]
        return Region(block.shape, [(shared.within(block), array) for shared, array in found])


def _tile(blocks: Sequence[Block], whole: Block) -> bool:
    """Tell whether blocks within another fill it, without gaps and without overlap."""
    if sum(math.prod(block.shape) for block in blocks) != math.prod(whole.shape):
        return False
    if not whole.shape or len(blocks) == 1:
        return len(blocks) == 1
    # of as many elements as the whole, they fill it unless two of them overlap
    axis = max(range(len(whole.shape)), key=lambda axis: len({block.begin[axis] for block in blocks}))
    blocks = sorted(blocks, key=lambda block: block.begin[axis])
    begins = np.array([block.begin for block in blocks])
    ends = begins + [block.shape for block in blocks]
    for i, stop in enumerate(np.searchsorted(begins[:, axis], ends[:, axis])):
        later = slice(i + 1, stop)  # those that begin before this one ends
        if ((begins[later] < ends[i]) & (begins[i] < ends[later])).all(axis=1).any():
            return False
    return True


class Region:
    """A block that lies in several files: NumPy puts it together where it is read, and nothing is kept."""

    def __init__(
        self, shape: tuple[int, ...], found: list[tuple[tuple[slice, ...], np.ndarray | Stored]]
    ) -> None:
        self.shape, self.dtype, self._found = shape, found[0][1].dtype, found

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        self.read_into(array)
        return array if dtype is None else array.astype(dtype, copy=False)

    def read_into(self, target: np.ndarray) -> None:
        """Fill an array of this type and shape."""
        for slices, piece in self._found:
            if isinstance(piece, Stored):
                place: tuple[Any, ...] = (*slices, ...)  # a view, also of a single number
                piece.read_into(target[place])
            else:
                target[slices] = piece


def cut(
    source: "np.ndarray | Stored | Blocks", block: Block | None, name: str
) -> "np.ndarray | Stored | Region":
    """Return an array at a block; None: all of it.

    Raises:
        ValueError: The block is of an array of another shape.
    """
    if block is None:
        block = Block.all_of(source.shape)
    check_whole(block, source.shape, name)
    if isinstance(source, Blocks):
        return source.cut(block)
    part = source[block.slices()]
    return part if isinstance(part, Stored) else np.asarray(part)


def check_whole(block: Block, shape: tuple[int, ...], name: str) -> None:
    """Raise ValueError unless a block is of an array of this shape."""
    if block.whole != shape:
        raise ValueError(f"{name!r} must have shape {block.whole} in all, got {shape}")


Unread = Stored | Region
"""What is yet to be read, into an array."""


_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})")


def is_numbered(path: Path) -> bool:
    """Tell whether a file has the name of one of a set."""
    return _NUMBERED.fullmatch(path.stem) is not None


def path_of(path: Path, number: int, count: int) -> Path:
    """Return the name of a file of a set: ``name-00001-of-00004.safetensors``."""
    return path.with_name(f"{path.stem}-{number:05}-of-{count:05}{path.suffix}")


def name_of(member: Path) -> Path:
    """Return what `path_of` made the name of a file of a set from."""
    match = _NUMBERED.fullmatch(member.stem)
    return member.with_name(match["stem"] + member.suffix) if match else member


def set_of(path: Path) -> list[Path]:
    """Return the files of a set, of its name or of that of one of them; none where there is no set.

    Raises:
        ValueError: There are several sets, or a set and a file, and either may be the newer one.
        FileNotFoundError: One of the files is not there.
    """
    given = _NUMBERED.fullmatch(path.stem)
    if given:
        path, counts = name_of(path), {int(given["count"])}
    else:
        found = [
            _NUMBERED.fullmatch(other.stem)
            for other in (path.parent.iterdir() if path.parent.is_dir() else ())
            if other.suffix == path.suffix
        ]
        counts = {int(match["count"]) for match in found if match and match["stem"] == path.stem}
    if len(counts) + (path.exists() and not given) > 1:
        sets = [f"a set of {count} files" for count in sorted(counts)] + ["a file"] * path.exists()
        raise ValueError(f"{path} is there as {' and as '.join(sets)}: give a file of the right set")
    paths = [path_of(path, number, count) for count in counts for number in range(1, count + 1)]
    for member in paths:
        if not member.exists():
            raise FileNotFoundError(f"{member} is not there, and {path} was saved in {len(paths)} files")
    return paths
