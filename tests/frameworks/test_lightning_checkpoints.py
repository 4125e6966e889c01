"""Lightning's checkpoints with averages: who reads them, and a run that goes on from one."""

import warnings

import pytest

from processes import free_ports, output_of, python, ranks, skip_without

pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:::pytorch_lightning", "ignore:::torch")
DECAY = 0.75


@pytest.fixture
def trainer(runs, tmp_path):
    """Return a function that makes a trainer."""

    def make(*callbacks, **options):
        options = {**runs.QUIET, "max_epochs": 2, "default_root_dir": tmp_path, **options}
        return runs.pl.Trainer(callbacks=list(callbacks), **options)

    return make


def arrays(state):
    """Return the parameters of a state dict as NumPy's arrays."""
    return {k: x.numpy() for k, x in state.items() if "running" not in k and "tracked" not in k}


def loaded(path):
    import torch

    return torch.load(path, weights_only=True)


def test_a_checkpoint_has_the_averages_and_the_weights_beside(runs, trainer, tmp_path):
    averages, record = runs.WeightAverages(DECAY), runs.Recorder()
    fit = trainer(record, averages)
    fit.fit(runs.Model(), runs.batches())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = loaded(tmp_path / "a.ckpt")
    assert runs.same(arrays(saved["state_dict"]), runs.replay(record.steps, DECAY))
    assert runs.same(arrays(saved["current_model_state"]), record.steps[-1])
    assert list(saved["averaging_state"]) == ["n_averaged"]
    assert saved["averaging_state"]["n_averaged"] == 8
    model = runs.Model.load_from_checkpoint(tmp_path / "a.ckpt")
    assert runs.same(runs.weights(model), runs.shown(averages))


def test_averages_are_in_a_file_once(runs, trainer, tmp_path):
    fit = trainer(runs.WeightAverages(DECAY))
    fit.fit(runs.Model(), runs.batches())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = loaded(tmp_path / "a.ckpt")
    for name, average in saved["fastema"]["averages"][0].items():
        assert average.data_ptr() == saved["state_dict"][name].data_ptr()


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_start", "on_validation_end"])
def test_a_checkpoint_of_any_hook_is_of_whole_steps(runs, trainer, tmp_path, hook, place):
    saves = runs.Saves(tmp_path / "a.ckpt", hook, step=3)
    averages, record = runs.WeightAverages(DECAY), runs.Recorder()
    callbacks = [saves, averages] if place == "before" else [averages, saves]
    fit = trainer(record, *callbacks, max_epochs=1, num_sanity_val_steps=0)
    fit.fit(runs.Model(), runs.batches(3), runs.batches(1))
    saved = loaded(tmp_path / "a.ckpt")
    assert saved["fastema"]["step"] == 3
    assert saved["fastema"]["swapped"] is None
    assert runs.same(arrays(saved["state_dict"]), runs.replay(record.steps, DECAY))
    assert runs.same(arrays(saved["current_model_state"]), record.steps[-1])
    assert averages.ema.step == 3
    assert runs.same(runs.weights(fit.lightning_module), record.steps[-1])


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_monitored_checkpoint_holds_the_averages_that_were_evaluated(runs, trainer, tmp_path, weights_only):
    from lightning.pytorch.callbacks import ModelCheckpoint

    best = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=-1, save_weights_only=weights_only)
    averages, model = runs.WeightAverages(DECAY), runs.Model()
    fit = trainer(best, averages, enable_checkpointing=True, num_sanity_val_steps=0)
    fit.fit(model, runs.batches(), runs.batches(1))
    assert len(best.best_k_models) == 2
    for path in best.best_k_models:
        saved = loaded(path)
        evaluated = model.seen[saved["epoch"]]
        assert runs.same(arrays(saved["state_dict"]), evaluated)
        assert ("callbacks" in saved) == ("current_model_state" in saved) == (not weights_only)


def test_a_hook_of_the_model_that_leaves_weights_out_of_a_file_is_heard(runs, trainer, torch, tmp_path):
    class Leaves(runs.Model):
        def on_save_checkpoint(self, checkpoint):
            del checkpoint["state_dict"]["net.3.bias"]

    averages = runs.WeightAverages(DECAY)
    fit = trainer(averages)
    fit.fit(Leaves(), runs.batches())
    fit.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    state = loaded(tmp_path / "a.ckpt")["state_dict"]
    assert "net.3.bias" not in state
    assert torch.equal(state["net.3.weight"], averages.ema.averages["net.3.weight"])


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("who", ["the same", "another", "none"])
def test_evaluating_a_file_shows_its_averages(runs, trainer, tmp_path, weights_only, who):
    averages, model = runs.WeightAverages(DECAY), runs.Model()
    fit = trainer(averages, max_epochs=1)
    fit.fit(model, runs.batches())
    fit.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    expected = runs.shown(averages)
    fit.fit_loop.max_epochs = 3
    fit.fit(model, runs.batches())
    assert averages.ema.step == 12
    if who != "the same":
        fit, model = trainer(*([runs.WeightAverages(DECAY)] if who == "another" else [])), runs.Model(seed=1)
    for evaluate in (fit.validate, fit.test, fit.predict):
        evaluate(model, runs.batches(1), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
        assert runs.same(model.seen[-1], expected)
    fit.validate(model, runs.batches(1), verbose=False)
    assert runs.same(model.seen[-1], expected)


VARIANTS = {
    "plain": {},
    "from zeros, every third step": {"initial": "zeros", "every": 3},
    "compensated, two decays": {"decay": [0.9, 0.99], "rounding": "compensated"},
    "bfloat16 weights": {"precision": "bf16-true"},
    "averaged buffers, some weights": {"buffers": "average", "only": ["net.0.*", "net.1.*"]},
    "accumulated": {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_ends_with_the_bits_of_the_whole_one(runs, trainer, tmp_path, variant):
    of_trainer = {"precision", "accumulate_grad_batches"}
    options = {key: value for key, value in VARIANTS[variant].items() if key not in of_trainer}
    of_trainer = {key: value for key, value in VARIANTS[variant].items() if key in of_trainer}

    def fit(model, max_steps, **options_of_fit):
        averages = runs.WeightAverages(**{"decay": DECAY, **options})
        run = trainer(averages, max_epochs=-1, max_steps=max_steps, **of_trainer)
        run.fit(model, runs.batches(), runs.batches(1), **options_of_fit)
        return run, averages.ema.state_dict(), model.state_dict()

    *_, expected_averages, expected = fit(runs.ByIndex(), 10)
    first, *_ = fit(runs.ByIndex(), 5)
    first.save_checkpoint(tmp_path / "a.ckpt")
    resumed, averages, model = fit(runs.ByIndex(seed=1), 10, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.global_step == 10
    assert runs.same_everywhere(model, expected)
    assert runs.same_everywhere(averages, expected_averages)


PROGRAM = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
import lightning_runs as runs

folder, what = sys.argv[1:]

class Stops(runs.ByIndex):
    def training_step(self, batch, batch_idx):
        if what == "stopped" and self.trainer.global_step == 8:
            os._exit(9)
        return super().training_step(batch, batch_idx)

averages, model, record = runs.WeightAverages(0.75), Stops(), runs.Recorder()
files = runs.pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=7, save_top_k=-1)
options = {**runs.QUIET, "enable_checkpointing": what == "stopped"}
trainer = runs.pl.Trainer(
    callbacks=[record, averages, *([files] if what == "stopped" else [])], max_epochs=3, **options
)
resumed = folder + "/step=7.ckpt" if what == "resumed" else None
trainer.fit(model, runs.batches(), runs.batches(1), ckpt_path=resumed)
if what == "whole":
    assert runs.same(runs.shown(averages), runs.replay(record.steps, 0.75))
optimizer = trainer.optimizers[0].state_dict()
torch.save([model.state_dict(), averages.ema.state_dict(), optimizer], folder + f"/{what}.pt")
"""


def test_a_run_that_was_stopped_in_mid_epoch_ends_in_a_new_process_with_the_bits_of_the_whole_one(
    runs, torch, tmp_path
):
    output_of(PROGRAM, tmp_path, "whole")
    assert python(PROGRAM, tmp_path, "stopped").returncode == 9
    output_of(PROGRAM, tmp_path, "resumed")
    whole, resumed = (torch.load(tmp_path / f"{what}.pt") for what in ("whole", "resumed"))
    assert whole[1]["step"] == 12
    assert runs.same_everywhere(whole, resumed)


def test_a_file_without_averages_begins_them_at_its_weights(runs, trainer, tmp_path):
    plain = trainer(max_epochs=1)
    plain.fit(runs.Model(), runs.batches())
    plain.save_checkpoint(tmp_path / "a.ckpt")
    averages, record = runs.WeightAverages(DECAY), runs.Recorder()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(record, averages).fit(runs.Model(seed=1), runs.batches(), ckpt_path=tmp_path / "a.ckpt")
    assert any("the checkpoint has no averages: they begin anew" in str(each.message) for each in said)
    assert averages.ema.step == 4
    assert runs.same(runs.shown(averages), runs.replay(record.steps, DECAY))


# --- Lightning's own WeightAveraging ----------------------------------------------------------------


@pytest.fixture
def theirs(runs):
    if not hasattr(runs.pl.callbacks, "EMAWeightAveraging"):
        pytest.skip(f"lightning {runs.pl.__version__} has no WeightAveraging")
    return runs.pl.callbacks.EMAWeightAveraging(decay=DECAY)


def starts(runs, look):
    """Return a callback that notes what a run that was resumed begins with."""

    class Starts(runs.pl.Callback):
        def on_train_start(self, _, pl_module):
            self.weights, self.averages = runs.weights(pl_module), look()

    return Starts()


def test_lightnings_own_callback_reads_our_files(runs, trainer, theirs, tmp_path):
    ours, model = runs.WeightAverages(DECAY), runs.Model()
    first = trainer(ours, max_epochs=1)
    first.fit(model, runs.batches())
    first.save_checkpoint(tmp_path / "a.ckpt")
    note = starts(runs, lambda: runs.weights(theirs._average_model.module))
    trainer(theirs, note).fit(runs.Model(seed=1), runs.batches(), ckpt_path=tmp_path / "a.ckpt")
    assert runs.same(note.weights, runs.weights(model))
    assert runs.same(note.averages, runs.shown(ours))
    assert theirs._average_model.n_averaged == 8


@pytest.mark.parametrize("options", [{}, {"initial": "zeros"}, {"decay": [0.75, 0.5], "every": 2}], ids=str)
def test_their_files_are_read(runs, trainer, theirs, tmp_path, options):
    # not after the training: theirs has then written the averages into the model
    saves = runs.Saves(tmp_path / "a.ckpt", "on_train_batch_end")
    trainer(theirs, saves, max_epochs=1).fit(runs.Model(), runs.batches())
    saved = loaded(tmp_path / "a.ckpt")
    ours, record = runs.WeightAverages(**{"decay": DECAY, **options}), runs.Recorder()
    note = starts(runs, lambda: runs.shown(ours))
    trainer(ours, record, note).fit(runs.Model(seed=1), runs.batches(), ckpt_path=tmp_path / "a.ckpt")
    assert runs.same(note.weights, arrays(saved["current_model_state"]))
    assert runs.same(note.averages, arrays(saved["state_dict"]))
    assert ours.ema.step == 4 * options.get("every", 1) + 4
    if "every" not in options:
        expected = runs.replay([arrays(saved["state_dict"]), *record.steps[1:]], DECAY)
        assert runs.same(runs.shown(ours), expected)


# --- several processes ----------------------------------------------------------------------------

RANKS = """
import os, sys, warnings
warnings.simplefilter("ignore")
os.environ["LOCAL_RANK"] = os.environ["RANK"]
import torch
import lightning_runs as runs

folder = sys.argv[1]
torch.set_num_threads(1)

def fit(epochs, **options):
    averages, model, record = runs.WeightAverages(0.75), runs.Model(), runs.Recorder()
    trainer = runs.pl.Trainer(
        callbacks=[record, averages], max_epochs=epochs, **{**runs.QUIET, "devices": 2, "strategy": "ddp"}
    )
    trainer.fit(model, runs.batches(), runs.batches(2), **options)
    return trainer, averages, model, record

trainer, averages, model, record = fit(2)
assert averages.ema.step == 4 and trainer.world_size == 2
assert runs.same(runs.shown(averages), runs.replay(record.steps, 0.75))
trainer.save_checkpoint(folder + "/two.ckpt")
trainer.validate(model, runs.batches(2), verbose=False)
assert runs.same(model.seen[-1], runs.shown(averages))
assert runs.same(runs.weights(model), record.steps[-1])
averaged = averages.ema.averages["net.0.weight"]
everyone = [torch.empty_like(averaged) for _ in range(2)]
torch.distributed.all_gather(everyone, averaged)
assert torch.equal(*everyone)
_, whole, _, _ = fit(3)
_, resumed, _, _ = fit(3, ckpt_path=folder + "/two.ckpt")
assert runs.same(runs.shown(resumed), runs.shown(whole)) and resumed.ema.step == 6
sys.stdout.flush()
os._exit(0)  # torch aborts some such processes where Python finalizes
"""


def test_two_processes_have_the_same_averages_and_go_on_with_them(tmp_path):
    skip_without("torch")
    skip_without("lightning")
    port = str(free_ports(1)[0])
    ranks(
        2, RANKS, tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK="0", GLOO_SOCKET_IFNAME="lo"
    )
