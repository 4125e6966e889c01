"""What holds beside Keras' other callbacks, on every backend. test_keras_backends.py runs this on each."""

import copy

import keras
import pytest

from fastema.keras import AverageModelCheckpoint, SwapEMAWeights
from keras_replay import assert_same_bits, averages_of, fit, model_values, numpy, problem, small_model, wrap
from processes import python

BACKEND = keras.backend.backend()


def compiled():
    """Return a model whose variables have the same paths in every process, for Orbax."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    x = keras.layers.Dense(9, "tanh", name="first")(inputs)
    x = keras.layers.BatchNormalization(name="second")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="last")(x))
    model.compile(wrap(), loss="mse")
    return model


def train(model, *callbacks, epochs=4, initial_epoch=0):
    x, y = problem()
    return model.fit(
        x,
        y,
        batch_size=16,
        initial_epoch=initial_epoch,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )


def everything(model):
    return [numpy(v) for v in [*model.variables, *model.optimizer.variables]]


def backed_up(folder):
    return SwapEMAWeights(swap_on_epoch=True), keras.callbacks.BackupAndRestore(folder)


KILLED = """
    import os, signal, sys
    import keras
    from keras_recipes import backed_up, compiled, numpy, train

    class Killed(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if numpy(self.model.optimizer.iterations) == 10:
                os.kill(os.getpid(), signal.SIGKILL)

    train(compiled(), *backed_up(sys.argv[1]), Killed())
"""


def test_killed_in_mid_epoch_and_resumed_is_as_if_never_stopped(tmp_path):
    """The backup is one of swapped weights."""
    assert python(KILLED, tmp_path, KERAS_BACKEND=BACKEND).returncode == -9
    resumed, whole = compiled(), compiled()
    assert train(resumed, *backed_up(tmp_path)).epoch == [2, 3]
    train(whole)
    assert_same_bits(everything(resumed), everything(whole))


@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")  # Keras gives none
def test_a_checkpoint_of_orbax_trains_on_as_if_never_stopped(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
    if not hasattr(keras.callbacks, "OrbaxCheckpoint"):
        pytest.skip("this Keras has no OrbaxCheckpoint")
    save = keras.callbacks.OrbaxCheckpoint(tmp_path)
    train(compiled(), save, SwapEMAWeights(swap_on_epoch=True), epochs=2)
    loaded, whole = keras.saving.load_model(tmp_path), compiled()
    train(loaded, initial_epoch=2)
    train(whole)
    assert_same_bits(everything(loaded), everything(whole))


def test_a_copied_optimizer_goes_on_with_its_state():
    model = small_model()
    fit(model, wrap())
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    other = copy.deepcopy(model.optimizer)
    fit(model, model.optimizer, epochs=1)
    fit(twin, other, epochs=1)
    assert_same_bits(everything(twin), everything(model))


def test_a_configuration_makes_an_optimizer_that_begins_anew():
    model, start = small_model(), model_values(small_model())
    fit(model, wrap(average_decay=0.5), epochs=1)
    config = model.optimizer.get_config()
    clone, fresh = keras.models.clone_model(model), small_model()
    made = type(model.optimizer).from_config(config)
    for each, optimizer in (clone, made), (fresh, wrap(average_decay=0.5)):
        for variable, value in zip(each.trainable_variables, start, strict=True):
            variable.assign(value)
        fit(each, optimizer, epochs=1)
    assert_same_bits(everything(clone), everything(fresh))


def test_an_optimizer_is_refused_a_second_model():
    """Keras on JAX notices nothing: it trains by places. So it is told when fit ends."""
    first, second = small_model(), small_model()
    fit(first, wrap(), epochs=1)
    optimizer, averages = first.optimizer, averages_of(first.optimizer)
    error = RuntimeError if BACKEND == "jax" else ValueError
    with pytest.raises(error, match=r"built for the variables of another model|Unknown variable"):
        fit(second, optimizer, epochs=1)
    if BACKEND != "jax":
        assert_same_bits(averages_of(optimizer), averages)
    fit(first, wrap(), epochs=1)


@pytest.mark.parametrize("callback", [SwapEMAWeights, lambda: AverageModelCheckpoint("never.keras")])
def test_callbacks_refuse_a_second_model_before_it_runs(callback):
    first, second = small_model(), small_model()
    fit(first, wrap(), epochs=1)
    second.compile(first.optimizer, loss="mse")
    before = everything(first), model_values(second)
    for run in second.fit, second.evaluate:
        with pytest.raises(ValueError, match="model must have variables that its optimizer averages, got"):
            run(*problem(), verbose=0, callbacks=[callback()])
    assert_same_bits(everything(first), before[0])
    assert_same_bits(model_values(second), before[1])


@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter is deprecated")  # Keras' own call
def test_an_exported_model_computes_with_the_averages(tmp_path):
    model, (x, _) = compiled(), problem()
    train(model, epochs=1)
    before = everything(model)
    with model.optimizer.averaged_weights():
        expected = model.predict(x, batch_size=64, verbose=0)
        served = EXPORTED[BACKEND](model, tmp_path, x)
    assert_same_bits(everything(model), before)
    assert_same_bits([served], [expected])


def served_by_tensorflow(model, folder, x):
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    model.export(folder / "served", format="tf_saved_model", verbose=False)
    served = tf.saved_model.load(folder / "served")
    assert len(served.variables) == len(model.variables)
    return served.serve(x).numpy()


def served_by_torch(model, folder, x):
    import torch

    signature = [keras.InputSpec(shape=x.shape, dtype="float32")]
    model.export(folder / "served.pt2", format="torch", input_signature=signature, verbose=False)
    program = torch.export.load(folder / "served.pt2")
    assert len(program.state_dict) == len(model.variables)
    return program.module()(torch.from_numpy(x)).detach().numpy()


EXPORTED = {"tensorflow": served_by_tensorflow, "jax": served_by_tensorflow, "torch": served_by_torch}
