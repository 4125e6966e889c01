"""The native core as Python sees it. Arrays are NumPy's; everything is checked before anything changes."""

from collections.abc import Sequence
from typing import Any, Unpack, overload

import numpy as np

from ._arrays import Descriptor
from ._types import Terms

class Pairs:
    """Averages and values that were checked once and are kept alive."""

    def __init__(
        self,
        averages: list[np.ndarray],
        values: list[np.ndarray],
        carries: list[np.ndarray] = [],
        terms: Terms = {},
        **keywords: Unpack[Terms],
    ) -> None: ...
    def __len__(self) -> int: ...
    @overload
    def update(self, decay: float | Sequence[float], threads: int = 0) -> None: ...
    @overload
    def update(
        self, decay: float | Sequence[float], threads: int, stochastic: bool, seed: int, step: int
    ) -> None: ...
    def swap(self, threads: int = 0) -> None: ...
    def copy(self, threads: int = 0) -> None: ...
    def check_unmoved(self) -> None:
        """Raise if an array was given other memory, or may not be written any more."""

    def first_non_finite(self, threads: int = 0) -> int | None: ...

class Contents:
    """Dictionaries and lists with the objects that they held, to notice others."""

    def __init__(self, containers: list[dict[Any, Any] | list[Any]]) -> None: ...
    def changed(self) -> bool:
        """Tell whether one holds another object, more, fewer, or in another order."""

    def accept(self) -> None:
        """Take what they hold now for right."""

def check(
    averages: list[np.ndarray] | list[Descriptor],
    values: list[np.ndarray] | list[Descriptor],
    carries: list[np.ndarray] | list[Descriptor] = [],
    **terms: Unpack[Terms],
) -> None:
    """Check arrays as `Pairs` does, without making any; they may lie where the host cannot read."""

def check_numbers(
    decay: float | Sequence[float],
    threads: int = 0,
    seed: int = 0,
    step: int = 0,
    *,
    averages_per_value: int = 1,
) -> list[float]:
    """Check the numbers of an update, and return its decays, one for each average of a value."""

def shown(number: object) -> str:
    """Return a number as errors show it, however many digits it has."""

def mixes() -> list[tuple[str, str]]:
    """Return the types of averages and of their values that updates take."""

def instruction_sets() -> list[str]: ...
def use_instruction_set(name: str) -> None: ...
def build_config() -> dict[str, Any]: ...
