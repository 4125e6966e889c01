"""Callbacks that must not stand on the wrong side of each other, and models that are exported.

What holds on all backends is in tests/support/keras_recipes.py.
"""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from fastema.keras import AverageModelCheckpoint, SwapEMAWeights
from keras_replay import assert_same_bits, averages_of, everything_of, problem, small_model, weights_of, wrap

X, Y = problem(32)  # two steps of 16 make an epoch
CALLBACKS = keras.callbacks


def averaging():
    return wrap(keras.optimizers.SGD(0.05))


def use_ema():
    return keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5)


def compiled(make=averaging):
    model = small_model()
    model.compile(make(), loss="mse", run_eagerly=True)  # no tracing, or the tests take minutes
    return model


def fit(model, *callbacks, epochs=1):
    held_out = X, -Y  # so that more training makes it worse
    arguments = {"validation_data": held_out, "batch_size": 16, "shuffle": False, "verbose": 0}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **arguments)


class Dies(CALLBACKS.Callback):
    """Stands for a process that is killed, in the midst of an epoch of two steps."""

    def __init__(self, step=5):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        del batch, logs
        if self.model.optimizer.iterations == self.step:
            raise KeyError


def swap():
    return SwapEMAWeights(swap_on_epoch=True)


def stop():
    return CALLBACKS.EarlyStopping(restore_best_weights=True)


def update():
    return AverageModelCheckpoint("never.keras", update_weights=True)


def backup(**arguments):
    return CALLBACKS.BackupAndRestore("never", **arguments)


def orbax_or_skip():
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
    if not hasattr(CALLBACKS, "OrbaxCheckpoint"):
        pytest.skip("this Keras has no OrbaxCheckpoint")


def orbax(**arguments):
    orbax_or_skip()
    return CALLBACKS.OrbaxCheckpoint("/never", **arguments)


REFUSED = {
    "a backup of averages alone": (use_ema, [swap, backup], "BackupAndRestore before SwapEMAWeights"),
    "a backup from before the update": (averaging, [backup, update], "BackupAndRestore after AverageModel"),
    "weights in the averages' place": (averaging, [stop, swap], "EarlyStopping.* after SwapEMAWeights"),
    "swapped, and nobody knows": (averaging, [swap, orbax], "OrbaxCheckpoint before SwapEMAWeights"),
}


@pytest.mark.parametrize(("make", "callbacks", "message"), REFUSED.values(), ids=REFUSED)
def test_a_callback_on_the_wrong_side_is_refused_before_anything_is_trained(
    make, callbacks, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = compiled(make)
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        fit(model, *(each() for each in callbacks))
    assert_same_bits(model.get_weights(), before)
    assert list(tmp_path.iterdir()) == []


TAKEN = {
    "a backup in mid-epoch": (use_ema, [swap, lambda: backup(save_freq=2)]),
    "a backup of both": (averaging, [swap, backup]),
    "a backup of weights": (use_ema, [backup, swap]),
    "a backup after the update": (averaging, [update, backup]),
    "files of averages alone": (averaging, [swap, lambda: orbax(save_weights_only=True)]),
}


@pytest.mark.parametrize(("make", "callbacks"), TAKEN.values(), ids=TAKEN)
def test_on_the_right_side_they_are_taken(make, callbacks):
    listed, model = [each() for each in callbacks], compiled(make)
    CALLBACKS.CallbackList(listed, model=model)


def test_weights_restored_by_the_validation_of_averages_are_warned_of():
    with pytest.warns(UserWarning, match="chosen by the validation of averages"):
        fit(compiled(), SwapEMAWeights(), stop())


@pytest.mark.parametrize(
    ("make", "more"), [(use_ema, [swap]), (averaging, [])], ids=["use_ema", "update_weights"]
)
def test_a_backup_on_the_right_side_resumes_with_the_bits_of_a_run_that_never_stopped(make, more, tmp_path):
    def callbacks():
        save = CALLBACKS.BackupAndRestore(tmp_path / "backup")
        updating = AverageModelCheckpoint(tmp_path / "m.keras", update_weights=True)
        return [save, *(each() for each in more)] if more else [updating, save]

    with pytest.raises(KeyError):
        fit(compiled(make), *callbacks(), Dies(), epochs=4)
    resumed, whole = compiled(make), compiled(make)
    assert fit(resumed, *callbacks(), epochs=4).epoch == [2, 3]
    fit(whole, *(each for each in callbacks() if not isinstance(each, CALLBACKS.BackupAndRestore)), epochs=4)
    assert_same_bits(everything_of(resumed), everything_of(whole))


def test_a_run_that_ends_for_a_nan_leaves_weights_and_averages_alike():
    class Spoils(CALLBACKS.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            del logs
            if batch == 1:
                self.model.trainable_variables[-1].assign([np.nan, 0])

    model = compiled()
    fit(model, Spoils(), CALLBACKS.TerminateOnNaN(), SwapEMAWeights(), epochs=3)
    assert model.optimizer.iterations == 2
    for values in weights_of(model), averages_of(model.optimizer):
        assert np.isnan(values[-1]).any()
    assert not model.optimizer.is_swapped


# --- what the page says of Keras --------------------------------------------------------------------


def test_keras_own_backup_in_mid_epoch_begins_the_epoch_anew_and_then_counts_from_nothing(tmp_path):
    def plain():
        return keras.optimizers.SGD(0.05)

    save = {"backup_dir": tmp_path, "save_freq": 1, "delete_checkpoint": False}
    with pytest.raises(KeyError):
        fit(compiled(plain), CALLBACKS.BackupAndRestore(**save), Dies(3), epochs=3)
    resumed = compiled(plain)
    with pytest.raises(KeyError):
        fit(resumed, CALLBACKS.BackupAndRestore(**save), Dies(4), epochs=3)
    assert resumed.history.epoch == []
    assert json.loads((tmp_path / "training_metadata.json").read_text())["epoch"] == 0
    assert fit(compiled(plain), CALLBACKS.BackupAndRestore(**save), epochs=3).epoch == [0, 1, 2]


def test_keras_finds_nothing_of_a_sequential_model_in_a_checkpoint_of_orbax(tmp_path):
    orbax_or_skip()
    model = compiled(lambda: keras.optimizers.Adam(0.05))
    fit(model, CALLBACKS.OrbaxCheckpoint(tmp_path, save_on_background=False))
    loaded = keras.saving.load_model(tmp_path)
    assert not np.array_equal(weights_of(loaded)[0], weights_of(model)[0])


def test_all_averages_come_back_from_a_checkpoint_of_orbax(tmp_path):
    orbax_or_skip()

    def shadowed():
        model = compiled(lambda: wrap(keras.optimizers.SGD(0.05), trainable_weights_only=False))
        model.optimizer.shadow_copy(model)
        return model

    keras.utils.clear_session()  # names are those of a new process
    model = shadowed()
    fit(model, CALLBACKS.OrbaxCheckpoint(tmp_path, save_on_background=False))
    keras.utils.clear_session()
    loaded = shadowed()
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(tmp_path)
    assert_same_bits(everything_of(loaded), everything_of(model))


# --- export -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:\\s*Warning. tf.lite.Interpreter is deprecated")
def test_a_model_of_litert_computes_with_the_averages(tmp_path):
    """As one does whose weights they are: its kernels round in other places than TensorFlow's."""

    def served(model):
        model.export(str(tmp_path / "m.tflite"), format="litert", verbose=False)
        run = tf.lite.Interpreter(str(tmp_path / "m.tflite")).get_signature_runner()
        (name,) = run.get_input_details()
        return list(run(**{name: X}).values())

    model = compiled()
    fit(model)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for variable, average in zip(clone.trainable_variables, averages_of(model.optimizer), strict=True):
        variable.assign(average)
    with model.optimizer.averaged_weights():
        averaged = served(model)
    assert_same_bits(averaged, served(clone))
    assert not np.array_equal(averaged[0], served(model)[0])


@pytest.mark.parametrize("kind", ["legacy", "new"])
def test_a_model_of_tf_keras_is_exported_with_the_averages_and_without_slots(kind, tmp_path):
    tf_keras = pytest.importorskip("tf_keras", reason="tf_keras is not installed")
    optimizers = tf_keras.optimizers.legacy if kind == "legacy" else tf_keras.optimizers
    model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(4,))])
    model.compile(wrap(optimizers.Adam(0.1)), loss="mse")
    model.fit(X, Y, batch_size=16, verbose=0)
    with model.optimizer.averaged_weights():
        expected = model(X).numpy()
        model.export(tmp_path / "served")
    assert not np.array_equal(model(X), expected)
    served = tf.saved_model.load(tmp_path / "served")
    assert len(served.variables) == len(model.variables)
    assert_same_bits([served.serve(X).numpy()], [expected])
