"""How the averages that users see come of what is kept."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from .. import _arrays
from .._types import AnyArray
from .count import Count

Kept = Callable[[int], list[AnyArray]]
"""Returns of a list, by its number, the local arrays of one leaf."""


class Shown(ABC):
    """What users see of the lists of arrays that are kept of their values.

    Attributes:
        lists: How many averages they see; these have the numbers of the first lists.
        is_sparse: Whether an update leaves out lists whose decay is 1, which makes NaN of infinite values.
        has_types_of_values: Whether lists are of the values' own types, for they are copies of them.
    """

    lists = 1
    is_sparse = False
    has_types_of_values = False

    @abstractmethod
    def is_kept(self, k: int, count: Count) -> bool:
        """Tell whether the k-th average is shown as its list is kept."""

    @abstractmethod
    def computed(self, k: int, kept: Kept, count: Count) -> list[AnyArray]:
        """Return the local arrays of a leaf's k-th average, where it is not shown as it is kept."""

    @abstractmethod
    def obstacle(self, k: int, count: Count) -> str | None:
        """Return what keeps a module from computing in the memory of the k-th average, if anything does."""


class Divided(Shown):
    """An average for each list; those that start at zeros are divided by the share of what came since."""

    def __init__(self, lists: int) -> None:
        self.lists = lists

    def is_kept(self, k: int, count: Count) -> bool:
        return count.divisor(k) == 1.0

    def computed(self, k: int, kept: Kept, count: Count) -> list[AnyArray]:
        return [_arrays.quotient(average, count.divisor(k)) for average in kept(k)]

    def obstacle(self, k: int, count: Count) -> str | None:
        if self.is_kept(k, count) and count.products[k] != 1.0:
            return None
        return (
            "initial must be 'values' for module(), which computes with averages as they are kept, "
            "and not divided as they are shown; got 'zeros'"
        )
