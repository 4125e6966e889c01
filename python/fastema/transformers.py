"""Averages in the Trainer of Hugging Face transformers: a callback, and a Trainer that shows averages.

    from fastema.transformers import AveragingTrainer

    trainer = AveragingTrainer(model, args, train_dataset=data, eval_dataset=held_out, decay=0.999)
    trainer.train()  # evaluations and checkpoints are of averages

`AveragingMixin` makes the same of other Trainers. `WeightAverages` is a callback for any Trainer, which goes
on evaluating and saving the weights; the averages lie beside them.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import is_sagemaker_mp_enabled

from ._types import Decay
from .checkpoint._replace import StrPath
from .ema import EMA

__all__ = ["AveragingMixin", "AveragingTrainer", "WeightAverages"]

_FILE = "averages.safetensors"
_STATE = "trainer_state.json"
_OPTIONS = {  # name -> default
    name: parameter.default
    for name, parameter in inspect.signature(EMA).parameters.items()
    if name not in ("values", "decay")
}


class WeightAverages(TrainerCallback):
    """A callback of Hugging Face's Trainer that averages the weights, and saves the averages.

    It averages after each step of the optimizer: once for accumulated gradients, never for a step that a
    scaler of gradients skips. Each checkpoint folder gets a file ``averages.safetensors``, of `EMA.save`, and
    training that is resumed goes on from it to the bit. All else stays as it is: the Trainer evaluates and
    saves the weights. See `AveragingTrainer` for one that evaluates and saves averages.

    Of models of PEFT those parameters are averaged that are trained when training begins, so that the base
    model costs nothing. Of others all parameters are, unless `only` is given.

    The file is written after the Trainer has written its own and deleted older checkpoints. Use one for each
    Trainer: a second one would write over the first one's file. Several decays are ``decay=[0.99, 0.999]``.

    Args:
        decay: As for `EMA`.
        resume_from_checkpoint: The folder that training is resumed from. None: ``checkpoint-N`` in the
            Trainer's ``output_dir``, N being the step. The Trainer does not tell callbacks what it reads.
        **options: The other arguments of `EMA`.

    Attributes:
        ema: The averages, an `EMA` of the model; None before training. After training with
            ``load_best_model_at_end`` they are those of the best checkpoint, as the model is.
        model: The model that is averaged; None before training.
        resume_from_checkpoint: As given; can be changed.

    Raises:
        TypeError: An option is none of `EMA`.

    Example:
        To average, and look at the averages after the training::

            averages = WeightAverages(decay=0.999)
            trainer = Trainer(model, args, train_dataset=data, callbacks=[averages])
            trainer.train()
            with averages.ema.swapped():
                model.save_pretrained("averaged")
    """

    def __init__(
        self,
        decay: Decay | Sequence[Decay] = 0.999,
        *,
        resume_from_checkpoint: StrPath | None = None,
        **options: Any,
    ) -> None:
        inspect.signature(EMA).bind(None, decay, **options)
        self.ema: EMA | None = None
        self.model: Any = None
        self.resume_from_checkpoint = resume_from_checkpoint
        # what is not given is what EMA takes then, not what a checkpoint says
        self._given = {**_OPTIONS, "decay": decay, **options}
        self._arguments = self._given
        self._scale = 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Make the averages, or go on from those of the checkpoint.

        Raises:
            FileNotFoundError: The checkpoint holds no averages; or the best one so far does not, which would
                be loaded in the end.
            ValueError: The folder is none that this training goes on from; or the optimizer averages already.
        """
        model = self.model = kwargs["model"]
        _check_optimizer(kwargs.get("optimizer"))
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            _path_in(state.best_model_checkpoint)
        self._arguments = dict(self._given)
        if self._given["only"] is None and hasattr(model, "peft_config"):
            self._arguments["only"] = _trained_first()
        if state.global_step == 0 and self.resume_from_checkpoint is None:
            self.ema = EMA(model, **self._arguments)
            return
        folder = self.resume_from_checkpoint or _checkpoint(args, state)
        _check_is_resumed(folder, state)
        self._load(folder)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Note by how much gradients are scaled."""
        self._scale = _scale_of(kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Average, unless the step was skipped."""
        optimizer = kwargs["optimizer"]
        # a fused optimizer skips by itself: then the scale alone tells
        if not optimizer.step_was_skipped and _scale_of(optimizer) >= self._scale:
            self._averages.update()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save the averages into the checkpoint that was just written.

        Raises:
            FileNotFoundError: It is elsewhere, as in a search for hyperparameters.
        """
        folder = _checkpoint(args, state)
        if args.should_save and not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} must be the checkpoint, and is not there: use AveragingTrainer, which knows where "
                "a search for hyperparameters writes"
            )
        self._save(folder, args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Go back to the averages of the best model, where the Trainer did to that."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            PartialState().wait_for_everyone()  # the last file may still be written
            self._load(state.best_model_checkpoint)

    @property
    def _averages(self) -> EMA:
        if self.ema is None:
            raise RuntimeError("there are no averages before training has begun")
        return self.ema

    def _save(self, folder: Path, args: Any) -> None:
        """Write the averages, and the weights if averages are in their place; every process calls this."""
        if args.should_save or _is_sharded(self.model):
            folder.mkdir(parents=True, exist_ok=True)
            self._averages.save(folder / _FILE)

    def _load(self, folder: StrPath) -> None:
        """Go on from a checkpoint; its weights come into the model, if it was saved with averages."""
        self.ema = None  # frees its memory
        self.ema = EMA.load(_path_in(folder), self.model, **self._arguments)
        if self.ema.is_swapped:
            self.ema.swap()


class _SavedByTrainer(WeightAverages):
    """Averages that their Trainer saves before it deletes an older checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass


if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object  # so that it comes before any Trainer


class AveragingMixin(_Base):
    """Makes a Trainer evaluate, predict and save with averaged weights; see `AveragingTrainer`.

    Example:
        ::

            class AveragingSeq2SeqTrainer(AveragingMixin, Seq2SeqTrainer):
                pass
    """

    def __init__(self, *args: Any, decay: Decay | Sequence[Decay] = 0.999, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        self.weight_averages = _SavedByTrainer(decay, **options)
        super().__init__(*args, **kwargs)
        _check_trainer(self)
        self.add_callback(self.weight_averages)

    @property
    def ema(self) -> EMA | None:
        """The averages, an `EMA` of the model; None before training."""
        return self.weight_averages.ema

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint` is a folder, or True for the last one in the output folder."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        folder = None if isinstance(resume_from_checkpoint, bool) else resume_from_checkpoint
        self.weight_averages.resume_from_checkpoint = folder
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate averages; the weights come back bit for bit."""
        with self._averaged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict with averages; the weights come back bit for bit."""
        with self._averaged():
            return super().predict(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> Any:
        """Save averages as the model; the weights come back bit for bit."""
        with self._averaged():
            return super().save_model(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / _name(self.state)
        with self._averaged():
            # while averages are in their place the file holds the weights, too
            self.weight_averages._save(folder, self.args)
            super()._save_checkpoint(model, trial)

    def _averaged(self) -> AbstractContextManager[None]:
        """Put averages in the place of the weights, unless there are none or they are there already."""
        ema = self.ema
        if ema is None or ema.is_swapped:
            return nullcontext()
        if self.model is not self.weight_averages.model:
            raise RuntimeError("trainer.model must be the model that was trained, and is another by now")
        return ema.swapped()


class AveragingTrainer(AveragingMixin, Trainer):
    """Hugging Face's Trainer, which evaluates, predicts and saves with averaged weights.

    What `evaluate`, `predict` and `save_model` show, and what ``from_pretrained`` finds in a checkpoint, are
    averages; so the best model is that of the best averages. The model itself has the weights at all other
    times, also after training and whatever was raised: ``with trainer.ema.swapped():`` shows averages to code
    of your own.

    Beside the model, a checkpoint folder has the file ``averages.safetensors``, of `EMA.save`: averages as
    they are kept, and the weights. Training that is resumed goes on from these to the bit. So it does with
    ``load_best_model_at_end``: the model then has the weights of the best checkpoint, and what is shown are
    its averages. A run that was begun with `WeightAverages` can be resumed, and the other way round.

    It is averaged as `WeightAverages` does, of which ``trainer.weight_averages`` is one.

    Args:
        *args: As for the Trainer.
        decay: As for `EMA`.
        **kwargs: As for the Trainer, and the other arguments of `EMA`.

    Attributes:
        ema: The averages, an `EMA` of the model; None before training.
        weight_averages: The callback that averages.

    Raises:
        ValueError: The Trainer is to work as one whose model cannot be exchanged: with DeepSpeed or FSDP, or
            with 16-bit evaluation (``fp16_full_eval``, ``bf16_full_eval``), which casts the weights for good.
            Or there is a `WeightAverages` among its callbacks.

    Example:
        ::

            trainer = AveragingTrainer(model, args, train_dataset=data, eval_dataset=held_out, decay=0.999)
            trainer.train()
            trainer.evaluate()  # of averages
    """


# --- the checkpoints of a Trainer ---------------------------------------------------------------------


def _name(state: Any) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / _name(state)


def _path_in(folder: StrPath) -> Path:
    """Return the path of the averages in a checkpoint, which may be those of a set of files.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(folder) / _FILE
    if not any(path.parent.glob(f"{path.stem}*{path.suffix}")):
        raise FileNotFoundError(
            f"{folder} must hold {_FILE}, the averages of that step, and was saved without: to begin them "
            f"with its weights, load these into a model and call fastema.EMA(model).save({str(path)!r})"
        )
    return path


def _check_is_resumed(folder: StrPath, state: Any) -> None:
    """Raise unless a folder tells the same of the training as the Trainer, which read the checkpoint.

    Raises:
        FileNotFoundError: It is not there, or no checkpoint.
        ValueError: It does not.
    """
    path = Path(folder) / _STATE
    cure = "set WeightAverages' resume_from_checkpoint to the folder that train() resumes from, or to None"
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be there for averages to go on: {cure}")
    found = TrainerState.load_from_json(str(path))
    if _story(found) != _story(state):
        raise ValueError(
            f"{folder} must be the checkpoint that the Trainer resumes at step {state.global_step}, and is "
            f"of another training, at step {found.global_step}: {cure}"
        )


def _story(state: Any) -> str:
    """Return what only one training can tell, as text: there a NaN is equal to itself."""
    return repr((state.global_step, state.epoch, state.total_flos, state.best_metric, state.log_history))


# --- what cannot be averaged --------------------------------------------------------------------------


def _check_trainer(trainer: Any) -> None:
    """Raise if a Trainer's model cannot be exchanged, or is averaged twice.

    Raises:
        ValueError: So it is.
    """
    ours, args = type(trainer).__name__, trainer.args
    others = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled,
        "SageMaker's model parallelism": is_sagemaker_mp_enabled(),
        "a model sharded at load": getattr(trainer, "is_distributed_loading_by_transformers", False),
    }
    for name, enabled in others.items():
        if enabled:
            raise ValueError(
                f"{ours} must save the model's own parameters, and {name} keeps and saves others: use a "
                "plain Trainer with callbacks=[WeightAverages(...)]"
            )
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"args.{name} must be False for {ours}: the Trainer would cast the weights for good"
            )
    if any(isinstance(callback, WeightAverages) for callback in trainer.callback_handler.callbacks):
        raise ValueError(f"callbacks must be without WeightAverages: {ours} has one, and both save one file")


def _check_optimizer(optimizer: Any) -> None:
    """Raise if an optimizer changes weights when they are evaluated.

    Raises:
        ValueError: It does.
    """
    while hasattr(optimizer, "optimizer"):  # what accelerate and DeepSpeed wrap
        optimizer = optimizer.optimizer
    if callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"the optimizer must leave weights alone when they are evaluated, and {type(optimizer).__name__} "
            "puts averages of its own there, as schedule-free ones do: average with one or the other"
        )


def _scale_of(optimizer: Any) -> float:
    """Return the factor of gradients; it falls when a step was skipped."""
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _is_sharded(model: Any) -> bool:
    """Tell whether each process has a part of the parameters only, so that each has to save."""
    return any(
        not placement.is_replicate()
        for parameter in model.parameters()
        for placement in getattr(parameter, "placements", ())
    )


def _trained_first() -> Any:
    """Return a choice of values: those that need a gradient when they are first asked for."""
    trained: dict[str, bool] = {}
    return lambda name, value: trained.setdefault(name, value.requires_grad)
