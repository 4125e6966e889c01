"""ema.pull(amount): weights that move towards their averages, in NumPy's bits."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
import oracle
import tolerances
from processes import skip_without

KINDS = {  # of a value and of its average
    "float16": [None, "float16", "float32"],
    "bfloat16": [None, "bfloat16"],
    "float32": [None, "float16", "bfloat16"],
    "float64": [None],
}
AMOUNTS = [1.0, 0.5, 0.1, 2.0**-60, 1e-3]


def pulled(value, average, amount):
    """Return value + w * (average - value), one operation of NumPy at a time, rounded once at the end."""
    return oracle.update(value, average, 1.0 - amount)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize(("kind", "dtype"), [(kind, x) for kind, kinds in KINDS.items() for x in kinds])
def test_a_value_moves_towards_its_average_with_numpys_bits(rng, kind, dtype, amount):
    kind = np.dtype(getattr(ml_dtypes, kind, kind))
    values = {"w": rng.normal(size=(7, 9)).astype(kind), "counter": np.array(3)}
    values["w"].flat[:3] = [np.nan, np.inf, -0.0]
    ema = fastema.EMA(values, 0.75, dtype=dtype)
    for _ in range(2):
        values["w"][:] = rng.normal(size=(7, 9)).astype(kind)
        ema.update()
    values["counter"] += 1
    average, step = np.array(ema.averages["w"]), ema.step
    expected = pulled(values["w"], average, amount)
    ema.pull(amount)
    assert values["w"].dtype == kind
    assert oracle.same_bits(values["w"], expected)
    assert values["counter"] == 4
    assert ema.averages["w"].tobytes() == average.tobytes()
    assert ema.step == step


@given(st.floats(0.0, 1.0), st.integers(0, 2**32))
def test_float32_weights_have_the_bits_of_the_plain_formula(amount, seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=5).astype(np.float32)
    ema = fastema.EMA([weight], 0.5)
    weight += rng.normal(size=5).astype(np.float32)
    ema.update()
    average = ema.averages[0].copy()
    share = 1.0 - (1.0 - amount)
    expected = average if share == 1.0 else weight + np.float32(share) * (average - weight)
    ema.pull(amount)
    assert oracle.same_bits(weight, expected)


def test_what_is_shown_is_pulled_towards_also_where_that_is_not_what_is_kept():
    weight = np.zeros(3)
    ema = fastema.EMA([weight], [0.5, 0.75], initial="zeros")
    weight += 4
    ema.update()
    weight += 4
    ema.update()
    shown = ema.averages_of(1)[0]
    ema.pull(0.5, 1)
    assert oracle.same_bits(weight, pulled(np.full(3, 8.0), shown, 0.5))


def test_lookahead_is_an_average_every_few_steps_and_a_pull():
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(12, 3))
    fast = np.zeros(3)
    ema = fastema.EMA([fast], 0.5 ** (1 / 3), every=3)
    slow, expected = np.zeros(3), np.zeros(3)
    for n, change in enumerate(steps, start=1):
        fast += change
        ema.update()
        expected += change
        if n % 3 == 0:
            ema.pull()
            slow = slow + 0.5 * (expected - slow)  # Zhang et al. 2019, algorithm 1
            expected = slow.copy()
        np.testing.assert_allclose(fast, expected, rtol=1e-12)  # the third power of the third root


def descent(rng, steps, shape=(4,)):
    """Return what each step of a training adds to the weights, whatever they are."""
    return 0.1 * rng.standard_normal((steps, *shape)).astype(np.float32)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_lookahead_is_an_update_and_a_pull_every_few_steps(rng, alpha):
    """Zhang et al. 2019, algorithm 1: phi += alpha (theta - phi), and theta goes on from phi."""
    weight = {"w": rng.standard_normal(4).astype(np.float32)}
    ema = fastema.EMA(weight, 1.0 - alpha)
    theta = phi = weight["w"].copy()
    for step, change in enumerate(descent(rng, 60), 1):
        weight["w"] += change
        theta = theta + change
        if step % 5 == 0:
            ema.update()
            ema.pull()
            theta = phi = oracle.update(phi, theta, 1.0 - alpha)
        assert oracle.same_bits(weight["w"], theta)


@pytest.mark.parametrize("period", [7, 20])
def test_switch_ema_and_hare_and_tortoise_are_a_pull_once_in_a_while(rng, period):
    """Li et al. 2024 after each epoch, Lee et al. 2024 each so many steps: the weights become their EMA."""
    weight = {"w": rng.standard_normal(4).astype(np.float32)}
    ema = fastema.EMA(weight, 0.9)
    hare = tortoise = weight["w"].copy()
    for step, change in enumerate(descent(rng, 60), 1):
        weight["w"] += change
        hare = hare + change
        ema.update()
        tortoise = oracle.update(tortoise, hare, 0.9)
        if step % period == 0:
            ema.pull()
            hare = tortoise
        assert oracle.same_bits(weight["w"], hare)
        assert oracle.same_bits(ema.averages["w"], tortoise)


def test_keras_overwrites_as_a_pull_does(rng):
    skip_without("keras")
    import keras

    start, gradients = rng.standard_normal(4).astype(np.float32), descent(rng, 30)
    variable = keras.Variable(start)
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=4)
    optimizer.build([variable])
    weight = {"w": start.copy()}
    ema = fastema.EMA(weight, 0.9, start_step=2)  # their first step copies
    for step, gradient in enumerate(gradients, 1):
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        weight["w"] -= np.float32(0.5) * gradient
        ema.update()
        if step % 4 == 0:
            ema.pull()
        tolerances.assert_close(keras.ops.convert_to_numpy(variable), weight["w"], tolerances.FRAMEWORK)


def test_a_torch_module_is_pulled_in_place_and_autograd_is_told(torch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2).bfloat16())
    ema = fastema.EMA(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()
    y = model[0](torch.ones(1, 3, requires_grad=True)).sum()
    expected = [
        pulled(x.detach().numpy(), a.numpy(), 0.25)
        for x, a in zip(model[0].parameters(), ema.averages.values(), strict=False)
    ]
    ema.pull(0.25)
    for parameter, needed in zip(model[0].parameters(), expected, strict=True):
        assert oracle.same_bits(parameter.detach().numpy(), needed)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_variables_of_tensorflow_are_pulled():
    skip_without("tensorflow")
    import tensorflow as tf

    weight = tf.Variable([0.0, 1.0])
    ema = fastema.EMA([weight], 0.5)
    weight.assign([4.0, 5.0])
    ema.update()
    ema.pull(0.5)
    np.testing.assert_array_equal(weight.numpy(), [3.0, 4.0])


def test_arrays_that_never_change_cannot_be_pulled_and_the_cure_is_told():
    skip_without("jax")
    import jax.numpy as jnp

    ema = fastema.EMA({"w": jnp.zeros(2)}, 0.5)
    with pytest.raises(TypeError, match=r"pull\(\) must change values\['w'\], .* use `averages` or copy_to"):
        ema.pull()


def test_what_cannot_be_pulled_is_refused_and_nothing_has_changed():
    memory, fixed = np.arange(6.0), np.ones(2)
    fixed.flags.writeable = False
    for values, arguments, error, message in (
        ({"a": np.zeros(2), "b": fixed}, {}, ValueError, r"pull\(\) must change values\['b'\], .* read-only"),
        (
            {"c": memory[:4], "d": memory[2:]},
            {},
            ValueError,
            r"values\['c'\] and values\['d'\] must not overlap",
        ),
        ({"e": np.ones(2, np.float32)}, {"dtype": "float64"}, TypeError, r"values\['e'\] must be of a type"),
    ):
        ema = fastema.EMA(values, 0.5, **arguments)
        before = [x.tobytes() for x in values.values()]
        with pytest.raises(error, match=message):
            ema.pull()
        assert [x.tobytes() for x in values.values()] == before


def test_an_amount_is_from_0_to_1_and_0_changes_nothing():
    weight = np.ones(2)
    ema, other = fastema.EMA([weight], 0.5), fastema.EMA([weight], 0.5)
    ema.update()
    ema.averages[0][:] = np.inf
    ema.pull(0)
    assert (weight == 1).all()
    for amount, error in ((-0.5, ValueError), (1.5, ValueError), ("1", TypeError)):
        with pytest.raises(error, match=r"^amount must be"):
            ema.pull(amount)
    with pytest.raises(IndexError):
        ema.pull(k=1)
    with ema.swapped(), pytest.raises(RuntimeError, match=r"pull\(\) needs the weights"):
        ema.pull()
    with other.swapped(), pytest.raises(RuntimeError, match=r"pull\(\) needs .* another EMA's averages"):
        ema.pull()
