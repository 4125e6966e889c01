"""The same as keras_replay for tf_keras: training runs whose weights are recorded."""

import tf_keras

from fastema.keras import ExponentialMovingAverage
from keras_replay import problem


def small_model(seed=3, **dense):
    tf_keras.utils.set_random_seed(seed)
    return tf_keras.Sequential(
        [
            tf_keras.Input((4,)),
            tf_keras.layers.Dense(9, "tanh", **dense),
            tf_keras.layers.BatchNormalization(),
            tf_keras.layers.Dense(2, **dense),
        ]
    )


def fit(model, optimizer, epochs=3, of="trainable_variables", **compile_arguments):
    """Train with fit; return the weights after each step."""
    steps = []

    class Recorder(tf_keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            del batch, logs
            steps.append(values_of(getattr(self.model, of)))

    model.compile(optimizer, loss="mse", **compile_arguments)
    x, y = problem()
    model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, callbacks=[Recorder()])
    return steps


def wrap(inner, **arguments):
    return ExponentialMovingAverage(inner, **arguments)


def values_of(variables):
    return [variable.numpy() for variable in variables]


def averages_of(optimizer, variables):
    return [optimizer.get_slot(variable, "average").numpy() for variable in variables]
