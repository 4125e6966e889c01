"""Bad input: an error that names the argument, what was needed and what came; and nothing changes."""

import re

import numpy as np
import pytest

import fastema


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
    "a narrower average": (np.zeros(3, "f2"), f32(3), TypeError, f"{LIES} must have one type"),
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


def contents(arrays):
    arrays = arrays if isinstance(arrays, list) else [arrays]
    return [x.tobytes() for x in arrays if isinstance(x, np.ndarray)]


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_bad_pair_is_refused_and_nothing_changes(case):
    averages, values, error, message = BAD_PAIRS[case]
    before = contents(averages), contents(values)
    with pytest.raises(error, match=re.escape(message)):
        fastema.update(averages, values, 0.5)
    with pytest.raises(error, match=re.escape(message)):
        fastema.Pairs(averages, values)
    with pytest.raises(error, match=re.escape(message.replace("averages", "a").replace("values", "b"))):
        fastema.swap(averages, values)
    assert (contents(averages), contents(values)) == before


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


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_NUMBERS)
def test_a_bad_number_is_refused_and_nothing_changes(arguments, error, message):
    a, v = f32(10), np.ones(10, np.float32)
    with pytest.raises(error, match=re.escape(message)):
        fastema.update(a, v, **arguments)
    with pytest.raises(error, match=re.escape(message)):
        fastema.Pairs(a, v).update(**arguments)
    assert (a == f32(10)).all()


def test_swap_needs_both_writable_and_apart():
    a = f32(3)
    with pytest.raises(ValueError, match="b must be writable, and is read-only"):
        fastema.swap(a, read_only(np.ones(3, np.float32)))
    with pytest.raises(ValueError, match=re.escape("values[0] must be writable, and is read-only")):
        fastema.Pairs([a], [read_only(np.ones(3, np.float32))]).swap()
    shared = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=re.escape("b[0] and b[1] must not overlap")):
        fastema.swap([a, f32(3)], [shared, shared])
    with pytest.raises(ValueError, match=re.escape("values[0] and values[1] must not overlap")):
        fastema.Pairs([a, f32(3)], [shared, shared]).swap()
    assert (a == f32(3)).all()
    assert (shared == 1).all()


def test_an_array_that_was_resized_is_noticed():
    """Its memory is gone: without the check this would write into somebody else's."""
    a, v = np.zeros(10), np.ones(10)
    pairs = fastema.Pairs([a], [v])
    a.resize(100_000, refcheck=False)
    with pytest.raises(ValueError, match=re.escape("averages[0] was resized after it was paired")):
        pairs.update(0.5)
    with pytest.raises(ValueError, match=re.escape("averages[0] was resized")):
        pairs.swap()
    assert not a.any()


def test_several_averages_need_as_many_decays_and_cannot_be_swapped():
    pairs = fastema.Pairs.several([[f32(3)], [f32(3)]], [f32(3)])
    with pytest.raises(ValueError, match="averages must hold one list or more, got none"):
        fastema.Pairs.several([], [f32(3)])
    with pytest.raises(ValueError, match="averages and decay must have one length, got 2 and 3"):
        pairs.update([0.1, 0.2, 0.3])
    with pytest.raises(TypeError, match="decay must be a sequence of 2 numbers"):
        pairs.update(0.5)
    with pytest.raises(ValueError, match="swap needs one list of averages, got several"):
        pairs.swap()
    with pytest.raises(ValueError, match=re.escape("averages[1][0] and values[0] must have one size")):
        fastema.Pairs.several([[f32(3)], [f32(4)]], [f32(3)])
    with pytest.raises(
        ValueError, match=re.escape("averages[1] and values must have one length, got 0 and 1")
    ):
        fastema.Pairs.several([[f32(3)], []], [f32(3)])


def test_carries_must_fit_their_averages():
    a, v = f32(3), f32(3)
    with pytest.raises(ValueError, match="rounding must be 'nearest' where averages have carries"):
        fastema.update(a, v, 0.5, carries=np.zeros(3, np.float32), rounding="stochastic")
    with pytest.raises(TypeError, match="carries must be float32 beside a float32 average, got float64"):
        fastema.Pairs(a, v, carries=np.zeros(3))
    with pytest.raises(ValueError, match="averages and carries must have one size, got 3 and 4"):
        fastema.Pairs(a, v, carries=f32(4))
    with pytest.raises(ValueError, match="averages and carries must not overlap"):
        fastema.Pairs(a, v, carries=a)
    with pytest.raises(TypeError, match="averages must be float32, or bfloat16 as its value, to be compens"):
        fastema.Pairs(np.zeros(3), np.zeros(3), carries=np.zeros(3))
    with pytest.raises(TypeError, match="averages is compensated, and cannot be swapped without its carry"):
        fastema.Pairs(a, v, carries=np.zeros(3, np.float32)).swap()
