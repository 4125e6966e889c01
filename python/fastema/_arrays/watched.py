"""Were arrays given other memory, or another layout, since they were paired?"""

from collections.abc import Callable, Iterable

from .. import _core
from .._types import AnyArray

Watched = Callable[[], object] | AnyArray | None
"""What tells where an array lies: a function; a tensor of which the core can ask; None: it stays there."""


def watched(tensor: AnyArray) -> Watched:
    """Return what tells where a tensor of torch lies: itself, where that needs no call of Python."""
    if _core.Layouts.is_readable(tensor):
        return tensor
    return lambda: (tensor.data_ptr(), tensor.shape, tensor.stride())


class Addresses:
    """Where arrays lay when they were paired, to notice those that were given other memory since.

    Args:
        watched: What tells of each array where it lies now.
    """

    __slots__ = ("_ask", "_before", "_layouts")

    def __init__(self, watched: Iterable[Watched]) -> None:
        found = [one for one in watched if one is not None]
        self._layouts = _core.Layouts([one for one in found if not callable(one)])
        self._ask = [one for one in found if callable(one)]
        self.accept()

    def __len__(self) -> int:
        return len(self._layouts) + len(self._ask)

    def accept(self) -> None:
        """Take the present addresses for right."""
        self._layouts.accept()
        self._before = [ask() for ask in self._ask]

    def moved(self) -> bool:
        """Tell whether one has moved."""
        return self._layouts.changed() or [ask() for ask in self._ask] != self._before

    def check(self, paired: str) -> None:
        """Raise if one has moved.

        Args:
            paired: What holds the pairs, and must be made anew then.

        Raises:
            ValueError: One has.
        """
        if self.moved():
            what = "other memory, shape or strides"
            raise ValueError(f"a tensor was given {what} after it was paired; make the {paired} anew")
