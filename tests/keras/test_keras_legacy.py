"""The wrapper around optimizers of tf_keras (Keras 2): legacy ones, and those that follow Keras 3's."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import oracle
import tolerances
from fastema.keras import ExponentialMovingAverage
from keras_replay import arguments_of, assert_same_bits, custom_loop, problem, replay
from legacy_replay import averages_of, fit, small_model, values_of, wrap
from original import CASES, GOLDEN
from processes import output_of
from tolerances import assert_close

tf_keras = pytest.importorskip("tf_keras", reason="tf_keras, for optimizers of Keras 2, is not installed")

biased = pytest.mark.filterwarnings("ignore:with dynamic_decay=False")
old_names = pytest.mark.filterwarnings("ignore:lr and decay are old names:FutureWarning")
legacy_format = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")


@pytest.fixture(params=["legacy", "new"])
def kind(request):
    """Return the module of one kind of optimizers."""
    return tf_keras.optimizers.legacy if request.param == "legacy" else tf_keras.optimizers


# --- which wrapper ----------------------------------------------------------------------------------


def test_the_wrapper_is_of_the_same_keras_as_the_optimizer_within():
    legacy = wrap(tf_keras.optimizers.legacy.SGD(0.1))
    new = wrap(tf_keras.optimizers.SGD(0.1))
    keras_3 = wrap(keras.optimizers.SGD(0.1))
    assert all(isinstance(o, ExponentialMovingAverage) for o in (legacy, new, keras_3))
    assert isinstance(legacy, tf_keras.optimizers.legacy.Optimizer)
    assert isinstance(new, tf_keras.optimizers.Optimizer)
    assert isinstance(keras_3, keras.optimizers.Optimizer)
    assert not isinstance(tf_keras.optimizers.SGD(0.1), ExponentialMovingAverage)


def test_an_optimizer_derived_elsewhere_from_one_of_tf_keras_is_wrapped_too():
    class Mine(tf_keras.optimizers.legacy.SGD):
        pass

    assert isinstance(wrap(Mine(0.1)), tf_keras.optimizers.legacy.Optimizer)
    assert isinstance(ExponentialMovingAverage(optimizer=Mine(0.1)), ExponentialMovingAverage)


def test_without_an_optimizer_of_tf_keras_it_is_not_imported():
    program = """
        import sys
        sys.modules["tf_keras"] = None  # to import it is an error
        import keras
        from fastema.keras import ExponentialMovingAverage
        optimizer = ExponentialMovingAverage(keras.optimizers.SGD(1.0))
        weight = keras.Variable(1.0)
        optimizer.apply([keras.ops.ones(())], [weight])
        print(float(weight.value))
    """
    assert output_of(program).split()[-1] == "0.0"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"average_decay": 1.5}, ValueError, "average_decay must be from 0 to 1"),
        ({"momentum": 0.9}, TypeError, "keywords must be among clipnorm, .* got momentum"),
        ({"clipnorm": 1.0, "clipvalue": 1.0}, ValueError, "only one of clipnorm, "),
    ],
)
def test_bad_arguments_are_refused(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        wrap(kind.SGD(0.1), **arguments)


def test_arguments_that_average_little_are_warned_of():
    with pytest.warns(UserWarning, match="stay close to zero"):
        wrap(tf_keras.optimizers.legacy.SGD(0.1), dynamic_decay=False)
    with pytest.warns(UserWarning, match="use_ema=True"):
        wrap(tf_keras.optimizers.SGD(0.1, use_ema=True))


# --- what is averaged -------------------------------------------------------------------------------


@biased
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_golden_values_of_the_original(kind, case, graph):
    optimizer = wrap(kind.SGD(1.0), **CASES[case])
    weight = tf.Variable(1.0)
    optimizer.shadow_copy([weight])

    def step():
        optimizer.apply_gradients([(tf.constant(-1.0), weight)])

    step = tf.function(step) if graph else step
    for row in GOLDEN[case]:
        if row["iterations"] > 0:
            step()
        assert weight.numpy() == row["w"]
        assert optimizer.iterations.numpy() == row["iterations"]
        assert_close(averages_of(optimizer, [weight])[0], row["avg"], tolerances.GOLDEN)


def test_golden_values_around_the_original_optimizer():
    optimizer = wrap(tf_keras.optimizers.legacy.Adam(0.01))
    weight = tf.Variable([1.0, -2.0])
    optimizer.shadow_copy([weight])
    for row in GOLDEN["E"]:
        t = row["iterations"]
        if t > 0:
            optimizer.apply_gradients([(tf.constant([0.1 * t, -0.2 * t]), weight)])
        assert_same_bits([weight.numpy()], [np.float32(row["w"])])
        assert_close(averages_of(optimizer, [weight])[0], row["avg"], tolerances.GOLDEN)


@biased
@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}], ids=["graph", "eager"])
@pytest.mark.parametrize(
    "schedule",
    [
        {"decay": 0.99, "start_step": 0, "dynamic": True},
        {"decay": 0.999, "start_step": 3, "dynamic": False},
        {"decay": 0.9, "start_step": 0, "dynamic": True, "every": 3},
    ],
    ids=str,
)
def test_fit_averages_as_a_numpy_replay_to_the_bit(kind, how, schedule):
    model = small_model()
    optimizer = wrap(kind.Adam(0.01), **arguments_of(schedule))
    steps = fit(model, optimizer, **how)
    assert optimizer.engine == "native"
    assert_same_bits(averages_of(optimizer, model.trainable_variables), replay(steps, **schedule))


def test_fit_under_xla_averages_as_a_numpy_replay(kind):
    model, optimizer = small_model(), wrap(kind.SGD(0.1))
    steps = fit(model, optimizer, jit_compile=True)
    assert optimizer.engine == "graph"
    assert_same_bits(averages_of(optimizer, model.trainable_variables), replay(steps))


@pytest.mark.parametrize("graph", [False, True])
def test_a_custom_loop_averages_as_a_numpy_replay_to_the_bit(kind, graph):
    model, optimizer = small_model(), wrap(kind.Adam(0.01))
    steps = custom_loop(model, optimizer, graph=graph)
    assert_same_bits(averages_of(optimizer, model.trainable_variables), replay(steps))


def test_wrapping_changes_nothing_about_training(kind):
    plain = fit(small_model(), kind.Adam(0.01))
    wrapped = fit(small_model(), wrap(kind.Adam(0.01)))
    for x, y in zip(plain, wrapped, strict=True):
        assert_same_bits(x, y)


def test_averages_that_start_at_the_weights(kind):
    model = small_model()
    start = values_of(model.trainable_variables)
    optimizer = wrap(kind.SGD(0.1), initial_average="weights", dynamic_decay=False, average_decay=0.9)
    steps = fit(model, optimizer)
    expected = replay(steps, initial="weights", start=start, decay=0.9, dynamic=False)
    assert_same_bits(averages_of(optimizer, model.trainable_variables), expected)


def test_batch_normalisation_is_averaged_when_asked(kind):
    model, optimizer = small_model(), wrap(kind.SGD(0.1), trainable_weights_only=False)
    optimizer.shadow_copy(model)
    expected = replay(fit(model, optimizer, of="variables"))
    assert_same_bits(averages_of(optimizer, model.variables), expected)


def test_an_unbuilt_model_is_finished_when_it_is_built(kind):
    model, optimizer = tf_keras.Sequential([tf_keras.layers.Dense(2)]), wrap(kind.SGD(0.1))
    optimizer.shadow_copy(model)
    assert not optimizer.has_shadow_copy
    steps = fit(model, optimizer)
    assert optimizer.has_shadow_copy
    assert_same_bits(averages_of(optimizer, model.trainable_variables), replay(steps))


def test_variables_that_come_later_are_averaged():
    first, second = tf.Variable(0.0), tf.Variable(0.0)
    optimizer = wrap(tf_keras.optimizers.legacy.SGD(1.0))
    optimizer.apply_gradients([(tf.constant(-1.0), first)])
    optimizer.apply_gradients([(tf.constant(-1.0), second)])
    once = oracle.update(np.float32(0), np.float32(1), oracle.decay_at(1))
    expected = [oracle.update(a, np.float32(1), oracle.decay_at(2)) for a in (once, np.float32(0))]
    assert_same_bits(averages_of(optimizer, [first, second]), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_have_float32_averages_and_come_back_exactly(kind, dtype):
    weight = tf.Variable([1.0, 2.0], dtype=getattr(tf, dtype))
    optimizer = wrap(kind.SGD(1.0))
    optimizer.shadow_copy([weight])
    optimizer.apply_gradients([(tf.constant([-1.0, -1.0], weight.dtype), weight)])
    raw = weight.numpy()
    expected = oracle.update(np.zeros(2, np.float32), raw, oracle.decay_at(1))
    assert_same_bits(averages_of(optimizer, [weight]), [expected])
    with optimizer.averaged_weights():
        assert_same_bits([weight.numpy()], [expected.astype(raw.dtype)])
    assert_same_bits([weight.numpy()], [raw])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mirrored_variables_are_averaged(kind):
    """One replica here; the strategy's variables are averaged by framework operations."""
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model, optimizer = small_model(), wrap(kind.Adam(0.01), initial_average="weights")
    start = values_of(model.trainable_variables)
    steps = fit(model, optimizer, epochs=2)
    assert optimizer.engine == "graph"
    expected = replay(steps, initial="weights", start=start)
    assert_same_bits(averages_of(optimizer, model.trainable_variables), expected)
    optimizer.swap_weights()
    assert_same_bits(values_of(model.trainable_variables), expected)


REPLICAS = """
    import numpy as np, tensorflow as tf, tf_keras
    from keras_replay import replay
    from legacy_replay import averages_of, fit, small_model, values_of, wrap

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    for kind in (tf_keras.optimizers.legacy, tf_keras.optimizers):
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        with strategy.scope():
            model, optimizer = small_model(), wrap(kind.Adam(0.01), initial_average="weights")
        start = values_of(model.trainable_variables)
        expected = replay(fit(model, optimizer, epochs=1), initial="weights", start=start)
        optimizer.swap_weights()
        for variable, e in zip(model.trainable_variables, expected, strict=True):
            for replica in strategy.experimental_local_results(variable):
                assert replica.numpy().tobytes() == e.tobytes()
        assert len(optimizer.get_weights()) == 1 + 3 * len(expected)
"""


@pytest.mark.slow
def test_two_replicas_hold_the_same_averages_of_a_numpy_replay():
    output_of(REPLICAS)


# --- mixed precision --------------------------------------------------------------------------------


def scaled(optimizer, **arguments):
    return tf_keras.mixed_precision.LossScaleOptimizer(optimizer, **arguments)


@pytest.mark.parametrize("order", ["EMA(x)", "EMA(LSO(x))", "LSO(EMA(x))"])
def test_fit_in_mixed_precision_averages_as_a_numpy_replay_to_the_bit(kind, order):
    inner = kind.SGD(0.1)
    optimizer = wrap(scaled(inner, initial_scale=64.0) if order == "EMA(LSO(x))" else inner)
    model = small_model(dtype="mixed_float16")
    plain = fit(small_model(dtype="mixed_float16"), scaled(kind.SGD(0.1), initial_scale=64.0))
    policy = tf_keras.mixed_precision.global_policy()
    tf_keras.mixed_precision.set_global_policy("mixed_float16" if order != "LSO(EMA(x))" else policy)
    try:
        steps = fit(model, scaled(optimizer, initial_scale=64.0) if order == "LSO(EMA(x))" else optimizer)
    finally:
        tf_keras.mixed_precision.set_global_policy(policy)
    assert_same_bits(averages_of(optimizer, model.trainable_variables), replay(steps))
    if order == "LSO(EMA(x))":
        for x, y in zip(plain, steps, strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_a_step_skipped_for_its_loss_scale_moves_no_average(kind, outside, graph):
    weight = tf.Variable([1.0, 2.0])
    inner = kind.SGD(1.0)
    if outside:
        optimizer = wrap(inner)
        outer = scaled(optimizer, initial_scale=2.0)
    else:
        optimizer = outer = wrap(scaled(inner, initial_scale=2.0))

    def step(gradient):
        outer.apply_gradients([(gradient, weight)])

    step = tf.function(step) if graph else step
    step(tf.constant([-1.0, -1.0]))
    assert weight.numpy().tolist() == [2.0, 3.0]
    before = averages_of(optimizer, [weight])
    assert_same_bits(before, [oracle.update(np.zeros(2, np.float32), weight.numpy(), oracle.decay_at(1))])
    step(tf.constant([np.inf, 0.0]))
    assert weight.numpy().tolist() == [2.0, 3.0]
    assert_same_bits(before, averages_of(optimizer, [weight]))
    step(tf.constant([-1.0, -1.0]))
    assert averages_of(optimizer, [weight])[0][0] > before[0][0]


# --- changing places --------------------------------------------------------------------------------


def test_swap_is_exact_and_twice_is_nothing(kind):
    values = np.array([1e8, 3e38, np.inf, np.nan, -0.0, 1e-45], np.float32)
    weight, optimizer = tf.Variable(values), wrap(kind.SGD(1.0))
    optimizer.shadow_copy([weight])
    average = np.array([1e-8, -3e38, 1.0, 2.0, 0.0, 1e30], np.float32)
    optimizer.get_slot(weight, "average").assign(average)
    optimizer.swap_weights()
    assert optimizer.is_swapped
    assert weight.numpy().tobytes() == average.tobytes()
    optimizer.swap_weights()
    assert not optimizer.is_swapped
    assert weight.numpy().tobytes() == values.tobytes()
    assert averages_of(optimizer, [weight])[0].tobytes() == average.tobytes()


def test_training_while_swapped_is_refused(kind):
    weight, optimizer = tf.Variable(1.0), wrap(kind.SGD(1.0))
    optimizer.shadow_copy([weight])
    with optimizer.averaged_weights():
        with pytest.raises(RuntimeError, match="cannot train while the weights are swapped"):
            optimizer.apply_gradients([(tf.constant(1.0), weight)])
        with pytest.raises(RuntimeError, match="cannot average while the weights are swapped"):
            optimizer.update_average()
    assert optimizer.iterations.numpy() == 0
    assert weight.numpy() == 1.0


def test_averages_are_assigned_to_the_listed_variables(kind):
    weight, other, optimizer = tf.Variable(1.0), tf.Variable(5.0, name="other"), wrap(kind.SGD(1.0))
    optimizer.shadow_copy([weight])
    optimizer.iterations.assign(1)
    optimizer.update_average()
    with pytest.warns(UserWarning, match="other:0 has no average"):
        optimizer.assign_average_vars([weight, other])
    assert weight.numpy() == oracle.update(np.float32(0), np.float32(1), oracle.decay_at(1))
    assert other.numpy() == 5.0


# --- the documented members -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clipping", "expected"),
    [({"clipnorm": 1.0}, -0.5), ({"clipvalue": 0.25}, -0.25), ({"global_clipnorm": 1.0}, -0.5)],
    ids=str,
)
def test_clipping_is_honoured(kind, clipping, expected):
    optimizer = wrap(kind.SGD(1.0), **clipping)
    ((name, value),) = clipping.items()
    assert getattr(optimizer, name) == value
    weight = tf.Variable(tf.zeros(4))
    optimizer.apply_gradients([(tf.fill([4], 7.0), weight)])
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6)  # a norm is rounded


@old_names
def test_lr_and_decay_are_honoured(kind):
    optimizer = wrap(kind.SGD(1.0), lr=0.5, decay=1.0)
    weight = tf.Variable(0.0)
    for _ in range(3):
        optimizer.apply_gradients([(tf.constant(-1.0), weight)])
    # lr / (1 + decay * iterations)
    np.testing.assert_allclose(weight.numpy(), 0.5 + 0.25 + 0.5 / 3, rtol=1e-6)


def test_callbacks_change_the_learning_rate(kind):
    model, optimizer = small_model(), wrap(kind.SGD(0.1))
    model.compile(optimizer, loss="mse")
    halve = tf_keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
    model.fit(np.ones((4, 4)), np.ones((4, 2)), epochs=2, verbose=0, callbacks=[halve])
    np.testing.assert_allclose(optimizer.learning_rate.numpy(), 0.025, rtol=1e-6)
    optimizer.lr = 0.5
    assert float(optimizer._optimizer.learning_rate.numpy()) == float(optimizer.lr.numpy()) == 0.5


def test_get_config_and_back(kind):
    schedule = tf_keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    arguments = {"average_decay": 0.9, "start_step": 3, "trainable_weights_only": False, "update_every": 2}
    optimizer = wrap(kind.SGD(schedule, momentum=0.9), name="mine", clipnorm=1.0, **arguments)
    config = optimizer.get_config()
    text = json.dumps(config)  # plain values
    assert config.items() > arguments.items()
    again = type(optimizer).from_config(config, custom_objects={})
    assert json.dumps(config) == text
    assert again.get_config() == config
    assert type(again._optimizer) is kind.SGD
    assert again.clipnorm == 1.0
    assert tf_keras.optimizers.deserialize(tf_keras.optimizers.serialize(optimizer)).get_config() == config


def test_get_weights_are_iterations_the_inner_state_then_the_averages(kind):
    model, optimizer = small_model(), wrap(kind.SGD(0.1, momentum=0.9))
    optimizer.shadow_copy(model)
    averages = averages_of(optimizer, model.trainable_variables)
    assert_same_bits(optimizer.get_weights()[1:], averages)
    fit(model, optimizer, epochs=1)
    weights = optimizer.get_weights()
    assert len(weights) == 1 + 6 + 6
    assert weights[0] == 4
    averages = averages_of(optimizer, model.trainable_variables)
    assert_same_bits(weights[7:], averages)
    assert_same_bits(weights, values_of(optimizer.variables()))
    assert_same_bits(weights, values_of(optimizer.weights))


def test_set_weights_restores_what_get_weights_gave(kind):
    model, optimizer = small_model(), wrap(kind.SGD(0.1, momentum=0.9))
    fit(model, optimizer, epochs=1)
    saved, raw = optimizer.get_weights(), values_of(model.variables)
    expected = fit(model, optimizer, epochs=1)
    averages = averages_of(optimizer, model.trainable_variables)
    optimizer.set_weights(saved)
    assert_same_bits(optimizer.get_weights(), saved)
    for variable, value in zip(model.variables, raw, strict=True):
        variable.assign(value)
    again = fit(model, optimizer, epochs=1)
    assert_same_bits(again[-1], expected[-1])
    assert_same_bits(averages_of(optimizer, model.trainable_variables), averages)


def test_set_weights_also_takes_the_inner_state_alone_and_refuses_what_does_not_fit(kind):
    weight, optimizer = tf.Variable([1.0, 2.0]), wrap(kind.SGD(1.0, momentum=0.5))
    optimizer.apply_gradients([(tf.constant([1.0, 1.0]), weight)])
    before = optimizer.get_weights()
    optimizer.set_weights([np.array(7), np.array([3.0, 4.0], np.float32)])
    assert optimizer.iterations.numpy() == 7
    assert_same_bits(optimizer.get_weights()[2:], before[2:])
    with pytest.raises(ValueError, match="weights must hold 3 values, or 2 without the averages, got 1"):
        optimizer.set_weights([np.array(8)])
    with pytest.raises(ValueError, match=r"weights\[2\] must have the shape of .*, \(2,\), got \(3,\)"):
        optimizer.set_weights([np.array(8), np.zeros(2), np.zeros(3)])
    assert optimizer.iterations.numpy() == 7


def test_slots_are_the_averages_the_users_own_and_the_inner_ones(kind):
    weight, optimizer = tf.Variable([1.0, 2.0], name="w"), wrap(kind.Adam(0.1))
    optimizer.apply_gradients([(tf.constant([1.0, 1.0]), weight)])
    mine = optimizer.add_slot(weight, "mine", initializer="ones")
    assert mine.numpy().tolist() == [1.0, 1.0]
    assert optimizer.add_slot(weight, "mine") is mine
    assert optimizer.get_slot(weight, "mine") is mine
    assert optimizer.add_slot(weight, "average") is optimizer.get_slot(weight, "average")
    # 1 - beta_1: beta_1 rounded before (legacy), or the difference after
    exact = {float(np.float32(1) - np.float32(0.9)), float(np.float32(1 - 0.9))}
    assert set(optimizer.get_slot(weight, "m").numpy().tolist()) <= exact
    assert {"average", "mine"} <= set(optimizer.get_slot_names())
    assert any(v is mine for v in optimizer.variables())
    scalar = optimizer.add_slot(weight, "scalar", initializer=tf.constant(3.0), shape=[])
    assert scalar.numpy() == 3.0
    with pytest.raises(KeyError):
        optimizer.get_slot(weight, "none")


def test_add_weight_makes_a_variable(kind):
    weight = wrap(kind.SGD(0.1)).add_weight("mine", [2], initializer="ones", trainable=False)
    assert weight.numpy().tolist() == [1.0, 1.0]
    assert not weight.trainable


def test_minimize_takes_a_function_or_a_tensor_with_its_tape(kind):
    weight, optimizer = tf.Variable([1.0, 2.0]), wrap(kind.SGD(1.0))
    optimizer.minimize(lambda: tf.reduce_sum(weight**2) / 2, [weight])
    assert weight.numpy().tolist() == [0.0, 0.0]
    weight.assign([1.0, 2.0])
    with tf.GradientTape() as tape:
        loss = weight * 2.0
    optimizer.minimize(loss, [weight], grad_loss=tf.constant([1.0, 3.0]), tape=tape)
    assert weight.numpy().tolist() == [-1.0, -4.0]
    optimizer.minimize(lambda: weight * 1.0, lambda: [weight], grad_loss=tf.constant([-1.0, -4.0]))
    assert weight.numpy().tolist() == [0.0, 0.0]
    assert optimizer.iterations.numpy() == 3
    assert averages_of(optimizer, [weight])[0][0] != 0.0
    with pytest.raises(ValueError, match="`tape` is required"):
        optimizer.minimize(loss, [weight])


def test_get_updates_is_one_step_of_a_graph_averaging_included(kind):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        weight = tf.Variable(1.0)
        optimizer = wrap(kind.SGD(1.0))
        gradients = optimizer.get_gradients(-weight, [weight])
        alone, nested = (optimizer.get_gradients(-weight, x) for x in (weight, {"a": [weight]}))
        updates = optimizer.get_updates(-weight, [weight])
        average = optimizer.get_slot(weight, "average")
        with pytest.raises(ValueError, match="the loss has no gradient with respect to Variable"):
            optimizer.get_gradients(tf.constant(1.0), [weight])
        session.run(tf.compat.v1.global_variables_initializer())
        assert session.run([gradients, alone, nested]) == [[-1.0]] * 3
        expected = np.float32(0)
        for step in (1, 2, 3):
            session.run(updates)
            expected = oracle.update(expected, np.float32(1 + step), oracle.decay_at(step))
            assert session.run([weight, average]) == [1 + step, expected]


def test_gradients_of_a_graph_are_refused_in_eager_code(kind):
    weight = tf.Variable(1.0)
    with pytest.raises(RuntimeError, match=r"get_gradients and get_updates need TensorFlow.s graph mode"):
        wrap(kind.SGD(1.0)).get_updates(weight * 2, [weight])


def test_malformed_gradients_are_refused(kind):
    optimizer, weight = wrap(kind.SGD(1.0)), tf.Variable(1.0)
    with pytest.raises(TypeError, match="grads_and_vars must be"):
        optimizer.apply_gradients([tf.constant(1.0)])
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimizer.apply_gradients([(None, weight)])
    optimizer.apply_gradients([])
    assert optimizer.iterations.numpy() == 0
    assert not optimizer.has_shadow_copy


def test_gradients_summed_by_the_caller_are_taken(kind):
    optimizer, weight = wrap(kind.SGD(1.0)), tf.Variable(1.0)
    optimizer.apply_gradients([(tf.constant(1.0), weight)], experimental_aggregate_gradients=False)
    assert weight.numpy() == 0.0


def test_the_callers_counter_is_used(kind):
    optimizer, counter, weight = wrap(kind.SGD(1.0)), tf.Variable(0, dtype=tf.int64), tf.Variable(1.0)
    optimizer.iterations = counter
    optimizer.apply_gradients([(tf.constant(1.0), weight)])
    assert counter.numpy() == optimizer.iterations.numpy() == 1


# --- saving -----------------------------------------------------------------------------------------


class Original(tf_keras.optimizers.legacy.Optimizer):
    """Stands in for TensorFlow Model Garden's class: what of it decides the layout of a checkpoint."""

    def __init__(self, optimizer):
        super().__init__("ExponentialMovingAverage")
        self._optimizer = optimizer
        self._track_trackable(self._optimizer, "base_optimizer")

    def shadow_copy(self, model):
        for variable in model.trainable_variables:
            self.add_slot(variable, "average", initializer="zeros")

    def apply_gradients(self, grads_and_vars, name=None):
        return self._optimizer.apply_gradients(grads_and_vars, name)

    iterations = property(lambda self: self._optimizer.iterations)

    def get_config(self):
        raise NotImplementedError


@pytest.mark.parametrize("initial", ["zeros", "weights"])
@pytest.mark.parametrize("built", [False, True])
def test_checkpoints_of_the_original_are_restored(tmp_path, built, initial):
    model, original = small_model(), Original(tf_keras.optimizers.legacy.Adam(0.01))
    original.shadow_copy(model)
    custom_loop(model, original)
    for i, variable in enumerate(model.trainable_variables):
        original.get_slot(variable, "average").assign(tf.fill(variable.shape, float(i)))
    path = tf.train.Checkpoint(model=model, optimizer=original).write(str(tmp_path / "original"))
    keys = [key for key, _ in tf.train.list_variables(path)]
    kernel = "model/layer_with_weights-0/kernel/.OPTIMIZER_SLOT/optimizer"
    assert f"{kernel}/average/.ATTRIBUTES/VARIABLE_VALUE" in keys

    again = small_model(seed=4)
    optimizer = wrap(tf_keras.optimizers.legacy.Adam(0.5), initial_average=initial)
    if built:
        custom_loop(again, optimizer, steps=1)
    status = tf.train.Checkpoint(model=again, optimizer=optimizer).read(path)
    optimizer.shadow_copy(again)
    status.assert_existing_objects_matched()
    assert_same_bits(values_of(again.variables), values_of(model.variables))
    for i, average in enumerate(averages_of(optimizer, again.trainable_variables)):
        assert np.all(average == i)
    custom_loop(model, original, steps=2)
    custom_loop(again, optimizer, steps=2)
    status.assert_consumed()
    assert_same_bits(values_of(again.variables), values_of(model.variables))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("initial", ["zeros", "weights"])
def test_a_checkpoint_resumes_as_if_never_interrupted(tmp_path, kind, built, swapped, initial):
    model, optimizer = small_model(), wrap(kind.Adam(0.01), initial_average=initial)
    custom_loop(model, optimizer, steps=4, graph=False)
    if swapped:
        optimizer.swap_weights()
    path = tf.train.Checkpoint(model=model, optimizer=optimizer).write(str(tmp_path / "ours"))
    if swapped:
        optimizer.swap_weights()

    again, other = small_model(seed=4), wrap(kind.Adam(0.01), initial_average=initial)
    if built:
        custom_loop(again, other, steps=4, graph=False)
    status = tf.train.Checkpoint(model=again, optimizer=other).read(path)
    assert other.is_swapped == swapped
    if swapped:
        other.shadow_copy(again)
        other.swap_weights()
    custom_loop(again, other, steps=4, graph=False)
    status.assert_consumed()
    custom_loop(model, optimizer, steps=4, graph=False)
    assert_same_bits(values_of(again.variables), values_of(model.variables))
    assert other.get_weights()[0] == optimizer.get_weights()[0]
    for v, w in zip(again.trainable_variables, model.trainable_variables, strict=True):
        for slot in ("average", "m", "v"):
            assert_same_bits([other.get_slot(v, slot).numpy()], [optimizer.get_slot(w, slot).numpy()])


CONTINUE = """
    import sys
    import numpy as np, tf_keras
    import fastema.keras.legacy
    from keras_replay import problem

    model = tf_keras.models.load_model(sys.argv[1])
    x, y = problem()
    model.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    np.savez(sys.argv[2], *[v.numpy() for v in [*model.variables, *model.optimizer.variables()]])
"""


@pytest.mark.slow
@legacy_format
@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_saved_loaded_in_a_new_process_and_trained_on_is_as_if_never_interrupted(tmp_path, kind, suffix):
    if suffix == "keras" and kind is tf_keras.optimizers.legacy:
        pytest.skip("tf_keras itself keeps no state of legacy optimizers in .keras files")
    path = tmp_path / f"model.{suffix}"
    model, optimizer = small_model(), wrap(kind.Adam(0.01))
    fit(model, optimizer, epochs=1)
    model.save(path)
    output_of(CONTINUE, path, tmp_path / "resumed.npz")
    fit(model, optimizer, epochs=1)
    with np.load(tmp_path / "resumed.npz") as resumed:
        assert_same_bits(list(resumed.values()), values_of([*model.variables, *optimizer.variables()]))


def test_saved_while_swapped_both_sides_come_back_the_right_way_round(tmp_path):
    model, optimizer = small_model(), wrap(tf_keras.optimizers.SGD(0.1))
    fit(model, optimizer, epochs=1)
    with optimizer.averaged_weights():
        model.save(tmp_path / "model.keras")
    loaded = tf_keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.is_swapped
    loaded.optimizer.swap_weights()
    assert_same_bits(values_of(loaded.variables), values_of(model.variables))
    assert_same_bits(loaded.optimizer.get_weights(), optimizer.get_weights())


def test_saved_models_hold_the_averages_that_stand_in_the_model(tmp_path, kind):
    model, optimizer = small_model(), wrap(kind.SGD(0.1))
    fit(model, optimizer, epochs=1)
    x, _ = problem()
    with optimizer.averaged_weights():
        expected = model(x).numpy()
        model.save(tmp_path / "saved", save_format="tf")
    loaded = tf_keras.models.load_model(tmp_path / "saved")
    assert isinstance(loaded.optimizer, ExponentialMovingAverage)
    assert_same_bits([loaded(x).numpy()], [expected])
