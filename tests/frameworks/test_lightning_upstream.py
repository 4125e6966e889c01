"""What Lightning's tests of WeightAveraging and torch's of swa_utils ask of averages, asked of ours.

Not asked: ``should_update`` (``every`` and ``start_step`` are ours), averages by a function of one's own (a
decay may be one), ddp_spawn (refused: its processes end with the averages), a device of its own for averages
beside a GPU, FSDP (refused here, `fastema.EMA` takes it), pickling of the averages (a copy would not know its
model), counts of private swaps, and that no data loader is copied: no model is.
"""

import numpy as np
import pytest

import fastema

pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:::torch")


@pytest.fixture
def fit(runs, torch, tmp_path):
    """Return a function that trains for eight epochs of four steps, two batches each."""

    class Model(runs.pl.LightningModule):
        def __init__(self, batch_norm=True, crash=None):
            super().__init__()
            torch.manual_seed(3)
            norm = [torch.nn.BatchNorm1d(32)] if batch_norm else []
            self.layer = torch.nn.Sequential(
                torch.nn.Linear(32, 32), *norm, torch.nn.ReLU(), torch.nn.Linear(32, 2)
            )
            self.crash = crash

        def training_step(self, batch, _):
            if self.trainer.current_epoch == self.crash:
                raise RuntimeError("CRASH")
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), lr=0.1)

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data)

    data = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))

    def run(*callbacks, batch_norm=True, iterable=False, crash=None, path=None):
        trainer = runs.pl.Trainer(
            callbacks=list(callbacks),
            **{**runs.QUIET, "enable_checkpointing": crash is not None},
            max_epochs=8,
            accumulate_grad_batches=2,
            default_root_dir=tmp_path,
        )
        model = Model(batch_norm, crash)
        loader = torch.utils.data.DataLoader(Endless() if iterable else data, batch_size=4)
        if crash is None:
            trainer.fit(model, loader, ckpt_path=path)
        else:
            with pytest.raises(RuntimeError, match="CRASH"):
                trainer.fit(model, loader, ckpt_path=path)
        return model

    return run


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("iterable", [True, False])
def test_every_step_of_every_epoch_is_averaged(runs, fit, batch_norm, iterable):
    averages, record = runs.WeightAverages(), runs.Recorder()
    fit(record, averages, batch_norm=batch_norm, iterable=iterable)
    assert averages.ema.step == 32
    assert runs.same(runs.shown(averages), runs.replay(record.steps, 0.999))


@pytest.mark.parametrize("crash", [1, 5])
def test_a_crashed_run_goes_on_from_its_last_file(runs, fit, tmp_path, crash):
    whole, resumed = runs.WeightAverages(), runs.WeightAverages()
    expected = fit(whole)
    fit(runs.WeightAverages(), crash=crash)
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    model = fit(resumed, path=path)
    assert runs.same(runs.weights(model), runs.weights(expected))
    assert runs.same_everywhere(resumed.ema.state_dict(), whole.ema.state_dict())


@pytest.mark.parametrize("decay", [0.9, 0.9999])
@pytest.mark.parametrize("options", [{}, {"every": 5}, {"start_step": 10}], ids=str)
def test_rare_and_late_averages_are_those_of_numpy(runs, fit, decay, options):
    averages, record = runs.WeightAverages(decay, **options), runs.Recorder()
    fit(record, averages)
    every, start = options.get("every", 1), options.get("start_step", 0)
    expected = record.steps[0]
    for k in range(every, 33, every):
        used = 0.0 if k < start else fastema.schedules.compound(decay, every) if every > 1 else decay
        expected = {name: runs.oracle.update(x, record.steps[k][name], used) for name, x in expected.items()}
    assert averages.ema.step == 32
    assert runs.same(runs.shown(averages), expected)


def test_equal_weights_of_some_epochs_are_torchs_swa(runs, fit):
    averages, record = runs.WeightAverages(fastema.schedules.equal_weights(), every=4), runs.Recorder()
    fit(record, averages)
    for name, average in runs.shown(averages).items():
        mean = np.mean([record.steps[k][name].astype(np.float64) for k in range(4, 33, 4)], axis=0)
        np.testing.assert_allclose(average, mean, rtol=1e-5, atol=1e-6)


# --- torch's test_swa_utils: without any trainer, as the callback averages -------------------------


@pytest.fixture
def convolutions(torch):
    torch.manual_seed(4)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 5, kernel_size=3),
        torch.nn.BatchNorm2d(5, momentum=0.3),
        torch.nn.Conv2d(5, 2, kernel_size=3),
        torch.nn.Linear(5, 10),
    )


def moved(torch, module):
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.add_(torch.randn_like(value))


@pytest.mark.parametrize("buffers", ["average", "copy"])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_of_a_module_are_torchs(torch, convolutions, kind, buffers):
    from torch.optim import swa_utils

    # one by one: for all at once torch divides counters as no operation of it can
    function = swa_utils.get_ema_avg_fn(0.9) if kind == "ema" else swa_utils.get_swa_avg_fn()
    theirs = swa_utils.AveragedModel(convolutions, avg_fn=function, use_buffers=buffers == "average")
    decay = 0.9 if kind == "ema" else fastema.schedules.equal_weights()
    ours = fastema.EMA(convolutions, decay, buffers=buffers, start_step=2 if kind == "ema" else 0)
    for _ in range(10):
        moved(torch, convolutions)
        theirs.update_parameters(convolutions)
        ours.update()
    expected = theirs.module.state_dict()
    for name, average in ours.averages.items():
        if average.is_floating_point():
            torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-6)
    again = fastema.EMA(convolutions, decay, buffers=buffers)
    again.load_state_dict(ours.state_dict())
    assert again.step == ours.step == theirs.n_averaged == 10
    assert all(torch.equal(again.averages[name], average) for name, average in ours.averages.items())


def test_update_bn_gives_averages_their_own_statistics_and_keeps_mode_and_momentum(torch):
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(5, 100), torch.nn.BatchNorm1d(100, momentum=0.3))
    ema, x = fastema.EMA(model, 0.9, buffers="ignore"), torch.rand(100, 5)
    for _ in range(3):
        moved(torch, model)
        ema.update()
    model.eval()
    with ema.swapped():
        torch.optim.swa_utils.update_bn([x[i : i + 5] for i in range(0, 100, 5)], model)
        inner = model[0](x).detach()
    assert not model.training
    assert model[1].momentum == 0.3
    torch.testing.assert_close(model[1].running_mean, inner.mean(0))
    torch.testing.assert_close(model[1].running_var, inner.var(0, unbiased=False), atol=0.1, rtol=0)
