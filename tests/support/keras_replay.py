"""Training runs whose weights are recorded, so that their averages can be computed again in NumPy."""

import keras
import numpy as np

import oracle
from fastema.keras import ExponentialMovingAverage


def problem(size=64):
    """Return inputs and targets of a small regression, always the same."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((size, 4)).astype(np.float32)
    return x, np.tanh(x @ rng.standard_normal((4, 2)).astype(np.float32))


def small_model(seed=3):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(9, "tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2),
        ]
    )


def numpy(variable):
    """Return a copy of a variable's value, on every backend."""
    return np.array(keras.ops.convert_to_numpy(getattr(variable, "_value", variable)))


def model_values(model, of="trainable_variables"):
    """Return a model's values, also in the midst of a fit on JAX, which keeps them aside."""
    if keras.backend.backend() == "jax" and getattr(model, "_jax_state", None):
        model.jax_state_sync()
    return [numpy(v) for v in getattr(model, of)]


class Recorder(keras.callbacks.Callback):
    """Keeps every weight after every step."""

    def __init__(self, of):
        super().__init__()
        self.of = of
        self.steps = []

    def on_train_batch_end(self, batch, logs=None):
        del batch, logs
        self.steps.append(model_values(self.model, self.of))


def fit(model, optimizer, epochs=3, of="trainable_variables", data=None, **compile_arguments):
    """Train with fit; return the weights after each step."""
    recorder = Recorder(of)
    model.compile(optimizer, loss="mse", **compile_arguments)
    x, y = data or problem()
    model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, callbacks=[recorder])
    return recorder.steps


def custom_loop(model, optimizer, steps=12, graph=True):
    """Train with a GradientTape; return the weights after each step."""
    import tensorflow as tf

    x, y = problem()

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    step = tf.function(step) if graph else step
    recorded = []
    for _ in range(steps):
        step()
        recorded.append([v.numpy() for v in model.trainable_variables])
    return recorded


def replay(steps, initial="zeros", start=None, every=1, **schedule):
    """Return the averages that these weights must have given, by the formula in NumPy."""
    averages = [np.zeros_like(w) for w in steps[0]] if initial == "zeros" else start
    for t, weights in enumerate(steps, 1):
        if t % every == 0:
            decay = oracle.decay_at(t, every=every, **schedule)
            averages = [oracle.update(a, w, decay) for a, w in zip(averages, weights, strict=True)]
    return averages


def arguments_of(schedule):
    """Return the wrapper's arguments for what `replay` calls decay, start_step, dynamic and every."""
    names = {"decay": "average_decay", "dynamic": "dynamic_decay", "every": "update_every"}
    return {names.get(name, name): value for name, value in schedule.items()}


def weights_of(model):
    return [v.numpy() for v in model.trainable_variables]


def everything_of(model):
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def averages_of(optimizer):
    """Return the averages an optimizer holds."""
    count = len(optimizer.variables) - len(optimizer._optimizer.variables)
    return [numpy(v) for v in optimizer.variables[-count:]]


def wrap(inner=None, **arguments):
    return ExponentialMovingAverage(inner or keras.optimizers.Adam(0.01), **arguments)


def assert_same_bits(xs, ys):
    assert len(xs) == len(ys)
    assert all(oracle.same_bits(x, y) for x, y in zip(xs, ys, strict=True))
