"""fastema.jax: the averages of fastema.EMA as pure functions, inside of jit."""

import itertools

import numpy as np
import pytest

import fastema
import oracle
from fastema import schedules

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import fastema.jax  # noqa: E402

DECAYS = [
    0.9,
    schedules.dynamic(0.99),
    schedules.warmup(0.999, gamma=3.0),
    schedules.equal_weights(),
    schedules.power(0.1),
    schedules.constant(0.9, 4),
    schedules.linear(0.5, 0.9, 6),
]
KINDS = [(None, "nearest"), ("bfloat16", "nearest"), ("bfloat16", "stochastic"), ("float16", "stochastic")]


def params_of(step, dtype=None):
    rng = np.random.default_rng(step)
    params = {
        "a": jnp.asarray(rng.standard_normal(1003), jnp.float32),
        "half": [jnp.asarray(rng.standard_normal((7, 11)), jnp.bfloat16)],
        "steps": jnp.asarray(step),
        "z": jnp.asarray(rng.standard_normal(5) + 1j * rng.standard_normal(5), jnp.complex64),
    }
    if dtype is not None:
        del params["z"]
    if dtype == "float16":
        del params["half"]
    return params


def bits_of(tree):
    """Return the bits of all arrays of a tree."""
    arrays = [np.asarray(x) for x in jax.tree.leaves(tree)]
    return [(x.dtype, x.shape, x.tobytes()) for x in arrays]


@pytest.mark.parametrize(("dtype", "rounding"), KINDS, ids=str)
@pytest.mark.parametrize("initial", ["values", "zeros"])
@pytest.mark.parametrize("decay", DECAYS, ids=str)
def test_has_the_bits_of_an_ema_and_goes_on_where_that_was_and_back(decay, initial, dtype, rounding):
    for every, start in itertools.product((1, 3), (0, 5)):
        arguments = {
            "every": every,
            "start_step": start,
            "initial": initial,
            "dtype": dtype,
            "rounding": rounding,
            "seed": 7,
        }
        theirs = fastema.EMA(params_of(0, dtype), decay, **arguments)
        ours = fastema.jax.ema(decay, **arguments)
        state, update = ours.init(params_of(0, dtype)), jax.jit(ours.update, donate_argnums=0)
        for step in range(1, 10):
            params = params_of(step, dtype)
            theirs.update(params)
            state = update(state, params)
            if theirs.decay is not None:
                assert bits_of(ours.averages(state)) == bits_of(theirs.averages), (arguments, step)
        found, expected = ours.state_dict(state), theirs.state_dict()
        assert {key: found[key] for key in ("step", "decay", "products")} == {
            key: expected[key] for key in ("step", "decay", "products")
        }
        assert bits_of(ours.load_state_dict(expected, params)) == bits_of(state)
        theirs.load_state_dict(found)
        theirs.update(params_of(10, dtype))
        assert bits_of(theirs.averages) == bits_of(ours.averages(update(state, params_of(10, dtype))))


def test_equals_a_replay_by_numpy():
    average = fastema.jax.ema(schedules.dynamic(0.999))
    state, update = average.init(params_of(0)["a"]), jax.jit(average.update)
    expected = np.asarray(params_of(0)["a"])
    for step in range(1, 20):
        state = update(state, params_of(step)["a"])
        expected = oracle.update(expected, np.asarray(params_of(step)["a"]), oracle.decay_at(step, 0.999))
    assert oracle.same_bits(np.asarray(average.averages(state)), expected)


@pytest.mark.parametrize(("dtype", "rounding"), KINDS, ids=str)
def test_many_steps_within_one_jit_have_the_bits_of_as_many_calls(dtype, rounding):
    average = fastema.jax.ema(0.9, dtype=dtype, rounding=rounding, initial="zeros")
    steps = [params_of(step, dtype) for step in range(6)]
    state = average.init(steps[0])
    for params in steps[1:]:
        state = average.update(state, params)

    @jax.jit
    def unrolled(steps):
        state = average.init(steps[0])
        for params in steps[1:]:
            state = average.update(state, params)
        return state

    @jax.jit
    def scanned(steps):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *steps[1:])
        return jax.lax.scan(
            lambda state, x: (average.update(state, x), None), average.init(steps[0]), stacked
        )[0]

    assert bits_of(unrolled(steps)) == bits_of(state)
    assert bits_of(scanned(steps)) == bits_of(state)


def test_averages_are_arrays_of_their_own_so_that_all_can_be_donated():
    average, params = fastema.jax.ema(0.5), params_of(0)
    state = average.init(params)

    def step(params, state):
        params = jax.tree.map(lambda x: x + 1, params)
        return params, average.update(state, params)

    train = jax.jit(step, donate_argnums=(0, 1))
    shown = average.averages(state)
    for _ in range(2):
        params, state = train(params, state)
    state = average.update(state, params)  # outside of jit, too
    params, state = train(params, state)
    assert bits_of(shown) == bits_of(average.averages(average.init(params_of(0))))
    assert int(state.averages["steps"]) == 3


def test_before_the_first_update_that_averages_they_are_what_they_started_at():
    average = fastema.jax.ema(0.5, every=3, initial="zeros")
    state = average.update(average.init({"w": jnp.ones(2)}), {"w": jnp.full(2, 5.0)})
    assert average.averages(state)["w"].tolist() == [1.0, 1.0]
    assert average.state_dict(state)["decay"] is None


def test_averages_take_the_types_of_other_parameters_if_asked_to():
    average, params = fastema.jax.ema(0.5), params_of(0)
    shown = average.averages(average.init(params), like=params)
    assert [x.dtype for x in jax.tree.leaves(shown)] == [x.dtype for x in jax.tree.leaves(params)]


def test_keys_of_random_numbers_are_carried_along():
    average = fastema.jax.ema(0.5)
    params = {"key": jax.random.key(0), "w": jnp.zeros(2)}
    state = jax.jit(average.update)(average.init(params), {"key": jax.random.key(1), "w": jnp.ones(2)})
    assert (jax.random.key_data(state.averages["key"]) == jax.random.key_data(jax.random.key(1))).all()
    assert average.averages(state)["w"].tolist() == [0.5, 0.5]


def test_averages_what_the_chain_of_optax_makes():
    optax = pytest.importorskip("optax")
    average = fastema.jax.ema(schedules.dynamic(0.9))
    optimizer = optax.chain(optax.adam(0.1), average.as_optax())
    params = {"w": params_of(0)["a"], "b": jnp.zeros(())}
    state = optimizer.init(params)

    @jax.jit
    def train(params, state, target):
        gradients = jax.grad(lambda p: jnp.mean((p["w"] * 2 + p["b"] - target) ** 2))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    expected = {name: np.asarray(x) for name, x in params.items()}
    for step in range(1, 20):
        params, state = train(params, state, params_of(step)["a"])
        decay = oracle.decay_at(step, 0.9)
        expected = {name: oracle.update(x, np.asarray(params[name]), decay) for name, x in expected.items()}
    assert bits_of(average.averages(state)) == bits_of(dict(sorted(expected.items())))
    with pytest.raises(ValueError, match="params must be given to the optimizer's update"):
        optimizer.update(params, state)


def test_steps_that_optax_leaves_out_are_not_counted():
    optax = pytest.importorskip("optax")
    average = fastema.jax.ema(0.5)
    optimizer = optax.apply_if_finite(optax.chain(optax.sgd(1.0), average.as_optax()), 10)
    params = {"w": jnp.zeros(2)}
    state = optimizer.init(params)
    for gradient in (-1.0, np.nan, -1.0):
        updates, state = jax.jit(optimizer.update)({"w": jnp.full(2, gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    assert average.averages(state)["w"].tolist() == [1.25, 1.25]


def test_what_cannot_be_done_right_is_refused():
    @jax.tree_util.Partial
    def asked(step):
        return min(step, 0.5)

    class Python(schedules.Schedule):
        def at(self, step, xp):
            return xp.minimum(0.5, 1.0) if step > 3 else 0.0

    ema, params = fastema.jax.ema, params_of(0)
    for error, message, make in [
        (TypeError, "decay must be a number or a schedule of fastema.schedules", lambda: ema(asked)),
        (TypeError, "whose method at takes tensors", lambda: ema(Python())),
        (ValueError, "every must be at most 16384", lambda: ema(schedules.dynamic(0.9), every=20_000)),
        (ValueError, "dtype must not be float64 unless", lambda: ema(0.9, dtype="float64")),
        (ValueError, "decay must be from 0 to 1", lambda: ema(1.5)),
        (ValueError, "params must hold an array or more", lambda: ema(0.9).init({})),
        (
            TypeError,
            "dtype must go with params.'half'.*bfloat16",
            lambda: ema(0.9, dtype="float16").init(params),
        ),
        (
            TypeError,
            "dtype must be None where values are complex",
            lambda: ema(0.9, dtype="bfloat16").init(params),
        ),
        (ValueError, "state must hold one state of averages, got 0", lambda: ema(0.9).averages({})),
    ]:
        with pytest.raises(error, match=message):
            make()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"b": np.ones(2)}, ValueError, r"missing: \[\], unknown: \[\"\['b'\]\"\]"),
        ({"a": np.ones(2)}, ValueError, r"params\['a'\] must have shape \(1003,\), got \(2,\)"),
        ({"a": np.ones(1003, np.int32)}, TypeError, r"params\['a'\] must be averaged"),
        (
            {"steps": np.int8(1)},
            TypeError,
            r"params\['steps'\] must be of a type that goes with its average's int32",
        ),
    ],
)
def test_other_parameters_than_at_first_are_refused(change, error, message):
    average, params = fastema.jax.ema(0.5), params_of(0)
    state = average.init(params)
    with pytest.raises(error, match=message):
        jax.jit(average.update)(state, {**params, **change})


def test_a_state_whose_clock_went_otherwise_is_refused():
    params = {"w": jnp.zeros(2)}
    theirs = fastema.EMA(params, 0.5)
    theirs.update(params, span=2)
    with pytest.raises(ValueError, match="state must have counted each update as one"):
        fastema.jax.ema(0.5).load_state_dict(theirs.state_dict(), params)
    zeros = fastema.EMA(params, 0.5, initial="zeros")
    with pytest.raises(ValueError, match="initial must be 'zeros'"):
        fastema.jax.ema(0.5).load_state_dict(zeros.state_dict(), params)
