"""An optimizer's lists of averages have one order, whatever was called first."""

import itertools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_replay
from keras_replay import assert_same_bits, numpy, wrap
from processes import skip_without


def wide_model(library=keras):
    """Return a model whose weights have few shapes: in a wrong order they would be mixed up unnoticed."""
    layers = library.layers
    return library.Sequential(
        [
            library.Input((4,)),
            layers.Dense(4),
            layers.BatchNormalization(),
            layers.Dense(4),
            layers.BatchNormalization(),
        ]
    )


def train(model, optimizer):
    model.compile(optimizer, "mse")
    x, _ = keras_replay.problem()
    model.fit(x, x, batch_size=16, epochs=1, verbose=0)


CALLS = {
    "shadow_copy": lambda model, optimizer: optimizer.shadow_copy(model),
    "build": lambda model, optimizer: optimizer.build(model.trainable_variables),
    "trainables": lambda model, optimizer: optimizer.shadow_copy(model.trainable_variables),
    "statistics": lambda model, optimizer: optimizer.shadow_copy(model.non_trainable_variables[::-1]),
    "fit": train,
}
ORDERS = [
    *itertools.permutations(("shadow_copy", "build")),
    *itertools.permutations(("shadow_copy", "fit")),
    ("statistics", "shadow_copy", "build"),
    ("build", "statistics", "shadow_copy"),
    ("trainables", "statistics", "fit", "shadow_copy"),
]


def optimizer_after(model, calls, inner=None):
    optimizer = wrap(inner, trainable_weights_only=False)
    for call in calls:
        CALLS[call](model, optimizer)
    return optimizer


def number(model, optimizer):
    """Give the average of each variable a value that tells it from all others."""
    for i, variable in enumerate(model.variables):
        average = optimizer.get_slot(variable, "average")
        average.assign(np.full(average.shape, i + 1, np.float32))


def averages(model, optimizer):
    return [numpy(optimizer.get_slot(variable, "average")) for variable in model.variables]


@pytest.mark.parametrize("calls", ORDERS, ids=" ".join)
@pytest.mark.parametrize("others", ORDERS, ids=" ".join)
def test_set_weights_gives_each_variable_its_average_whatever_was_called_first(calls, others):
    model, again = wide_model(), wide_model()
    optimizer, other = optimizer_after(model, calls), optimizer_after(again, others)
    number(model, optimizer)
    other.set_weights(optimizer.get_weights())
    assert_same_bits(averages(again, other), averages(model, optimizer))


@pytest.mark.parametrize("calls", ORDERS, ids=" ".join)
def test_a_loaded_optimizer_has_the_lists_of_the_one_that_was_saved(calls, tmp_path):
    model = wide_model()
    optimizer = optimizer_after(model, calls)
    train(model, optimizer)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.optimizer.shadow_copy(loaded)
    assert_same_bits(loaded.optimizer.get_weights(), optimizer.get_weights())
    assert_same_bits(*([numpy(v) for v in o.variables] for o in (loaded.optimizer, optimizer)))
    assert_same_bits(averages(loaded, loaded.optimizer), averages(model, optimizer))


def test_averages_that_wait_for_their_model_are_saved_again(tmp_path):
    model = wide_model()
    optimizer = optimizer_after(model, ["shadow_copy", "fit"])
    model.save(tmp_path / "model.keras")
    keras.saving.load_model(tmp_path / "model.keras").save(tmp_path / "again.keras")
    loaded = keras.saving.load_model(tmp_path / "again.keras")
    loaded.optimizer.shadow_copy(loaded)
    assert_same_bits(loaded.optimizer.get_weights(), optimizer.get_weights())


@pytest.mark.parametrize("calls", ORDERS[:4], ids=" ".join)
@pytest.mark.parametrize("others", ORDERS[:4], ids=" ".join)
def test_a_tensorflow_checkpoint_is_read_whatever_was_called_first(calls, others, tmp_path):
    model, again = wide_model(), wide_model()
    optimizer, other = optimizer_after(model, calls), optimizer_after(again, others)
    number(model, optimizer)
    path = tf.train.Checkpoint(model=model, optimizer=optimizer).write(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(model=again, optimizer=other).read(path).assert_existing_objects_matched()
    assert_same_bits(averages(again, other), averages(model, optimizer))


@pytest.mark.parametrize("names", ["ab", "ba"], ids=str)
def test_two_models_of_one_optimizer_have_one_order(names):
    models = {"a": wide_model(), "b": wide_model()}
    optimizer = wrap(trainable_weights_only=False)
    for name in names:
        optimizer.shadow_copy(models[name])
    optimizer.build([v for model in models.values() for v in model.trainable_variables])
    variables = [
        *(v for model in models.values() for v in model.trainable_variables),
        *(v for model in models.values() for v in model.non_trainable_variables if v.dtype == "float32"),
    ]
    listed = list(optimizer.variables)[-len(variables) :]
    assert [id(v) for v in listed] == [id(optimizer.get_slot(v, "average")) for v in variables]


def test_layers_that_are_frozen_and_unfrozen_keep_the_order():
    model, again = wide_model(), wide_model()
    optimizer, other = wrap(), wrap()
    train(model, optimizer)
    optimizer.shadow_copy(model)
    model.layers[0].trainable = False
    optimizer.shadow_copy(model)
    model.layers[0].trainable = True
    optimizer.shadow_copy(model)
    again.layers[2].trainable = False
    other.shadow_copy(again)
    again.layers[2].trainable = True
    other.build(again.trainable_variables)
    other.shadow_copy(again)
    for i, variable in enumerate(model.trainable_variables):
        average = optimizer.get_slot(variable, "average")
        average.assign(np.full(average.shape, i + 1, np.float32))
    other.set_weights(optimizer.get_weights())
    for theirs, ours in zip(again.trainable_variables, model.trainable_variables, strict=True):
        assert_same_bits(
            *([numpy(o.get_slot(v, "average"))] for o, v in ((other, theirs), (optimizer, ours)))
        )


@pytest.mark.parametrize("calls", ORDERS[:4], ids=" ".join)
@pytest.mark.parametrize("others", ORDERS[:4], ids=" ".join)
@pytest.mark.parametrize("kind", ["legacy", "new"])
def test_optimizers_of_tf_keras_have_one_order_too(kind, calls, others):
    skip_without("tf_keras")
    import tf_keras

    optimizers = tf_keras.optimizers.legacy if kind == "legacy" else tf_keras.optimizers
    both = []
    for one in (calls, others):
        model = wide_model(tf_keras)
        optimizer = wrap(optimizers.SGD(0.1, momentum=0.9), trainable_weights_only=False)
        for call in one:
            if (kind, call) == ("legacy", "build"):
                optimizer._create_all_weights(model.trainable_variables)
            else:
                CALLS[call](model, optimizer)
        both.append((model, optimizer))
    (model, optimizer), (again, other) = both
    slot = other.add_slot(again.trainable_variables[0], "mine")
    optimizer.add_slot(model.trainable_variables[0], "mine")
    number(model, optimizer)
    if ("fit" in calls) == ("fit" in others) or kind == "new":
        other.set_weights(optimizer.get_weights())
        assert_same_bits(averages(again, other), averages(model, optimizer))
    assert other.get_weights()[-1].shape == slot.shape


@pytest.mark.parametrize("built", [False, True])
def test_averages_of_some_variables_are_loaded_as_they_were_saved(built, tmp_path):
    """Those that nobody named have no average, or one that stands still."""
    model, optimizer = wide_model(), wrap()
    if built:
        train(model, optimizer)
    named = model.trainable_variables[2:5]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what was traced before
        optimizer.shadow_copy(named)
    train(model, optimizer)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = loaded.optimizer
    assert_same_bits(again.get_weights(), optimizer.get_weights())
    assert [id(v) for v, _ in again._averages.pairs] == [id(v) for v in loaded.trainable_variables[2:5]]
    raw = [numpy(v) for v in loaded.variables]
    with again.averaged_weights(), optimizer.averaged_weights():
        assert_same_bits(*([numpy(v) for v in m.variables] for m in (loaded, model)))
    assert_same_bits([numpy(v) for v in loaded.variables], raw)


def test_averages_of_more_variables_than_are_trained_are_refused():
    """By their places they would be given to the wrong ones, where shapes agree."""
    model, optimizer = wide_model(), wrap()
    optimizer.build(model.trainable_variables)
    store, fewer = {}, wrap()
    optimizer.save_own_variables(store)
    fewer.build(model.trainable_variables[4:])
    before = fewer.get_weights()
    with pytest.raises(ValueError, match="averages of the 4 variables that the optimizer trains, got 8"):
        fewer.load_own_variables(store)
    assert_same_bits(fewer.get_weights(), before)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")  # Keras', of its own
def test_a_model_is_saved_and_loaded_before_it_is_trained(tmp_path):
    model, optimizer = wide_model(), wrap()
    optimizer.shadow_copy(model)
    model.compile(optimizer, "mse")
    model.save(tmp_path / "model.keras")
    assert keras.saving.load_model(tmp_path / "model.keras").optimizer.has_shadow_copy
