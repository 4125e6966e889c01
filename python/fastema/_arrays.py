"""What the core can be given: one array or a sequence of arrays, never copied."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def as_list(arrays: Any, argument: str) -> tuple[list[Any], bool]:
    """Return the arrays as a list, and whether a single one was given.

    Raises:
        TypeError: `arrays` is neither an array nor a sequence.
    """
    if isinstance(arrays, np.ndarray):
        return [arrays], True
    if isinstance(arrays, Iterable) and not isinstance(arrays, str | bytes):
        return list(arrays), False
    raise TypeError(
        f"{argument} must be a NumPy array or a sequence of NumPy arrays, got {type(arrays).__name__}"
    )
