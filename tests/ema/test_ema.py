"""fastema.EMA: what its averages are, and how they are shaped, started and stored."""

import copy
import pickle
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
import oracle
import tolerances
from fastema import schedules
from mixes import MIXES
from processes import LINUX_ONLY, output_of

bfloat16 = ml_dtypes.bfloat16


def train(rng, weights):
    for weight in weights:
        np.add(weight, rng.standard_normal(weight.shape).astype(weight.dtype), out=weight)


def weights_of(rng, *dtypes, shape=(5, 3)):
    return [rng.standard_normal(shape).astype(dtype) for dtype in dtypes]


@given(
    schedule=st.tuples(st.floats(0, 1), st.integers(0, 6), st.booleans()),
    every=st.integers(1, 4),
    updates=st.integers(1, 12),
)
def test_averages_are_the_formula_at_the_decay_of_each_step(rng, schedule, every, updates):
    decay, start, dynamic = schedule
    weights = weights_of(rng, np.float32, np.float64)
    expected = [weight.copy() for weight in weights]
    ema = fastema.EMA(
        weights, schedules.dynamic(decay, start) if dynamic else decay, every=every, start_step=start
    )
    last = 0
    for step in range(1, updates + 1):
        train(rng, weights)
        ema.update()
        if step % every == 0 or step < start:  # before the start each step copies
            needed = oracle.decay_at(step, decay, start, dynamic, step - last)
            tolerances.assert_close(ema.decay, needed, tolerances.PRODUCT)
            expected = [oracle.update(a, w, ema.decay) for a, w in zip(expected, weights, strict=True)]
            last = step
    assert ema.step == updates
    if last == 0:  # nothing was averaged yet
        expected = weights
    assert all(oracle.same_bits(a, e) for a, e in zip(ema.averages, expected, strict=True))


def test_a_schedule_is_called_with_the_updates_seen_the_present_one_included():
    seen = []
    ema = fastema.EMA(np.zeros(2), lambda step: seen.append(step) or 0.5, every=2, start_step=3)
    assert ema.decay is None
    for _ in range(7):
        ema.update()
    assert seen == [3, 4, 5, 6]  # of the first two steps one copies, and so both at once do
    assert ema.decay == 0.25


def test_several_averages_are_those_averages_one_by_one(rng):
    weights = weights_of(rng, np.float32, bfloat16, np.float64)
    decays = [0.9, schedules.dynamic(0.999), 0.5]
    together = fastema.EMA(weights, decays)
    apart = [fastema.EMA(weights, decay) for decay in decays]
    for _ in range(5):
        train(rng, weights)
        for ema in (together, *apart):
            ema.update()
    assert together.decay == tuple(ema.decay for ema in apart)
    for k, ema in enumerate(apart):
        assert all(map(oracle.same_bits, together.averages_of(k), ema.averages))
    assert all(map(oracle.same_bits, together.averages, apart[0].averages))
    with pytest.raises(IndexError, match="k must be from 0 to 2, got 3"):
        together.averages_of(3)


class Layer(NamedTuple):
    kernel: np.ndarray
    bias: np.ndarray


def test_averages_are_shaped_as_the_values():
    layer = Layer(np.ones((2, 2)), np.zeros(2))
    values = {"layer": layer, "others": [np.ones(1), (np.ones(3),)], "empty": {}}
    averages = fastema.EMA(values).averages
    assert isinstance(averages["layer"], Layer)
    assert averages["layer"].kernel.shape == (2, 2)
    assert averages["others"][1][0].shape == (3,)
    assert averages["empty"] == {}
    assert fastema.EMA(np.ones(4)).averages.shape == (4,)
    assert len(fastema.EMA(np.ones(2) for _ in range(3)).averages) == 3


def test_new_values_are_known_by_their_place_and_key(rng):
    values = {"a": rng.standard_normal(3), "b": [rng.standard_normal(3)]}
    ema = fastema.EMA(values, 0.5)
    new = {"b": [rng.standard_normal(3)], "a": rng.standard_normal(3)}
    ema.update(new)
    assert oracle.same_bits(ema.averages["a"], oracle.update(values["a"], new["a"], 0.5))
    assert oracle.same_bits(ema.averages["b"][0], oracle.update(values["b"][0], new["b"][0], 0.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": np.ones(3)}, r"missing: \['b'\], unknown: \[\]"),
        ([np.ones(3)], "values must be a mapping, got list"),
        ({"a": np.ones(3), "b": np.ones(3)}, r"values\['b'\] must be a sequence, got ndarray"),
        ({"a": np.ones(3), "b": []}, r"values\['b'\] must have 1 entries, got 0"),
        ({"a": np.ones(3), "b": [np.ones(4)]}, r"averages\['b.0'\] and values\['b.0'\] must have one size"),
    ],
)
def test_new_values_that_do_not_fit_are_refused_by_name(values, message):
    ema = fastema.EMA({"a": np.zeros(3), "b": [np.zeros(3)]}, 0.5)
    with pytest.raises(ValueError, match=message):
        ema.update(values)
    assert ema.step == 0
    assert not ema.averages["a"].any()


def test_sixteen_bit_values_have_float32_averages_unless_asked_otherwise(rng):
    weights = weights_of(rng, np.float16, bfloat16, np.float32, np.float64)
    names = [average.dtype.name for average in fastema.EMA(weights).averages]
    assert names == ["float32", "float32", "float32", "float64"]
    for dtype in (bfloat16, "bfloat16"):
        assert fastema.EMA([weights[1]], dtype=dtype).averages[0].dtype == bfloat16
    with pytest.raises(TypeError, match=r"averages\['0'\] and values\['0'\] must have one type, or be"):
        fastema.EMA(weights, dtype=bfloat16)
    with pytest.raises(TypeError, match="dtype must be float16, bfloat16, float32 or float64, got int32"):
        fastema.EMA(weights, dtype=np.int32)


def test_averages_of_bfloat16_weights_in_float16_are_refused_by_name(rng):
    weights = {"w": weights_of(rng, bfloat16)[0]}
    refused = r"averages\['w'\] and values\['w'\] must have one type, .* got float16 and bfloat16"
    with pytest.raises(TypeError, match=refused):
        fastema.EMA(weights, dtype=np.float16)


def test_copies_of_bfloat16_arrays_in_float16_are_numpy_s(rng):
    [weight] = weights_of(rng, bfloat16)
    [copy] = fastema.copies([weight], np.float16)
    assert copy.tobytes() == weight.astype(np.float32).astype(np.float16).tobytes()


@pytest.mark.parametrize(("average", "value"), MIXES)
def test_averages_have_any_type_that_the_core_offers_beside_their_values(rng, average, value):
    weights = weights_of(rng, value, value)
    ema = fastema.EMA(weights, 0.9, dtype=average)
    expected = [weight.astype(average) for weight in weights]
    assert all(map(oracle.same_bits, fastema.copies(weights, average), expected))
    for _ in range(5):
        train(rng, weights)
        ema.update()
        expected = [oracle.update(a, v, 0.9) for a, v in zip(expected, weights, strict=True)]
    assert all(map(oracle.same_bits, ema.averages, expected))


@pytest.mark.parametrize("value", [bfloat16, np.float32])
def test_stochastic_rounding_has_the_bits_of_seed_and_step(rng, value):
    weights = weights_of(rng, value, value)
    ema = fastema.EMA(weights, 0.999, dtype=bfloat16, rounding="stochastic", seed=7)
    expected = fastema.copies(weights, bfloat16)
    for step in range(1, 6):
        train(rng, weights)
        ema.update()
        fastema.update(expected, weights, 0.999, rounding="stochastic", seed=7, step=step)
    assert all(map(oracle.same_bits, ema.averages, expected))


@pytest.mark.parametrize(("dtype", "carry"), [(np.float32, np.float32), (bfloat16, np.int16)])
def test_compensated_averages_keep_what_rounding_loses(rng, dtype, carry):
    weights = weights_of(rng, dtype, dtype)
    ema = fastema.EMA(weights, [0.9999, 0.999], dtype=dtype, rounding="compensated")
    averages = fastema.copies(weights, dtype)
    carries = [np.zeros(weight.shape, carry) for weight in weights]
    for _ in range(5):
        train(rng, weights)
        ema.update()
        fastema.update(averages, weights, 0.9999, carries=carries)
    assert all(map(oracle.same_bits, ema.averages, averages))
    assert carries[0].any()


def test_a_compensated_bfloat16_average_of_float32_weights_is_a_float32_average(rng):
    weights = weights_of(rng, np.float32, np.float32)
    arguments = {"decay": 0.999, "initial": "zeros"}
    ema = fastema.EMA(weights, dtype=bfloat16, rounding="compensated", **arguments)
    plain = fastema.EMA(weights, **arguments)
    for _ in range(5):
        train(rng, weights)
        ema.update()
        plain.update()
    state = ema.state_dict()
    for name, exact in plain.state_dict()["averages"][0].items():
        high, low = state["averages"][0][name], state["carries"][0][name]
        bits = (high.view(np.uint16).astype(np.uint32) << 16) + low.astype(np.uint32)
        assert oracle.same_bits(bits.view(np.float32), exact)


@given(decays=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_averages_from_zeros_are_divided_by_what_of_them_is_no_longer_zero(rng, decays):
    weight = rng.standard_normal(4)
    ema = fastema.EMA(weight, lambda step: decays[step - 1], initial="zeros")
    kept, product = None, 1.0
    for decay in decays:
        weight += rng.standard_normal(4)
        ema.update()
        if kept is None and decay < 1.0:
            kept = np.zeros(4)
        if kept is not None:
            kept = oracle.update(kept, weight, decay)
        product *= decay
    if kept is not None:
        assert np.array_equal(ema.averages, kept / (1.0 - product))
        assert oracle.same_bits(ema.state_dict()["averages"][0]["0"], kept)


def test_the_average_of_a_single_number_is_an_array():
    weight = np.array(3.0, np.float32)
    for initial in ("values", "zeros"):
        ema = fastema.EMA([weight], 0.5, initial=initial)
        ema.update()
        assert isinstance(ema.averages[0], np.ndarray)
        assert oracle.same_bits(ema.averages[0], weight)


def test_an_average_from_zeros_is_the_first_value_after_one_update_and_before():
    weight = np.array([3.0, -7.0])
    ema = fastema.EMA(weight, 0.5, initial="zeros")
    assert ema.averages.tolist() == [3.0, -7.0]
    weight += 1.0
    ema.update()
    assert ema.averages.tolist() == [4.0, -6.0]


def test_a_first_update_from_zeros_that_fails_changes_nothing():
    weight = np.ones(3)
    ema = fastema.EMA([weight], 0.5, initial="zeros")
    with pytest.raises(ValueError, match="must have one size"):
        ema.update([np.ones(4)])
    assert ema.averages[0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int32", "uint64"])
def test_integers_and_booleans_are_copied_at_each_update(dtype):
    counter = np.array([0, 1, 1], dtype)
    ema = fastema.EMA({"weight": np.ones(2), "counter": counter}, [0.9, 0.99], every=2)
    ema.update()
    ema.update()
    counter[0] = 1
    ema.update()
    assert ema.averages["counter"].tolist() == [0, 1, 1]
    ema.update()
    for k in range(2):
        assert ema.averages_of(k)["counter"].tolist() == [1, 1, 1]
        assert ema.averages_of(k)["counter"].dtype == dtype
    with ema.swapped():
        assert counter.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "other", "error", "message"),
    [
        (np.int64, np.ones(2), TypeError, r"values\['n'\] must be of int64, got float64"),
        (np.int32, np.ones(2, np.uint32), TypeError, r"values\['n'\] must be of int32, got uint32"),
        (np.uint8, np.ones(2, np.int8), TypeError, r"values\['n'\] must be of uint8, got int8"),
        (np.uint8, np.ones(1, np.uint8), ValueError, r"values\['n'\] must have shape \(2,\), got \(1,\)"),
        (np.int64, np.ones((2, 1), int), ValueError, r"values\['n'\] must have shape \(2,\), got \(2, 1\)"),
    ],
)
def test_integers_of_another_type_or_shape_are_refused_and_nothing_changes(dtype, other, error, message):
    ema = fastema.EMA({"w": np.zeros(3), "n": np.zeros(2, dtype)})
    with pytest.raises(error, match=message):
        ema.update({"w": np.ones(3), "n": other})
    assert ema.step == 0
    assert not ema.averages["w"].any()
    assert not ema.averages["n"].any()


def test_every_bit_of_an_integer_is_copied_and_swapped():
    counter = np.array([0x7FF0000000000001, -1, 2**62 + 1])  # NaN that signal, were they float64
    ema = fastema.EMA(counter)
    counter += 1
    ema.update()
    assert ema.averages.tolist() == counter.tolist()
    counter[:] = 5
    with ema.swapped():
        assert counter.tolist() == [0x7FF0000000000002, 0, 2**62 + 2]
    assert counter.tolist() == [5, 5, 5]


def test_an_array_given_twice_is_averaged_once():
    tied, other = np.ones(4), np.ones(4)
    ema = fastema.EMA({"embedding": tied, "head": tied, "view": tied[:], "other": other}, 0.5)
    averages = ema.averages
    assert averages["embedding"] is averages["head"] is averages["view"]
    assert averages["other"] is not averages["head"]
    tied += 1.0
    ema.update()
    with ema.swapped():
        assert tied.tolist() == [1.5] * 4
    assert tied.tolist() == [2.0] * 4
    assert set(ema.state_dict()["averages"][0]) == {"embedding", "other"}


@LINUX_ONLY
def test_averages_larger_than_memory_lie_in_a_file(tmp_path):
    """RLIMIT_DATA counts a process' own memory, and not the files that it maps."""
    program = """
        import resource, sys
        import numpy as np
        import fastema

        value = np.ones(1 << 20, np.float32)
        status = open("/proc/self/status").read().split()
        used = int(status[status.index("VmData:") + 1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + (24 << 20),) * 2)
        decays = [0.5] * 16  # 64 MiB of averages
        try:
            fastema.EMA(value, decays)
        except MemoryError:
            print("not in memory")
        ema = fastema.EMA(value, decays, memory=sys.argv[1])
        value += 1
        ema.update()
        print(all((ema.averages_of(k) == 1.5).all() for k in range(16)))
    """
    path = tmp_path / "averages"
    assert output_of(program, path) == "not in memory\nTrue"
    assert path.stat().st_size >= 64 << 20


def test_averages_in_a_file_that_is_made_anew_stay(tmp_path):
    first = fastema.EMA(np.ones(1000), memory=tmp_path / "averages")
    second = fastema.EMA(np.zeros(1000), memory=tmp_path / "averages")
    assert (first.averages == 1).all()
    assert (second.averages == 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"decay": 1.5}, ValueError, "decay must be from 0 to 1, got 1.5"),
        ({"decay": [0.9, -1]}, ValueError, "decay must be from 0 to 1, got -1"),
        ({"decay": "fast"}, TypeError, "decay must be a number from 0 to 1, or a schedule, got 'fast'"),
        ({"decay": []}, ValueError, "decay must hold one decay or more"),
        ({"threads": -1}, ValueError, "threads must be 0 or more, got -1"),
        ({"every": 0}, ValueError, "every must be 1 or more, got 0"),
        ({"every": 1.5}, TypeError, "every must be a whole number, got 1.5"),
        ({"start_step": -1}, ValueError, "start_step must be 0 or more, got -1"),
        ({"initial": "ones"}, ValueError, "initial must be 'values' or 'zeros', got 'ones'"),
        ({"rounding": "up"}, ValueError, "rounding must be 'nearest' or 'stochastic' or 'compensated'"),
        ({"buffers": "keep"}, ValueError, "buffers must be 'copy' or 'average' or 'ignore', got 'keep'"),
        ({"device": "tpu"}, ValueError, "device must be None or 'cpu', got 'tpu'"),
        ({"background": True}, ValueError, r"background must be False unless .* values\['0'\] is of ndarray"),
        (
            {"rounding": "compensated"},
            TypeError,
            r"averages\['0'\] must be float32 or bfloat16 to be compensated",
        ),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        fastema.EMA([np.ones(2)], **arguments)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_cannot_be_copied_says_what_can(copied):
    with pytest.raises(TypeError, match=r"an EMA cannot be copied or pickled: .* use state_dict\(\)"):
        copied(fastema.EMA([np.ones(2)]))


def test_an_average_says_of_how_many_arrays_and_updates_it_is():
    ema = fastema.EMA({"w": np.ones(2), "b": np.ones(1)})
    ema.update()
    assert repr(ema) == "<fastema.EMA of 2 arrays, step 1>"
    with ema.swapped():
        assert repr(ema) == "<fastema.EMA of 2 arrays, step 1, in the place of the weights>"
    assert repr(fastema.Window(np.ones(2), 3)) == "<fastema.Window of 1 array, step 0>"


def test_values_that_are_no_arrays_are_refused_by_name():
    with pytest.raises(TypeError, match=r"values\['a.1'\] must be an array, .* got str"):
        fastema.EMA({"a": [np.ones(2), "relu"]})
    with pytest.raises(TypeError, match=r"values\['0'\] must be of float16, .* got datetime64"):
        fastema.EMA([np.ones(2, "M8[s]")])
    with pytest.raises(ValueError, match=r"values\['w'\] must be dense"):
        fastema.EMA({"w": np.ones(4)[::2]})
    with pytest.raises(ValueError, match=r"values must have one name each, and two of them are 'a\.0'"):
        fastema.EMA({"a.0": np.ones(2), "a": [np.ones(2)]})


def test_a_schedule_that_leaves_its_range_changes_nothing():
    weight = np.zeros(2)
    ema = fastema.EMA(weight, lambda step: 0.5 if step < 2 else 1.5)
    weight += 1.0
    ema.update()
    with pytest.raises(ValueError, match=r"decay\(2\) must be from 0 to 1, got 1\.5"):
        ema.update()
    assert ema.step == 1
    assert ema.averages.tolist() == [0.5, 0.5]


def test_an_array_that_was_resized_is_noticed_by_name():
    weight = np.zeros(2)
    ema = fastema.EMA({"w": weight})
    weight.resize(1000, refcheck=False)
    with pytest.raises(ValueError, match=r"values\['w'\] was resized after it was paired"):
        ema.update()


def test_none_in_a_tree_is_no_array_and_stays():
    """JAX's trees have it where a layer has no bias."""
    weights = {"layer": {"kernel": np.ones(2), "bias": None}, "rest": [None]}
    ema = fastema.EMA(weights, 0.5)
    ema.update({"layer": {"kernel": np.zeros(2), "bias": None}, "rest": [None]})
    assert ema.averages["layer"]["kernel"].tolist() == [0.5, 0.5]
    assert ema.averages["layer"]["bias"] is None
    assert ema.averages["rest"] == [None]
    with pytest.raises(ValueError, match=r"values\['layer.bias'\] must be None as at first, got ndarray"):
        ema.update({"layer": {"kernel": np.zeros(2), "bias": np.zeros(2)}, "rest": [None]})
    assert ema.step == 1
    with pytest.raises(TypeError, match="values must be an array"):
        fastema.EMA(None)
