"""fastema.jax with a clock, several decays and compensated rounding: the bits of fastema.EMA."""

import numpy as np
import pytest

import fastema
import oracle
from fastema import schedules

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import fastema.jax  # noqa: E402


class Halving(schedules.Schedule):
    """A schedule of one's own, with no formula for spans."""

    def __repr__(self):
        return "Halving()"

    def at(self, step, xp):
        return 1.0 - 0.5 / xp.maximum(step, 1.0)


DECAYS = [
    (0.9, schedules.dynamic(0.999), Halving()),
    (schedules.warmup(0.999, gamma=3.0), schedules.equal_weights(3)),
    (schedules.power(0.1), schedules.constant(0.99, 40), schedules.half_life(1)),
    [schedules.half_life(64)],
]
FORMS = [
    {"rounding": "compensated"},
    {"rounding": "compensated", "dtype": "bfloat16", "every": 3, "start_step": 40},
    {"rounding": "stochastic", "dtype": "bfloat16", "initial": "zeros", "seed": 7},
    {"initial": "zeros", "every": 3, "start_step": 40},
    {"rounding": "compensated", "initial": "zeros", "every": 2},
]
# each form with two of the decays
CASES = [(d, f) for i, d in enumerate(DECAYS) for j, f in enumerate(FORMS) if (i + j) % 2 == 0]


def params_of(step, dtype=None):
    rng = np.random.default_rng(step)
    params = {
        "a": jnp.asarray(rng.standard_normal(1003), jnp.float32),
        "half": [jnp.asarray(rng.standard_normal((7, 11)), jnp.bfloat16)],
        "key": jax.random.key(step),
        "steps": jnp.asarray(step),
        "z": jnp.asarray(rng.standard_normal(5) + 1j * rng.standard_normal(5), jnp.complex64),
    }
    if dtype is not None:
        del params["z"]
    return params


def bits_of(tree):
    """Return the bits of all arrays of a tree."""
    leaves = jax.tree.leaves(tree)
    data = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]
    return [(x.dtype, x.shape, x.tobytes()) for x in map(np.asarray, data)]


def plain(state):
    """Return an EMA's state with the bytes of its arrays, by which states can be compared."""

    def of(x):
        if isinstance(x, dict):
            return {name: of(each) for name, each in x.items()}
        return [of(each) for each in x] if isinstance(x, list) else x.tobytes() if hasattr(x, "shape") else x

    return {key: of(x) for key, x in state.items() if key not in ("config", "values")}


def spans(seed):
    """Yield spans for ever: ones, whole numbers, and real numbers that float32 holds."""
    rng = np.random.default_rng(seed)
    while True:
        yield 1.0
        yield float(rng.integers(1, 300))
        yield float(np.float32(rng.random() * 20))


@pytest.mark.parametrize(("decay", "form"), CASES, ids=str)
def test_fifty_random_spans_have_the_bits_of_an_ema_and_states_go_both_ways(decay, form):
    dtype = form.get("dtype")
    theirs = fastema.EMA(params_of(0, dtype), decay, **form)
    ours = fastema.jax.ema(decay, clock=True, **form)
    state, traces = ours.init(params_of(0, dtype)), []

    @jax.jit
    def update(state, params, span):
        traces.append(span)
        return ours.update(state, params, span=span)

    for step, span in zip(range(1, 51), spans(5)):  # noqa: B905 - spans have no end
        params = params_of(step, dtype)
        theirs.update(params, span=span)
        state = update(state, params, jnp.float32(span))
        if theirs.decay is not None:
            for k in range(len(decay)):
                assert bits_of(ours.averages_of(state, k)) == bits_of(theirs.averages_of(k)), (step, k)
    assert len(traces) == 1
    assert state.clock == theirs.clock
    found, expected = ours.state_dict(state), theirs.state_dict()
    assert plain(found) == plain(expected)
    assert bits_of(ours.load_state_dict(expected, params)) == bits_of(state)
    theirs.load_state_dict(found)
    theirs.update(params_of(51, dtype), span=0.1)  # no float32, as it is given
    state = ours.update(state, params_of(51, dtype), span=0.1)
    assert plain(ours.state_dict(state)) == plain(theirs.state_dict())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_several_decays_without_a_clock_have_the_bits_of_an_ema(form):
    decay, dtype = DECAYS[0], form.get("dtype")
    theirs = fastema.EMA(params_of(0, dtype), decay, **form)
    ours = fastema.jax.ema(decay, **form)
    state, update = ours.init(params_of(0, dtype)), jax.jit(ours.update, donate_argnums=0)
    for step in range(1, 51):
        theirs.update(params_of(step, dtype))
        state = update(state, params_of(step, dtype))
    assert plain(ours.state_dict(state)) == plain(theirs.state_dict())
    assert bits_of(ours.load_state_dict(theirs.state_dict(), params_of(50, dtype))) == bits_of(state)


def test_what_rounding_loses_is_kept():
    values = np.float32(1) + np.float32(1e-3) * np.random.default_rng(0).random((500, 64), np.float32)
    average = fastema.jax.ema(0.99999, rounding="compensated")
    state = average.init(jnp.ones(64))
    state, _ = jax.lax.scan(lambda state, x: (average.update(state, x), None), state, jnp.asarray(values))
    theirs = fastema.EMA([np.ones(64, np.float32)], 0.99999, rounding="compensated")
    for value in values:
        theirs.update([value])
    assert bits_of(state.averages) == bits_of(theirs.averages)
    assert bits_of(state.carries) == bits_of(list(theirs.state_dict()["carries"][0].values()))
    assert np.any(np.asarray(state.carries))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compensated_averages_of_every_bfloat16_are_those_of_an_ema(dtype):
    """NaN and infinities among them, but nothing so small that a carry would be subnormal: zero under XLA."""
    every = np.arange(1 << 16, dtype=np.uint16)
    rest = every & 0x7FFF
    every = every[(rest == 0) | (rest > (127 - 95) << 7)].view(jnp.bfloat16)
    values = [np.random.default_rng(i).permutation(every) for i in range(4)]
    theirs = fastema.EMA([values[0]], [0.7, 0.0], rounding="compensated", dtype=dtype)
    ours = fastema.jax.ema([0.7, 0.0], rounding="compensated", dtype=dtype)
    state = ours.init([jnp.asarray(values[0])])
    for value in values[1:]:
        theirs.update([value])
        state = jax.jit(ours.update)(state, [jnp.asarray(value)])
    for k in range(2):
        found, expected = (np.asarray(x[0]) for x in (ours.averages_of(state, k), theirs.averages_of(k)))
        assert oracle.same_bits(found, expected)


def test_spans_that_no_time_can_be_let_the_averages_stay():
    average = fastema.jax.ema([0.5, 0.25], clock=True)
    before = average.update(average.init(params_of(0)), params_of(1), span=2)
    update = jax.jit(lambda state, params, span: average.update(state, params, span=span))
    for span in (0.0, -1.0, np.nan, np.inf):
        after = update(before, params_of(2), span)
        assert after.step == 2
        assert after.clock == before.clock == 2
        assert bits_of(average.averages(after)["a"]) == bits_of(average.averages(before)["a"])
        assert bits_of(update(after, params_of(3), 1)._replace(step=None)) == bits_of(
            update(before, params_of(3), 1)._replace(step=None)
        )


def test_a_state_that_left_values_out_goes_on_with_a_clock():
    params = {"w": jnp.ones(3)}
    theirs = fastema.EMA(params, 0.5)
    theirs.update({"w": jnp.full(3, np.nan)}, non_finite="skip")
    ours = fastema.jax.ema(0.5, clock=True)
    state = ours.load_state_dict(theirs.state_dict(), params)
    for value in (3.0, 4.0):
        theirs.update({"w": jnp.full(3, value)})
        state = ours.update(state, {"w": jnp.full(3, value)})
    assert bits_of(ours.averages(state)) == bits_of(theirs.averages)
    theirs.update({"w": jnp.full(3, np.nan)}, non_finite="skip")
    with pytest.raises(ValueError, match="averaged last at step 4, unless there is a clock"):
        fastema.jax.ema(0.5).load_state_dict(theirs.state_dict(), params)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_parameters_and_all_of_a_state_can_be_donated(form):
    average, params = fastema.jax.ema([0.5, 0.9], clock=True, **form), params_of(0, form.get("dtype"))
    state = average.init(params)

    def step(params, state):
        return jax.tree.map(jnp.copy, params), average.update(state, params, span=3)

    train = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(3):
        params, state = train(params, state)
    state = average.update(state, params)  # outside of jit, too
    params, state = train(params, state)
    assert state.clock == 13


def test_a_chain_of_optax_takes_spans():
    optax = pytest.importorskip("optax")
    average = fastema.jax.ema(schedules.half_life(64), clock=True)
    last = optax.GradientTransformationExtraArgs(*average.as_optax())
    optimizer, params = optax.chain(optax.sgd(1.0), last), {"w": jnp.zeros(2)}
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)({"w": jnp.full(2, -1.0)}, state, params, span=jnp.float32(128))
    params = optax.apply_updates(params, updates)
    assert average.averages(state)["w"].tolist() == [0.75, 0.75]


def test_what_cannot_be_done_right_is_refused():
    ema, params = fastema.jax.ema, params_of(0)
    clocked, several = ema(0.5, clock=True), ema([0.5, 0.9])
    state = clocked.init(params)
    for error, message, do in [
        (TypeError, "decay must be a number or a schedule", lambda: ema([0.5, abs])),
        (ValueError, "decay must hold one decay or more", lambda: ema([])),
        (ValueError, "clock must be", lambda: ema(0.5, clock="samples")),
        (
            ValueError,
            r"span must be 1 unless there is a clock: ema\(..., clock=True\); got 2",
            lambda: ema(0.5).update(ema(0.5).init(params), params, span=2),
        ),
        (ValueError, "span must be above 0 and finite", lambda: clocked.update(state, params, span=0)),
        (TypeError, "span must be a number above 0", lambda: clocked.update(state, params, span="1")),
        (
            TypeError,
            r"span must be a real number, got float32 of shape \(2,\)",
            lambda: jax.jit(lambda x: clocked.update(state, params, span=x))(jnp.ones(2)),
        ),
        (ValueError, "it has other times", lambda: ema(0.5).update(state, params)),
        (ValueError, "it has other products", lambda: ema(0.5, initial="zeros", clock=True).averages(state)),
        (
            ValueError,
            "has 2 averages of each.*other averages",
            lambda: ema([0.5, 0.9], clock=True).averages(state),
        ),
        (
            ValueError,
            "has 2 averages of each.*other averages",
            lambda: several.averages(ema([0.5]).init(params)),
        ),
        (IndexError, "k must be from 0 to 1, got 2", lambda: several.averages_of(several.init(params), 2)),
        (
            TypeError,
            r"'compensated' where averages are float16, as that of params\['a'\]",
            lambda: ema(0.5, rounding="compensated", dtype="float16").init({"a": params["a"]}),
        ),
    ]:
        with pytest.raises(error, match=message):
            do()
    theirs = fastema.EMA(params, [0.5, 0.9])
    with pytest.raises(ValueError, match="state must be of 1 decays, got 2"):
        ema(0.5).load_state_dict(theirs.state_dict(), params)
