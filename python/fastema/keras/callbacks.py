"""Callbacks that give a model its averaged weights while it evaluates, predicts or is saved."""

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import keras

from . import backends
from .averages import Pair
from .kinds import Model, Optimizer
from .wrapper import Wrapper

Logs = Mapping[str, float] | None


class SwapEMAWeights(keras.callbacks.Callback):  # type: ignore[misc]  # Keras is untyped
    """Evaluates and predicts with averaged weights; the weights come back bit for bit.

    Serves `ExponentialMovingAverage` and Keras' own optimizers with ``use_ema=True``, also where the
    loss is scaled (``mixed_float16``) and in a ``MultiOptimizer``, in ``fit``, ``evaluate`` and
    ``predict``.

    With ``swap_on_epoch=True`` the model also holds the averages from the end of each epoch until
    the next one begins, for the callbacks that come after this one: a ``ModelCheckpoint`` saves them,
    ``EarlyStopping(restore_best_weights=True)`` restores them. Put this callback first in the list, and
    only ``BackupAndRestore`` before it if you like: with ``use_ema=True`` it has to be there.

    Where an exception leaves ``fit``, ``evaluate`` or ``predict``, Keras tells no callback, and the
    averages stay in the model. They leave it when the callback is used again, with `restore`, or at
    once at the end of a ``with`` block::

        with SwapEMAWeights() as swap:
            model.fit(x, y, validation_data=held_out, callbacks=[swap])

    Training begins from the weights, whoever swapped them: a model that was saved while swapped can be
    loaded and trained on. A run within a run, such as ``evaluate`` called by another callback, needs a
    callback of its own.

    The wrapper's averages change places with the weights. For ``use_ema=True`` the weights are kept
    aside, which takes the memory of one copy: Keras assigns the averages to the weights when ``fit``
    ends, so these must stay where they are.

    Args:
        swap_on_epoch: Whether other callbacks see averaged weights at the end of an epoch.

    Raises:
        ValueError: The model's optimizer keeps no averages, or those of another model. Or another callback
            stands on the wrong side of this one, and would keep averages for weights.
        RuntimeError: It has none yet.

    Example:
        >>> import keras, numpy as np
        >>> from fastema.keras import ExponentialMovingAverage, SwapEMAWeights
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile(ExponentialMovingAverage(keras.optimizers.SGD(0.1)), loss="mse")
        >>> x, y = np.ones((8, 2)), np.ones((8, 1))
        >>> history = model.fit(x, y, validation_data=(x, y), verbose=0, callbacks=[SwapEMAWeights()])
        >>> loss = model.evaluate(x, y, verbose=0, callbacks=[SwapEMAWeights()])
    """

    def __init__(self, swap_on_epoch: bool = False) -> None:
        super().__init__()
        self.swap_on_epoch = swap_on_epoch
        self._averaged: _Averaged | None = None
        self._since = ""  # what put the averages into the model

    def __enter__(self) -> "SwapEMAWeights":
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the model its weights back, if this callback left averages in it; else do nothing."""
        if self._averaged:
            self._averaged.end()
            self._averaged = None

    def set_model(self, model: Model) -> None:
        """Begin a run; one before it may have ended by an exception."""
        self.restore()
        _prepare(model, type(self).__name__)
        _check_others(self, model)
        super().set_model(model)

    def _show_averages(self, since: str) -> None:
        if not self._averaged:
            self._averaged, self._since = _Averaged(self.model), since

    def _hide_averages(self, since: str) -> None:
        if self._since == since:
            self.restore()

    def _train_weights(self) -> None:
        self.restore()
        _unswap(self.model)  # a checkpoint that was saved while swapped may just have been loaded

    def on_train_begin(self, logs: Logs = None) -> None:  # noqa: ARG002, D102
        self._train_weights()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:  # noqa: ARG002, D102
        self._train_weights()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:  # noqa: ARG002, D102
        if self.swap_on_epoch:
            self._show_averages("epoch")

    def on_train_end(self, logs: Logs = None) -> None:  # noqa: ARG002, D102
        if self._averaged:
            self.restore()
            # fit has done it already, while these weights were aside
            self.model.optimizer.finalize_variable_values(self.model.trainable_variables)

    def on_test_begin(self, logs: Logs = None) -> None:  # noqa: ARG002, D102
        self._show_averages("test")

    def on_test_end(self, logs: Logs = None) -> None:  # noqa: ARG002, D102
        self._hide_averages("test")

    def on_predict_begin(self, logs: Logs = None) -> None:  # noqa: ARG002, D102
        self._show_averages("predict")

    def on_predict_end(self, logs: Logs = None) -> None:  # noqa: ARG002, D102
        self._hide_averages("predict")


class AverageModelCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]
    """Saves the model with averaged weights; otherwise Keras' ``ModelCheckpoint``.

    The weights come back bit for bit, also when saving fails. Together with `SwapEMAWeights` the
    monitored validation is that of the averages too.

    What the file holds, with `ExponentialMovingAverage`:

    ====================== ================= ====================================================
    ``update_weights``     model             optimizer
    ====================== ================= ====================================================
    False                  the averages      the weights, and that they are swapped
    True                   the averages      the averages
    ====================== ================= ====================================================

    So the loaded model predicts with averages. To train on from the first, call
    ``model.optimizer.swap_weights()``, or pass one of these callbacks to ``fit``, which does it; the
    run then continues with the bits of one that never stopped. With Keras' own ``use_ema=True`` the
    file has no place for the weights: it holds the averages twice, and training goes on from them.

    Args:
        filepath: As in ``ModelCheckpoint``.
        update_weights: Whether the model keeps the averages after each save and trains on from them;
            the weights are lost then. Not together with ``SwapEMAWeights(swap_on_epoch=True)``.
        **kwargs: The other arguments of ``ModelCheckpoint``, such as ``monitor``, ``save_best_only``,
            ``save_weights_only`` and ``save_freq``.

    Raises:
        TypeError: `filepath` is no path.
        ValueError: The model's optimizer keeps no averages, or those of another model. Or, with
            `update_weights`, a ``BackupAndRestore`` comes before this callback.
        RuntimeError: It has none yet, or the weights to update are swapped.

    Example:
        ``model.fit(x, y, callbacks=[AverageModelCheckpoint("averaged-{epoch}.keras")])``
    """

    def __init__(self, filepath: str | os.PathLike[str], update_weights: bool = False, **kwargs: Any) -> None:
        if not isinstance(filepath, str | os.PathLike):  # TensorFlow Addons has the two the other way round
            raise TypeError(f"filepath must be a path, before update_weights, got {filepath!r}")
        super().__init__(filepath, **kwargs)
        self.update_weights = update_weights
        self._averaged: _Averaged | None = None

    def set_model(self, model: Model) -> None:
        """Begin a run."""
        _prepare(model, type(self).__name__)
        if self.update_weights and any(isinstance(one, _Backup) for one in _others(self)[0]):
            raise ValueError(
                "callbacks must have BackupAndRestore after AverageModelCheckpoint(update_weights=True), got "
                "it before: its backup would hold the weights from before they are updated"
            )
        super().set_model(model)

    def on_train_begin(self, logs: Logs = None) -> None:  # noqa: ARG002, D102
        _unswap(self.model)

    def _should_save_model(self, epoch: int, batch: int | None, logs: Logs, filepath: str) -> bool:
        saves: bool = super()._should_save_model(epoch, batch, logs, filepath)
        if saves:
            self._averaged = _Averaged(self.model, swap=not self.update_weights)
        return saves

    def _save_model(self, epoch: int, batch: int | None, logs: Logs) -> None:
        keep = False
        try:
            super()._save_model(epoch, batch, logs)
            keep = self.update_weights
        finally:
            if self._averaged and not keep:
                self._averaged.end()
            self._averaged = None


# --- other callbacks ----------------------------------------------------------------------------------

_Backup = keras.callbacks.BackupAndRestore
_Orbax = getattr(keras.callbacks, "OrbaxCheckpoint", ())  # of newer Keras alone


def _others(callback: keras.callbacks.Callback) -> tuple[list[Any], list[Any]]:
    """Return the callbacks before and after this one, in the list that Keras is going through now.

    Keras tells a callback nothing of the others: their list is found among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            found = [one is callback for one in caller.callbacks]
            if True in found:
                place = found.index(True)
                return caller.callbacks[:place], caller.callbacks[place + 1 :]
        frame = frame.f_back
    return [], []


def _check_others(swap: SwapEMAWeights, model: Model) -> None:
    """Raise, or warn, where another callback would take averages for weights, or weights for averages.

    Raises:
        ValueError: It would, for it stands on the wrong side of `swap`.
    """
    before, after = _others(swap)
    stopping = [
        one
        for one in [*before, *after]
        if isinstance(one, keras.callbacks.EarlyStopping) and one.restore_best_weights
    ]
    if not swap.swap_on_epoch:
        if any(one.monitor.startswith("val_") for one in stopping):
            warnings.warn(
                "EarlyStopping(restore_best_weights=True) will restore weights, chosen by the validation of "
                "averages: put SwapEMAWeights(swap_on_epoch=True) before it",
                stacklevel=2,
            )
        return
    if any(one in before for one in stopping):
        raise ValueError(
            "callbacks must have EarlyStopping(restore_best_weights=True) after "
            "SwapEMAWeights(swap_on_epoch=True), got it before: it would put weights in the averages' place"
        )
    saving = [one for one in after if getattr(one, "save_freq", None) == "epoch"]
    remembered = all(isinstance(one, Wrapper) for one in _averaging(model.optimizer))
    if not remembered and any(isinstance(one, _Backup) for one in saving):
        raise ValueError(
            "callbacks must have BackupAndRestore before SwapEMAWeights(swap_on_epoch=True) where the "
            "optimizer has use_ema=True, got it after: its backup would hold the averages alone"
        )
    if any(isinstance(one, _Orbax) and not one.save_weights_only for one in saving):
        raise ValueError(
            "callbacks must have OrbaxCheckpoint before SwapEMAWeights(swap_on_epoch=True), got it after: "
            "its files do not say that weights and averages are swapped; for files of averages alone, give "
            "it save_weights_only=True"
        )


# --- which averages -----------------------------------------------------------------------------------


def _averaging(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers that average, within those that scale the loss or share out variables."""
    if isinstance(optimizer, Wrapper):
        return [optimizer]
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return _averaging(optimizer.inner_optimizer)
    several = getattr(optimizer, "optimizers", None)
    if several is not None:
        return [found for one in several for found in _averaging(one)]
    return [optimizer] if getattr(optimizer, "use_ema", False) else []


def _prepare(model: Model, callback: str) -> None:
    """See to it that a model has averages, or will have them when it is trained."""
    optimizer = getattr(model, "optimizer", None)
    averaging = _averaging(optimizer)
    if not averaging:
        got = "a model that is not compiled" if optimizer is None else type(optimizer).__name__
        raise ValueError(
            f"{callback} needs averages: compile the model with fastema.keras.ExponentialMovingAverage "
            f"around its optimizer, or with an optimizer that has use_ema=True; got {got}"
        )
    for one in averaging:
        if isinstance(one, Wrapper) and one._averages.lacks_a_model:
            one.shadow_copy(model)
        if isinstance(one, Wrapper):
            one._averages.know(model)


def _unswap(model: Model) -> None:
    for optimizer in _averaging(model.optimizer):
        if isinstance(optimizer, Wrapper) and optimizer.is_swapped:
            optimizer.swap_weights()


def _pairs(optimizer: Optimizer) -> list[Pair]:
    if isinstance(optimizer, Wrapper):
        return optimizer._averages.pairs
    averages = getattr(optimizer, "_model_variables_moving_average", ())
    variables = optimizer._trainable_variables if averages else ()
    return [(v, a) for v, a in zip(variables, averages, strict=True) if a is not None]


# --- into the model and back --------------------------------------------------------------------------


class _Averaged:
    """A model with its averages in it, until the end.

    Args:
        model: Whose averages and weights.
        swap: Exchange them where the optimizer remembers it; else keep the weights aside, and leave
            the averages also where they are.

    Raises:
        RuntimeError: There are no averages yet; or they are in the model, and are not to be swapped.
    """

    def __init__(self, model: Model, swap: bool = True) -> None:
        optimizers = _averaging(model.optimizer)
        if not any(_pairs(optimizer) for optimizer in optimizers):
            raise RuntimeError("there are no averages yet: train a step, or call shadow_copy(model)")
        swapped = [o for o in optimizers if isinstance(o, Wrapper) and o.is_swapped]
        if swapped and not swap:
            raise RuntimeError("update_weights=True needs weights that are not swapped")
        self._model = model
        self._undo = [
            _swap(optimizer)
            if swap and isinstance(optimizer, Wrapper)
            else _assign_averages(_pairs(optimizer))
            for optimizer in optimizers
            if optimizer not in swapped  # by somebody else, who will swap them back
        ]
        _tell_trainer(model)

    def end(self) -> None:
        """Put the weights back."""
        if hasattr(self._model, "jax_state_sync"):
            self._model.jax_state_sync()  # an exception may have left variables empty
        with ExitStack() as each:  # whatever one of them raises
            each.callback(_tell_trainer, self._model)
            for undo in self._undo:
                each.callback(undo)


def _swap(optimizer: Wrapper) -> Callable[[], None]:
    optimizer.swap_weights()

    def undo() -> None:
        if optimizer.is_swapped:
            optimizer.swap_weights()

    return undo


def _assign_averages(pairs: list[Pair]) -> Callable[[], None]:
    backend = backends.load(keras.backend.backend())
    weights = [backend.hold(variable) for variable, _ in pairs]
    for variable, average in pairs:
        # a copy: JAX gives the arrays of a model away to its steps
        backend.assign(variable, keras.ops.copy(backends.native(average)))

    def undo() -> None:
        for (variable, _), weight in zip(pairs, weights, strict=True):
            backend.assign(variable, weight)

    return undo


def _tell_trainer(model: Model) -> None:
    """Let JAX's trainer know what the variables hold now.

    It empties them during a step, and when the step fails, fills them with the state that it knew
    last: weights and averages from before they changed places.
    """
    if hasattr(model, "jax_state_sync"):
        names = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
        state = model._get_jax_state(**dict.fromkeys(names, True))
        model._jax_state = dict(zip(names, state, strict=True))
