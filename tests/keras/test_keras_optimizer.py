"""The wrapper as an optimizer: its arguments, and what it passes on to the optimizer within."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from fastema.keras import ExponentialMovingAverage
from keras_replay import fit, small_model, wrap


def test_the_documented_defaults():
    config = ExponentialMovingAverage("sgd").get_config()
    inner = config.pop("optimizer")
    assert inner["class_name"] == "SGD"
    assert config == {
        "trainable_weights_only": True,
        "average_decay": 0.99,
        "start_step": 0,
        "dynamic_decay": True,
        "name": "moving_average",
        "initial_average": "zeros",
        "average_dtype": None,
        "update_every": 1,
        "engine": "auto",
    }


BAD = [
    ({"average_decay": 1.5}, ValueError, "average_decay must be from 0 to 1, got 1.5"),
    ({"average_decay": float("nan")}, ValueError, "average_decay must be from 0 to 1, got nan"),
    ({"start_step": -1}, ValueError, "start_step must be a whole number from 0, got -1"),
    ({"start_step": 0.5}, ValueError, "start_step must be a whole number from 0, got 0.5"),
    ({"update_every": 0}, ValueError, "update_every must be a whole number from 1, got 0"),
    (
        {"initial_average": "ones"},
        ValueError,
        "initial_average must be 'zeros' or 'weights', got 'ones'",
    ),
    ({"engine": "cuda"}, ValueError, "engine must be 'auto' or 'native' or 'graph', got 'cuda'"),
    (
        {"average_dtype": "int32"},
        ValueError,
        "average_dtype must be a floating-point type or None, got 'int32'",
    ),
    (
        {"momentum": 0.9},
        TypeError,
        "keywords must be among clipnorm, clipvalue, global_clipnorm, lr, decay, got momentum",
    ),
    (
        {"clipnorm": 1.0, "clipvalue": 1.0},
        ValueError,
        "only one of clipnorm, clipvalue, global_clipnorm can be set",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        wrap(**arguments)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="optimizer must be a Keras 3 optimizer, its name or config, got"):
        ExponentialMovingAverage(lambda: 0.1)
    with pytest.raises(ValueError, match="sdg"):
        ExponentialMovingAverage("sdg")


def test_clipping_of_inner_and_wrapper_together_is_one_too_many():
    with pytest.raises(ValueError, match="only one of"):
        wrap(keras.optimizers.SGD(clipvalue=1.0), clipnorm=1.0)


@pytest.mark.parametrize(
    ("clipping", "expected"),
    [({"clipnorm": 1.0}, -0.5), ({"clipvalue": 0.25}, -0.25), ({"global_clipnorm": 1.0}, -0.5)],
    ids=str,
)
def test_clipping_is_honoured(clipping, expected):
    """The original accepts and ignores it."""
    optimizer = wrap(keras.optimizers.SGD(1.0), **clipping)
    ((name, value),) = clipping.items()
    assert getattr(optimizer, name) == value
    weight = keras.Variable(np.zeros(4, np.float32))
    optimizer.apply_gradients([(tf.fill([4], 7.0), weight)])
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6)  # a norm is rounded
    setattr(optimizer, name, None)
    assert getattr(optimizer._optimizer, name) is None


def test_lr_and_decay_are_honoured():
    with pytest.warns(FutureWarning, match="average_decay"):
        optimizer = wrap(keras.optimizers.SGD(1.0), lr=0.5, decay=1.0)
    weight = keras.Variable(0.0)
    for _ in range(3):
        optimizer.apply_gradients([(tf.constant(-1.0), weight)])
    # legacy optimizers: lr / (1 + decay * iterations)
    np.testing.assert_allclose(weight.numpy(), 0.5 + 0.25 + 0.5 / 3, rtol=1e-6)


def test_learning_rate_is_the_wrapped_optimizers():
    optimizer = wrap(keras.optimizers.SGD(0.1))
    optimizer.learning_rate = 0.5
    assert float(optimizer._optimizer.learning_rate.numpy()) == 0.5
    optimizer.lr = 0.25
    assert float(optimizer.learning_rate.numpy()) == float(optimizer.lr.numpy()) == 0.25


def test_callbacks_change_the_learning_rate():
    optimizer = wrap(keras.optimizers.SGD(0.1))
    model = small_model()
    model.compile(optimizer, loss="mse")
    halve = keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
    model.fit(np.ones((4, 4)), np.ones((4, 2)), epochs=2, verbose=0, callbacks=[halve])
    np.testing.assert_allclose(optimizer.learning_rate.numpy(), 0.025, rtol=1e-6)


def test_variables_are_the_inner_ones_then_the_averages_and_can_be_called():
    optimizer = wrap(keras.optimizers.SGD(0.1, momentum=0.9, name="SGD"))
    fit(small_model(), optimizer, epochs=1)
    paths = [v.path for v in optimizer.variables]
    assert paths[:2] == ["SGD/iteration", "SGD/learning_rate"]
    assert all("momentum" in path for path in paths[2:8])
    assert all(path.startswith("moving_average/") and path.endswith("_average") for path in paths[8:])
    assert len(paths) == 2 + 6 + 6
    assert [v.path for v in optimizer.variables()] == [v.path for v in optimizer.weights] == paths


def test_iterations_are_the_wrapped_optimizers():
    optimizer = wrap()
    assert fit(small_model(), optimizer, epochs=1)
    assert optimizer.iterations.numpy() == optimizer._optimizer.iterations.numpy() == 4


def test_malformed_gradients_are_refused():
    optimizer, weight = wrap(), keras.Variable(1.0)
    with pytest.raises(TypeError, match="grads_and_vars must be"):
        optimizer.apply_gradients([tf.constant(1.0)])
    with pytest.raises(TypeError, match="grads_and_vars must be"):
        optimizer.apply_gradients(None)
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimizer.apply_gradients([(None, weight)])
    assert optimizer.iterations.numpy() == 0


def test_apply_gradients_in_a_cross_replica_context_is_refused():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        weight = keras.Variable(1.0)
        with pytest.raises(RuntimeError, match="apply_gradients must be called in a replica context"):
            wrap().apply_gradients([(tf.constant(1.0), weight)])
    assert weight.numpy() == 1


def test_a_biased_start_and_an_average_of_the_inner_optimizer_warn():
    with pytest.warns(UserWarning, match="the averages stay close to zero"):
        wrap(dynamic_decay=False)
    with pytest.warns(UserWarning, match="the wrapped optimizer has use_ema=True"):
        wrap(keras.optimizers.SGD(use_ema=True))


def test_the_model_is_not_kept_alive():
    import gc
    import weakref

    optimizer, model = wrap(), keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    optimizer.shadow_copy(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_other_backends_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "openvino")
    with pytest.raises(NotImplementedError, match="needs TensorFlow, JAX or torch below Keras, got"):
        ExponentialMovingAverage("sgd")
