"""The clock: what an average is that takes several steps, samples or weights at once."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
import tolerances
from fastema import schedules
from ids import shown

DECAYS = [
    0.9,
    schedules.constant(0.9, start_step=7),
    schedules.dynamic(0.95),
    schedules.dynamic(0.95, start_step=5),
    schedules.warmup(0.99, start_step=2, min_decay=0.3),
    schedules.equal_weights(),
    schedules.equal_weights(6),
    schedules.half_life(5),
    schedules.power(0.1),
    schedules.ramp(0.95, 6),
    schedules.cosine(0.3, 0.95, 20),
    schedules.growing(0.4, 8),
    lambda step: 0.5 if step < 8 else 0.9,
]
every_decay = pytest.mark.parametrize("decay", DECAYS, ids=shown)


def decay_at(decay, step, start):
    """Return the decay of one step, from the definition alone."""
    return 0.0 if step < start else decay(step) if callable(decay) else decay


def replayed(values, decay, start=0):
    """Return the averages after an update at each step; the first value is where they start."""
    averages = [values[0]]
    for step, value in enumerate(values[1:], start=1):
        d = decay_at(decay, step, start)
        averages.append(d * averages[-1] + (1 - d) * value)
    return averages


def fed(ema, weight, values, **options):
    for value in values:
        weight[()] = value
        ema.update(**options)
    return float(ema.averages)


@every_decay
@given(every=st.integers(1, 6), start=st.integers(0, 20), seed=st.integers(0, 99))
def test_every_so_many_updates_is_an_update_at_each_where_weights_stand_still(decay, every, start, seed):
    blocks = np.random.default_rng(seed).standard_normal(6)
    values = [1e3, *np.repeat(blocks, every)]
    weight = np.array(values[0])
    ema = fastema.EMA(weight, decay, every=every, start_step=start)
    got = fed(ema, weight, values[1:])
    tolerances.assert_close(got, replayed(values, decay, start)[-1], tolerances.CLOCK)
    assert ema.step == ema.clock == len(values) - 1


@every_decay
@given(spans=st.lists(st.integers(1, 9), min_size=1, max_size=6), start=st.integers(0, 20))
def test_an_update_of_a_span_is_so_many_updates_with_a_value_that_is_held(decay, spans, start):
    weight, values = np.array(1e3), [1e3]
    ema = fastema.EMA(weight, decay, start_step=start)
    for i, span in enumerate(spans):
        weight[()] = i
        ema.update(span=span)
        values += [i] * span
    tolerances.assert_close(float(ema.averages), replayed(values, decay, start)[-1], tolerances.CLOCK)
    assert (ema.step, ema.clock) == (len(spans), sum(spans))


def test_weights_averaged_once_an_epoch_have_equal_shares():
    weight = np.array([1e6])
    ema = fastema.EMA(weight, schedules.equal_weights(), every=100)
    for step in range(1, 501):
        weight[:] = (step + 99) // 100
        ema.update()
    assert ema.averages[0] == 3.0


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_equal_weights_of_spans_are_the_weighted_mean(shares):
    values = np.random.default_rng(0).standard_normal(len(shares))
    weight = np.array(1e6)
    ema = fastema.EMA(weight, schedules.equal_weights())
    for value, share in zip(values, shares, strict=True):
        weight[()] = value
        ema.update(span=share)
    mean = math.fsum(values * shares) / math.fsum(shares)
    tolerances.assert_close(float(ema.averages), mean, tolerances.CLOCK)
    tolerances.assert_close(ema.clock, math.fsum(shares), tolerances.CLOCK)


@pytest.mark.parametrize("batch", [1, 32, 256])
def test_a_half_life_in_samples_does_not_depend_on_the_batch(batch):
    weight = np.array(1.0)
    ema = fastema.EMA(weight, schedules.half_life(1024))
    fed(ema, weight, [0.0] * (2048 // batch), span=batch)
    tolerances.assert_close(float(ema.averages), 0.25, tolerances.CLOCK)


def test_a_batch_so_many_times_as_large_has_the_decay_to_that_power():
    """The scaling rule of Busbridge et al. 2023 (2307.13813)."""
    weight = np.zeros(())
    ema = fastema.EMA(weight, 0.999)
    ema.update(span=2.5)
    assert ema.decay == 0.999**2.5


def test_zeros_are_divided_by_what_all_spans_left_of_them():
    weight = np.array(3.0)
    ema = fastema.EMA(weight, 0.9, initial="zeros")
    for span in (1, 4, 0.5):
        ema.update(span=span)
        tolerances.assert_close(float(ema.averages), 3.0, tolerances.CLOCK)


@pytest.mark.parametrize(("before", "after"), [(5, 3), (3, 1), (1, 4)])
@pytest.mark.parametrize("way", ["file", "state"])
def test_every_may_change_when_a_run_is_resumed(tmp_path, before, after, way):
    values = [7.0, *[1.0] * 11, *[2.0] * 13]
    weight = np.array(values[0])
    first = fastema.EMA({"w": weight}, schedules.equal_weights(), every=before)
    for value in values[1:12]:
        weight[()] = value
        first.update()
    if way == "file":
        first.save(tmp_path / "e.safetensors")
        ema = fastema.EMA.load(tmp_path / "e.safetensors", {"w": weight}, every=after)
    else:
        ema = fastema.EMA({"w": weight}, schedules.equal_weights(), every=after)
        ema.load_state_dict(first.state_dict())
    last = 0.0
    for value in values[12:]:
        weight[()] = value
        ema.update()
        # what was not averaged before the resumption is, at the first update after it
        taken, total = ema.step // after * after, ema.step
        if total % after == 0:
            held = [1.0] * (11 // before * before) + [2.0] * (taken - 11 // before * before)
            last = float(ema.averages["w"])
            tolerances.assert_close(last, np.mean(held), tolerances.CLOCK)
    assert last


def test_a_resumed_clock_goes_on_to_the_bit(tmp_path):
    rng = np.random.default_rng(3)
    spans, values = rng.uniform(0.1, 50, 20), rng.standard_normal((20, 5))
    path = tmp_path / "e.safetensors"

    def begin():
        weight = np.ones(5)
        return weight, fastema.EMA({"w": weight}, [schedules.power(0.05), 0.99], every=3, start_step=4)

    weight, whole = begin()
    other, part = begin()
    for i, (span, value) in enumerate(zip(spans, values, strict=True)):
        weight[:] = other[:] = value
        whole.update(span=span)
        part.update(span=span)
        part.save(path)
        part = fastema.EMA.load(path, {"w": other})
        assert (part.clock, part.step) == (whole.clock, i + 1)
    for k in (0, 1):
        assert part.averages_of(k)["w"].tobytes() == whole.averages_of(k)["w"].tobytes()


def test_of_a_state_without_a_clock_that_is_the_step():
    ema = fastema.EMA({"w": np.ones(2)}, 0.9, every=3)
    for _ in range(7):
        ema.update()
    state = ema.state_dict()
    del state["clock"], state["averaged"]  # as of those that are older than clocks
    ema.load_state_dict({**state, "step": 8})
    assert ema.clock == 8
    ema.update()
    assert ema.decay == schedules.compound(0.9, 3)  # of steps 7, 8 and 9


@pytest.mark.parametrize(
    ("span", "error", "message"),
    [
        (0, ValueError, "span must be above 0 and finite, got 0"),
        (-1.5, ValueError, "span must be above 0 and finite, got -1.5"),
        (math.inf, ValueError, "span must be above 0 and finite, got inf"),
        (math.nan, ValueError, "span must be above 0 and finite, got nan"),
        ("2", TypeError, "span must be a number above 0, got '2'"),
        (None, TypeError, "span must be a number above 0, got None"),
        ([1], TypeError, r"span must be a number above 0, got [1]"),
    ],
)
def test_a_span_is_a_number_above_nothing(span, error, message):
    weight = np.ones(2)
    ema = fastema.EMA(weight, 0.9)
    weight += 1
    with pytest.raises(error, match=re.escape(message)):
        ema.update(span=span)
    assert (ema.step, ema.clock) == (0, 0)
    assert ema.averages.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("key", "time", "message"),
    [
        ("clock", -1, "state['clock'] must be above 0 and finite, got -1"),
        ("clock", 0, "state['clock'] must be the time of state['step'], which is 1, got 0"),
        ("averaged", 9, "state['averaged'] must be at most 2, its clock, got 9"),
    ],
)
def test_a_state_with_an_impossible_clock_is_refused(key, time, message):
    ema = fastema.EMA({"w": np.ones(2)}, 0.9)
    ema.update(span=2)
    assert (ema.state_dict()["clock"], ema.state_dict()["averaged"]) == (2, 2)
    with pytest.raises(ValueError, match=re.escape(message)):
        ema.load_state_dict({**ema.state_dict(), key: time})


# --- before the first average -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"every": 100},
        {"every": 100, "start_step": 1000},
        {"start_step": 1000},
        {"every": 7, "initial": "zeros"},
    ],
)
@pytest.mark.parametrize("decay", [0.9, schedules.warmup(0.9999), [0.5, 0.9]], ids=repr)
def test_before_the_first_average_an_average_is_a_copy_of_now(tmp_path, decay, options):
    weights = {"w": np.zeros(2), "n": np.zeros((), np.int64)}
    ema = fastema.EMA(weights, decay, **options)
    for step in range(1, 7):
        weights["w"] += 1
        weights["n"] += 1
        ema.update()
        averages = ema.averages
        assert (averages["w"].tolist(), int(averages["n"])) == ([step, step], step)
    with ema.swapped():
        assert (weights["w"].tolist(), int(weights["n"])) == ([6, 6], 6)
        assert ema.averages["w"].tolist() == [6, 6]
    ema.save(tmp_path / "e.safetensors")
    assert fastema.checkpoint.File(tmp_path / "e.safetensors")["w"].tolist() == [6, 6]
    averages["w"][:] = 0
    assert weights["w"].tolist() == [6, 6], "it is the weight itself"


@pytest.mark.parametrize("way", ["file", "state"])
@pytest.mark.parametrize("swapped", [False, True])
def test_resumed_before_the_first_average_a_run_goes_on_to_the_bit(tmp_path, way, swapped):
    path, runs = tmp_path / "e.safetensors", []
    for resumed in (False, True):
        weights = {"w": np.full(3, 5.0)}
        ema = fastema.EMA(weights, schedules.dynamic(0.99), every=6)
        for step in range(20):
            if resumed and step == 4:
                if swapped:
                    ema.swap()
                ema.save(path)
                state, weights = ema.state_dict(), {"w": np.full(3, -1.0)}
                if way == "file":
                    ema = fastema.EMA.load(path, weights)
                else:
                    ema = fastema.EMA(weights, schedules.dynamic(0.99), every=6)
                    ema.load_state_dict(state)
                if swapped:
                    assert weights["w"].tolist() == [8.0, 8.0, 8.0]
                    ema.swap()
                    assert weights["w"].tolist() == [8.0, 8.0, 8.0]
            weights["w"][:] = step + 5
            ema.update()
        runs.append(ema.averages["w"].tobytes())
    assert runs[0] == runs[1]


def test_before_the_first_average_16_bit_weights_have_float32_averages():
    weight = np.ones(2, np.float16)
    ema = fastema.EMA(weight, 0.9, every=3)
    weight += 1
    ema.update()
    assert ema.averages.dtype == np.float32
    assert ema.averages.tolist() == [2.0, 2.0]


def test_of_arrays_that_never_change_the_last_ones_given_are_shown():
    jax = pytest.importorskip("jax")
    ema = fastema.EMA({"w": jax.numpy.zeros(2)}, 0.5, every=3)
    for step in (1.0, 2.0):
        ema.update({"w": jax.numpy.full(2, step)})
        assert ema.averages["w"].tolist() == [step, step]
    ema.update({"w": jax.numpy.full(2, 8.0)})
    assert ema.averages["w"].tolist() == [7.0, 7.0]  # an eighth of zeros is left
