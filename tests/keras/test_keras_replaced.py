"""Variables of a Keras model that others took the place of: averages of what no layer has are not shown."""

import keras
import numpy as np
import pytest

from fastema.keras import AverageModelCheckpoint, ExponentialMovingAverage, SwapEMAWeights
from keras_replay import assert_same_bits, averages_of, problem, weights_of

X, Y = problem(16)
pytestmark = pytest.mark.filterwarnings("ignore:Layer InputLayer does not have")  # Keras, of quantize
REFUSAL = r"must compute with .*/kernel, which is averaged, .*as after quantize\(\).*with a new optimizer"


def trained(known=True):
    model = keras.Sequential(
        [keras.Input(X.shape[1:]), keras.layers.Dense(4), keras.layers.Dense(Y.shape[1])]
    )
    optimizer = ExponentialMovingAverage(keras.optimizers.SGD(0.05), average_decay=0.5)
    model.compile(optimizer, loss="mse", run_eagerly=True)
    if known:
        optimizer.shadow_copy(model)
    model.fit(X, Y, verbose=0)
    return model


def another_layer(model):
    model.pop()
    model.add(keras.layers.Dense(Y.shape[1]))


REPLACING = {"quantize": lambda model: model.quantize("int8"), "another layer": another_layer}


@pytest.mark.parametrize("replace", REPLACING.values(), ids=REPLACING)
def test_a_swap_after_variables_were_replaced_is_refused_and_changes_nothing(replace):
    model = trained()
    replace(model)
    before = [*weights_of(model), *averages_of(model.optimizer)]
    with pytest.raises(RuntimeError, match=REFUSAL):
        model.optimizer.swap_weights()
    with pytest.raises(RuntimeError, match=REFUSAL), model.optimizer.averaged_weights():
        pass
    assert not model.optimizer.is_swapped
    assert_same_bits([*weights_of(model), *averages_of(model.optimizer)], before)


@pytest.mark.parametrize("run", ["fit", "evaluate", "checkpoint"])
def test_callbacks_refuse_a_quantized_model_before_it_runs(run, tmp_path):
    model = trained(known=False)
    model.quantize("int8")
    calls = {
        "fit": lambda: model.fit(X, Y, verbose=0, callbacks=[SwapEMAWeights()]),
        "evaluate": lambda: model.evaluate(X, Y, verbose=0, callbacks=[SwapEMAWeights()]),
        "checkpoint": lambda: model.fit(
            X, Y, verbose=0, callbacks=[AverageModelCheckpoint(tmp_path / "m.keras")]
        ),
    }
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=REFUSAL):
        calls[run]()
    assert_same_bits(weights_of(model), before)


def test_a_model_that_a_callback_met_is_known_in_a_loop_of_ones_own():
    model = trained(known=False)
    model.evaluate(X, Y, verbose=0, callbacks=[SwapEMAWeights()])
    model.quantize("int8")
    with pytest.raises(RuntimeError, match=REFUSAL):
        model.optimizer.swap_weights()


def test_quantized_while_averages_are_in_it_a_model_gets_its_other_weights_back_and_is_told():
    model = trained()
    biases = [layer.bias.numpy() for layer in model.layers]
    with pytest.raises(RuntimeError, match=REFUSAL), model.optimizer.averaged_weights():
        model.quantize("int8")
    assert not model.optimizer.is_swapped
    assert_same_bits([layer.bias.numpy() for layer in model.layers], biases)


def test_averages_are_quantized_after_they_were_assigned():
    model = trained()
    averages = averages_of(model.optimizer)
    model.optimizer.assign_average_vars(model.trainable_variables)
    model.quantize("int8")
    model.compile(ExponentialMovingAverage(keras.optimizers.SGD(0.05)), loss="mse", run_eagerly=True)
    model.fit(X, Y, verbose=0, callbacks=[SwapEMAWeights()])
    for layer, average in zip(model.layers, averages[::2], strict=True):
        scale = 127 / np.abs(average).max(axis=0)
        np.testing.assert_allclose(layer._kernel.numpy() / scale, average, atol=float(0.51 / scale.min()))


def test_layers_that_are_taken_away_or_frozen_are_no_obstacle():
    for change in (lambda model: model.pop(), lambda model: setattr(model.layers[0], "trainable", False)):
        model = trained()
        change(model)
        before = [variable.numpy() for variable in model.variables]
        averages = [model.optimizer._averages.of(variable).numpy() for variable in model.variables]
        with model.optimizer.averaged_weights():
            assert_same_bits([variable.numpy() for variable in model.variables], averages)
        assert_same_bits([variable.numpy() for variable in model.variables], before)


def test_with_lora_what_is_frozen_keeps_its_average_and_what_is_new_is_refused_by_keras():
    model = trained()
    model.layers[0].enable_lora(2)
    kernel = model.layers[0]._kernel
    average = model.optimizer._averages.of(kernel).numpy()
    with model.optimizer.averaged_weights():
        assert_same_bits([kernel.numpy()], [average])
    model.compile(model.optimizer, loss="mse", run_eagerly=True)
    with pytest.raises(ValueError, match="lora_kernel"):
        model.fit(X, Y, verbose=0)
