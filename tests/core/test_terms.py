"""What the core is told of lists beside the arrays: names in errors, verbs, and memory that nobody reads."""

import re

import ml_dtypes
import numpy as np
import pytest

from fastema import _core
from fastema._arrays import Descriptor
from fastema._types import MIXES


def f32(size):
    return np.zeros(size, np.float32)


def test_errors_call_arrays_by_the_names_of_their_values():
    names = ["layer.weight", "it's"]
    with pytest.raises(
        ValueError, match=re.escape("averages['layer.weight'] and values['layer.weight'] must")
    ):
        _core.Pairs([f32(3), f32(3)], [f32(4), f32(3)], names=names)
    with pytest.raises(ValueError, match=re.escape('averages[1]["it\'s"] and values["it\'s"] must have one')):
        _core.check([f32(3)] * 3 + [f32(4)], [f32(3)] * 2, names=names, averages_per_value=2)
    with pytest.raises(ValueError, match="names and values must have one length, got 2 and 1"):
        _core.Pairs([f32(3)], [f32(3)], names=names)


TYPES = ["?", "i1", "u8", "c16", ">i4", "M8[s]", "S3", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_copies_and_swaps_move_the_bytes_of_any_type(rng, dtype):
    a, b = (np.frombuffer(rng.bytes(np.dtype(dtype).itemsize * 1001), dtype).copy() for _ in range(2))
    before = a.tobytes(), b.tobytes()
    _core.Pairs([a], [b], verb="swap").swap()
    assert (b.tobytes(), a.tobytes()) == before
    b.flags.writeable = False
    _core.Pairs([a], [b], verb="copy").copy()
    assert a.tobytes() == b.tobytes() == before[0]


def test_a_verb_is_refused_that_the_pairs_were_not_made_for():
    a, b = [f32(3)], [np.ones(3, np.float32)]
    with pytest.raises(ValueError, match="pairs must be made for verb='update' to update"):
        _core.Pairs(a, b, verb="copy").update(0.5)
    with pytest.raises(ValueError, match="pairs must be made for verb='copy' to copy"):
        _core.Pairs(a, b).copy()
    with pytest.raises(TypeError, match="must have one type to be copied, got int32 and float32"):
        _core.Pairs([np.zeros(3, np.int32)], b, verb="copy")
    with pytest.raises(TypeError, match="must hold numbers, got dtype"):
        _core.Pairs([np.zeros(3, object)], [np.zeros(3, object)], verb="copy")
    with pytest.raises(TypeError, match="must be float16, bfloat16, float32 or float64"):
        _core.Pairs([np.zeros(3, int)], [np.zeros(3, int)], verb="swap", only_floats=True)
    assert not a[0].any()


HERE = Descriptor(np.dtype(np.float32), (3, 4), (16, 4), 4096, True)
THERE = HERE._replace(address=8192, writable=False)
BAD = {
    "must be writable": (THERE, HERE),
    "must not overlap": (HERE, HERE._replace(address=4100)),
    "one order in memory, got (16, 4) and (4, 12)": (HERE, THERE._replace(strides=(4, 12))),
    "must be dense (no holes": (HERE._replace(strides=(32, 4)), THERE),
    "must be aligned to its 4-byte elements": (HERE._replace(address=4097), THERE),
    "must have one type": (HERE, THERE._replace(dtype=np.dtype(np.float64), strides=(32, 8))),
}


@pytest.mark.parametrize("message", BAD)
def test_memory_that_the_host_cannot_read_is_checked_by_its_description(message):
    _core.check([HERE], [THERE])
    average, value = BAD[message]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        _core.check([average], [value])
    with pytest.raises(TypeError, match="must be a NumPy array, got Descriptor"):
        _core.Pairs([HERE], [THERE])


def test_mixes_are_those_that_pairs_take():
    types = ["float16", "bfloat16", "float32", "float64"]
    for average in types:
        for value in types:
            arrays = [[np.zeros(1, getattr(ml_dtypes, name, name))] for name in (average, value)]
            if (average, value) in MIXES:
                _core.check(*arrays)
            else:
                with pytest.raises(TypeError, match="must have one type"):
                    _core.check(*arrays)
