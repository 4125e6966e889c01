"""Starting again from the weights (reset), and going on from another step (step = n)."""

import ml_dtypes
import numpy as np
import pytest

import fastema
from fastema import schedules
from processes import skip_without

SETTINGS = {
    "plain": {},
    "several": {"decay": [0.5, schedules.dynamic(0.9)]},
    "zeros": {"initial": "zeros"},
    "stochastic": {"dtype": "bfloat16", "rounding": "stochastic"},
    "compensated": {"dtype": "bfloat16", "rounding": "compensated"},
    "every second": {"every": 2},
    "late": {"start_step": 3},
    "in a file": {"memory": "averages"},
    "some": {"only": ["w", "counter"]},
}


def weights(seed):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(3, 5)).astype(np.float32),
        "half": rng.normal(size=7).astype(ml_dtypes.bfloat16),
        "complex": (rng.normal(size=4) + 1j).astype(np.complex64),
        "counter": np.array(seed),
        "strided": np.arange(8)[::2] + seed,
    }


def train(values, seed):
    for name, new in weights(seed).items():
        values[name][...] = new


def state_of(ema):
    state = ema.state_dict()
    held = [*state["averages"], *state["carries"], state["copied"]]
    arrays = [{name: x.tobytes() for name, x in named.items()} for named in held]
    return arrays, state["products"], ema.step, ema.clock, ema.decay


def made(values, path, arguments):
    if "memory" in arguments:
        arguments = {**arguments, "memory": path / arguments["memory"]}
    return fastema.EMA(values, **{"decay": 0.75, **arguments})


@pytest.mark.parametrize("given", [False, True], ids=["", "given"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_after_a_reset_all_is_as_of_a_new_ema_and_so_is_what_follows(tmp_path, setting, given):
    values = weights(0)
    ema = made(values, tmp_path, SETTINGS[setting])
    shown = ema.averages
    for seed in range(1, 6):
        train(values, seed)
        ema.update(span=2)
    if given:
        other = weights(6)
        ema.reset(other)
        values = other
    else:
        ema.reset()
    (tmp_path / "fresh").mkdir()
    fresh = made(values, tmp_path / "fresh", SETTINGS[setting])
    assert state_of(ema) == state_of(fresh)
    if "initial" not in SETTINGS[setting]:
        assert (shown["w"] == ema.averages["w"]).all(), "averages that were shown stay the averages"
    for seed in range(7, 12):
        train(values, seed)
        ema.update(values)
        fresh.update()
        assert state_of(ema) == state_of(fresh)
        with ema.swapped(), fresh.swapped():
            pass


def test_a_reset_is_refused_where_another_ema_has_its_averages_in_place_and_nothing_has_changed():
    values = weights(0)
    ema, other = fastema.EMA(values, 0.5), fastema.EMA(values, 0.75)
    train(values, 1)
    ema.update()
    other.update()
    before = state_of(ema)
    with other.swapped(), pytest.raises(RuntimeError, match=r"reset\(\) needs .* another EMA's averages"):
        ema.reset()
    assert state_of(ema) == before


@pytest.mark.parametrize("value", [np.zeros((5, 3), np.float32), np.zeros((3, 5))], ids=["shape", "type"])
def test_a_reset_to_values_that_do_not_fit_changes_nothing(value):
    values = weights(0)
    ema = fastema.EMA(values, 0.5)
    train(values, 1)
    ema.update()
    before = state_of(ema)
    with pytest.raises((ValueError, TypeError), match=r"values\['w'\]"):
        ema.reset({**values, "w": value})
    with pytest.raises(ValueError, match="missing"):
        ema.reset({"w": values["w"]})
    assert state_of(ema) == before


def test_a_reset_starts_at_what_the_last_update_was_given():
    ema = fastema.EMA([np.zeros(2)], 0.5)
    ema.update([np.ones(2)])
    ema.reset()
    np.testing.assert_array_equal(ema.averages[0], np.ones(2))


@pytest.mark.parametrize("arguments", [{}, {"background": True}, {"every": 3}], ids=str)
def test_arrays_that_never_change_are_given_to_a_reset(arguments):
    skip_without("jax")
    import jax.numpy as jnp

    ema = fastema.EMA({"w": jnp.zeros(3)}, 0.5, **arguments)
    for n in range(1, 4):
        ema.update({"w": jnp.full(3, float(n))})
    before = state_of(ema)
    with pytest.raises(ValueError, match=r"values must be given: values\['w'\]"):
        ema.reset()
    assert state_of(ema) == before
    ema.reset({"w": jnp.full(3, 8.0)})
    fresh = fastema.EMA({"w": jnp.full(3, 8.0)}, 0.5, **arguments)
    assert (np.asarray(ema.averages["w"]) == 8).all()
    for n in range(1, 4):
        for each in (ema, fresh):
            each.update({"w": jnp.full(3, float(n))})
        assert state_of(ema) == state_of(fresh)


def test_a_module_is_reset_with_the_buffers_that_it_has_by_then():
    skip_without("torch")
    import torch

    module = torch.nn.BatchNorm1d(2)
    ema = fastema.EMA(module, 0.5)
    module(torch.ones(3, 2))
    ema.update()
    module.register_buffer("late", torch.ones(1))
    with torch.no_grad():
        module.weight += 1
    ema.reset()
    assert sorted(ema.averages) == sorted(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert torch.equal(ema.averages[name], tensor)


# --- another step -------------------------------------------------------------------------------------

PACES = [
    {"decay": schedules.dynamic(0.99)},
    {"decay": schedules.equal_weights()},
    {"decay": schedules.power(0.1), "every": 3},
    {"decay": schedules.dynamic(0.99, start_step=4), "every": 4},
    {"decay": schedules.equal_weights(), "every": 4, "start_step": 6},
    {"decay": [0.5, schedules.warmup(0.9)], "start_step": 5},
]


@pytest.mark.parametrize("pace", PACES, ids=str)
@pytest.mark.parametrize("step", [0, 1, 3, 4, 5, 7, 8])
def test_schedules_go_on_from_a_step_that_was_set_as_if_so_many_updates_had_been_seen(pace, step):
    values = [np.arange(3.0)]
    long, ema = (fastema.EMA(values, **pace) for _ in range(2))
    for _ in range(step):
        long.update()
    ema.step = step
    assert (ema.step, ema.clock) == (long.step, long.clock) == (step, step)
    for n in range(1, 10):
        values[0][:] = np.arange(3.0) * n**2
        long.update()
        ema.update()
        if long.step % pace.get("every", 1) == 0:
            assert ema.decay == long.decay
        assert ema.averages[0].tobytes() == long.averages[0].tobytes()


def test_a_step_that_was_set_shows_and_saves_the_averages_that_are_kept():
    weight = np.zeros(2)
    ema = fastema.EMA({"w": weight}, schedules.equal_weights())
    ema.step = 3
    weight += 4
    np.testing.assert_array_equal(ema.averages["w"], np.zeros(2))
    again = fastema.EMA({"w": weight}, schedules.equal_weights())
    again.load_state_dict(ema.state_dict())
    for each in (ema, again):
        each.update()
        assert each.step == 4
        np.testing.assert_array_equal(each.averages["w"], np.ones(2))


def test_averages_that_started_at_zeros_keep_the_share_of_their_start_when_the_step_is_set():
    weight = np.ones(2)
    ema = fastema.EMA([weight], 0.5, initial="zeros")
    ema.update()
    ema.step = 100
    weight += 1
    ema.update()
    np.testing.assert_array_equal(ema.averages[0], np.full(2, (0.25 + 1) / 0.75))


def test_what_is_no_step_is_refused_and_nothing_has_changed():
    ema = fastema.EMA([np.zeros(2)], 0.5)
    ema.update()
    for step, error in ((-1, ValueError), (1.5, TypeError), ("1", TypeError), (2**64, ValueError)):
        with pytest.raises(error, match=r"^step must be"):
            ema.step = step
    assert (ema.step, ema.clock) == (1, 1)
    ema.update(span=2.5)
    with pytest.raises(RuntimeError, match=r"step cannot be set .* the clock is at 3.5 after 2 updates"):
        ema.step = 4
    assert (ema.step, ema.clock) == (2, 3.5)
    ema.reset()
    ema.step = 4
    assert (ema.step, ema.clock) == (4, 4)


def test_a_step_is_set_after_what_the_background_does():
    skip_without("jax")
    import jax.numpy as jnp

    ema = fastema.EMA([jnp.zeros(300_000)], 0.5, background=True)
    ema.update([jnp.ones(300_000)])
    ema.step = 5
    ema.update([jnp.ones(300_000)])
    assert ema.step == 6
    assert (np.asarray(ema.averages[0]) == 0.75).all()
