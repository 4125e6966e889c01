"""Where do the local arrays of a value that is spread over processes or devices lie in the whole?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Block(NamedTuple):
    """A rectangular part of an array."""

    whole: tuple[int, ...]  # the shape of the array that it is a part of
    begin: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def all_of(cls, shape: Sequence[int]) -> "Block":
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(begin, begin + size) for begin, size in zip(self.begin, self.shape, strict=True))

    def meeting(self, other: "Block") -> "Block | None":
        """Return what two blocks share, if that is anything."""
        begin = tuple(map(max, self.begin, other.begin))
        ends = zip(self.begin, self.shape, other.begin, other.shape, strict=True)
        shape = tuple(min(a + m, b + n) - first for (a, m, b, n), first in zip(ends, begin, strict=True))
        return Block(self.whole, begin, shape) if all(size > 0 for size in shape) else None

    def within(self, other: "Block") -> tuple[slice, ...]:
        """Return the slices of an array at `other` that this block is."""
        begin = tuple(a - b for a, b in zip(self.begin, other.begin, strict=True))
        return Block(self.whole, begin, self.shape).slices()


@dataclass(frozen=True)
class Shards:
    """How a value is spread.

    Attributes:
        blocks: Where each local part lies.
        writers: Of each part the owner that saves it; None: one of another process saves its like.
        owners: The processes or devices that the value is spread over, in all processes.
        mine: Those of them that are of this process.
    """

    blocks: tuple[Block, ...]
    writers: tuple[int | None, ...]
    owners: frozenset[int]
    mine: frozenset[int]
