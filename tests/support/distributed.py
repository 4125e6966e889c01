"""Training under tf.distribute on one machine; programs of tests that need devices of their own import it."""

import numpy as np
import tensorflow as tf

import processes
from keras_replay import problem


def output_of(code, *arguments, **environment):
    """Run a program of Keras, on TensorFlow if it does not say otherwise; return what it printed."""
    return processes.output_of(code, *arguments, **{"KERAS_BACKEND": "tensorflow", **environment})


def mirrored(replicas=2):
    """Return a strategy with so many replicas, each on a logical CPU; call it before TensorFlow runs."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def gradients_of(model, optimizer, x, y):
    """Return the gradients of this replica."""
    with tf.GradientTape() as tape:
        loss = optimizer.scale_loss(tf.reduce_mean((model(x, training=True) - y) ** 2))
    return tape.gradient(loss, model.trainable_variables)


def step_of(model, optimizer):
    """Return a training step for strategy.run."""

    def step(x, y):
        gradients = gradients_of(model, optimizer, x, y)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    return step


def batches(strategy, size=16, epochs=2):
    """Return the batches of `keras_replay.problem`, shared among the replicas."""
    data = tf.data.Dataset.from_tensor_slices(problem()).batch(size).repeat(epochs)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return strategy.experimental_distribute_dataset(data.with_options(options))


def train(strategy, step, variables, graph=True, epochs=2):
    """Run a step on all replicas for each batch; return the variables' values after each step."""

    def run(x, y):
        strategy.run(step, args=(x, y))

    run = tf.function(run) if graph else run
    recorded = []
    for x, y in batches(strategy, epochs=epochs):
        run(x, y)
        recorded.append([v.numpy() for v in variables])
    return recorded


def as_averaged(model):
    """Return the variables of a model in the order of their averages: those that are trained come first."""
    return [*model.trainable_variables, *model.non_trainable_variables]


def replicas_of(variable):
    """Return the value of a variable in each replica of this process."""
    native = getattr(variable, "_value", variable)
    parts = native.values if isinstance(native, tf.distribute.DistributedValues) else [native]
    return [part.numpy() for part in parts]


def assert_replicas_agree(variables):
    for variable in variables:
        first, *others = replicas_of(variable)
        assert others, variable
        assert all(first.tobytes() == other.tobytes() for other in others), variable


def differ(variable):
    """Tell whether any replica holds another value."""
    first, *others = replicas_of(variable)
    return any(np.any(first != other) for other in others)
