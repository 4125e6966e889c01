"""state_dict and load_state_dict: training goes on to the bit, in this process or another."""

import pickle

import ml_dtypes
import numpy as np
import pytest

import fastema
from fastema import schedules
from processes import output_of

bfloat16 = ml_dtypes.bfloat16
ARGUMENTS = [
    {"every": 4},
    {"decay": schedules.dynamic(0.999), "start_step": 3},
    {"decay": [0.9, schedules.dynamic(0.99)], "initial": "zeros"},
    {"rounding": "compensated", "every": 3},
    {"rounding": "stochastic", "dtype": bfloat16, "seed": 3},
    {"dtype": np.float64},
]


def weights_at(step, arguments):
    """Return what the weights are at a step of the training."""
    rng = np.random.default_rng(step)
    dtype = bfloat16 if "dtype" in arguments else np.float32
    return {
        "kernel": rng.standard_normal((4, 5)).astype(dtype),
        "half": rng.standard_normal(7).astype(bfloat16),
        "steps": np.array(step),
    }


def train(weights, ema, steps, arguments):
    for step in steps:
        for name, value in weights_at(step, arguments).items():
            weights[name][...] = value
        ema.update()


def all_bits(ema):
    state = ema.state_dict()
    dictionaries = [*state["averages"], *state["carries"], state["copied"]]
    arrays = [{name: (x.dtype, x.tobytes()) for name, x in named.items()} for named in dictionaries]
    return arrays, state["step"], state["products"], state["decay"]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(arguments, swapped):
    arguments = dict(arguments)
    weights = weights_at(0, arguments)
    ema = fastema.EMA(weights, **arguments)
    train(weights, ema, range(1, 11), arguments)  # half-way through every=4 and every=3
    raw = {name: weight.tobytes() for name, weight in weights.items()}
    if swapped:
        ema.swap(len(ema.state_dict()["averages"]) - 1)
    saved = pickle.loads(pickle.dumps((weights, ema.state_dict())))
    if swapped:
        ema.swap()
    train(weights, ema, range(11, 20), arguments)

    resumed_weights, state = saved
    resumed = fastema.EMA(resumed_weights, **arguments)
    resumed.load_state_dict(state)
    assert resumed.is_swapped == swapped
    if swapped:
        with pytest.raises(RuntimeError, match="needs the weights"):
            resumed.update()
        resumed.swap()
    assert {name: weight.tobytes() for name, weight in resumed_weights.items()} == raw
    train(resumed_weights, resumed, range(11, 20), arguments)
    assert all_bits(resumed) == all_bits(ema)


def test_a_run_is_resumed_in_another_process(tmp_path):
    program = """
        import pickle, sys
        import numpy as np
        import fastema

        path, begin, end, swapped = sys.argv[1], *map(int, sys.argv[2:])
        weights = {"w": np.zeros(9, np.float32)}
        ema = fastema.EMA(weights, 0.9, every=3, initial="zeros")
        if begin:
            weights["w"][...], state = pickle.load(open(path, "rb"))
            ema.load_state_dict(state)
            if ema.is_swapped:
                ema.swap()
        for step in range(begin, end):
            weights["w"] += np.random.default_rng(step).standard_normal(9, np.float32)
            ema.update()
        if swapped:
            ema.swap()
        pickle.dump((weights["w"], ema.state_dict()), open(path, "wb"))
        print(ema.averages["w"].tobytes().hex(), ema.step, ema.decay)
    """
    whole = output_of(program, tmp_path / "whole", 0, 12, 0)
    for swapped in (0, 1):
        output_of(program, tmp_path / "parts", 0, 5, swapped)
        assert output_of(program, tmp_path / "parts", 5, 12, 0) == whole


@pytest.mark.parametrize("before", [True, False])
def test_a_state_saved_while_swapped_gives_the_weights_back_whichever_the_model_holds(before):
    weights = {"w": np.zeros(3), "half": np.zeros(2, bfloat16)}
    ema = fastema.EMA(weights, 0.5)
    for weight in weights.values():
        np.add(weight, 1, out=weight)
    ema.update()
    with ema.swapped():
        model, state = {name: weight.copy() for name, weight in weights.items()}, ema.state_dict()
    fresh = {"w": np.full(3, 9.0), "half": np.full(2, 9, bfloat16)}
    resumed = fastema.EMA(fresh, 0.5)
    for load in (True, False):
        if load == before:
            resumed.load_state_dict(state)
        else:
            for name, weight in model.items():
                fresh[name][...] = weight
    assert resumed.is_swapped
    assert fresh["w"].tolist() == [0.5] * 3
    resumed.swap()
    assert fresh["w"].tolist() == [1.0] * 3
    assert fresh["half"].tolist() == [1, 1]
    assert resumed.averages["w"].tolist() == [0.5] * 3


def test_a_state_is_a_copy_of_plain_values_and_arrays():
    weights = {"w": np.zeros(3), "n": np.array(1)}
    ema = fastema.EMA(weights, [0.5, 0.9], every=2)
    state = ema.state_dict()
    assert state.keys() == {
        *("averages", "carries", "copied", "values", "step", "clock", "averaged", "decay", "products"),
        *("swapped", "config"),
    }
    assert state["averages"][1]["w"].tolist() == [0.0, 0.0, 0.0]
    assert state["copied"]["n"] == 1
    assert (state["step"], state["decay"], state["products"], state["swapped"]) == (0, None, [0.0, 0.0], None)
    weights["w"] += 1
    ema.update()
    ema.update()
    assert not state["averages"][0]["w"].any()
    ema.load_state_dict(state)
    weights["w"] += 1
    ema.update()
    ema.update()
    assert not state["averages"][0]["w"].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.pop("copied"), KeyError, "copied"),
        (lambda s: s.update(step=-1), ValueError, r"state\['step'\] must be 0 or more, got -1"),
        (lambda s: s.update(products=[0.0, 0.0]), ValueError, "state must be of 1 decays, got 2"),
        (lambda s: s.update(averages=[]), ValueError, r"state\['averages'\] must hold 1 dictionaries, got 0"),
        (lambda s: s.update(carries=[{}]), ValueError, r"state\['carries'\] must hold 0 dictionaries, got 1"),
        (
            lambda s: s["averages"][0].update(c=s["averages"][0].pop("b")),
            ValueError,
            r"state\['averages'\]\[0\] must name the values; missing: \['b'\], unknown: \['c'\]",
        ),
        (
            lambda s: s["averages"][0].update(b=np.zeros(3)),
            ValueError,
            r"state\['averages'\]\[0\]\['b'\] must have shape \(2,\), got \(3,\)",
        ),
        (
            lambda s: s["averages"][0].update(b=np.zeros(2, np.float32)),
            TypeError,
            r"state\['averages'\]\[0\]\['b'\] must be float64, got float32",
        ),
        (lambda s: s.update(swapped=0), ValueError, r"state\['values'\] must name the values; missing"),
        (lambda s: s.update(swapped=2), IndexError, "k must be from 0 to 0, got 2"),
        (
            lambda s: s.update(decay=["x"]),
            TypeError,
            r"state\['decay'\] must be a number from 0 to 1, got 'x'",
        ),
        (
            lambda s: s.update(products=[np.nan]),
            ValueError,
            r"state\['products'\] must be from 0 to 1, got nan",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(change, error, message):
    values = {"a": np.ones(2), "b": np.ones(2), "n": np.array(3)}
    ema = fastema.EMA(values, 0.5)
    ema.update()
    state = fastema.EMA({name: np.zeros_like(value) for name, value in values.items()}, 0.5).state_dict()
    change(state)
    before = all_bits(ema)
    with pytest.raises(error, match=message):
        ema.load_state_dict(state)
    assert all_bits(ema) == before
    assert not ema.is_swapped
    assert values["a"].tolist() == [1.0, 1.0]
