"""Hugging Face's Trainer: what is averaged, who sees averages, what a resumed training goes on from."""

import json
import os
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

import fastema
from processes import free_ports, output_of, ranks

for needed in ("torch", "transformers", "accelerate", "peft"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

import torch
import transformers
from safetensors.numpy import load_file
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

import trainers
from fastema.transformers import AveragingMixin, AveragingTrainer, WeightAverages
from trainers import DECAY, Recorder, data, replayed, same, weights

FILE = "averages.safetensors"


@pytest.fixture(autouse=True, scope="module")
def quiet_and_one_thread():
    """Keep small models from waiting for threads, and the Trainer from telling of each step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


class Stop(TrainerCallback):
    """Raises after a step, as Ctrl-C would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Evaluated(TrainerCallback):
    """Keeps the weights that were evaluated last; raises there if it is to."""

    def __init__(self, raises=False):
        self.weights, self.raises = None, raises

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.weights = weights(model)
        if self.raises:
            raise OSError("no data")


def averages_of(averaging):
    """Return the averages of a Trainer or callback, by the names of what is trained."""
    ema, model = averaging.ema, averaging.model
    return {name: ema.averages[name].numpy().copy() for name in weights(model)}


def in_checkpoint(folder):
    """Return the weights that others find in a checkpoint, by their names."""
    (file,) = (x for x in ("model.safetensors", "adapter_model.safetensors") if (folder / x).exists())
    return {name.replace("lora_A.w", "lora_A.default.w").replace("lora_B.w", "lora_B.default.w"): value
            for name, value in load_file(folder / file).items()}  # fmt: skip


# --- what is averaged ---------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [trainers.model, trainers.lora, trainers.in_bfloat16])
@pytest.mark.parametrize("changed", [{}, {"bf16": True}], ids=["float32", "autocast"])
def test_each_step_of_the_optimizer_is_averaged_once(tmp_path, of, changed):
    recorder = Recorder()
    trainer = trainers.trainer(tmp_path, of=of, callbacks=[recorder], **changed)
    trainer.train()
    assert trainer.ema.step == 12  # 24 batches, of which two are accumulated
    assert same(averages_of(trainer), replayed(recorder.weights))


def test_a_callback_averages_and_leaves_the_training_as_it_is(tmp_path):
    recorder, averages = Recorder(), WeightAverages(DECAY, dtype="float64")
    usual = {"kind": Trainer, "eval_strategy": "epoch", "save_strategy": "epoch"}
    alone = trainers.trainer(tmp_path / "alone", **usual)
    alone.train()
    beside = trainers.trainer(tmp_path / "beside", callbacks=[recorder, averages], **usual)
    said = beside.args.to_dict()
    beside.train()
    assert same(weights(alone.model), weights(beside.model))
    assert same(in_checkpoint(tmp_path / "beside/checkpoint-12"), weights(alone.model))
    losses = [[x.get("eval_loss") for x in each.state.log_history] for each in (alone, beside)]
    assert losses[0] == losses[1]
    assert beside.args.to_dict() == said
    start = [{name: x.astype(np.float64) for name, x in recorder.weights[0].items()}, *recorder.weights[1:]]
    assert same(averages_of(averages), replayed(start))


def test_only_adapters_are_averaged_and_the_base_model_costs_nothing(tmp_path):
    trainer = trainers.trainer(tmp_path, of=trainers.lora, save_strategy="epoch")
    trainer.train()
    assert len(trainer.ema.averages) == 4
    assert all("lora_" in name for name in trainer.ema.averages)
    assert same(in_checkpoint(tmp_path / "checkpoint-12"), averages_of(trainer))
    kept = load_file(tmp_path / "checkpoint-12" / FILE)
    assert sum(x.size for x in kept.values()) == 2 * sum(x.size for x in weights(trainer.model).values())


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_not_averaged(tmp_path, fused):
    recorder, steps = Recorder(), []
    optim = "adamw_torch_fused" if fused else "adamw_torch"
    trainer = trainers.trainer(tmp_path, callbacks=[recorder], optim=optim)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def overflow(gradient):
        steps.append(trainer.state.global_step)
        return gradient * torch.inf if steps[-1] in (1, 6, 7) else gradient

    trainer.model.transformer.ln_f.weight.register_hook(overflow)
    trainer.train()
    taken = [after for before, after in pairwise(recorder.weights) if not same(before, after)]
    assert max(steps) == 11
    assert trainer.ema.step == len(taken) == 9
    assert same(averages_of(trainer), replayed([recorder.weights[0], *taken]))


def test_steps_that_an_optimizer_says_were_skipped_are_not_averaged(tmp_path):
    trainer = trainers.trainer(tmp_path)
    trainer.train()
    for skipped, steps in ((True, 12), (False, 13)):
        optimizer = SimpleNamespace(step_was_skipped=skipped)  # as of DeepSpeed, which has no scaler
        trainer.weight_averages.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        trainer.weight_averages.on_optimizer_step(None, None, None, optimizer=optimizer)
        assert trainer.ema.step == steps


# --- who sees averages --------------------------------------------------------------------------------


def test_evaluate_predict_and_files_have_averages_and_the_model_its_weights(tmp_path):
    recorder, evaluated = Recorder(), Evaluated()
    trainer = trainers.trainer(
        tmp_path, callbacks=[recorder, evaluated], save_strategy="steps", save_steps=5, eval_strategy="epoch"
    )
    trainer.train()
    averages = replayed(recorder.weights)
    for show in (trainer.evaluate, lambda: trainer.predict(data(8))):
        evaluated.weights = None
        show()
        assert same(evaluated.weights, averages)
    trainer.save_model(str(tmp_path / "final"))
    assert same(in_checkpoint(tmp_path / "final"), averages)
    assert not (tmp_path / "final" / FILE).exists()
    assert same(in_checkpoint(tmp_path / "checkpoint-5"), replayed(recorder.weights[:6]))
    assert same(weights(trainer.model), recorder.weights[-1])
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "final")
    assert same(weights(loaded), averages)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight  # tied


def test_evaluations_of_several_data_sets_and_within_swapped_show_averages(tmp_path):
    evaluated = Evaluated()
    trainer = trainers.trainer(tmp_path, callbacks=[evaluated])
    trainer.train()
    raw, averages = weights(trainer.model), averages_of(trainer)
    metrics = trainer.evaluate({"a": data(2), "b": data(4)})
    assert {"eval_a_loss", "eval_b_loss"} <= metrics.keys()
    assert same(evaluated.weights, averages)
    with trainer.ema.swapped():
        trainer.evaluate()
        assert same(evaluated.weights, averages)
    assert same(weights(trainer.model), raw)


@pytest.mark.parametrize("call", ["evaluate", "predict", "save_model", "train"])
def test_weights_are_back_after_an_exception(tmp_path, monkeypatch, call):
    evaluated, recorder = Evaluated(), Recorder()
    trainer = trainers.trainer(tmp_path, callbacks=[evaluated, recorder])
    trainer.train()
    evaluated.raises = True
    monkeypatch.setattr(trainer.model, "save_pretrained", lambda *_, **__: 1 / 0)
    if call == "train":
        trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 3
    act = (lambda: trainer.predict(data(8))) if call == "predict" else getattr(trainer, call)
    with pytest.raises((OSError, ZeroDivisionError)):
        act()
    assert not trainer.ema.is_swapped
    assert same(weights(trainer.model), recorder.weights[-1])
    assert (len(recorder.weights) > 14) == (call == "train")


def test_other_trainers_take_the_mixin(tmp_path):
    class AveragingSeq2SeqTrainer(AveragingMixin, Seq2SeqTrainer):
        pass

    recorder, evaluated = Recorder(), Evaluated()
    trainer = AveragingSeq2SeqTrainer(
        trainers.model(),
        trainers.arguments(tmp_path, kind=transformers.Seq2SeqTrainingArguments),
        train_dataset=data(),
        callbacks=[recorder, evaluated],
        decay=DECAY,
        every=2,
    )
    trainer.train()
    trainer.predict(data(8), max_length=4)
    seldom = [recorder.weights[0], *recorder.weights[2::2]]
    assert same(evaluated.weights, replayed(seldom, DECAY**2))


# --- going on -----------------------------------------------------------------------------------------


KINDS = {"averaging": (AveragingTrainer, trainers.model), "lora": (AveragingTrainer, trainers.lora)}
KINDS["callback"] = (Trainer, trainers.model)


def run(folder, kind, *callbacks, seed=42, **train):
    """Train, and return what averages."""
    trainer_class, of = KINDS[kind]
    beside = WeightAverages(DECAY) if trainer_class is Trainer else None
    callbacks = [*callbacks, *([beside] if beside else [])]
    trainer = trainers.trainer(
        folder, kind=trainer_class, of=of, callbacks=callbacks, save_strategy="steps", save_steps=4, seed=seed
    )
    trainer.train(**train)
    return beside or trainer


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Return folders of trainings that were stopped in mid-epoch, and what other processes made of them."""
    folder = tmp_path_factory.mktemp("stopped")
    for kind in KINDS:
        with pytest.raises(KeyboardInterrupt):
            run(folder / kind, kind, Stop(10))
    program = """
        import sys
        from pathlib import Path
        import numpy as np, torch
        sys.path.insert(0, sys.argv[2])
        import test_transformers as tests
        torch.set_num_threads(1)
        for kind in tests.KINDS:
            done = tests.run(Path(sys.argv[1]) / kind, kind, resume_from_checkpoint=True)
            for what, arrays in ("weights", tests.weights(done.model)), ("averages", tests.averages_of(done)):
                np.savez(f"{sys.argv[1]}/{kind}-{what}.npz", **arrays)
    """
    output_of(program, folder, os.path.dirname(__file__))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_is_resumed_in_mid_epoch_ends_with_the_bits_of_one_that_is_not(
    tmp_path, resumed, kind
):
    recorder = Recorder()
    whole = run(tmp_path, kind, recorder)
    assert same(weights(whole.model), np.load(resumed / f"{kind}-weights.npz"))
    assert same(averages_of(whole), np.load(resumed / f"{kind}-averages.npz"))
    assert same(averages_of(whole), replayed(recorder.weights))


@pytest.mark.parametrize(("begun", "goes_on"), [("callback", "averaging"), ("averaging", "callback")])
def test_callback_and_trainer_go_on_from_each_other(tmp_path, begun, goes_on):
    whole = run(tmp_path / "whole", "callback")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", begun, Stop(5))
    done = run(tmp_path / "part", goes_on, resume_from_checkpoint=str(tmp_path / "part/checkpoint-4"))
    assert same(weights(done.model), weights(whole.model))
    assert same(averages_of(done), averages_of(whole))


def test_a_checkpoint_elsewhere_is_gone_on_from(tmp_path):
    whole = run(tmp_path / "a", "averaging")
    (tmp_path / "a/checkpoint-8").rename(tmp_path / "moved")
    done = run(tmp_path / "b", "averaging", resume_from_checkpoint=str(tmp_path / "moved"))
    assert same(averages_of(done), averages_of(whole))
    assert same(weights(done.model), weights(whole.model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_comes_with_its_averages(tmp_path, kind):
    recorder, (trainer_class, of) = Recorder(), KINDS[kind]
    beside = [WeightAverages(DECAY)] if trainer_class is Trainer else []
    trainer = trainers.trainer(
        tmp_path,
        kind=trainer_class,
        of=of,
        callbacks=[recorder, *beside],
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.3 if kind == "lora" else 0.03,
        lr_scheduler_type="constant",
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert 0 < best < 12
    averaging = beside[0] if beside else trainer
    assert same(weights(trainer.model), recorder.weights[best])
    assert same(averages_of(averaging), replayed(recorder.weights[: best + 1]))
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    assert [x.name for x in tmp_path.iterdir()] == [f"checkpoint-{best}"]
    assert (tmp_path / f"checkpoint-{best}" / FILE).exists()


def test_old_checkpoints_are_deleted_with_their_averages(tmp_path):
    trainer = trainers.trainer(tmp_path, save_strategy="steps", save_steps=3, save_total_limit=2)
    trainer.train()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-9"]
    assert all((x / FILE).exists() for x in tmp_path.iterdir())


def test_a_second_training_begins_averages_anew(tmp_path):
    trainer = trainers.trainer(tmp_path)
    trainer.train()
    first, raw = trainer.ema, weights(trainer.model)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert trainer.ema is not first
    assert same(recorder.weights[0], raw)
    assert same(averages_of(trainer), replayed(recorder.weights))


def test_options_are_those_of_now_and_not_of_the_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainers.trainer(
            tmp_path, kind=Trainer, callbacks=[WeightAverages(DECAY, every=2), Stop(5)],
            save_strategy="steps", save_steps=4,
        ).train()  # fmt: skip
    recorder, averages = Recorder(), WeightAverages(0.5)
    trainers.trainer(tmp_path, kind=Trainer, callbacks=[averages, recorder]).train(
        resume_from_checkpoint=True
    )
    begun = load_file(tmp_path / "checkpoint-4" / FILE)
    start = {name: begun[name] for name in recorder.weights[0]}
    assert same(averages_of(averages), replayed([start, *recorder.weights[1:]], 0.5))


# --- several processes --------------------------------------------------------------------------------


def test_processes_have_the_same_averages_and_one_of_them_saves(tmp_path):
    program = """
        import os, sys
        rank = os.environ["LOCAL_RANK"] = os.environ["RANK"]
        import numpy as np, torch
        import fastema, trainers
        torch.set_num_threads(1)
        if rank == "1":
            fastema.EMA.save = lambda *_: 1 / 0
        usual = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.3}
        usual |= {"eval_strategy": "steps", "eval_steps": 2}  # which draws from torch's random numbers
        whole = trainers.Recorder()
        trainer = trainers.trainer(sys.argv[1], callbacks=[whole], load_best_model_at_end=True, **usual)
        trainer.train()
        until = trainer.state.best_global_step
        assert trainers.same(trainers.weights(trainer.model), whole.weights[until])
        averages = trainers.replayed(whole.weights[: until + 1])
        assert trainers.same({name: trainer.ema.averages[name].numpy() for name in averages}, averages)

        part = trainers.Recorder()
        trainer = trainers.trainer(sys.argv[1], callbacks=[part], **usual)
        trainer.train(resume_from_checkpoint=sys.argv[1] + "/checkpoint-2")
        assert trainers.same(part.weights[-1], whole.weights[-1])
        averages = trainers.replayed(whole.weights)
        assert trainers.same({name: trainer.ema.averages[name].numpy() for name in averages}, averages)
        np.savez(f"{sys.argv[1]}/{rank}.npz", **averages)
    """
    (port,) = free_ports(1)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    ranks(2, program, tmp_path, **where)
    assert same(np.load(tmp_path / "0.npz"), np.load(tmp_path / "1.npz"))


# --- what is refused ----------------------------------------------------------------------------------


def test_a_checkpoint_without_averages_is_refused_and_can_be_given_some(tmp_path):
    trainers.trainer(tmp_path, kind=Trainer, save_strategy="steps", save_steps=4).train()
    folder = tmp_path / "checkpoint-8"
    trainer = trainers.trainer(tmp_path / "other")
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint-8 must hold averages.safetensors, .* and was saved without"
    ):
        trainer.train(resume_from_checkpoint=str(folder))
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    fastema.EMA(model).save(folder / FILE)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train(resume_from_checkpoint=str(folder))
    assert len(recorder.weights) == 5
    assert same(averages_of(trainer), replayed(recorder.weights))


def test_a_folder_of_another_training_is_refused(tmp_path):
    for seed, part in enumerate("ab"):
        run(tmp_path / part, "callback", seed=seed)
    averages = WeightAverages(DECAY)
    trainer = trainers.trainer(tmp_path / "b", kind=Trainer, callbacks=[averages])
    with pytest.raises(
        ValueError, match=r"b/checkpoint-4 must be the checkpoint that the Trainer resumes at step 4"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))
    averages.resume_from_checkpoint = tmp_path / "a/checkpoint-8"
    for resumed_from, problem in ((tmp_path / "a/checkpoint-4", "at step 8"), (None, "at step 0")):
        with pytest.raises(ValueError, match=problem):
            trainer.train(resume_from_checkpoint=resumed_from and str(resumed_from))
    averages.resume_from_checkpoint = tmp_path / "c/checkpoint-4"
    with pytest.raises(FileNotFoundError, match=r"c/checkpoint-4/trainer_state.json must be there"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))


def test_a_best_checkpoint_without_averages_is_refused_before_the_training(tmp_path):
    usual = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    usual |= {"load_best_model_at_end": True}
    with pytest.raises(KeyboardInterrupt):
        trainers.trainer(tmp_path, callbacks=[Stop(9)], **usual).train()
    state = json.loads((tmp_path / "checkpoint-8/trainer_state.json").read_text())
    best = tmp_path / f"checkpoint-{state['best_global_step']}"
    (best / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"{best.name} must hold"):
        trainers.trainer(tmp_path, **usual).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize(
    ("attribute", "name"),
    [
        ("is_deepspeed_enabled", "DeepSpeed"),
        ("is_fsdp_enabled", "FSDP"),
        ("is_fsdp_xla_enabled", "FSDP"),
        ("is_distributed_loading_by_transformers", "a model sharded at load"),
    ],
)
def test_what_cannot_be_exchanged_is_refused(tmp_path, monkeypatch, attribute, name):
    make = Trainer._validate_args

    def enabled(self):
        make(self)
        setattr(self, attribute, True)

    monkeypatch.setattr(Trainer, "_validate_args", enabled)
    with pytest.raises(
        ValueError, match=f"AveragingTrainer must save the model's own parameters, and {name} keeps"
    ):
        trainers.trainer(tmp_path)


@pytest.mark.parametrize("kind", [AveragingTrainer, Trainer])
def test_parameters_of_zero_3_are_refused(tmp_path, kind):
    trainer = trainers.trainer(
        tmp_path, kind=kind, callbacks=[] if kind is AveragingTrainer else [WeightAverages()]
    )
    trainer.model.transformer.wte.weight.ds_id = 0
    with pytest.raises(TypeError, match="is a parameter of DeepSpeed's ZeRO-3"):
        trainer.train()


@pytest.mark.parametrize("name", ["fp16_full_eval", "bf16_full_eval"])
def test_evaluations_that_cast_the_weights_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"args.{name} must be False for AveragingTrainer"):
        trainers.trainer(tmp_path, **{name: True})


def test_averages_are_not_kept_twice(tmp_path):
    with pytest.raises(ValueError, match="callbacks must be without WeightAverages"):
        trainers.trainer(tmp_path, callbacks=[WeightAverages()])


def test_schedule_free_optimizers_are_refused(tmp_path):
    class ScheduleFree(torch.optim.SGD):
        def train(self):
            pass

        def eval(self):
            pass

    trainer = trainers.trainer(tmp_path)
    trainer.optimizer = ScheduleFree(trainer.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="ScheduleFree puts averages of its own there"):
        trainer.train()


def test_another_model_is_not_taken_for_the_one_that_was_trained(tmp_path):
    trainer = trainers.trainer(tmp_path)
    trainer.train()
    trainer.model = trainers.model(seed=1)
    with pytest.raises(RuntimeError, match=r"trainer.model must be the model that was trained"):
        trainer.evaluate()


def test_a_callback_says_where_it_would_have_saved(tmp_path):
    averages = WeightAverages()
    args = trainers.arguments(tmp_path)
    with pytest.raises(FileNotFoundError, match="checkpoint-3 must be the checkpoint, and is not there"):
        averages.on_save(args, SimpleNamespace(global_step=3), None)


def test_options_that_are_none_are_refused():
    with pytest.raises(TypeError, match="warm_up"):
        WeightAverages(0.9, warm_up=3)


def test_importing_fastema_imports_no_transformers():
    code = "import sys, fastema; print({'transformers', 'accelerate'} & {*sys.modules})"
    assert output_of(code) == "set()"
