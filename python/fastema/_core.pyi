"""The native core as Python sees it. Arrays are NumPy's; everything is checked before anything changes."""

from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any, TypeVar, Unpack

import numpy as np

from ._arrays import Descriptor
from ._types import Terms

T = TypeVar("T")

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
    def update(
        self,
        decay: float | Sequence[float],
        threads: int = 0,
        done: list[Any] | None = None,
        now: object = None,
        copies: Pairs | None = None,
        *,
        stochastic: bool = False,
        seed: int = 0,
        step: int = 0,
    ) -> None:
        """Move averages, make copies, and make `now` the only item of `done`: all three, or nothing."""

    def swap(self, threads: int = 0) -> None: ...
    def copy(self, threads: int = 0) -> None: ...
    def check_unmoved(self) -> None:
        """Raise if an array was given other memory, or may not be written any more."""

    def first_non_finite(self, threads: int = 0) -> int | None: ...

class Scope:
    """A context manager whose `leave` runs to its end whenever `enter` has begun, whatever interrupts it.

    Neither is given anything; `leave` finds out what is to be undone.
    """

    def __init__(self, enter: Callable[[], object], leave: Callable[[], object]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *raised: object) -> None: ...

class Contents:
    """Dictionaries and lists with the objects that they held, to notice others."""

    def __init__(self, containers: list[dict[Any, Any] | list[Any]]) -> None: ...
    def changed(self) -> bool:
        """Tell whether one holds another object, more, fewer, or in another order."""

    def accept(self) -> None:
        """Take what they hold now for right."""

class Layouts:
    """Tensors with the memory, shapes and strides that they had, to notice others; no Python is called."""

    def __init__(self, tensors: list[Any]) -> None: ...
    def __len__(self) -> int: ...
    def changed(self) -> bool:
        """Tell whether one lies elsewhere, or has another shape or strides."""

    def accept(self) -> None:
        """Take what they are now for right."""

    @staticmethod
    def is_readable(tensor: Any) -> bool:
        """Tell whether an array has DLPack's exchange API, and can be told of by it."""

def locked(lock: RLock, call: Callable[..., T], *arguments: object) -> T:
    """Return what a call returns that is made while a lock is held; no interrupt keeps it held."""

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

USUAL_AHEAD: int

def tune(ahead: int) -> None:
    """Have updates of large lists ask for memory so many bytes ahead; < 0: as they find best, anew."""

def tuned() -> list[dict[str, Any]]:
    """Return what they found, a dictionary for each loop: average, value, rounding, together, ahead."""

def calls_by_openmp() -> int:
    """Return how many calls another library's spinning threads carried out."""
