"""Averages in the place of the weights, for a while (swap, swapped) or for good (copy_to)."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
import oracle
from mixes import MIXES

bfloat16 = ml_dtypes.bfloat16
DTYPES = [np.float16, bfloat16, np.float32, np.float64, np.int64, np.uint8, np.bool_]


@pytest.fixture
def weights(rng):
    """Return weights of every type, NaN payloads, infinities and large beside small numbers among them."""
    made = [rng.standard_normal(6).astype(dtype) for dtype in DTYPES]
    for weight in made[:4]:
        weight[:4] = [np.nan, -0.0, np.inf, 3e4]
        weight.view(f"u{weight.itemsize}")[0] |= 5
    return made


def bits(arrays):
    return [np.asarray(array).tobytes() for array in arrays]


def trained(ema, weights, steps=3):
    for _ in range(steps):
        for weight in weights:
            if weight.dtype.kind not in "biu":
                weight[3:] = weight[3:] * weight.dtype.type(0.5)
            else:
                weight[:] = weight[::-1].copy()
        ema.update()


ARGUMENTS = [
    {},
    {"initial": "zeros"},
    {"rounding": "compensated"},
    {"decay": [0.9, 0.5]},
    {"decay": [0.9, 0.5], "initial": "zeros"},
    {"every": 2, "start_step": 2},
]


def made(weights, decay=0.9, **arguments):
    if arguments.get("rounding") == "compensated":
        weights = [weight for weight in weights if weight.dtype != np.float64]
    return fastema.EMA(weights, decay, **arguments), weights


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("k", [0, -1])
def test_swapped_weights_are_the_averages_and_come_back_bit_for_bit(weights, arguments, k):
    ema, weights = made(weights, **arguments)
    k = len(ema.state_dict()["averages"]) - 1 if k else 0
    trained(ema, weights)
    raw, averages = bits(weights), [np.array(x) for x in ema.averages_of(k)]
    others = bits(ema.averages_of(0))
    for _ in range(2):
        ema.swap(k)
        assert ema.is_swapped
        for weight, average in zip(weights, averages, strict=True):
            with np.errstate(over="ignore"):
                assert weight.tobytes() == average.astype(weight.dtype).tobytes()
        assert bits(ema.averages_of(k)) == bits(averages), "averages stay what they are while swapped"
        assert bits(ema.averages_of(0)) == others
        ema.swap()
        assert not ema.is_swapped
        assert bits(weights) == raw
        assert bits(ema.averages_of(k)) == bits(averages)


@pytest.mark.parametrize(("average", "value"), [mix for mix in MIXES if mix[0] != mix[1]])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_weights_of_another_type_are_kept_aside_and_their_averages_are_shown(rng, average, value, rounding):
    weight = rng.standard_normal(6).astype(value)
    weight[:3] = [np.nan, -0.0, np.inf]
    weight.view(f"u{weight.itemsize}")[0] |= 5
    ema = fastema.EMA([weight], 0.9, dtype=average, rounding=rounding)
    trained(ema, [weight])
    raw, kept = bits([weight]), bits(ema.averages)
    with ema.swapped():
        assert weight.tobytes() == ema.averages[0].astype(value).tobytes()
        assert bits(ema.averages) == kept
    assert bits([weight]) == raw
    assert bits(ema.averages) == kept


@given(data=st.data())
def test_any_bytes_come_back(data):
    weights = [
        np.frombuffer(data.draw(st.binary(min_size=24, max_size=24)), dtype).copy() for dtype in DTYPES[:4]
    ]
    ema = fastema.EMA(weights, data.draw(st.floats(0, 1)))
    raw = bits(weights)
    before = bits(ema.averages)
    with ema.swapped():
        pass
    assert bits(weights) == raw
    assert bits(ema.averages) == before


def test_arrays_of_one_type_are_exchanged_without_further_memory(rng):
    weight = rng.standard_normal(5).astype(np.float32)
    ema = fastema.EMA([weight])
    average = ema.averages[0]
    raw = weight.copy()
    weight += 1.0
    ema.swap()
    assert oracle.same_bits(weight, raw)
    assert oracle.same_bits(average, raw + np.float32(1)), "the weight is where the average was"


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, Interruption])
def test_swapped_restores_whatever_is_raised(weights, error):
    ema = fastema.EMA(weights)
    trained(ema, weights)
    raw = bits(weights)

    def evaluate():
        with ema.swapped():
            assert bits(weights) != raw
            raise error

    with pytest.raises(error):
        evaluate()
    assert not ema.is_swapped
    assert bits(weights) == raw


EMA = fastema.ema.__file__, str(Path(fastema.ema.__file__).with_name("_ema"))


@contextmanager
def interrupted_after(lines):
    """Raise KeyboardInterrupt, once, at some line of EMA, as Ctrl-C does when native code returns."""
    left = lines

    def trace(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.startswith(EMA):
            return None
        left -= event == "line"
        if left < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_wherever_a_swap_is_interrupted_the_weights_come_back(weights, arguments):
    ema, weights = made(weights, **arguments)
    trained(ema, weights)
    raw, averages = bits(weights), bits(ema.averages)
    back_already, lines = 0, 0
    while True:
        try:
            with interrupted_after(lines), ema.swapped():
                pass
        except KeyboardInterrupt:
            back_already += not ema.is_swapped
            if ema.is_swapped:
                ema.swap()
            assert bits(weights) == raw, lines
            assert bits(ema.averages) == averages, lines
            lines += 1
        else:
            break
    assert lines > 50
    assert back_already > 0.9 * lines, "but where nothing of the way back was begun it needs no second swap"


def test_an_interrupt_as_native_code_returns_is_of_an_update_that_was_done(weights, monkeypatch):
    weights = weights[2:4]
    ema, other = (fastema.EMA(weights, 0.9, initial="zeros") for _ in range(2))
    move = fastema.Pairs._move

    def interrupted(*arguments, **options):
        move(*arguments, **options)
        raise KeyboardInterrupt

    for _ in range(2):
        monkeypatch.setattr(fastema.Pairs, "_move", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ema.update()
        monkeypatch.undo()
        other.update()
    assert ema.step == other.step == 2
    assert bits(ema.averages) == bits(other.averages)


def test_swapped_restores_on_return_break_and_the_end_of_a_generator(weights):
    ema = fastema.EMA(weights)
    trained(ema, weights)
    raw = bits(weights)

    def returning():
        with ema.swapped():
            return bits(weights)

    def generating():
        with ema.swapped():
            yield bits(weights)

    assert returning() != raw
    assert bits(weights) == raw
    for _ in range(2):
        with ema.swapped():
            break
    assert bits(weights) == raw
    generator = generating()
    assert next(generator) != raw
    generator.close()
    assert bits(weights) == raw


def test_swapped_leaves_alone_what_was_swapped_back_within(weights):
    ema = fastema.EMA(weights)
    trained(ema, weights)
    raw = bits(weights)
    with ema.swapped():
        ema.swap()
    assert not ema.is_swapped
    assert bits(weights) == raw


def test_an_evaluation_within_an_evaluation_is_nothing_and_the_outermost_gives_the_weights_back(weights):
    ema = fastema.EMA(weights)
    trained(ema, weights)
    raw = bits(weights)
    with ema.swapped():
        seen = bits(weights)
        with ema.swapped(), ema.swapped():
            assert bits(weights) == seen
        assert ema.is_swapped
        with pytest.raises(ZeroDivisionError), ema.swapped():
            raise ZeroDivisionError
        assert ema.is_swapped
        assert bits(weights) == seen
    assert not ema.is_swapped
    assert bits(weights) == raw


def test_an_evaluation_after_a_swap_leaves_the_averages_there(weights):
    ema = fastema.EMA(weights)
    trained(ema, weights)
    raw = bits(weights)
    ema.swap()
    seen = bits(weights)
    with ema.swapped():
        assert bits(weights) == seen
    assert bits(weights) == seen
    ema.swap()
    assert bits(weights) == raw


def test_after_a_swap_within_an_evaluation_the_weights_are_there_and_each_further_one_has_its_averages(
    weights,
):
    ema = fastema.EMA(weights)
    trained(ema, weights)
    raw = bits(weights)
    with ema.swapped():
        seen = bits(weights)
        with ema.swapped():
            ema.swap()
            assert bits(weights) == raw
        assert bits(weights) == raw
        with ema.swapped():
            assert bits(weights) == seen
        assert bits(weights) == raw
        ema.swap()
        assert bits(weights) == seen
    assert bits(weights) == raw


def test_an_evaluation_of_another_decay_within_one_is_refused(weights):
    ema = fastema.EMA(weights, [0.5, 0.9])
    trained(ema, weights)
    raw = bits(weights)
    with ema.swapped(1):
        seen = bits(weights)
        with (
            pytest.raises(RuntimeError, match=r"swapped\(0\) needs .* averages of swapped\(1\)"),
            ema.swapped(),
        ):
            pass
        with pytest.raises(IndexError), ema.swapped(2):
            pass
        assert bits(weights) == seen
    assert bits(weights) == raw


def test_an_evaluation_within_that_of_another_ema_is_refused_where_that_covers_its_own():
    weight = np.zeros(2)
    slow, fast = fastema.EMA([weight], 0.75), fastema.EMA([weight], 0.5)
    weight += 4
    slow.update()
    fast.update()
    with slow.swapped(), fast.swapped():
        with pytest.raises(RuntimeError, match="another EMA's averages"), slow.swapped():
            pass
        with fast.swapped():
            assert (weight == 2).all()
    assert (weight == 4).all()


def test_an_evaluation_that_outlives_the_one_it_began_in_has_averages_to_its_end(weights):
    ema = fastema.EMA(weights)
    trained(ema, weights)
    raw = bits(weights)
    first, second = ema.swapped(), ema.swapped()
    first.__enter__()
    seen = bits(weights)
    second.__enter__()
    first.__exit__(None, None, None)
    assert bits(weights) == seen
    second.__exit__(None, None, None)
    assert bits(weights) == raw


def test_an_evaluation_that_was_begun_and_lost_keeps_no_other_from_its_end(weights):
    ema = fastema.EMA(weights)
    trained(ema, weights)
    raw = bits(weights)
    with ema.swapped():
        ema.swapped().__enter__()
    assert bits(weights) == raw


def test_an_evaluation_within_that_of_another_thread_is_refused():
    weight = np.zeros(2)
    ema = fastema.EMA([weight], 0.5)
    weight += 1
    ema.update()

    def evaluate():
        with ema.swapped():
            return "seen"

    with ThreadPoolExecutor(1) as other, ema.swapped():
        error = other.submit(evaluate).exception()
    assert "another thread has put these averages" in str(error)
    assert (weight == 1).all()


def test_what_needs_the_weights_is_refused_while_they_are_away(weights):
    ema = fastema.EMA(weights)
    trained(ema, weights)
    state = ema.state_dict()
    with ema.swapped():
        seen, step = bits(weights), ema.step
        setting = partial(setattr, ema, "step", 7)
        for call in (ema.update, ema.copy_to, ema.reset, lambda: ema.load_state_dict(state), setting):
            with pytest.raises(RuntimeError, match=r" needs the weights, .* call swap\(\) first"):
                call()
        assert bits(weights) == seen
        assert ema.step == step


def test_training_goes_on_after_a_swap_as_if_there_had_been_none(weights):
    copies = [weight.copy() for weight in weights]
    plain, swapped = fastema.EMA(copies), fastema.EMA(weights)
    for _ in range(3):
        trained(plain, copies, 1)
        trained(swapped, weights, 1)
        with swapped.swapped():
            pass
    assert bits(weights) == bits(copies)
    assert bits(plain.averages) == bits(swapped.averages)


def test_a_value_that_is_read_only_or_shared_is_refused_and_nothing_is_swapped():
    memory = np.arange(6.0)
    fixed = np.ones(2)
    fixed.flags.writeable = False
    for values, message in (
        ({"a": np.zeros(2), "b": fixed}, r"swap\(\) must change values\['b'\], which is read-only"),
        ({"c": memory[:4], "d": memory[2:]}, r"values\['c'\] and values\['d'\] must not overlap"),
    ):
        ema = fastema.EMA(values)
        before = bits(values.values())
        with pytest.raises(ValueError, match=message):
            ema.swap()
        assert not ema.is_swapped
        assert bits(values.values()) == before


def test_a_swap_that_fails_on_its_way_has_changed_nothing(weights):
    """The types that are written one by one come first, and those that are exchanged fail then."""
    memory = np.arange(6.0)
    values = [*weights, memory[:4], memory[2:]]
    ema = fastema.EMA(values)
    trained(ema, weights)
    raw, averages = bits(values), bits(ema.averages)
    with pytest.raises(ValueError, match="must not overlap"):
        ema.swap()
    assert bits(values) == raw
    assert bits(ema.averages) == averages


def test_copy_to_writes_averages_for_good(weights):
    ema = fastema.EMA(weights)
    trained(ema, weights)
    averages = [average.astype(weight.dtype) for average, weight in zip(ema.averages, weights, strict=True)]
    others = [np.zeros_like(weight) for weight in weights]
    raw = bits(weights)
    assert all(x is y for x, y in zip(ema.copy_to(others), others, strict=True))
    assert bits(others) == bits(averages)
    assert bits(weights) == raw
    ema.copy_to()
    assert bits(weights) == bits(averages)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (np.ones(4), ValueError, r"values\['b'\] must have shape \(3,\), got \(4,\)"),
        (np.ones(3, int), TypeError, r"values\['b'\] must be able to hold float64, got int64"),
        (np.broadcast_to(1.0, 3), ValueError, r"copy_to\(\) must change values\['b'\], which is read-only"),
    ],
)
def test_copy_to_what_does_not_fit_changes_nothing(other, error, message):
    ema = fastema.EMA({"a": np.ones(3), "b": np.ones(3)})
    target = np.zeros(3)
    with pytest.raises(error, match=message):
        ema.copy_to({"a": target, "b": other})
    assert not target.any()
