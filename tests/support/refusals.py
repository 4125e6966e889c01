"""What is refused on every device, and in which words."""

import numpy as np
import pytest


def f32(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def read_only(array):
    array.flags.writeable = False
    return array


def unaligned(size):
    return np.frombuffer(bytearray(4 * size + 1), np.float32, size, offset=1)


BASE = f32(20)
LIES = "averages and values"

BAD_PAIRS = {
    "size": (f32(12), f32(13), ValueError, f"{LIES} must have one size, got 12 and 13"),
    "shape": (f32(2, 3), f32(3, 2), ValueError, f"{LIES} must have one shape, got (2, 3) and (3, 2)"),
    "order": (
        f32(2, 3),
        f32(3, 2).T,
        ValueError,
        f"{LIES} must have one order in memory, got (12, 4) and (4, 8)",
    ),
    "types": (f32(3), np.zeros(3), TypeError, f"{LIES} must have one type"),
    "a far narrower average": (np.zeros(3, "f2"), np.zeros(3), TypeError, f"{LIES} must have one type"),
    "integers": (np.zeros(3, int), np.zeros(3, int), TypeError, "averages must be float16, bfloat16, float"),
    "byte order": (np.zeros(3, ">f4"), f32(3), TypeError, "averages must be float16, bfloat16, float32"),
    "strided average": (f32(6)[::2], f32(3), ValueError, "averages must be dense"),
    "strided value": (f32(3), f32(6)[::2], ValueError, "values must be dense"),
    "reversed": (f32(3)[::-1], f32(3)[::-1], ValueError, "averages must be dense"),
    "broadcast": (np.zeros(3, "f"), np.broadcast_to(np.float32(1), 3), ValueError, "values must be dense"),
    "read-only": (read_only(f32(3)), f32(3), ValueError, "averages must be writable, and is read-only"),
    "unaligned": (f32(3), unaligned(3), ValueError, "values must be aligned to its 4-byte elements"),
    "overlap": (BASE[:10], BASE[9:19], ValueError, f"{LIES} must not overlap"),
    "the same": (BASE, BASE, ValueError, f"{LIES} must not overlap"),
    "no array": (3.0, f32(3), TypeError, "averages must be a NumPy array, a torch tensor, "),
    "text": (f32(3), "abc", TypeError, "values must be a NumPy array, a torch tensor, "),
    "a mapping": ({"w": f32(3)}, [f32(3)], TypeError, "averages must be a NumPy array, a torch tensor, "),
    "numbers": ([f32(3)], [[1.0, 2.0, 3.0]], TypeError, "values[0] must be a NumPy array, a torch tensor, "),
    "lengths": ([f32(3)], [f32(3), f32(3)], ValueError, f"{LIES} must have one length, got 1 and 2"),
    "second": (
        [f32(3), f32(3)],
        [f32(3), f32(4)],
        ValueError,
        "averages[1] and values[1] must have one size, got 3 and 4",
    ),
    "an average twice": (
        [BASE, BASE],
        [f32(20), f32(20)],
        ValueError,
        "averages[0] and averages[1] must not overlap",
    ),
    "another's value": (
        [f32(20), BASE[:5]],
        [BASE, f32(5)],
        ValueError,
        "averages[1] and values[0] must not overlap",
    ),
}

BAD_NUMBERS = [
    ({"decay": -0.1}, ValueError, "decay must be from 0 to 1, got -0.1"),
    ({"decay": 1.0000001}, ValueError, "decay must be from 0 to 1, got 1.0000001"),
    ({"decay": float("nan")}, ValueError, "decay must be from 0 to 1, got nan"),
    ({"decay": "0.5"}, TypeError, "decay must be a number from 0 to 1, got str"),
    ({"decay": None}, TypeError, "decay must be a number from 0 to 1, got NoneType"),
    ({"decay": 0.5, "threads": -1}, ValueError, "threads must be 0 (OpenMP's choice) or more, got -1"),
    ({"decay": 0.5, "threads": 1.5}, TypeError, "threads must be a whole number"),
    ({"decay": 0.5, "rounding": "up"}, ValueError, "rounding must be 'nearest' or 'stochastic', got 'up'"),
    ({"decay": 0.5, "seed": -1}, ValueError, "seed must be a whole number from 0 below 2**64, got -1"),
    ({"decay": 0.5, "step": 0.5}, ValueError, "step must be a whole number from 0 below 2**64, got 0.5"),
]


def error_of(call):
    """Return the kind and the words of the error that a call must end in."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return type(caught.value), str(caught.value)
