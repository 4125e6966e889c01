"""How people train: each leaves the training as it is, and averages as a NumPy replay of it, to the bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import oracle
from fastema.keras import ExponentialMovingAverage
from keras_replay import Recorder, assert_same_bits, averages_of, problem, replay, small_model, wrap

LossScaleOptimizer = keras.optimizers.LossScaleOptimizer


def fit(model, optimizer, callbacks=(), epochs=3, data=None, **compile_arguments):
    """Train with fit; return the trainable weights after each step, in the type of their averages."""
    recorder = Recorder("trainable_variables")
    model.compile(optimizer, loss="mse", **compile_arguments)
    x, y = data or problem()
    callbacks = [*callbacks, recorder]
    model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return recorder.steps


def assert_transparent(make_model, make_inner, exact=True, **arguments):
    """Train without and with the wrapper: the same weights, and the averages of a replay. Return both."""
    plain = fit(make_model(), make_inner(), **arguments)
    optimizer = wrap(make_inner())
    steps = fit(model := make_model(), optimizer, **arguments)
    assert len(plain) == len(steps)
    for x, y in zip(plain, steps, strict=True):
        assert_same_bits(x, y)
    if exact:
        assert optimizer.engine == "native"
        assert_same_bits(averages_of(optimizer), replay(steps))
    return model, optimizer


@pytest.fixture
def policy():
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


# --- learning rates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate",
    [
        pytest.param(
            keras.optimizers.schedules.CosineDecay(0.1, 10, warmup_target=0.2, warmup_steps=3), id="cosine"
        ),
        pytest.param(
            keras.optimizers.schedules.PiecewiseConstantDecay([3, 7], [0.1, 0.05, 0.01]),
            id="piecewise",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda: 0.05, id="callable"),
    ],
)
def test_rates_that_follow_a_schedule(rate):
    _, optimizer = assert_transparent(small_model, lambda: keras.optimizers.SGD(rate, momentum=0.9))
    assert float(optimizer.learning_rate) == float(optimizer._optimizer.learning_rate)


def test_rates_that_callbacks_set():
    halve = keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=100.0)
    _, optimizer = assert_transparent(
        small_model, lambda: keras.optimizers.SGD(1.0), callbacks=[halve, plateau], epochs=4
    )
    assert float(optimizer.learning_rate.numpy()) == 2.0**-7  # four halves, and three where the loss stood


def test_rates_of_several_optimizers_that_callbacks_set():
    inner = several()
    halve = keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
    fit(small_model(), wrap(inner), callbacks=[halve], epochs=2)
    assert [float(o.learning_rate.numpy()) for o in inner.optimizers] == [0.125, 0.25]


# --- types ------------------------------------------------------------------------------------------


def test_mixed_bfloat16_averages_the_float32_weights(policy):
    policy("mixed_bfloat16")
    model, optimizer = assert_transparent(small_model, lambda: keras.optimizers.Adam(0.01))
    assert model.layers[0].compute_dtype == "bfloat16"
    assert {a.dtype for a in averages_of(optimizer)} == {np.dtype("float32")}


def test_bfloat16_weights_have_float32_averages(policy):
    policy("bfloat16")
    optimizer = wrap(keras.optimizers.SGD(0.1))
    steps = fit(small_model(), optimizer)
    assert {w.dtype.name for w in steps[0]} == {"bfloat16"}
    widened = [[w.astype(np.float32) for w in step] for step in steps]
    assert_same_bits(averages_of(optimizer), replay(widened))


def test_mixed_float16_scales_the_loss_once(policy):
    """compile() wraps the wrapper: with a scale of 2**15 divided out twice, SGD would stand still."""
    policy("mixed_float16")
    model = small_model()
    plain = fit(model, LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    for inner in (keras.optimizers.SGD(0.1), LossScaleOptimizer(keras.optimizers.SGD(0.1))):
        optimizer = wrap(inner)
        steps = fit(model := small_model(), optimizer)
        assert isinstance(model.optimizer, LossScaleOptimizer)
        assert model.optimizer.inner_optimizer is optimizer
        for x, y in zip(plain, steps, strict=True):
            assert_same_bits(x, y)
        assert_same_bits(averages_of(optimizer), replay(steps))


SCALED = {
    "LSO(EMA)": lambda: LossScaleOptimizer(wrap(keras.optimizers.SGD(0.5)), initial_scale=8.0),
    "EMA(LSO)": lambda: wrap(LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=8.0)),
    "LSO(EMA(LSO))": lambda: LossScaleOptimizer(
        wrap(LossScaleOptimizer(keras.optimizers.SGD(0.5))), initial_scale=8.0
    ),
    "EMA(LSO(EMA))": lambda: wrap(
        LossScaleOptimizer(wrap(keras.optimizers.SGD(0.5), name="within"), initial_scale=8.0)
    ),
    "EMA(fixed scale)": lambda: wrap(keras.optimizers.SGD(0.5, loss_scale_factor=8.0)),
}


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("order", SCALED)
def test_a_scaled_loss_is_divided_out_once_whatever_the_order(order, graph):
    optimizer, weight = SCALED[order](), keras.Variable([4.0, 2.0])
    optimizer.build([weight])
    loss = optimizer.scale_loss(tf.constant(1.0))
    assert loss.numpy() == 8.0

    step = lambda gradient: optimizer.apply([gradient * loss], [weight])  # noqa: E731
    step = tf.function(step) if graph else step
    step(tf.constant([1.0, 2.0]))
    assert weight.numpy().tolist() == [3.5, 1.0]
    averaging = optimizer if isinstance(optimizer, ExponentialMovingAverage) else optimizer.inner_optimizer
    assert_same_bits(averages_of(averaging)[-1:], replay([[weight.numpy()]]))
    if order != "EMA(fixed scale)":
        before = averages_of(averaging)[-1:]
        step(tf.constant([np.inf, 1.0]))
        assert weight.numpy().tolist() == [3.5, 1.0]
        assert_same_bits(averages_of(averaging)[-1:], before)


# --- what is trained --------------------------------------------------------------------------------


def test_frozen_layers_are_left_alone():
    def model():
        model = small_model()
        model.layers[0].trainable = False
        return model

    trained, optimizer = assert_transparent(model, lambda: keras.optimizers.Adam(0.01))
    assert len(averages_of(optimizer)) == len(trained.trainable_variables) == 4
    frozen = trained.layers[0].kernel.numpy()
    with optimizer.averaged_weights():
        assert_same_bits([trained.layers[0].kernel.numpy()], [frozen])


def several():
    first, others = keras.optimizers.SGD(0.5), keras.optimizers.SGD(1.0, momentum=0.5)
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(others, optimizer_map={".*batch_norm.*": first})
    )


def test_several_optimizers_within_the_wrapper():
    assert_transparent(small_model, several)


def test_wrappers_within_several_optimizers():
    one = wrap(keras.optimizers.SGD(0.5), average_decay=0.5, name="one")
    other = wrap(keras.optimizers.SGD(0.25), name="other")
    mapped = keras.optimizers.OptimizerMap(other, optimizer_map={".*batch_norm.*": one})
    steps = fit(model := small_model(), keras.optimizers.MultiOptimizer(mapped))
    of_one = [i for i, v in enumerate(model.trainable_variables) if "batch_norm" in v.path]
    assert len(of_one) == 2
    assert_same_bits(averages_of(one), replay([[step[i] for i in of_one] for step in steps], decay=0.5))
    of_other = [i for i in range(len(steps[0])) if i not in of_one]
    assert_same_bits(averages_of(other), replay([[step[i] for i in of_other] for step in steps]))


@pytest.mark.parametrize("inner", [keras.optimizers.SGD, keras.optimizers.Adagrad, keras.optimizers.Adam])
def test_sparse_gradients_of_an_embedding(inner):
    tokens = np.random.default_rng(1).integers(0, 9, (64, 3))

    def model():
        keras.utils.set_random_seed(2)
        layers = keras.layers
        return keras.Sequential(
            [keras.Input((3,), dtype="int32"), layers.Embedding(50, 4), layers.Flatten(), layers.Dense(2)]
        )

    trained, optimizer = assert_transparent(model, lambda: inner(0.1), data=(tokens, problem()[1]))
    # rows that no batch held are averaged as well
    table, average = trained.layers[0].embeddings.numpy(), averages_of(optimizer)[0]
    assert_same_bits([average[20]], replay([[table[20]]] * 12)[0:1])


def test_sparse_gradients_reach_the_wrapped_optimizer_sparse():
    seen = []

    class Watching(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            seen.append(type(gradient))
            super().update_step(gradient, variable, learning_rate)

    weight = keras.Variable(np.ones((5, 2), np.float32))
    gradient = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([0, 3]), tf.constant([5, 2]))
    wrap(Watching(1.0)).apply([gradient], [weight])
    assert seen == [tf.IndexedSlices]
    assert weight.numpy()[:, 0].tolist() == [0, 1, 1, 0, 1]


def test_constraints_are_applied_before_averaging():
    def model():
        keras.utils.set_random_seed(4)
        dense = keras.layers.Dense(2, kernel_constraint=keras.constraints.UnitNorm(axis=0))
        return keras.Sequential([keras.Input((4,)), dense])

    trained, _ = assert_transparent(model, lambda: keras.optimizers.SGD(0.5))
    norms = np.linalg.norm(trained.layers[0].kernel.numpy(), axis=0)
    np.testing.assert_allclose(norms, 1.0, rtol=1e-6)  # Keras rounds a norm and a quotient


@pytest.mark.parametrize("scaled", [lambda inner: inner, keras.optimizers.LossScaleOptimizer])
def test_weights_excluded_from_decay(scaled):
    weight, bias = keras.Variable([2.0], name="kernel"), keras.Variable([2.0], name="bias")
    optimizer = wrap(scaled(keras.optimizers.SGD(1.0, weight_decay=0.5)))
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.apply([tf.zeros(1), tf.zeros(1)], [weight, bias])
    assert (weight.numpy()[0], bias.numpy()[0]) == (1.0, 2.0)


def test_a_variable_overwritten_with_its_gradient():
    scale, weight = keras.Variable([1.0]), keras.Variable([2.0])
    scale.overwrite_with_gradient = True
    optimizer = wrap(keras.optimizers.Adam(0.1))
    optimizer.apply([tf.constant([7.0]), tf.constant([1.0])], [scale, weight])
    assert scale.numpy() == [7.0]
    assert_same_bits(averages_of(optimizer), replay([[scale.numpy(), weight.numpy()]]))


# --- how the steps run ------------------------------------------------------------------------------


@pytest.mark.parametrize("per_execution", [2, 4])
def test_several_steps_per_execution(per_execution):
    every = fit(small_model(), keras.optimizers.Adam(0.01))
    optimizer = wrap()
    steps = fit(small_model(), optimizer, steps_per_execution=per_execution)
    assert_same_bits(steps[-1], every[-1])
    assert_same_bits(averages_of(optimizer), replay(every))


@pytest.mark.parametrize("initial", ["zeros", pytest.param("weights", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "inner", [keras.optimizers.Adam, keras.optimizers.ScheduleFreeAdamW], ids=lambda inner: inner.__name__
)
def test_a_model_built_by_its_first_step(inner, initial):
    """Its variables come to be in the trace of that step, and have no values before it ends."""

    def model():
        keras.utils.set_random_seed(5)
        return keras.Sequential([keras.layers.Dense(3, "tanh"), keras.layers.Dense(2)])

    built = model()
    built.build((None, 4))
    start = [v.numpy() for v in built.trainable_variables]
    plain = fit(model(), inner(0.01))
    optimizer = wrap(inner(0.01), initial_average=initial)
    steps = fit(model(), optimizer)
    for x, y in zip(plain, steps, strict=True):
        assert_same_bits(x, y)
    assert_same_bits(averages_of(optimizer), replay(steps, initial=initial, start=start))


@pytest.mark.parametrize(
    "clipping",
    [
        pytest.param({"clipnorm": 0.1}, marks=pytest.mark.slow),
        pytest.param({"clipvalue": 0.01}, marks=pytest.mark.slow),
        {"global_clipnorm": 0.1},
    ],
    ids=str,
)
def test_accumulated_and_clipped_gradients(clipping):
    inner = lambda: keras.optimizers.SGD(0.5, gradient_accumulation_steps=2, **clipping)  # noqa: E731
    _, optimizer = assert_transparent(small_model, inner, exact=False)
    steps = fit(small_model(), inner())
    assert_same_bits(averages_of(optimizer), replay(steps[1::2]))


def test_a_compiled_step_trains_the_same():
    """XLA compiles both: the averages are the only operations more."""
    model, optimizer = assert_transparent(
        small_model, lambda: keras.optimizers.SGD(0.5, momentum=0.9), exact=False, jit_compile=True
    )
    assert optimizer.engine == "graph"
    assert len(averages_of(optimizer)) == len(model.trainable_variables)


@pytest.mark.parametrize(
    "given", ["sgd", {"class_name": "SGD", "config": {"learning_rate": 0.01}}], ids=["name", "config"]
)
def test_an_optimizer_given_by_name_or_config(given):
    optimizer = ExponentialMovingAverage(given)
    plain = fit(small_model(), "sgd")
    steps = fit(small_model(), optimizer)
    for x, y in zip(plain, steps, strict=True):
        assert_same_bits(x, y)
    assert_same_bits(averages_of(optimizer), replay(steps))


def test_train_on_batch():
    optimizer, model = wrap(), small_model()
    model.compile(optimizer, loss="mse")
    steps = []
    for _ in range(5):
        model.train_on_batch(*problem(16))
        steps.append([v.numpy() for v in model.trainable_variables])
    assert_same_bits(averages_of(optimizer), replay(steps))


def test_a_train_step_of_ones_own():
    class Adversary(keras.Model):
        """Two updates in each step, of different variables, as adversarial networks do."""

        def __init__(self):
            super().__init__()
            self.maker, self.judge = keras.layers.Dense(4), keras.layers.Dense(1)

        def call(self, x):
            return self.judge(self.maker(x))

        def train_step(self, data):
            x, _ = data
            for part, optimizer, sign in ((self.judge, self.judging, 1), (self.maker, self.making, -1)):
                with tf.GradientTape() as tape:
                    loss = sign * tf.reduce_mean(self(x) ** 2)
                gradients = tape.gradient(loss, part.trainable_variables)
                optimizer.apply_gradients(zip(gradients, part.trainable_variables, strict=True))
            return {"loss": loss}

    keras.utils.set_random_seed(6)
    model = Adversary()
    model(problem()[0])
    model.judging, model.making = wrap(keras.optimizers.SGD(0.1)), wrap(keras.optimizers.Adam(0.01))
    recorder = Recorder("trainable_variables")
    model.compile()
    model.fit(*problem(), batch_size=16, epochs=2, verbose=0, callbacks=[recorder])
    assert_same_bits(averages_of(model.making), replay([step[:2] for step in recorder.steps]))
    assert_same_bits(averages_of(model.judging), replay([step[2:] for step in recorder.steps]))


# --- the face ---------------------------------------------------------------------------------------


def test_attributes_of_the_wrapped_optimizer_are_found_and_set_there():
    inner = keras.optimizers.SGD(0.5, momentum=0.25, nesterov=True)
    optimizer = wrap(inner)
    assert (optimizer.momentum, optimizer.nesterov) == (0.25, True)
    optimizer.momentum = 0.75
    assert inner.momentum == 0.75
    assert "momentum" not in vars(optimizer)
    optimizer.note = "mine"
    assert not hasattr(inner, "note")
    with pytest.raises(AttributeError, match="no attribute 'amsgrad'"):
        _ = optimizer.amsgrad
    with pytest.raises(AttributeError, match="Learning rate cannot be accessed on a MultiOptimizer"):
        _ = wrap(several()).learning_rate


def test_set_weights_takes_what_variables_gave():
    x, y = keras.Variable([1.0, 2.0]), keras.Variable([1.0, 2.0])
    one, other = wrap(keras.optimizers.Adam(0.5)), wrap(keras.optimizers.Adam(0.25))
    one.apply([tf.constant([1.0, 2.0])], [x])
    with pytest.raises(ValueError, match="not built"):
        other.set_weights(one.variables)
    other.build([y])
    other.set_weights([v.numpy() for v in one.variables])
    assert_same_bits([v.numpy() for v in other.variables], [v.numpy() for v in one.variables])
    bad = [v.numpy() for v in one.variables]
    bad[0], bad[-1] = bad[0] + 1, np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"must have the shape of .*average, \(2,\), got \(3,\)"):
        other.set_weights(bad)
    assert other.iterations.numpy() == 1
    assert oracle.same_bits(averages_of(other)[0], averages_of(one)[0])
