"""Bad input: an error that names the argument, what was needed and what came; and nothing changes."""

import re

import numpy as np
import pytest

import fastema
from refusals import BAD_NUMBERS, BAD_PAIRS, f32, read_only


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
    with pytest.raises(TypeError, match="averages must be float32 or bfloat16 to be compensated, got f"):
        fastema.Pairs(np.zeros(3), np.zeros(3), carries=np.zeros(3))
    with pytest.raises(TypeError, match="averages is compensated, and cannot be swapped without its carry"):
        fastema.Pairs(a, v, carries=np.zeros(3, np.float32)).swap()
