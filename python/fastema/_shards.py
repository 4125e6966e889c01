"""Where does a local array lie in the whole, and which files together hold one?

A sharded value lies in several processes or on several devices, and nobody has all of it. Its blocks are
saved where they lie, and loaded by whoever needs a part of them, cut as it may be.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._arrays.shards import Block, Shards


class Layout(NamedTuple):
    """What the files of a set hold.

    Attributes:
        files: Of this process' files, by their numbers from 1 on, the blocks of the values in them.
        parts: Of each of these files the names of values by those of their parts.
        total: How many files there are in all.
        names: The names of values by those of their parts.
    """

    files: dict[int, dict[str, Block]]
    parts: dict[int, dict[str, str]]
    total: int
    names: dict[str, str]

    def of_file(self, number: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return those of some parts that are in a file, by the names of their values."""
        parts = self.parts[number]
        return {parts[part]: array for part, array in arrays.items() if part in parts}


def layout(values: Iterable[tuple[str, Mapping[str, tuple[int, ...]], Shards | None]]) -> Layout | None:
    """Return how values are saved where they lie; None: all are whole, and a single file holds them.

    There is a file for each owner, so that the names in a file are those of the values. What is whole in
    every process is in the first file.

    Args:
        values: Of each value its name, the names and shapes of its parts, and how it is spread.
    """
    values = list(values)
    spread = [shards for _, _, shards in values if shards is not None]
    if not spread:
        return None
    owners = sorted(frozenset[int]().union(*(shards.owners for shards in spread)))
    mine = frozenset[int]().union(*(shards.mine for shards in spread))
    numbers = [number for number, owner in enumerate(owners, 1) if owner in mine]
    made = Layout({n: {} for n in numbers}, {n: {} for n in numbers}, len(owners), {})
    for name, parts, shards in values:
        blocks = shards.blocks if shards else [Block.all_of(shape) for shape in parts.values()]
        writers = shards.writers if shards else owners[:1]
        for part, block, writer in zip(parts, blocks, writers, strict=True):
            made.names[part] = name
            holds = math.prod(block.shape) > 0 or math.prod(block.whole) == 0
            if writer in mine and holds:
                number = owners.index(writer) + 1
                made.files[number][name], made.parts[number][part] = block, name
    return made


class Pieces:
    """An array in pieces, of which parts can be cut.

    Args:
        name: What errors call it.
        shape: Of the whole.
    """

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self._name, self.shape = name, shape
        self._pieces: dict[tuple[Any, ...], tuple[Block, np.ndarray]] = {}

    def add(self, begin: tuple[int, ...], array: np.ndarray) -> None:
        # the same block twice is of replicas, which were saved in more than one file
        self._pieces[begin, array.shape] = Block(self.shape, begin, array.shape), array

    def cut(self, block: Block) -> "np.ndarray | Region":
        """Return a part: a view where one piece holds it all.

        Raises:
            ValueError: The pieces are not all there.
        """
        arrays = [array for _, array in self._pieces.values()]
        if math.prod(block.shape) == 0:
            return np.empty(block.shape, arrays[0].dtype)
        found = [
            (shared, array[shared.within(piece)])
            for piece, array in self._pieces.values()
            if (shared := block.meeting(piece)) is not None
        ]
        if not _tile([shared for shared, _ in found], block):
            raise ValueError(f"{self._name!r} must be there in whole, and its pieces leave gaps or overlap")
        if len(found) == 1:
            return found[0][1]
        return Region(block.shape, [(shared.within(block), array) for shared, array in found])


def _tile(parts: Sequence[Block], block: Block) -> bool:
    """Tell whether parts of a block leave no gaps and do not overlap."""
    edges: list[list[int]] = []
    for axis, (begin, size) in enumerate(zip(block.begin, block.shape, strict=True)):
        ends = {end for b in parts for end in (b.begin[axis], b.begin[axis] + b.shape[axis])}
        edges.append(sorted(ends | {begin, begin + size}))
    # between two edges next to each other lies no other one: each cell is in a part or out of it
    cells = np.zeros([len(along) - 1 for along in edges], np.int64)
    for b in parts:
        spans = zip(edges, b.begin, b.shape, strict=True)
        cells[tuple(slice(bisect_left(at, a), bisect_left(at, a + n)) for at, a, n in spans)] += 1
    return bool((cells == 1).all())


class Region:
    """A part of an array in pieces; NumPy puts it together where it is used, and it is not kept."""

    def __init__(self, shape: tuple[int, ...], found: list[tuple[tuple[slice, ...], np.ndarray]]) -> None:
        self.shape, self.dtype, self._found = shape, found[0][1].dtype, found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for slices, piece in self._found:
            array[slices] = piece
        return array


def cut(source: "np.ndarray | Pieces", block: Block | None, name: str) -> "np.ndarray | Region":
    """Return a block of an array, or all of it.

    Raises:
        ValueError: The block is of an array of another shape.
    """
    if block is None:
        block = Block.all_of(source.shape)
    elif block.whole != source.shape:
        raise ValueError(f"{name!r} must have shape {block.whole} in all, got {source.shape}")
    return source.cut(block) if isinstance(source, Pieces) else np.asarray(source[block.slices()])


_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})")


def is_numbered(path: Path) -> bool:
    """Tell whether a file has the name of one of a set."""
    return _NUMBERED.fullmatch(path.stem) is not None


def path_of(path: Path, number: int, count: int) -> Path:
    """Return the name of a file of a set: ``name-00001-of-00004.safetensors``."""
    return path.with_name(f"{path.stem}-{number:05}-of-{count:05}{path.suffix}")


def set_of(path: Path) -> list[Path]:
    """Return the files of the set of this name, or that one of them is of; none, where there is no set.

    Raises:
        ValueError: There are several sets, or a set and a file, and either may be the newer one.
        FileNotFoundError: One of the files is not there.
    """
    given = _NUMBERED.fullmatch(path.stem)
    if given:
        path, counts = path.with_name(given["stem"] + path.suffix), {int(given["count"])}
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
    for one in paths:
        if not one.exists():
            raise FileNotFoundError(f"{one} is not there, and {path} was saved in {len(paths)} files")
    return paths
