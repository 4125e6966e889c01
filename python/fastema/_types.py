"""Which types of numbers there are, and which one an average has."""

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

Array: TypeAlias = Any  # of any library: see fastema._arrays
DType: TypeAlias = np.dtype[Any]

FLOATS: tuple[DType, ...] = tuple(
    np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
)


def compute_type(dtype: DType) -> DType:
    """Return the type in which averages of a type are computed."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def average_type(dtype: DType) -> DType:
    """Return the type of the averages of values of a type: a 16-bit one would stand still."""
    return np.dtype(np.float32) if dtype in FLOATS[:2] else dtype
