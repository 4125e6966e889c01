"""Callbacks: Keras evaluates, predicts and saves averages, and the weights come back bit for bit."""

import keras
import numpy as np
import pytest

from fastema.keras import AverageModelCheckpoint, ExponentialMovingAverage, SwapEMAWeights
from keras_replay import assert_same_bits, averages_of, everything_of, problem, small_model, weights_of, wrap
from processes import output_of, skip_without

X, Y = problem(32)  # two steps of 16 make an epoch


def averaging():
    return wrap(keras.optimizers.SGD(0.05, momentum=0.9))


def use_ema():
    return keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True, ema_momentum=0.5)


def compiled(make=averaging, **arguments):
    model = small_model()
    arguments = {"run_eagerly": True, **arguments}  # no tracing, or the tests take minutes
    model.compile(make(), loss="mse", **arguments)
    return model


def fit(model, *callbacks, epochs=1, **arguments):
    arguments = {"validation_data": (X, Y), "batch_size": 16, **arguments}
    return model.fit(X, Y, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks), **arguments)


def trained(make=averaging, epochs=2, **arguments):
    """Return a trained model; with Keras' own averages, one whose weights differ from them."""
    model = compiled(make, **arguments)
    fit(model, epochs=epochs)
    if make is use_ema:
        model.set_weights([w + np.float32(0.1) for w in model.get_weights()])
    return model


def all_averages_of(model):
    optimizer = model.optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    if isinstance(optimizer, ExponentialMovingAverage):
        return averages_of(optimizer)
    return [v.numpy() for v in optimizer._model_variables_moving_average]


def with_averages(model, do):
    """Return what a function says of a model like this one whose weights are the averages."""
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for variable, average in zip(clone.trainable_variables, all_averages_of(model), strict=True):
        variable.assign(average)
    clone.compile(loss="mse", run_eagerly=model.run_eagerly, jit_compile=False)
    return do(clone)


class At(keras.callbacks.Callback):
    """Calls a function at the given hooks."""

    def __init__(self, *hooks, do):
        super().__init__()
        for hook in hooks:
            setattr(self, hook, lambda *_, **__: do(self.model))


def evaluate(model, *callbacks):
    return model.evaluate(X, Y, batch_size=16, verbose=0, callbacks=list(callbacks))


def predict(model, *callbacks):
    return model.predict(X, verbose=0, callbacks=list(callbacks))


def fail(model):
    del model
    raise KeyError("a callback failed")


both = pytest.mark.parametrize("make", [averaging, use_ema])


# --- evaluate and predict ---------------------------------------------------------------------------------


@both
def test_evaluate_sees_averages_and_the_weights_come_back(make):
    model = trained(make)
    before = everything_of(model)
    loss = evaluate(model, SwapEMAWeights())
    assert_same_bits(everything_of(model), before)
    assert loss == with_averages(model, evaluate)
    assert loss != evaluate(model)


@both
def test_predict_sees_averages_and_the_weights_come_back(make):
    """Keras' own callback tests the wrong condition at the end: its averages stay in the model."""
    model = trained(make)
    before = everything_of(model)
    predicted = predict(model, SwapEMAWeights())
    assert_same_bits(everything_of(model), before)
    assert_same_bits([predicted], [with_averages(model, predict)])


@both
def test_what_arithmetic_swaps_lose_comes_back(make):
    """Keras' own callback swaps by a+b, a-b, a-b."""
    model = trained(make)
    bias = model.trainable_variables[1]
    average = {id(v): a for v, a in zip(model.trainable_variables, slots_of(model), strict=True)}[id(bias)]
    bias.assign([1e8, 3e38, np.inf, np.nan, -0.0, 1e-45, 1, 2, 3])
    average.assign([1e-8, -3e38, 1.0, 2.0, 0.0, 1e30, 1, 2, np.nan])
    before = everything_of(model)
    evaluate(model, SwapEMAWeights())
    predict(model, SwapEMAWeights())
    assert [v.tobytes() for v in everything_of(model)] == [v.tobytes() for v in before]


def slots_of(model):
    if isinstance(model.optimizer, ExponentialMovingAverage):
        return model.optimizer.variables[-len(model.trainable_variables) :]
    return model.optimizer._model_variables_moving_average


@both
@pytest.mark.parametrize(
    ("compiling", "fitting"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({}, {"validation_freq": 2}, id="validation_freq"),
        pytest.param(
            {"run_eagerly": False, "steps_per_execution": 2},
            {},
            id="steps_per_execution",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_fit_trains_as_without_and_validates_averages(make, compiling, fitting, swap_on_epoch):
    model, plain = compiled(make, **compiling), compiled(make, **compiling)
    losses = []
    look = At("on_test_end", do=lambda m: losses.append(with_averages(m, evaluate)))
    # ours comes first: when the other looks, the weights are back
    history = fit(model, SwapEMAWeights(swap_on_epoch), look, epochs=4, **fitting)
    fit(plain, epochs=4, **fitting)
    assert_same_bits(everything_of(model), everything_of(plain))
    assert history.history["val_loss"] == losses
    assert len(losses) == 4 // fitting.get("validation_freq", 1)


@both
@pytest.mark.parametrize("asked", [False, True])
def test_other_callbacks_see_averages_at_the_end_of_an_epoch_if_asked(make, asked):
    expected, seen = [], []
    before = At("on_epoch_end", do=lambda m: expected.append(all_averages_of(m) if asked else weights_of(m)))
    after = At("on_epoch_end", do=lambda m: seen.append(weights_of(m)))
    fit(compiled(make), before, SwapEMAWeights(swap_on_epoch=asked), after, epochs=3)
    assert_same_bits(sum(seen, []), sum(expected, []))  # noqa: RUF017


@pytest.fixture
def mixed_precision():
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    yield
    keras.mixed_precision.set_dtype_policy("float32")


@pytest.mark.usefixtures("mixed_precision")
@both
def test_with_mixed_precision_the_averages_below_the_loss_scaling_are_found(make):
    model = compiled(make)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    fit(model, SwapEMAWeights(swap_on_epoch=True))
    before, seen = everything_of(model), []
    evaluate(model, SwapEMAWeights(), At("on_test_begin", do=lambda m: seen.extend(weights_of(m))))
    assert_same_bits(seen, all_averages_of(model))
    assert_same_bits(everything_of(model), before)


def test_16_bit_weights_come_back_and_their_float32_averages_stay():
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="bfloat16")])
    model.compile(wrap(), loss="mse", run_eagerly=True)
    fit(model, SwapEMAWeights(swap_on_epoch=True))
    before = everything_of(model)
    evaluate(model, SwapEMAWeights())
    assert_same_bits(everything_of(model), before)


def test_several_optimizers_show_the_averages_that_they_have():
    model = small_model()
    first, second = model.layers[0], model.layers[-1]
    kinds = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1))
    kinds[f"{first.path}/.*"] = use_ema()
    kinds[f"{second.path}/.*"] = wrap()
    model.compile(keras.optimizers.MultiOptimizer(kinds), loss="mse", run_eagerly=True)
    fit(model)
    model.set_weights([w + np.float32(0.1) for w in model.get_weights()])
    averages = [
        *(v.numpy() for v in kinds[f"{first.path}/kernel"]._model_variables_moving_average),
        *averages_of(kinds[f"{second.path}/kernel"]),
    ]
    before, seen = everything_of(model), []
    evaluate(model, SwapEMAWeights(), At("on_test_begin", do=lambda m: seen.extend(weights_of(m))))
    assert_same_bits(seen[:2] + seen[-2:], averages)
    assert_same_bits(everything_of(model), before)


def test_statistics_of_batch_normalisation_are_averaged_without_shadow_copy():
    model = compiled(lambda: wrap(trainable_weights_only=False))
    fit(model, SwapEMAWeights())
    assert len(averages_of(model.optimizer)) == len(model.variables)


# --- on every way out -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "hook", ["on_test_begin", "on_test_batch_end", "on_test_end", "on_epoch_end", "on_epoch_begin"]
)
def test_after_a_callback_failed_in_fit_the_weights_come_back(make, hook):
    states = []

    def fail_later(model):
        states.append(model.optimizer.iterations.numpy())
        if len(states) > 3:
            raise KeyError("a callback failed")

    model = compiled(make)
    weights = []
    keep = At("on_train_batch_end", do=lambda m: weights.append(everything_of(m)[: len(m.variables)]))
    with pytest.raises(KeyError), SwapEMAWeights(swap_on_epoch=True) as swap:
        fit(model, swap, keep, At(hook, do=fail_later), epochs=5)
    assert_same_bits(
        weights_of(model), [w for w, v in zip(weights[-1], model.variables, strict=True) if v.trainable]
    )


@both
@pytest.mark.parametrize("run", ["evaluate", "predict"])
def test_after_an_evaluation_failed_restore_or_the_next_run_puts_the_weights_back(make, run):
    model = trained(make)
    before, averages = everything_of(model), all_averages_of(model)
    swap, seen = SwapEMAWeights(), []
    look = At("on_train_begin", do=lambda m: seen.extend(everything_of(m)))
    for put_back in (
        swap.restore,
        lambda: evaluate(model, swap),
        lambda: predict(model, swap),
        lambda: fit(model, swap, look),
    ):
        assert_same_bits(everything_of(model), before)
        with pytest.raises(KeyError):
            (evaluate if run == "evaluate" else predict)(
                model, swap, At("on_test_batch_end", "on_predict_batch_end", do=fail)
            )
        assert_same_bits(weights_of(model), averages)
        put_back()
    assert_same_bits(seen, before)


def test_training_begins_from_the_weights_whoever_swapped_them():
    model, plain = trained(), trained()
    model.optimizer.swap_weights()
    fit(model, SwapEMAWeights())
    fit(plain)
    assert_same_bits(everything_of(model), everything_of(plain))


def test_weights_that_somebody_else_swapped_are_left_to_them():
    model = trained()
    before, averages = everything_of(model), averages_of(model.optimizer)
    with model.optimizer.averaged_weights():
        evaluate(model, SwapEMAWeights())
        assert_same_bits(weights_of(model), averages)
    assert_same_bits(everything_of(model), before)


@both
def test_an_evaluation_at_the_end_of_an_epoch_leaves_the_averages_to_the_callbacks_after_it(make):
    model, plain = compiled(make), compiled(make)
    seen, expected = [], []
    within = At("on_epoch_end", do=lambda m: evaluate(m, SwapEMAWeights()))
    after = At("on_epoch_end", do=lambda m: seen.extend(weights_of(m)))
    fit(model, SwapEMAWeights(swap_on_epoch=True), within, after, epochs=3)
    fit(plain, At("on_epoch_end", do=lambda m: expected.extend(all_averages_of(m))), epochs=3)
    assert_same_bits(seen, expected)
    assert_same_bits(everything_of(model), everything_of(plain))


# --- next to other callbacks ------------------------------------------------------------------------------


@both
def test_early_stopping_restores_the_best_averages(make):
    """Keras' own callback then loses the averages, unless the last epoch was the one planned last."""
    model, averages = compiled(make), []
    look = At("on_epoch_end", do=lambda m: averages.append(all_averages_of(m)))
    stop = keras.callbacks.EarlyStopping("val_loss", mode="max", patience=2, restore_best_weights=True)
    history = fit(model, look, SwapEMAWeights(swap_on_epoch=True), stop, epochs=9)
    assert len(averages) < 9
    best = int(np.argmax(history.history["val_loss"]))
    assert best < len(averages) - 1
    assert_same_bits(weights_of(model), averages[best])
    assert_same_bits(all_averages_of(model), averages[-1])


@both
def test_early_stopping_leaves_averages_and_weights_as_fit_leaves_them(make):
    model, plain = compiled(make), compiled(make)
    for one, callbacks in ((model, [SwapEMAWeights(swap_on_epoch=True)]), (plain, [])):
        stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=1)
        history = fit(one, *callbacks, stop, epochs=9)
        assert len(history.epoch) < 9
    assert_same_bits(everything_of(model), everything_of(plain))


def test_reduce_lr_on_plateau_reduces_by_the_validation_of_averages():
    model = compiled()
    reduce = keras.callbacks.ReduceLROnPlateau("val_loss", mode="max", factor=0.5, patience=1)
    losses = fit(model, SwapEMAWeights(), reduce, epochs=4).history["val_loss"]
    worse = [loss <= max(losses[:i]) for i, loss in enumerate(losses) if i]
    assert any(worse)
    assert model.optimizer.learning_rate.numpy() == np.float32(0.05) * 0.5 ** sum(worse)


def test_model_checkpoint_after_it_saves_averages(tmp_path):
    model, averages = compiled(), []
    look = At("on_epoch_end", do=lambda m: averages.append(averages_of(m.optimizer)))
    save = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    fit(model, look, SwapEMAWeights(swap_on_epoch=True), save, epochs=2)
    for epoch, expected in enumerate(averages, 1):
        loaded = keras.saving.load_model(tmp_path / f"{epoch}.keras")
        assert_same_bits(weights_of(loaded), expected)


def test_backup_and_restore_resumes_with_the_bits_of_a_run_that_never_stopped(tmp_path):
    """The backup is made while swapped, and loaded after `on_train_begin` of the callbacks before it."""

    def callbacks(*more):
        return [SwapEMAWeights(swap_on_epoch=True), keras.callbacks.BackupAndRestore(tmp_path), *more]

    interrupt = At("on_epoch_begin", do=lambda m: fail(m) if m.optimizer.iterations.numpy() == 4 else None)
    with pytest.raises(KeyError):
        fit(compiled(), *callbacks(interrupt), epochs=4)
    model, plain = compiled(), compiled()
    history = fit(model, *callbacks(), epochs=4)
    assert history.epoch == [2, 3]
    fit(plain, epochs=4)
    assert_same_bits(everything_of(model), everything_of(plain))


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "callback", [SwapEMAWeights, lambda: AverageModelCheckpoint("never.keras")], ids=["swap", "checkpoint"]
)
def test_a_model_without_averages_is_refused_before_it_is_trained(callback):
    model = compiled(lambda: keras.optimizers.Adam(0.01))
    before = model.get_weights()
    with pytest.raises(
        ValueError,
        match=r"(SwapEMAWeights|AverageModelCheckpoint) needs averages: compile the model with "
        r"fastema.keras.ExponentialMovingAverage .* use_ema=True; got Adam",
    ):
        fit(model, callback())
    assert_same_bits(model.get_weights(), before)
    with pytest.raises(ValueError, match="got a model that is not compiled"):
        small_model().predict(X, verbose=0, callbacks=[callback()])


@both
def test_evaluating_averages_before_training_is_refused(make):
    model = compiled(make)
    with pytest.raises(RuntimeError, match=r"no averages yet: train a step, or call shadow_copy\(model\)"):
        evaluate(model, SwapEMAWeights())


# --- checkpoints ------------------------------------------------------------------------------------------


@both
def test_a_checkpoint_holds_averages_and_training_is_as_without(make, tmp_path):
    averages = []
    look = At("on_epoch_end", do=lambda m: averages.append(all_averages_of(m)))
    model, plain = compiled(make), compiled(make)
    fit(model, look, AverageModelCheckpoint(tmp_path / "{epoch}.keras"), epochs=3)
    fit(plain, epochs=3)
    assert_same_bits(everything_of(model), everything_of(plain))
    for epoch, expected in enumerate(averages, 1):
        loaded = keras.saving.load_model(tmp_path / f"{epoch}.keras")
        assert_same_bits(weights_of(loaded), expected)


@pytest.mark.parametrize("resume", ["swap_weights", "SwapEMAWeights", "AverageModelCheckpoint"])
@pytest.mark.parametrize("statistics", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_checkpoint_trains_on_with_the_bits_of_a_run_that_never_stopped(tmp_path, resume, statistics):
    def make():
        return wrap(keras.optimizers.SGD(0.05), trainable_weights_only=not statistics)

    save = AverageModelCheckpoint(tmp_path / "model.keras")
    fit(compiled(make), save, epochs=2)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.is_swapped
    if resume == "swap_weights":
        loaded.optimizer.shadow_copy(loaded)
        loaded.optimizer.swap_weights()
        fit(loaded, epochs=2)
    else:
        fit(loaded, save if resume == "AverageModelCheckpoint" else SwapEMAWeights(), epochs=2)

    plain = compiled(make)
    fit(plain, SwapEMAWeights(), epochs=4)
    assert_same_bits(*(weights_and_averages_of(m) for m in (loaded, plain)))


def weights_and_averages_of(model):
    """Return them in the order of the variables: averages are created in another order when loaded."""
    averages = [model.optimizer._averages.of(v) for v in model.variables]
    return [
        v.numpy()
        for v in [*model.variables, *averages, *model.optimizer._optimizer.variables]
        if v is not None
    ]


def test_a_checkpoint_that_is_trained_on_without_swapping_says_what_to_do(tmp_path):
    fit(compiled(), AverageModelCheckpoint(tmp_path / "model.keras"))
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    with pytest.raises(RuntimeError, match=r"swapped: call swap_weights\(\) first"):
        fit(loaded)


@both
def test_with_update_weights_training_goes_on_from_the_averages(make, tmp_path):
    """Also from the file: it resumes with the bits of the run that wrote it."""
    model, assigned = compiled(make), compiled(make)
    assign = At("on_epoch_end", do=assign_averages)
    fit(assigned, assign, epochs=3)
    fit(model, AverageModelCheckpoint(tmp_path / "{epoch}.keras", update_weights=True), epochs=3)
    assert_same_bits(everything_of(model), everything_of(assigned))
    assert_same_bits(weights_of(model), all_averages_of(model))

    loaded = keras.saving.load_model(tmp_path / "2.keras")
    fit(loaded, AverageModelCheckpoint(tmp_path / "{epoch}.keras", update_weights=True))
    assert_same_bits(everything_of(loaded), everything_of(model))


def assign_averages(model):
    for variable, average in zip(model.trainable_variables, all_averages_of(model), strict=True):
        variable.assign(average)


def test_update_weights_while_another_callback_swaps_is_refused(tmp_path):
    save = AverageModelCheckpoint(tmp_path / "model.keras", update_weights=True)
    with (
        pytest.raises(RuntimeError, match="update_weights=True needs weights that are not swapped"),
        SwapEMAWeights(swap_on_epoch=True) as swap,
    ):
        fit(compiled(), swap, save)


@both
@pytest.mark.parametrize("update_weights", [False, True])
def test_when_saving_fails_the_weights_come_back(make, update_weights, tmp_path, monkeypatch):
    model = trained(make)
    seen, before = [], []

    def save(*_, **__):
        seen.append(weights_of(model))
        raise OSError("the disk is full")

    monkeypatch.setattr(type(model), "save", save)
    look = At("on_epoch_end", do=lambda m: before.append((everything_of(m), all_averages_of(m))))
    with pytest.raises(OSError, match="the disk is full"):
        fit(model, look, AverageModelCheckpoint(tmp_path / "model.keras", update_weights))
    assert_same_bits(seen[0], before[0][1])
    assert_same_bits(everything_of(model), before[0][0])


def test_only_the_best_is_saved_and_updates_weights(tmp_path):
    model, averages = compiled(), []
    look = At("on_epoch_end", do=lambda m: averages.append(averages_of(m.optimizer)))
    save = AverageModelCheckpoint(
        tmp_path / "best.keras", update_weights=True, monitor="val_loss", mode="max", save_best_only=True
    )
    kept = At(
        "on_epoch_end", do=lambda m: same.append(not np.any(weights_of(m)[0] != averages_of(m.optimizer)[0]))
    )
    same = []
    history = fit(model, SwapEMAWeights(), look, save, kept, epochs=3)
    losses = history.history["val_loss"]
    best = [i for i, loss in enumerate(losses) if loss > max(losses[:i], default=-np.inf)]
    assert same == [i in best for i in range(3)]
    assert len(best) < 3
    assert_same_bits(weights_of(keras.saving.load_model(tmp_path / "best.keras")), averages[best[-1]])


def test_weights_only_and_a_frequency_in_batches(tmp_path):
    model, averages = compiled(), []
    look = At("on_train_batch_end", do=lambda m: averages.append(averages_of(m.optimizer)))
    path = str(tmp_path / "{epoch}-{batch}.weights.h5")
    fit(model, look, AverageModelCheckpoint(path, save_weights_only=True, save_freq=3), epochs=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2-1.weights.h5", "3-2.weights.h5"]
    for name, step in (("2-1", 2), ("3-2", 5)):
        resumed = compiled()
        resumed.optimizer.build(resumed.trainable_variables)
        resumed.load_weights(tmp_path / f"{name}.weights.h5")
        assert resumed.optimizer.is_swapped
        not_compiled = small_model(seed=8)
        not_compiled.load_weights(tmp_path / f"{name}.weights.h5")
        for loaded in (resumed, not_compiled):
            assert_same_bits(weights_of(loaded), averages[step])


@pytest.mark.usefixtures("mixed_precision")
def test_a_checkpoint_of_mixed_precision_loads_and_trains_on(tmp_path):
    model = compiled()
    fit(model, AverageModelCheckpoint(tmp_path / "model.keras"))
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_bits(weights_of(loaded), all_averages_of(model))
    fit(loaded, SwapEMAWeights())
    fit(model)
    assert_same_bits(everything_of(loaded), everything_of(model))


def test_arguments_in_the_order_of_tensorflow_addons_are_refused():
    with pytest.raises(TypeError, match="filepath must be a path, before update_weights, got False"):
        AverageModelCheckpoint(False, "model.keras")


# --- other backends, other devices ------------------------------------------------------------------------

# JAX's trainer keeps the state of a run to itself: it empties the variables during a step, and fills them
# with what it knew last when the step fails.
ANYWHERE = """
    import sys

    import keras, numpy as np
    from fastema.keras import AverageModelCheckpoint, ExponentialMovingAverage, SwapEMAWeights

    rng = np.random.default_rng(7)
    X, Y = rng.standard_normal((2, 32, 4)).astype(np.float32)

    class Failing(keras.layers.Layer):
        fails = False

        def call(self, x, training=False):
            if self.fails and not training:
                raise KeyError("in a step")
            return x

    class At(keras.callbacks.Callback):
        def __init__(self, *hooks, do):
            super().__init__()
            for hook in hooks:
                setattr(self, hook, lambda *_, **__: do(self.model))

    def numpy(variables):
        return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]

    def weights(model):
        return numpy(model.trainable_variables)

    def averages(model):
        if isinstance(model.optimizer, ExponentialMovingAverage):
            return numpy(model.optimizer.variables[-len(model.trainable_variables) :])
        return numpy(model.optimizer._model_variables_moving_average)

    def everything(model):
        return numpy([*model.variables, *model.optimizer.variables])

    def same(xs, ys):
        assert len(xs) == len(ys) and all(x.tobytes() == y.tobytes() for x, y in zip(xs, ys))

    def use_ema():
        return keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5)

    def compiled(optimizer):
        keras.utils.set_random_seed(3)
        layers = [keras.layers.Dense(5), keras.layers.BatchNormalization(), Failing(), keras.layers.Dense(4)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        model.compile(optimizer, loss="mse")
        return model

    def fit(model, *callbacks, epochs=3):
        arguments = {"validation_data": (X, Y), "batch_size": 16, "shuffle": False, "verbose": 0}
        model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **arguments)

    plain = compiled(use_ema())
    fit(plain)

    # fit trains as without, and validates averages
    for swap_on_epoch in (False, True):
        seen, expected = [], []
        look = At("on_test_begin", do=lambda m: (seen.extend(weights(m)), expected.extend(averages(m))))
        model = compiled(use_ema())
        fit(model, SwapEMAWeights(swap_on_epoch), look)
        same(everything(model), everything(plain))
        same(seen, expected)

    # a checkpoint holds averages, training is as without
    path, expected = sys.argv[1] + "/{epoch}.keras", []
    look = At("on_epoch_end", do=lambda m: expected.append(averages(m)))
    model = compiled(use_ema())
    fit(model, look, AverageModelCheckpoint(path))
    same(everything(model), everything(plain))
    for epoch in (1, 2, 3):
        objects = {"Failing": Failing}
        same(weights(keras.saving.load_model(path.format(epoch=epoch), objects)), expected[epoch - 1])
    model = compiled(use_ema())
    fit(model, AverageModelCheckpoint(path, update_weights=True))
    same(weights(model), averages(model))

    # after a failure in fit the weights are back
    for hook, step_fails in (("on_test_begin", True), ("on_test_batch_end", False), ("on_epoch_end", False)):
        kept = []

        def fail(model):
            Failing.fails = step_fails
            if not step_fails:
                raise KeyError("in a callback")

        model = compiled(use_ema())
        model.make_test_function(force=True)
        keep = At("on_train_batch_end", do=lambda m: kept.append((weights(m), averages(m))))
        try:
            with SwapEMAWeights(swap_on_epoch=True) as swap:
                fit(model, swap, keep, At(hook, do=fail))
        except KeyError:
            Failing.fails = False
        else:
            raise AssertionError("nothing failed")
        same(weights(model), kept[-1][0])
        same(averages(model), kept[-1][1])

    # evaluate and predict show averages, and the weights come back, also after a step failed
    for make in (use_ema, lambda: ExponentialMovingAverage(keras.optimizers.SGD(0.05))):
        for run, arguments in (("evaluate", {"x": X, "y": Y}), ("predict", {"x": X})):
            model = compiled(make())
            model.optimizer.build(model.trainable_variables)
            slots = model.optimizer.variables[-len(model.trainable_variables) :]
            for slot in slots:
                slot.assign(rng.standard_normal(slot.shape))
            before, expected, seen = everything(model), averages(model), []
            look = At("on_test_begin", "on_predict_begin", do=lambda m: seen.extend(weights(m)))
            swap = SwapEMAWeights()
            for fails in (False, True, False):
                model.make_test_function(force=True)
                model.make_predict_function(force=True)
                Failing.fails = fails
                try:
                    getattr(model, run)(**arguments, verbose=0, callbacks=[swap, look])
                except KeyError:
                    assert fails
                    swap.restore()
                else:
                    assert not fails
                same(everything(model), before)
            same(seen, expected * 3)
    print(keras.backend.backend())
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_on_other_backends(backend, tmp_path):
    skip_without(backend)
    assert output_of(ANYWHERE, tmp_path, KERAS_BACKEND=backend) == backend


MIRRORED = """
    import keras, numpy as np, tensorflow as tf
    from fastema.keras import ExponentialMovingAverage, SwapEMAWeights

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    x = np.random.default_rng(7).standard_normal((32, 4)).astype(np.float32)

    def everywhere(model):
        variables = [v.value for v in [*model.variables, *model.optimizer.variables]]
        return [copy.numpy().tobytes() for v in variables for copy in getattr(v, "values", [v])]

    for make in (
        lambda: ExponentialMovingAverage(keras.optimizers.SGD(0.05)),
        lambda: keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5),
    ):
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
            model.compile(make(), loss="mse")
        swap = SwapEMAWeights(swap_on_epoch=True)
        model.fit(x, x, validation_data=(x, x), verbose=0, callbacks=[swap])
        model.trainable_variables[0].assign_add(np.ones((4, 4), np.float32))
        before = everywhere(model)
        averaged = model.evaluate(x, x, verbose=0, callbacks=[swap])
        assert averaged != model.evaluate(x, x, verbose=0)
        assert everywhere(model) == before
    print("done")
"""


@pytest.mark.slow
def test_under_a_mirrored_strategy_every_replica_gets_its_weights_back():
    assert output_of(MIRRORED) == "done"
