"""Small trainings in Lightning, and what a test sees of them."""

import os
import warnings
from importlib import import_module

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import oracle

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it uses of torch that will change
    pl = import_module(os.environ.get("LIGHTNING", "lightning.pytorch"))

from fastema.lightning import WeightAverages  # noqa: F401 - for the tests

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Model(pl.LightningModule):
    """A small model, whose weights are those of a seed."""

    lr = 0.1

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.seen = []  # of each evaluated batch, the weights that it is evaluated with

    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, _):
        self.seen.append(weights(self))
        self.log("loss", self.net(batch[0]).square().mean())

    test_step = validation_step

    def predict_step(self, batch, _):
        self.seen.append(weights(self))
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class ByIndex(Model):
    """Learns from the numbers of batches: these go on in mid-epoch, where a loader begins anew."""

    def training_step(self, _, batch_idx):
        x = next(iter(batches(1)))[0]
        return super().training_step([x.to(self.dtype) * (1 + batch_idx)], batch_idx)


class Recorder(pl.Callback):
    """Notes the weights before the training and after each step of the optimizer."""

    def __init__(self):
        self.steps = []

    def on_train_start(self, trainer, pl_module):
        self.steps.append(weights(pl_module))
        self.before = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self.before:
            self.steps.append(weights(pl_module))
        self.before = trainer.global_step


class Saves(pl.Callback):
    """Saves a checkpoint in one hook, when the optimizer has done so many steps."""

    def __init__(self, path, hook, step=None):
        def save(trainer, *_):
            if step in (None, trainer.global_step):
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


def batches(count=4):
    """Return a loader of so many batches, always the same."""
    x = torch.randn(8 * count, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=8)


def weights(model):
    """Return copies of the parameters, by name."""
    return {name: value.detach().float().numpy().copy() for name, value in model.named_parameters()}


def replay(steps, decay):
    """Return the averages of recorded weights, by NumPy; they start at the first."""
    averages = steps[0]
    for now in steps[1:]:
        averages = {name: oracle.update(averages[name], value, decay) for name, value in now.items()}
    return averages


def shown(callback):
    """Return the averages of the parameters that a callback has."""
    return {
        name: average.float().numpy().copy()
        for name, average in callback.ema.averages.items()
        if "running" not in name and "tracked" not in name
    }


def same(a, b):
    """Tell whether two dictionaries of arrays hold the same bits."""
    return a.keys() == b.keys() and all(oracle.same_bits(np.asarray(a[k]), np.asarray(b[k])) for k in a)


def same_everywhere(a, b):
    """Tell whether two values of nested containers are equal, tensors to the bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_everywhere(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_everywhere, a, b))
    return bool(a == b)
