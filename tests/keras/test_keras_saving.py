"""Saved, loaded and resumed: nothing is lost, and the bits are those of a run that was never interrupted."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from fastema.keras import ExponentialMovingAverage
from keras_replay import assert_same_bits, averages_of, everything_of, fit, small_model, wrap
from processes import output_of

CONTINUE = """
    import sys
    import keras, numpy as np
    import fastema.keras
    from keras_replay import problem

    model = keras.saving.load_model(sys.argv[1])
    x, y = problem()
    model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    np.savez(sys.argv[2], *[v.numpy() for v in [*model.variables, *model.optimizer.variables]])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [{}, {"dynamic_decay": False, "start_step": 6}, {"update_every": 3}], ids=str
)
def test_saved_loaded_in_a_new_process_and_trained_on_is_bit_equal_to_never_stopping(tmp_path, arguments):
    path = tmp_path / "model.keras"
    model = small_model()
    fit(model, wrap(**arguments), epochs=2)
    model.save(path)
    output_of(CONTINUE, path, tmp_path / "resumed.npz")

    uninterrupted = small_model()
    fit(uninterrupted, wrap(**arguments), epochs=4)
    with np.load(tmp_path / "resumed.npz") as resumed:
        assert_same_bits(list(resumed.values()), everything_of(uninterrupted))


def test_saving_in_mid_fit_is_the_state_at_that_step(tmp_path):
    model = small_model()
    save = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    model.compile(wrap(), loss="mse")
    x, y = np.ones((32, 4), np.float32), np.ones((32, 2), np.float32)
    model.fit(x, y, epochs=2, verbose=0, shuffle=False, callbacks=[save])
    assert_same_bits(everything_of(keras.saving.load_model(tmp_path / "2.keras")), everything_of(model))
    resumed = keras.saving.load_model(tmp_path / "1.keras")
    resumed.fit(x, y, epochs=1, verbose=0, shuffle=False)
    assert_same_bits(everything_of(resumed), everything_of(model))


def test_saved_while_swapped_both_sides_come_back_the_right_way_round(tmp_path):
    model, optimizer = small_model(), wrap()
    fit(model, optimizer, epochs=1)
    before = everything_of(model)
    with optimizer.averaged_weights():
        model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.is_swapped
    loaded.optimizer.swap_weights()
    assert_same_bits(everything_of(loaded), before)


def test_half_a_swap_is_refused_until_the_model_is_named(tmp_path):
    """A loaded optimizer is told of trainable weights only: the statistics would stay behind."""
    model, optimizer = small_model(), wrap(trainable_weights_only=False)
    optimizer.shadow_copy(model)
    fit(model, optimizer, epochs=1)
    before = everything_of(model)
    with optimizer.averaged_weights():
        model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    with pytest.raises(RuntimeError, match=r"call shadow_copy\(model\) first"):
        loaded.optimizer.swap_weights()
    loaded.optimizer.shadow_copy(loaded)
    loaded.optimizer.swap_weights()
    assert_same_bits(everything_of(loaded), before)


def test_16_bit_weights_saved_while_swapped_come_back_exactly(tmp_path):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="bfloat16")])
    optimizer = wrap()
    fit(model, optimizer, epochs=1)
    before = everything_of(model)
    with optimizer.averaged_weights():
        model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.optimizer.swap_weights()
    assert_same_bits(everything_of(loaded), before)


def test_weights_loaded_before_the_optimizer_is_built_wait_for_it():
    model, optimizer = small_model(), wrap()
    fit(model, optimizer, epochs=1)
    store = {}
    optimizer.save_own_variables(store)
    fresh = wrap()
    fresh.load_own_variables(store)
    fresh.build(small_model(seed=9).trainable_variables)
    assert_same_bits(averages_of(fresh), averages_of(optimizer))


def test_a_file_without_averages_or_with_others_is_refused_and_nothing_changes():
    model, optimizer = small_model(), wrap()
    fit(model, optimizer, epochs=1)
    store = {}
    optimizer.save_own_variables(store)
    before = averages_of(optimizer)
    with pytest.raises(
        ValueError, match="the file holds no averages; it was not saved with an ExponentialMovingAverage"
    ):
        optimizer.load_own_variables({"0": np.zeros(3)})
    with pytest.raises(ValueError, match=r"the file lacks the average of .*kernel \(average_trained_0\)"):
        optimizer.load_own_variables({k: v for k, v in store.items() if k != "average_trained_0"})
    with pytest.raises(ValueError, match=r"kernel must have shape \(4, 9\), got \(3,\) from the file"):
        optimizer.load_own_variables({**store, "average_trained_0": np.zeros(3, np.float32)})
    assert_same_bits(averages_of(optimizer), before)


def test_config_round_trip_leaves_the_config_alone():
    optimizer = wrap(
        keras.optimizers.SGD(0.25, momentum=0.5, clipnorm=2.0),
        average_decay=0.9,
        trainable_weights_only=False,
        start_step=7,
        initial_average="weights",
        average_dtype="float64",
        update_every=4,
        engine="graph",
    )
    config = optimizer.get_config()
    copy = {**config}
    again = ExponentialMovingAverage.from_config(config)
    assert config == copy
    assert again.get_config() == config
    assert again.clipnorm == 2.0
    assert float(again.learning_rate.numpy()) == 0.25


def test_serialize_and_deserialize():
    optimizer = wrap(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 100)))
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert isinstance(again, ExponentialMovingAverage)
    assert again.get_config() == optimizer.get_config()


@pytest.mark.parametrize("initial", ["zeros", "weights"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("built", [False, True])
def test_a_tensorflow_checkpoint_is_the_state_whether_read_before_or_after_building(
    built, swapped, initial, tmp_path
):
    model, optimizer = small_model(), wrap(initial_average=initial)
    fit(model, optimizer, epochs=1)
    before = everything_of(model)
    if swapped:
        optimizer.swap_weights()
    path = tf.train.Checkpoint(model=model, optimizer=optimizer).write(str(tmp_path / "checkpoint"))
    again, fresh = small_model(seed=4), wrap(initial_average=initial)
    if built:
        fresh.build(again.trainable_variables)
    status = tf.train.Checkpoint(model=again, optimizer=fresh).read(path)
    if not built:
        fresh.build(again.trainable_variables)
    status.assert_existing_objects_matched()
    assert fresh.is_swapped == swapped
    if swapped:
        fresh.swap_weights()
    again.compile(fresh, "mse")
    assert_same_bits(everything_of(again), before)
