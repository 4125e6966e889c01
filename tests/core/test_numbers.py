"""Numbers of every library are what they say, and others are refused by name; everywhere alike."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

import fastema
from fastema import schedules

HALVES = {
    "float": 0.5,
    "np.float16": np.float16(0.5),
    "np.float32": np.float32(0.5),
    "np.float64": np.float64(0.5),
    "0-d": np.array(0.5),
    "Fraction": Fraction(1, 2),
    "Decimal": Decimal("0.5"),
}
THREES = {
    "int": 3,
    "np.int8": np.int8(3),
    "np.int64": np.int64(3),
    "np.uint64": np.uint64(3),
    "0-d": np.array(3),
    "0-d of bytes": np.array(3, np.uint8),
}
HUGE = {"10**400": 10**400, "10**5000": 10**5000, "-10**400": -(10**400), "a fraction": Fraction(10**400)}


def arrays():
    return np.zeros(9, np.float32), np.arange(9, dtype=np.float32)


def updated(**arguments):
    """Return what `update` and `Pairs.update` make of arguments, if that is the same."""
    (a, v), (b, w) = arrays(), arrays()
    fastema.update(a, v, **arguments)
    fastema.Pairs(b, w).update(**arguments)
    assert (a == b).all()
    return a.tolist()


def ema(**arguments):
    return fastema.EMA(arrays()[1], **{"decay": 0.5, **arguments})


def in_ema(name):
    return lambda number: ema(**{name: number})


# what takes a number, by what errors call it
DECAYS = {
    "decay": [
        lambda number: updated(decay=number),
        in_ema("decay"),
        lambda number: schedules.over(number, 0, 2),
        schedules.constant,
        schedules.dynamic,
        schedules.warmup,
    ]
}
COUNTS = {
    "seed": [lambda number: updated(decay=0.5, rounding="stochastic", seed=number), in_ema("seed")],
    "step": [
        lambda number: updated(decay=0.5, rounding="stochastic", step=number),
        lambda number: ema().load_state_dict({**ema().state_dict(), "step": number, "clock": 3.0}),
        lambda number: setattr(ema(), "step", number),
    ],
    "threads": [lambda number: updated(decay=0.5, threads=number), in_ema("threads")],
    "every": [in_ema("every")],
    "start_step": [in_ema("start_step")],
}
SPANS = {
    "span": [lambda number: ema().update(span=number)],
    "updates": [schedules.half_life],
}


def uses(table):
    return [
        pytest.param(name, use, id=f"{name}{i}") for name, some in table.items() for i, use in enumerate(some)
    ]


def just(pairs):
    return [pytest.param(pair.values[1], id=pair.id) for pair in pairs]


def assert_alike(use, given, plain):
    made, needed = use(given), use(plain)
    if not isinstance(needed, fastema.EMA):
        assert made == needed


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("use", just(uses(DECAYS) + uses(SPANS)))
def test_whatever_is_a_number_is_taken_for_it(use, half):
    assert_alike(use, HALVES[half], 0.5)


@pytest.mark.parametrize("three", THREES)
@pytest.mark.parametrize("use", just(uses(COUNTS) + uses(SPANS)))
def test_whatever_is_a_whole_number_is_taken_for_it(use, three):
    """A step of np.int64(3) was "no whole number"."""
    assert_alike(use, THREES[three], 3)


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize(("name", "use"), uses(DECAYS) + uses(SPANS))
def test_a_number_that_no_float_holds_is_out_of_range_and_named(name, use, huge):
    """It was an OverflowError of Python's, or a ValueError about the printing of integers."""
    with pytest.raises(
        ValueError, match=rf"{name} must be .*, got (-?10000|Fraction|a number of more digits)"
    ):
        use(HUGE[huge])


@pytest.mark.parametrize("huge", ["10**400", "10**5000", "-10**400"])
@pytest.mark.parametrize(("name", "use"), [x for x in uses(COUNTS) if x.values[0] != "threads"])
def test_a_huge_whole_number_is_out_of_range_and_named(name, use, huge):
    """Every 10**400 steps was a RecursionError."""
    with pytest.raises(ValueError, match=rf"{name}.* must be .*, got (-?10000|a number of more digits)"):
        use(HUGE[huge])


@pytest.mark.parametrize(
    "odd", [0.5, 3.0, "3", None, Fraction(3), Decimal(3), 3j, [3], np.ones(2, int)], ids=repr
)
@pytest.mark.parametrize(("name", "use"), uses(COUNTS))
def test_what_is_no_whole_number_is_refused_by_name(name, use, odd):
    with pytest.raises((TypeError, ValueError), match=rf"{name}.* must be .*, got "):
        use(odd)


@pytest.mark.parametrize("odd", ["0.5", b"0.5", None, 3j, [[0.5]], np.ones(2), ...], ids=repr)
@pytest.mark.parametrize(("name", "use"), uses(DECAYS) + uses(SPANS))
def test_what_is_no_number_is_refused_by_name(name, use, odd):
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        use(odd)


@pytest.mark.parametrize(
    "odd", [float("nan"), np.float16("nan"), Decimal("nan"), np.array(np.inf), 1e308 * 10], ids=repr
)
@pytest.mark.parametrize(("name", "use"), uses(DECAYS) + uses(SPANS))
def test_what_is_not_finite_is_refused_by_name(name, use, odd):
    with pytest.raises(ValueError, match=f"{name} must be (from 0 to 1|above 0 and finite), got"):
        use(odd)


def test_an_error_of_a_number_itself_is_not_hidden():
    class Odd:
        def __float__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        updated(decay=Odd())
    with pytest.raises(KeyboardInterrupt):
        schedules.constant(Odd())


def test_schedules_of_numpys_numbers_are_saved_and_loaded(tmp_path):
    """Their fields were NumPy's, which JSON cannot hold."""
    schedule = schedules.warmup(np.float64(0.9), gamma=np.int64(2), start_step=np.int32(3))
    kept = ema(decay=schedule, every=np.int64(2), seed=np.uint8(7))
    kept.save(tmp_path / "a.safetensors")
    loaded = fastema.EMA.load(tmp_path / "a.safetensors", arrays()[1])
    assert loaded.decay == kept.decay
    assert schedule == schedules.warmup(0.9, gamma=2, start_step=3)
