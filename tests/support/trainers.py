"""Tiny models, data and arguments for Hugging Face's Trainer, and what its tests look at."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments

import oracle
from fastema.transformers import AveragingTrainer

DECAY = 0.75


def model(seed=0, **config):
    """Return a GPT-2 of 9,000 parameters, with dropout and a head that is tied to the embedding."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32}
    return GPT2LMHeadModel(
        GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **config})
    )


def lora():
    """Return that model with adapters, whose base model is frozen."""
    config = LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
    return get_peft_model(model(), config)


def in_bfloat16():
    """Return that model with weights of 16 bits."""
    return model().to(torch.bfloat16)


def data(size=24, seed=0):
    """Return a data set of random texts."""
    texts = np.random.default_rng(seed).integers(1, 32, (size, 8))
    return [{"input_ids": torch.tensor(text), "labels": torch.tensor(text)} for text in texts]


def arguments(folder, kind=TrainingArguments, **changed):
    """Return arguments of a training of 2 epochs with 6 steps each, of 2 batches."""
    usual = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return kind(str(folder), **{**usual, **changed})


class Recorder(TrainerCallback):
    """Keeps the weights as they are after each step of the optimizer that was taken."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, *_, model=None, **__):
        self.weights.append(weights(model))

    def on_optimizer_step(self, *_, model=None, optimizer=None, **__):
        if not optimizer.step_was_skipped:
            self.weights.append(weights(model))


def weights(model):
    """Return a copy of all that is trained of a model, by name."""
    return {
        name: p.detach().numpy().copy() if p.dtype != torch.bfloat16 else p.detach().float().numpy()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def trainer(folder, *, kind=AveragingTrainer, of=model, callbacks=(), arguments_of=arguments, **changed):
    """Return a Trainer, and one that averages with `DECAY` where it is an AveragingTrainer."""
    more = {"decay": DECAY} if issubclass(kind, AveragingTrainer) else {}
    return kind(
        of(),
        arguments_of(folder, **changed),
        train_dataset=data(),
        eval_dataset=data(8, seed=1),
        callbacks=list(callbacks),
        **more,
    )


def replayed(recorded, decay=DECAY):
    """Return the averages of recorded weights, in NumPy; the first ones are those before any step."""
    averages = dict(recorded[0])
    for after in recorded[1:]:
        averages = {name: oracle.update(averages[name], value, decay) for name, value in after.items()}
    return averages


def same(ours, theirs):
    """Tell whether two dictionaries have the same names and bits."""
    return ours.keys() == theirs.keys() and all(
        oracle.same_bits(np.asarray(ours[name]), np.asarray(theirs[name])) for name in ours
    )
