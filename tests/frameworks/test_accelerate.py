"""Hugging Face's accelerate: what its loops need of an EMA, without any code of ours for it."""

import numpy as np
import pytest

import fastema
from oracle import same_bits, update
from processes import free_ports, output_of, ranks

for needed in ("torch", "accelerate"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

import torch
from accelerate import Accelerator

DECAY = 0.75


class Loop:
    """A training of 12 batches, of which two are accumulated, under an accelerator."""

    def __init__(self, **optimizer):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        batches = torch.utils.data.DataLoader(torch.randn(24, 4), batch_size=2)
        adam = torch.optim.AdamW(model.parameters(), lr=0.01, **optimizer)
        self.model, self.optimizer, self.batches = self.accelerator.prepare(model, adam, batches)
        self.ema = fastema.EMA(self.model, DECAY)
        self.accelerator.register_for_checkpointing(self.ema)
        self.recorded = [self.weights()]

    def weights(self):
        plain = self.accelerator.unwrap_model(self.model)
        return {name: p.detach().numpy().copy() for name, p in plain.named_parameters()}

    def train(self, saving=None, at=6, skip=0):
        """Train on all batches but the first ones; save when so many are done."""
        batches = self.accelerator.skip_first_batches(self.batches, skip) if skip else self.batches
        for i, x in enumerate(batches, skip):
            if i == at and saving:
                self.accelerator.save_state(saving)
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward((self.model(x) - x.sum(1, keepdim=True)).square().mean())
                self.optimizer.step()
                if self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped:
                    self.ema.update()
                    self.recorded.append(self.weights())
                self.optimizer.zero_grad()

    def replayed(self):
        averages = dict(self.recorded[0])
        for weights in self.recorded[1:]:
            averages = {name: update(averages[name], value, DECAY) for name, value in weights.items()}
        return averages

    def averages(self):
        return {name: average.numpy().copy() for name, average in self.ema.averages.items()}


def same(ours, theirs):
    return {*ours} == {*theirs} and all(same_bits(ours[name], theirs[name]) for name in ours)


def test_accumulated_gradients_are_averaged_once_under_plain_names():
    loop = Loop()
    loop.train()
    assert loop.ema.step == 6
    assert list(loop.ema.averages) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert same(loop.averages(), loop.replayed())


def test_a_registered_ema_is_saved_and_another_process_goes_on_from_it_in_mid_epoch(tmp_path):
    loop = Loop()
    loop.train(saving=tmp_path / "state")
    program = """
        import sys
        import numpy as np
        sys.path.insert(0, sys.argv[1])
        from test_accelerate import Loop
        loop = Loop()
        loop.accelerator.load_state(sys.argv[2] + "/state")
        assert loop.ema.step == 3
        loop.train(skip=6)
        np.savez(sys.argv[2] + "/averages.npz", **loop.averages())
        np.savez(sys.argv[2] + "/weights.npz", **loop.weights())
    """
    output_of(program, __file__.rpartition("/")[0], tmp_path)
    assert same(loop.averages(), np.load(tmp_path / "averages.npz"))
    assert same(loop.weights(), np.load(tmp_path / "weights.npz"))


def test_a_state_that_was_saved_within_swapped_gives_the_weights_back(tmp_path):
    loop = Loop()
    loop.train()
    weights, averages = loop.weights(), loop.averages()
    with loop.ema.swapped():
        loop.accelerator.save_state(tmp_path)  # the model's file has averages
    loop.train()
    loop.accelerator.load_state(tmp_path)
    assert same(loop.weights(), averages)
    loop.ema.swap()
    assert same(loop.weights(), weights)
    assert same(loop.averages(), averages)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_was_skipped_is_told_unless_the_optimizer_is_fused(fused):
    loop = Loop(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loop.accelerator.scaler = scaler
    optimizer = loop.accelerator.prepare_optimizer(torch.optim.AdamW(loop.model.parameters(), fused=fused))
    for factor in (1.0, torch.inf):
        before, scale = loop.weights(), scaler.get_scale()
        loop.accelerator.backward(loop.model(torch.ones(2, 4)).mean() * factor)
        optimizer.step()
        optimizer.zero_grad()
        skipped = factor == torch.inf
        assert same(before, loop.weights()) == skipped
        assert (scaler.get_scale() < scale) == skipped
        assert loop.accelerator.optimizer_step_was_skipped == (skipped and not fused)


def test_processes_have_the_same_averages_and_names(tmp_path):
    program = """
        import os, sys
        rank = os.environ["LOCAL_RANK"] = os.environ["RANK"]
        import numpy as np
        sys.path.insert(0, sys.argv[1])
        from test_accelerate import Loop, same
        whole = Loop()
        whole.train(saving=sys.argv[2] + "/state", at=4)
        assert type(whole.model).__name__ == "DistributedDataParallel"
        assert same(whole.averages(), whole.replayed())
        part = Loop()
        part.accelerator.load_state(sys.argv[2] + "/state")
        part.train(skip=4)
        np.savez(f"{sys.argv[2]}/whole-{rank}.npz", **whole.averages())
        np.savez(f"{sys.argv[2]}/part-{rank}.npz", **part.averages())
    """
    (port,) = free_ports(1)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    ranks(2, program, __file__.rpartition("/")[0], tmp_path, **where)
    whole, *others = (
        np.load(tmp_path / f"{part}-{rank}.npz") for part in ("whole", "part") for rank in range(2)
    )
    assert all(same(whole, other) for other in others)
