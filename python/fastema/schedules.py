"""Decay schedules: callables from a step to the decay of that step.

A step counts the updates seen, the present one included. Schedules are plain, picklable values:
two with the same arguments are equal.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["compound", "constant", "dynamic"]


class _Schedule(ABC):
    """A decay that depends on the step alone."""

    decay: float
    start_step: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"decay must be from 0 to 1, got {self.decay!r}")

    def __call__(self, step: int) -> float:
        """Return the decay of this step."""
        return float(self.at(step, np))

    def at(self, step: Any, xp: Any) -> Any:
        """Return the decay of this step, computed with an array library.

        Args:
            step: A number, or a float64 scalar tensor.
            xp: Where `maximum`, `minimum` and `where` come from: numpy, tensorflow, jax.numpy.
        """
        # tensors come first: TensorFlow takes the others' type from them
        k = xp.maximum(step - self.start_step, 0)
        return xp.where(step >= self.start_step, self._after(k, xp), 0.0)

    @abstractmethod
    def _after(self, k: Any, xp: Any) -> Any:
        """Return the decay `k` steps after the start."""


@dataclass(frozen=True)
class constant(_Schedule):  # noqa: N801 - used as a function
    """The same decay at every step from the start on; 0, a copy, before.

    Args:
        decay: From 0 to 1.
        start_step: The first step that averages.

    Example:
        >>> from fastema import schedules
        >>> schedules.constant(0.99)(7)
        0.99
    """

    decay: float
    start_step: int = 0

    def _after(self, k: Any, xp: Any) -> Any:
        return xp.minimum(k + 1.0, self.decay)  # a tensor where k is one


@dataclass(frozen=True)
class dynamic(_Schedule):  # noqa: N801 - used as a function
    """A decay that rises with the number of updates: ``min(decay, (1 + k) / (10 + k))``.

    Here ``k = step - start_step``; before the start it is 0, so that the average is a copy. This is
    the schedule of TensorFlow Model Garden's ``ExponentialMovingAverage`` (``dynamic_decay=True``)
    and of ``tf.compat.v1.train.ExponentialMovingAverage`` (``num_updates``), in integers and
    float64.

    Args:
        decay: From 0 to 1; the limit.
        start_step: The first step that averages.

    Example:
        >>> from fastema import schedules
        >>> schedule = schedules.dynamic(0.99, start_step=10)
        >>> schedule(9), schedule(10), schedule(28), schedule(10_000)
        (0.0, 0.1, 0.6785714285714286, 0.99)
    """

    decay: float
    start_step: int = 0

    def _after(self, k: Any, xp: Any) -> Any:
        return xp.minimum((1 + k) / (10 + k), self.decay)


def compound(decay: Any, updates: int) -> Any:
    """Return the decay of one update that stands for several: ``decay ** updates``.

    By multiplications alone, so that every array library gives the same bits.

    Example:
        >>> from fastema import schedules
        >>> schedules.compound(0.5, 3)
        0.125
    """
    if updates == 1:
        return decay
    half = compound(decay, updates // 2)
    return half * half if updates % 2 == 0 else half * half * decay
