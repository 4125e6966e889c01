"""Averages in Lightning: one callback, for `lightning` and `pytorch_lightning`."""

import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from importlib import import_module, util
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ._types import Decay
from .ema import EMA

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = object  # that of the library whose trainer it is for: found when an instance is made

__all__ = ["WeightAverages"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy"}  # each process has all weights, as they are

# Keys of a checkpoint; the first three are those of Lightning's own WeightAveraging.
_AVERAGES, _WEIGHTS, _COUNT, _OWN = "state_dict", "current_model_state", "averaging_state", "fastema"


class WeightAverages(Callback):
    """Average a model's weights after each step of a Lightning training, and evaluate with the averages.

    Averages move once for each step of the optimizer: not for batches whose gradients are only accumulated,
    nor for steps that were skipped, since ``training_step`` returned None or a gradient scaler found
    infinities. With several optimizers (manual optimization) a step of each is one step together: the next
    begins when one of them steps again. Averages move at the end of the batch, or where the next step begins.

    Validation, test and prediction see the averages, from the first to the last hook of the model but
    ``on_..._end``; the weights come back bit for bit, also after an error. The training goes on with them,
    and they are in the model when it has ended. To keep the averages then: ``averages.ema.copy_to()``.

    Checkpoints have the averages as ``"state_dict"``, also those of weights alone
    (``save_weights_only=True``), so that ``load_from_checkpoint`` and ``Trainer.test(ckpt_path=...)`` of any
    process find them, and ``ModelCheckpoint(monitor=...)`` saves what it has seen. The weights are beside
    them (``"current_model_state"``), and what else a run needs to go on to the bit. Lightning's own
    ``WeightAveraging`` reads these files, and this class reads those of that one.

    A second ``fit`` of one trainer and model goes on with the averages; one of another trainer or model, or
    of weights that were written meanwhile, begins anew. Evaluations after the training show the averages
    alike, until someone writes the weights, as ``ckpt_path=`` of a file without them does.

    Args:
        decay: As for `EMA`; of several, the first averages are evaluated and named ``"state_dict"``.
        options: Further arguments of `EMA`, as ``every``, ``start_step``, ``only`` and ``buffers``.

    Raises:
        ImportError: Neither `lightning` nor `pytorch_lightning` is installed.
        TypeError: An option is none of `EMA`, or is of another type.
        ValueError: One is outside of its range. When a training begins: another callback averages, too; or
            the strategy is none of one device or DDP, or ends its processes with the training, as
            ``"ddp_spawn"``.

    Example:
        One line in any training::

            from fastema.lightning import WeightAverages

            averages = WeightAverages(decay=0.999)
            trainer = Trainer(max_epochs=10, callbacks=[averages])
            trainer.fit(model, data)
            trainer.test(model, data)  # with the averages

    Attributes:
        ema: The averages; None before a training has begun.
    """

    def __new__(cls, *_: Any, **__: Any) -> "WeightAverages":
        """Make a callback of the package whose trainer it is for."""
        if not issubclass(cls, bases := _callback_classes()):
            cls = type(cls.__name__, (cls, *bases), {"__module__": cls.__module__, "_plain": cls})  # noqa: PLW0642
        made: WeightAverages = super().__new__(cls)
        return made

    def __init__(self, decay: Decay | Sequence[Decay] = 0.999, **options: Any) -> None:
        super().__init__()
        probe = [np.zeros(1, np.float32)]  # whose EMA complains of what is wrong
        EMA(probe, decay, **{**options, "memory": None, "only": None})
        self.decay, self.options = decay, options
        self.ema: EMA | None = None
        self._module: Any = None  # whose averages these are
        self._found: dict[str, Any] | None = None  # averages of a checkpoint, before there is an EMA
        self._shown = False  # whether this callback has put averages in the weights' place
        self._step: int | None = None  # the trainer's, when its last training ended
        self._left: list[int] | None = None  # what the weights were, when the trainer left them
        self._optimizers: Any = None  # the list whose steps are noticed
        self._hooks: list[Any] = []
        self._stepped: dict[int, bool] = {}  # optimizers that stepped since; whether they had gradients

    def __reduce__(self) -> tuple[Callable[..., "WeightAverages"], tuple[Any, ...]]:
        """Make copies as they were before any training: averages belong to one model."""
        return _made, (getattr(self, "_plain", type(self)), self.decay, self.options)

    # --- steps ------------------------------------------------------------------------------------

    def _watch(self, trainer: Any, module: Any) -> None:
        """Notice the steps of the optimizers that the trainer has now."""
        self._ignore()
        for i, optimizer in enumerate(trainer.optimizers):
            if not hasattr(optimizer, "register_step_post_hook"):
                kind = type(optimizer).__name__
                raise TypeError(
                    f"optimizers[{i}] must be a torch.optim.Optimizer, got {kind}: its steps are seen"
                )
            self._hooks += [
                optimizer.register_step_pre_hook(lambda one, *_: self._before_step(one, module)),
                optimizer.register_step_post_hook(lambda one, *_: self._after_step(one)),
            ]
        self._optimizers = trainer.optimizers

    def _ignore(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizers = [], None

    def _before_step(self, optimizer: Any, module: Any) -> None:
        if self._stepped.get(id(optimizer)):
            self._average()
        # in automatic optimization gradients are made within the step, and these are of the last one
        self._stepped[id(optimizer)] = not module.automatic_optimization and _has_gradients(optimizer)

    def _after_step(self, optimizer: Any) -> None:
        # a fused optimizer skips a step by itself, as the scaler has told it to
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):
            self._stepped.pop(id(optimizer), None)
        elif _has_gradients(optimizer):
            self._stepped[id(optimizer)] = True

    def _average(self) -> None:
        """Average, if an optimizer has stepped since the last time."""
        stepped, self._stepped = self._stepped, {}
        if self.ema is not None and any(stepped.values()):
            self.ema.update()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the averages, and notice steps from now on."""
        self._begin(pl_module)
        self._stepped = {}
        self._watch(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Notice the steps of optimizers that took others' place."""
        if trainer.optimizers is not self._optimizers:
            self._watch(trainer, pl_module)

    def on_train_batch_end(self, _: Any, pl_module: Any, outputs: Any, *__: Any) -> None:
        """Average, if an optimizer has stepped."""
        if self._stepped:
            if outputs and pl_module.automatic_optimization:  # also where an optimizer frees its gradients
                self._stepped = dict.fromkeys(self._stepped, True)
            self._average()

    def on_train_end(self, *_: Any) -> None:
        """Leave the optimizers alone."""
        self._ignore()

    # --- averages ---------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check what the training runs on; forget averages that are of other weights."""
        if stage == "fit":
            self._check(trainer)
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, _AveragesAlone):
            trainer.strategy.checkpoint_io = _AveragesAlone(io, self)
        left, self._left = self._left, None
        swapped = self.ema is not None and self.ema.is_swapped  # by the user
        written = left is not None and not swapped and left != _sums(pl_module)
        begins = stage == "fit" and trainer.global_step != self._step
        if pl_module is not self._module or written or begins:
            self._forget()

    def _check(self, trainer: Any) -> None:
        for other in trainer.callbacks:
            names = {base.__name__ for base in type(other).__mro__}
            if other is not self and names & {
                "WeightAverages",
                "WeightAveraging",
                "StochasticWeightAveraging",
            }:
                kind = type(other).__name__
                raise ValueError(f"callbacks must hold one that averages, got {kind} beside WeightAverages")
        strategy = trainer.strategy
        kinds = {base.__name__ for base in type(strategy).__mro__}
        if not kinds & _STRATEGIES:
            raise ValueError(
                "strategy must be of one device or 'ddp', where each process has the whole weights, got "
                f"{type(strategy).__name__}: average there with fastema.EMA, which takes sharded weights"
            )
        if hasattr(strategy.launcher, "_start_method"):
            raise ValueError(
                "strategy must keep its processes after fit, as 'ddp' does, got "
                f"start_method={strategy.launcher._start_method!r}: they end with fit, and averages with them"
            )
        if trainer.world_size > 1 and self.options.get("memory") is not None:
            raise ValueError(
                f"memory must be None with {trainer.world_size} processes: they would share a file"
            )

    def _forget(self) -> None:
        self.ema = self._module = self._found = None

    def _begin(self, module: Any) -> None:
        """Have averages of the weights where these lie now; those of a checkpoint, if one was read."""
        with torch.inference_mode(False):  # a training goes on with what is made here
            if self.ema is None:
                self.ema, self._module = self._made(module), module
            elif not self.ema.is_swapped:
                self.ema.rebind(module)

    def _made(self, module: Any) -> EMA:
        found = self._found
        if found is None:
            return EMA(module, self.decay, **self.options)
        if _OWN in found:
            ema = EMA(module, self.decay, **self.options)
            ema.load_state_dict(found[_OWN])
        else:
            weights = deepcopy(module.state_dict())
            try:  # the model itself knows which of its names is what
                module.load_state_dict(found[_AVERAGES])
                ema = EMA(module, self.decay, **self.options)
            finally:
                module.load_state_dict(weights)
            ema.load_state_dict(self._counted(ema.state_dict(), int(found[_COUNT]["n_averaged"])))
        self._found = None
        return ema

    def _counted(self, state: dict[str, Any], averaged: int) -> dict[str, Any]:
        """Return a state as after so many averages by another callback."""
        step = averaged * int(state["config"]["every"])
        given: Sequence[Decay] = self.decay if isinstance(self.decay, Sequence) else [self.decay]
        decays = [each(step) if callable(each) else each for each in given]
        known = {
            "step": step,
            "clock": step,
            "averaged": step,
            "decay": decays,
            "products": [0.0] * len(decays),
        }  # no start at zeros is in them
        return {**state, **known} if averaged else state

    # --- evaluations ------------------------------------------------------------------------------

    def on_sanity_check_start(self, _: Any, pl_module: Any) -> None:
        """Begin the averages: a run that goes on has some."""
        self._begin(pl_module)

    def _show(self, trainer: Any, module: Any) -> None:
        """Put the averages in the weights' place, if there are some."""
        fitting = trainer.state.fn == "fit"
        if not fitting and trainer.ckpt_path is not None and self._found is None:
            self._forget()  # the model has what the file has
        if not fitting and self.ema is None and self._found is None:
            return
        if self.ema is None or not fitting:
            self._begin(module)
        self._average()
        if self.ema is not None and not self.ema.is_swapped:
            self._shown = True  # before it is true: Ctrl-C may come between
            self.ema.swap()

    def _hide(self) -> None:
        """Give the weights back."""
        shown, self._shown = self._shown, False
        if shown and self.ema is not None and self.ema.is_swapped:
            self.ema.swap()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the averages in the weights' place."""
        self._show(trainer, pl_module)

    def on_validation_end(self, *_: Any) -> None:
        """Give the weights back."""
        self._hide()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the averages in the weights' place."""
        self._show(trainer, pl_module)

    def on_test_end(self, *_: Any) -> None:
        """Give the weights back."""
        self._hide()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the averages in the weights' place."""
        self._show(trainer, pl_module)

    def on_predict_end(self, *_: Any) -> None:
        """Give the weights back."""
        self._hide()

    def on_exception(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Give the weights back, and leave the optimizers alone."""
        self._hide()
        self._rest(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002 - given by name
        """Follow the model to where the trainer has moved it."""
        if self.ema is not None and not self.ema.is_swapped:
            self.ema.rebind(pl_module)
        self._rest(trainer, pl_module)

    def _rest(self, trainer: Any, module: Any) -> None:
        self._ignore()
        kept = self.ema is not None and not self.ema.is_swapped
        self._left = _sums(module) if kept else None
        if trainer.state.fn == "fit":
            self._step = trainer.global_step

    # --- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return how many updates were seen; the averages are in the checkpoint itself."""
        return {"latest_update_step": 0 if self.ema is None else self.ema.step}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the averages in the place of the weights in a checkpoint, and the weights beside."""
        if trainer.state.fn == "fit" and self.ema is None:
            self._begin(pl_module)
        if self.ema is None:
            return
        swapped = self.ema.is_swapped
        if swapped:  # what is saved is a state of the training
            self.ema.swap()
        try:
            self._average()
            weights = checkpoint[_AVERAGES]
            checkpoint[_WEIGHTS] = (
                deepcopy(trainer.strategy.lightning_module_state_dict()) if swapped else weights
            )
            checkpoint[_AVERAGES] = self.ema.model_state_dict()
            checkpoint[_COUNT] = {"n_averaged": torch.tensor(self.ema.step // self.options.get("every", 1))}
            checkpoint[_OWN] = _sharing(self.ema.state_dict(), checkpoint[_AVERAGES])
        finally:
            if swapped:
                self.ema.swap()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take weights and averages from a checkpoint, also from one of Lightning's WeightAveraging."""
        fitting = trainer.state.fn == "fit"
        if not fitting and self.ema is None:
            return  # nobody trains: the averages that the model has by now are what is evaluated
        self._forget()
        if _WEIGHTS in checkpoint and _COUNT in checkpoint:
            pl_module.load_state_dict(checkpoint[_WEIGHTS], strict=pl_module.strict_loading)
            self._found = {key: checkpoint[key] for key in (_AVERAGES, _COUNT, _OWN) if key in checkpoint}
        elif fitting:
            _warn("the checkpoint has no averages: they begin anew, at the weights that it has")


class _AveragesAlone:
    """A trainer's way to write files, whose files of weights alone have the averages instead.

    Lightning asks no callback about such files.
    """

    def __init__(self, io: Any, callback: WeightAverages) -> None:
        self._io, self._callback = io, callback

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_io":
            raise AttributeError(name)
        return getattr(self._io, name)

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        ema = self._callback.ema
        if ema is not None and _AVERAGES in checkpoint and "callbacks" not in checkpoint:
            averages = ema.model_state_dict()
            weights = checkpoint[_AVERAGES]  # the model's own hook may have left some out
            chosen = {name: averages.get(name, value) for name, value in weights.items()}
            checkpoint = {**checkpoint, _AVERAGES: chosen}
        self._io.save_checkpoint(checkpoint, *args, **kwargs)


def _callback_classes() -> tuple[type, ...]:
    """Return the classes of callbacks of those packages that are loaded; else of the first that there is."""
    names = [name for name in _PACKAGES if name in sys.modules]
    names = names or [name for name in _PACKAGES if util.find_spec(name.partition(".")[0])][:1]
    if not names:
        raise ImportError("WeightAverages needs lightning or pytorch_lightning: pip install lightning")
    return tuple(import_module(name).Callback for name in names)


def _made(kind: type[WeightAverages], decay: Decay, options: dict[str, Any]) -> WeightAverages:
    return kind(decay, **options)


def _warn(text: str) -> None:
    import_module("lightning_utilities.core.rank_zero").rank_zero_warn(text)


def _has_gradients(optimizer: Any) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _sums(module: Any) -> list[int]:
    """Return of each parameter the sum of its bits, which tells whether someone has written it."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    flat = [parameter.detach().reshape(-1) for parameter in module.parameters()]
    return [int(each.view(kinds.get(each.element_size(), torch.int64)).sum()) for each in flat]


def _sharing(state: dict[str, Any], averages: dict[str, Any]) -> dict[str, Any]:
    """Return a state of an EMA whose tensors are those of a state dict where both have the same bits.

    A file then has them once.
    """

    def shared(name: str, value: Any) -> Any:
        other = averages.get(name)
        same = torch.is_tensor(other) and other.dtype == value.dtype and torch.equal(other, value)
        return other if same else value

    def each(named: dict[str, Any]) -> dict[str, Any]:
        return {name: shared(name, value) for name, value in named.items()}

    return {
        **state,
        "averages": [each(named) for named in state["averages"]],
        "copied": each(state["copied"]),
    }
