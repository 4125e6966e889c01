"""The types that the core averages, and arrays of them."""

import ml_dtypes
import numpy as np

bfloat16 = ml_dtypes.bfloat16
TYPES = [np.float16, bfloat16, np.float32, np.float64]
# average, value
MIXES = [
    *((t, t) for t in TYPES),
    (np.float32, bfloat16),
    (np.float32, np.float16),
    (np.float64, np.float32),
    (np.float64, bfloat16),
    (np.float64, np.float16),
    (bfloat16, np.float32),
    (np.float16, np.float32),
]


def of_many_magnitudes(rng, size, dtype):
    """Return an array of random numbers from tiny to huge, some beyond a 16-bit type."""
    with np.errstate(over="ignore"):
        return (rng.standard_normal(size) * 10.0 ** rng.integers(-12, 12, size)).astype(dtype)
