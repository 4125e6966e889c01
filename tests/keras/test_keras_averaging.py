"""What the wrapper averages: the original's numbers, and a NumPy replay of the training, to the bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import oracle
import tolerances
from keras_replay import (
    arguments_of,
    assert_same_bits,
    averages_of,
    custom_loop,
    fit,
    replay,
    small_model,
    wrap,
)
from mixes import MIXES
from original import CASES, GOLDEN
from tolerances import assert_close

biased = pytest.mark.filterwarnings("ignore:with dynamic_decay=False")


@biased
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_golden_values_of_the_original(case, graph):
    optimizer = wrap(keras.optimizers.SGD(1.0), **CASES[case])
    weight = keras.Variable(1.0)
    optimizer.shadow_copy([weight])
    step = lambda: optimizer.apply_gradients([(tf.constant(-1.0), weight)])  # noqa: E731
    step = tf.function(step) if graph else step
    for row in GOLDEN[case]:
        if row["iterations"] > 0:
            step()
        assert weight.numpy() == row["w"]
        assert optimizer.iterations.numpy() == row["iterations"]
        assert_close(averages_of(optimizer)[0], row["avg"], tolerances.GOLDEN)


def test_golden_values_on_a_quadratic_loss():
    optimizer = wrap(keras.optimizers.SGD(0.1), average_decay=0.9, start_step=2)
    target, weight = np.array([3.0, -1.0, 0.5], np.float32), keras.Variable([0.0, 1.0, 2.0])
    optimizer.shadow_copy([weight])
    for row in GOLDEN["B"]:
        if row["iterations"] > 0:
            optimizer.apply_gradients([(weight - target, weight)])
        assert_close(averages_of(optimizer)[0], row["avg"], tolerances.GOLDEN)


def test_golden_values_around_adam():
    optimizer = wrap(keras.optimizers.Adam(0.01))
    weight = keras.Variable([1.0, -2.0])
    optimizer.shadow_copy([weight])
    for row in GOLDEN["E"]:
        t = row["iterations"]
        if t > 0:
            optimizer.apply_gradients([(tf.constant([0.1 * t, -0.2 * t]), weight)])
        assert_close(weight.numpy(), row["w"], tolerances.GOLDEN_ADAM)
        assert_close(averages_of(optimizer)[0], row["avg"], tolerances.GOLDEN_ADAM)


@pytest.mark.parametrize("key", GOLDEN["alpha"])
def test_golden_weights_of_each_step(key):
    """The original's probe: average 0, weight 1, one update_average at a given iteration."""
    start, iterations = map(int, key.split(":"))
    optimizer = wrap(keras.optimizers.SGD(1.0), start_step=start)
    weight = keras.Variable(1.0)
    optimizer.shadow_copy([weight])
    optimizer.iterations.assign(iterations)
    optimizer.update_average()
    assert_close(averages_of(optimizer)[0], GOLDEN["alpha"][key], tolerances.GOLDEN_WEIGHT)


@pytest.mark.parametrize(
    ("dtype", "average"), [("float64", "float64"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_16_bit_weights_have_float32_averages(dtype, average):
    optimizer = wrap(keras.optimizers.SGD(1.0))
    weight = keras.Variable(1.0, dtype=dtype)
    optimizer.shadow_copy([weight])
    for exact in GOLDEN["D_float64"]:
        assert averages_of(optimizer)[0].dtype == average
        assert_close(averages_of(optimizer)[0], exact, tolerances.GOLDEN)
        optimizer.apply_gradients([(tf.constant(-1.0, dtype), weight)])


@pytest.mark.parametrize(("average", "value"), MIXES)
@pytest.mark.parametrize("engine", ["native", "graph"])
def test_averages_have_any_type_that_is_offered_beside_their_weights(average, value, engine):
    """16-bit averages of float32 weights, float64 ones of any; by operations of TensorFlow, too."""
    average, value = np.dtype(average), np.dtype(value)
    settings = {"dynamic_decay": False, "initial_average": "weights", "average_dtype": average.name}
    optimizer = wrap(keras.optimizers.SGD(1.0), average_decay=0.9, engine=engine, **settings)
    weight = keras.Variable([1.1, -2.3, 0.01], dtype=value.name)
    optimizer.shadow_copy([weight])
    expected = weight.numpy().astype(average)
    for _ in range(4):
        optimizer.apply_gradients([(tf.cast([-1.1, 0.3, 1e-3], value.name), weight)])
        expected = oracle.update(expected, weight.numpy(), 0.9)
    assert optimizer.engine == engine
    assert_same_bits(averages_of(optimizer), [expected])
    raw = weight.numpy()
    optimizer.swap_weights()
    assert_same_bits([weight.numpy()], [expected.astype(value)])
    optimizer.swap_weights()
    assert_same_bits([weight.numpy(), *averages_of(optimizer)], [raw, expected])


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}], ids=["graph", "eager"])
@biased
@pytest.mark.parametrize(
    "schedule",
    [
        {"decay": 0.99, "start_step": 0, "dynamic": True},
        {"decay": 0.9, "start_step": 5, "dynamic": True},
        {"decay": 0.999, "start_step": 3, "dynamic": False},
        {"decay": 0.9, "start_step": 0, "dynamic": True, "every": 3},
    ],
    ids=str,
)
def test_fit_averages_as_a_numpy_replay_to_the_bit(how, schedule):
    optimizer = wrap(**arguments_of(schedule))
    steps = fit(small_model(), optimizer, **how)
    assert optimizer.engine == "native"
    assert_same_bits(averages_of(optimizer), replay(steps, **schedule))


def test_fit_under_xla_averages_as_a_numpy_replay():
    optimizer = wrap()
    steps = fit(small_model(), optimizer, jit_compile=True)
    assert optimizer.engine == "graph"
    assert_same_bits(averages_of(optimizer), replay(steps))


def test_a_product_of_decays_has_numpys_bits_under_xla():
    """Averages in float64 would show it if it were fused with the subtraction from 1."""
    optimizer = wrap(average_dtype="float64", update_every=3)
    steps = fit(small_model(), optimizer, epochs=9, jit_compile=True)
    exact = [[weight.astype(np.float64) for weight in step] for step in steps]
    assert_same_bits(averages_of(optimizer), replay(exact, every=3))


@pytest.mark.parametrize("graph", [False, True])
def test_a_custom_loop_averages_as_a_numpy_replay_to_the_bit(graph):
    """In a tf.function the optimizer is built while it is traced."""
    optimizer = wrap()
    steps = custom_loop(small_model(), optimizer, graph=graph)
    assert_same_bits(averages_of(optimizer), replay(steps))


def test_the_documented_example():
    model = small_model()
    optimizer = wrap(keras.optimizers.SGD(0.1))
    optimizer.shadow_copy(model)
    assert optimizer.has_shadow_copy
    steps = custom_loop(model, optimizer)
    optimizer.swap_weights()
    assert_same_bits([v.numpy() for v in model.trainable_variables], replay(steps))
    optimizer.swap_weights()
    assert_same_bits([v.numpy() for v in model.trainable_variables], steps[-1])


def test_engine_graph_outside_of_xla_has_the_same_bits():
    optimizer = wrap(engine="graph")
    steps = fit(small_model(), optimizer)
    assert optimizer.engine == "graph"
    assert_same_bits(averages_of(optimizer), replay(steps))


def test_engine_native_refuses_xla():
    with pytest.raises(RuntimeError, match="engine='native' cannot run here: this is compiled by XLA"):
        fit(small_model(), wrap(engine="native"), jit_compile=True)


def test_averages_that_start_at_the_weights():
    model = small_model()
    start = [v.numpy() for v in model.trainable_variables]
    optimizer = wrap(initial_average="weights", dynamic_decay=False, average_decay=0.9)
    steps = fit(model, optimizer)
    expected = replay(steps, initial="weights", start=start, decay=0.9, dynamic=False)
    assert_same_bits(averages_of(optimizer), expected)


def test_wrapping_changes_nothing_about_training():
    plain = fit(small_model(), keras.optimizers.Adam(0.01))
    wrapped = fit(small_model(), wrap(keras.optimizers.Adam(0.01)))
    for x, y in zip(plain, wrapped, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=str)
def test_accumulated_gradients_average_once_per_real_update(how):
    optimizer = wrap(keras.optimizers.SGD(0.1, gradient_accumulation_steps=3))
    steps = fit(small_model(), optimizer, **how)
    assert optimizer.iterations.numpy() == len(steps) // 3
    assert_same_bits(averages_of(optimizer), replay(steps[2::3]))


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_skipped_for_its_loss_scale_moves_no_average(graph):
    weight = keras.Variable([1.0, 2.0])
    optimizer = keras.optimizers.LossScaleOptimizer(wrap(keras.optimizers.SGD(1.0)), initial_scale=2.0)
    inner = optimizer.inner_optimizer
    step = lambda gradient: optimizer.apply([gradient], [weight])  # noqa: E731
    step = tf.function(step) if graph else step
    step(tf.constant([-2.0, -2.0]))
    assert weight.numpy().tolist() == [2.0, 3.0]
    before = averages_of(inner)[0]
    step(tf.constant([np.inf, 0.0]))
    assert inner.iterations.numpy() == 1
    assert weight.numpy().tolist() == [2.0, 3.0]
    assert_same_bits([before], averages_of(inner))


def test_batch_normalisation_is_averaged_when_asked():
    model = small_model()
    optimizer = wrap(trainable_weights_only=False)
    optimizer.shadow_copy(model)
    expected = replay(fit(model, optimizer, of="variables"))
    optimizer.swap_weights()
    assert_same_bits([v.numpy() for v in model.variables], expected)


def test_weights_without_a_gradient_are_averaged_too():
    used, unused = keras.Variable([1.0]), keras.Variable([5.0])
    optimizer = wrap(keras.optimizers.SGD(1.0), initial_average="weights", average_decay=0.5)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply_gradients([(tf.constant([1.0]), used), (None, unused)])
    unused.assign([9.0])
    optimizer.update_average()
    decay = oracle.decay_at(1, 0.5)
    assert averages_of(optimizer)[1] == oracle.update(np.float32([5.0]), np.float32([9.0]), decay)


def test_no_gradients_do_nothing():
    weight = keras.Variable([1.0])
    optimizer = wrap()
    optimizer.apply_gradients([(tf.constant([1.0]), weight)])
    before = averages_of(optimizer)
    weight.assign([9.0])
    optimizer.apply_gradients([])
    assert optimizer.iterations.numpy() == 1
    assert_same_bits(before, averages_of(optimizer))


def test_integer_variables_are_left_alone():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dropout(0.5, seed=1)])
    assert any("int" in str(v.dtype) for v in model.variables)
    optimizer = wrap(trainable_weights_only=False)
    optimizer.shadow_copy(model)
    optimizer.swap_weights()
    assert len(averages_of(optimizer)) == 2


def test_an_unbuilt_model_is_finished_when_it_is_built():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(2)])
    optimizer = wrap()
    optimizer.shadow_copy(model)
    assert not optimizer.has_shadow_copy
    steps = fit(model, optimizer)
    assert optimizer.has_shadow_copy
    assert_same_bits(averages_of(optimizer), replay(steps))


def test_a_second_shadow_copy_takes_effect():
    first, second = keras.Variable([1.0]), keras.Variable([2.0])
    optimizer = wrap()
    optimizer.shadow_copy([first])
    optimizer.shadow_copy([second])
    optimizer.iterations.assign(1)
    optimizer.update_average()
    assert [float(a[0]) for a in averages_of(optimizer)] == [0.0, np.float32(2 * (1 - 2 / 11))]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mirrored_variables_are_averaged():
    """One replica here; the strategy's variables are averaged by framework operations."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = small_model()
        optimizer = wrap()
        optimizer.shadow_copy(model)
    steps = fit(model, optimizer, epochs=2)
    assert optimizer.engine == "graph"
    assert_same_bits(averages_of(optimizer), replay(steps))
    optimizer.swap_weights()
    assert_same_bits([v.numpy() for v in model.trainable_variables], replay(steps))
