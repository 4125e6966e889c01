"""fastema.lightning.WeightAverages: which steps are averaged, and who sees the averages."""

import importlib
import signal

import pytest

import fastema
from processes import output_of, python, skip_without

# Lightning's own advice on workers and missing loaders, and what it uses of torch that will change
pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:::pytorch_lightning", "ignore:::torch")
DECAY = 0.75


@pytest.fixture
def averages(runs):
    return runs.WeightAverages(decay=DECAY)


@pytest.fixture
def trained(runs, tmp_path):
    """Return a function that fits a model with callbacks; it returns the trainer."""

    def fit(model, *callbacks, evaluate=False, count=4, **options):
        options = {**runs.QUIET, "max_epochs": 2, "default_root_dir": tmp_path, **options}
        trainer = runs.pl.Trainer(callbacks=list(callbacks), **options)
        trainer.fit(model, runs.batches(count), runs.batches(1) if evaluate else None)
        return trainer

    return fit


# --- which steps ----------------------------------------------------------------------------------


def test_the_averages_are_those_of_numpy_over_the_recorded_weights(runs, averages, trained):
    record, model = runs.Recorder(), runs.Model()
    trained(model, record, averages)
    assert len(record.steps) == 9
    assert averages.ema.step == 8
    assert runs.same(runs.shown(averages), runs.replay(record.steps, DECAY))
    assert runs.same(runs.weights(model), record.steps[-1])


def test_options_are_those_of_ema(runs, trained):

    schedule = fastema.schedules.dynamic(0.9)
    averages, record = runs.WeightAverages(schedule, only=["*.weight"], every=2), runs.Recorder()
    trained(runs.Model(), averages, record)
    expected = {name: x for name, x in record.steps[0].items() if name.endswith("weight")}
    for k in (2, 4, 6, 8):
        decay = schedule.over(k - 2, k)
        expected = {name: runs.oracle.update(x, record.steps[k][name], decay) for name, x in expected.items()}
    assert runs.same(runs.shown(averages), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"decay": 2.0}, ValueError, "decay"),
        ({"rounding": "up"}, ValueError, "rounding"),
        ({"decoy": 0.5}, TypeError, "decoy"),
    ],
)
def test_a_wrong_option_is_refused_when_the_callback_is_made(runs, arguments, error, text):

    with pytest.raises(error, match=text):
        runs.WeightAverages(**arguments)


def test_accumulated_batches_are_one_step(runs, averages, trained):
    record = runs.Recorder()
    trained(runs.Model(), record, averages, accumulate_grad_batches=2)
    assert averages.ema.step == 4
    assert runs.same(runs.shown(averages), runs.replay(record.steps, DECAY))


def test_a_step_whose_loss_is_none_is_not_averaged(runs, averages, trained):
    class Skips(runs.Model):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in {1, 2} else super().training_step(batch, batch_idx)

    trainer = trained(Skips(), averages)
    assert trainer.global_step == 8
    assert averages.ema.step == 4


def test_a_step_of_accumulated_gradients_is_averaged_though_the_last_loss_is_none(runs, averages, trained):
    class Skips(runs.Model):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    trained(Skips(), averages, accumulate_grad_batches=2)
    assert averages.ema.step == 4


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_is_not_averaged(runs, averages, trained, fused):
    import torch
    from lightning.pytorch.plugins import MixedPrecision

    class Overflows(runs.Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

    record = runs.Recorder()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    trained(Overflows(), record, averages, plugins=plugin, max_epochs=1)
    assert averages.ema.step == 3
    assert runs.same(record.steps[1], record.steps[2])
    assert runs.same(runs.shown(averages), runs.replay([*record.steps[:2], *record.steps[3:]], DECAY))


def test_an_optimizer_that_frees_its_gradients_is_averaged(runs, averages, trained):
    import torch

    class Frees(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            self.zero_grad()
            return loss

    class Freed(runs.Model):
        def configure_optimizers(self):
            return Frees(self.parameters(), lr=0.1)

    trained(Freed(), averages)
    assert averages.ema.step == 8


def manual(runs, steps):
    """Return a model whose training_step is a function of it, its optimizers and a batch."""
    import torch

    class Manual(runs.Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            steps(self, self.optimizers(), batch, batch_idx)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 3)]

    return Manual()


def one_step(model, optimizer, batch):
    optimizer.zero_grad()
    model.manual_backward(model.net(batch[0]).square().mean())
    optimizer.step()


def test_a_step_of_each_optimizer_is_one_step_together(runs, averages, trained):
    def steps(model, optimizers, batch, _):
        for optimizer in optimizers:
            one_step(model, optimizer, batch)

    record = runs.Recorder()
    trainer = trained(manual(runs, steps), record, averages)
    assert trainer.global_step == 16
    assert averages.ema.step == 8
    assert runs.same(runs.shown(averages), runs.replay(record.steps, DECAY))


def test_several_steps_of_one_optimizer_are_averaged_one_by_one(runs, averages, trained):
    seen = []

    def steps(model, optimizers, batch, _):
        seen.extend([] if seen else [runs.weights(model)])
        for _ in range(3):
            one_step(model, optimizers[0], batch)
            seen.append(runs.weights(model))
        one_step(model, optimizers[1], batch)
        seen[-1] = runs.weights(model)

    trained(manual(runs, steps), averages, max_epochs=1)
    assert averages.ema.step == 12
    assert runs.same(runs.shown(averages), runs.replay(seen, DECAY))


def test_a_batch_without_a_step_is_not_averaged(runs, averages, trained):
    def steps(model, optimizers, batch, batch_idx):
        if batch_idx % 2:
            one_step(model, optimizers[0], batch)

    trained(manual(runs, steps), averages)
    assert averages.ema.step == 4


def test_optimizers_that_take_others_place_are_noticed(runs, averages, trained):
    class Replaces(runs.pl.Callback):
        def on_train_epoch_start(self, trainer, _):
            if trainer.current_epoch == 1:
                trainer.strategy.setup_optimizers(trainer)

    trained(runs.Model(), Replaces(), averages)
    assert averages.ema.step == 8


def test_an_optimizer_of_another_kind_is_refused(runs, averages, trained):
    class Other:
        param_groups, state, defaults = [], {}, {}

        def step(self, closure=None):
            closure()

        def zero_grad(self):
            pass

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    class Odd(runs.Model):
        def configure_optimizers(self):
            return Other()

    with pytest.raises(TypeError, match=r"optimizers\[0\] must be a torch.optim.Optimizer, got Other"):
        trained(Odd(), averages)


def test_no_hook_is_left_on_the_optimizers(runs, averages, trained):
    trainer = trained(runs.Model(), averages)
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


# --- who sees the averages ------------------------------------------------------------------------


def test_validation_test_and_prediction_see_the_averages(runs, averages, trained):
    record, model = runs.Recorder(), runs.Model()
    trainer = trained(model, record, averages, evaluate=True, num_sanity_val_steps=1)
    assert len(model.seen) == 3
    for seen, steps in zip(model.seen, (1, 5, 9), strict=True):
        assert runs.same(seen, runs.replay(record.steps[:steps], DECAY))
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        evaluate(model, runs.batches(1))
        assert runs.same(model.seen[-1], runs.shown(averages))
        assert runs.same(runs.weights(model), record.steps[-1])
        assert averages.ema.step == 8
    assert len(model.seen) == 6


def test_the_models_own_hooks_within_an_evaluation_see_the_averages(runs, averages, trained):
    seen = []

    class Hooks(runs.Model):
        def on_validation_start(self):
            seen.append(runs.weights(self))

        def on_validation_epoch_end(self):
            seen.append(runs.weights(self))

    model = Hooks()
    trained(model, averages, evaluate=True, num_sanity_val_steps=0, max_epochs=1)
    assert runs.same(seen[0], model.seen[0])
    assert runs.same(seen[1], model.seen[0])
    assert not runs.same(seen[0], runs.weights(model))


def test_before_any_training_the_weights_are_evaluated(runs, averages):
    model = runs.Model()
    trainer = runs.pl.Trainer(callbacks=[averages], **runs.QUIET)
    trainer.validate(model, runs.batches(1), verbose=False)
    trainer.predict(model, runs.batches(1))
    assert averages.ema is None
    assert all(runs.same(seen, runs.weights(model)) for seen in model.seen)


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_training_goes_on_after_evaluations_in_inference_mode(
    runs, averages, trained, inference_mode, precision
):
    record, model = runs.Recorder(), runs.Model()
    options = {"inference_mode": inference_mode, "precision": precision}
    trainer = trained(model, record, averages, evaluate=True, max_epochs=1, **options)
    trainer.validate(model, runs.batches(1), verbose=False)
    assert runs.same(runs.weights(model), record.steps[-1])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, runs.batches(), runs.batches(1))
    assert averages.ema.step == 8
    del record.steps[5]  # the second training's start
    assert runs.same(runs.shown(averages), runs.replay(record.steps, DECAY))
    assert runs.same(runs.weights(model), record.steps[-1])


@pytest.mark.parametrize(
    "error", [RuntimeError("in validation"), KeyboardInterrupt()], ids=["error", "Ctrl-C"]
)
def test_the_weights_are_back_after_an_error_within_validation(runs, averages, trained, error):
    class Breaks(runs.Model):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if averages.ema.step == 8:
                raise error

    record, model = runs.Recorder(), Breaks()
    with pytest.raises((RuntimeError, SystemExit)):
        trained(model, record, averages, evaluate=True)
    assert not averages.ema.is_swapped
    assert runs.same(runs.weights(model), record.steps[-1])
    assert not runs.same(model.seen[-1], record.steps[-1])
    assert runs.same(runs.shown(averages), runs.replay(record.steps, DECAY))


def test_averages_that_are_shown_already_stay_where_they_are(runs, averages, trained):
    model = runs.Model()
    trainer = trained(model, averages)
    with averages.ema.swapped():
        trainer.validate(model, runs.batches(1), verbose=False)
        assert averages.ema.is_swapped
    assert runs.same(model.seen[-1], runs.shown(averages))
    trainer.validate(model, runs.batches(1), verbose=False)
    assert averages.ema.step == 8
    assert runs.same(model.seen[-1], runs.shown(averages))
    assert not runs.same(model.seen[-1], runs.weights(model))


# --- fit twice ------------------------------------------------------------------------------------


def test_a_second_fit_of_one_trainer_goes_on(runs, averages, trained):
    record, model = runs.Recorder(), runs.Model()
    trainer = trained(model, record, averages)
    trainer.validate(model, runs.batches(1), verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, runs.batches())
    assert averages.ema.step == 12
    del record.steps[9]
    assert runs.same(runs.shown(averages), runs.replay(record.steps, DECAY))


@pytest.mark.parametrize("what", ["trainer", "model", "weights"])
def test_a_fit_of_another_trainer_model_or_of_other_weights_begins_anew(runs, averages, trained, what):
    model = runs.Model()
    trainer = trained(model, averages)
    record = runs.Recorder()
    if what == "trainer":
        trained(model, record, averages)
    else:
        if what == "model":
            model = runs.Model(seed=1)
        else:
            model.load_state_dict(runs.Model(seed=1).state_dict())
        trainer.callbacks.append(record)
        trainer.fit_loop.max_epochs = 4
        trainer.fit(model, runs.batches())
    assert averages.ema.step == 8
    assert runs.same(runs.shown(averages), runs.replay(record.steps, DECAY))


def test_weights_that_were_written_after_the_training_are_evaluated(runs, averages, trained):
    model, other = runs.Model(), runs.Model(seed=1)
    trainer = trained(model, averages)
    model.load_state_dict(other.state_dict())
    trainer.validate(model, runs.batches(1), verbose=False)
    assert runs.same(model.seen[-1], runs.weights(other))
    another = runs.Model(seed=2)
    trainer.validate(another, runs.batches(1), verbose=False)
    assert runs.same(another.seen[-1], runs.weights(runs.Model(seed=2)))


# --- the trainer's other tools --------------------------------------------------------------------


def test_a_model_that_is_made_in_configure_model_is_averaged(runs, averages, trained):
    class Late(runs.Model):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = runs.Model().net

    record = runs.Recorder()
    trained(Late(), record, averages)
    assert runs.same(runs.shown(averages), runs.replay(record.steps, DECAY))


def test_a_learning_rate_finder_moves_no_average(runs, averages, trained):
    from lightning.pytorch.callbacks import LearningRateFinder

    record, model = runs.Recorder(), runs.Model()
    first = runs.weights(model)
    finder = LearningRateFinder(num_training_steps=5, early_stop_threshold=None, update_attr=True)
    trained(model, record, finder, averages, max_epochs=1, count=8)
    assert runs.same(record.steps[0], first)
    assert averages.ema.step == 8
    assert runs.same(runs.shown(averages), runs.replay(record.steps, DECAY))


def test_a_tuner_leaves_the_weights_and_the_next_training_as_they_were(runs, averages):
    from lightning.pytorch.tuner import Tuner

    record, model = runs.Recorder(), runs.Model()
    first = runs.weights(model)
    trainer = runs.pl.Trainer(callbacks=[record, averages], max_epochs=1, **runs.QUIET)
    Tuner(trainer).lr_find(model, runs.batches(8), num_training=5, early_stop_threshold=None)
    assert runs.same(runs.weights(model), first)
    trainer.fit(model, runs.batches(8))
    assert averages.ema.step == 8
    assert runs.same(runs.shown(averages), runs.replay(record.steps, DECAY))


# --- what is refused ------------------------------------------------------------------------------


def test_a_second_callback_that_averages_is_refused(runs, averages, trained):
    callbacks = importlib.import_module("lightning.pytorch.callbacks")
    others = ["StochasticWeightAveraging", "WeightAveraging"]
    for name in others:
        if not hasattr(callbacks, name):  # Lightning 2.5 has no WeightAveraging
            continue
        other = getattr(callbacks, name)(**({"swa_lrs": 0.1} if name == others[0] else {}))
        with pytest.raises(ValueError, match=f"got {name} beside WeightAverages"):
            trained(runs.Model(), other, averages)


def test_strategies_whose_averages_would_be_lost_are_refused(runs, averages):
    from lightning.pytorch.strategies import FSDPStrategy

    trainer = runs.pl.Trainer(callbacks=[averages], **{**runs.QUIET, "strategy": "ddp_spawn", "devices": 2})
    with pytest.raises(
        ValueError, match=r"strategy must keep its processes after fit, .* got start_method='spawn'"
    ):
        averages._check(trainer)
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(ValueError, match=r"strategy must be of one device or 'ddp', .* got FSDPStrategy"):
        averages._check(trainer)


def test_a_copy_is_as_before_any_training(runs, averages, trained):
    from copy import deepcopy

    trained(runs.Model(), averages)
    other = deepcopy(averages)
    assert other.ema is None
    assert other.decay == DECAY
    assert type(other).__qualname__ == "WeightAverages"


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_each_package_trains_with_its_own_callback(package):
    for needed in ("torch", package.partition(".")[0]):
        skip_without(needed)
    code = """
        import sys, warnings
        warnings.simplefilter("ignore")
        import fastema.lightning
        assert not {"lightning", "pytorch_lightning"} & set(sys.modules)
        import lightning_runs as runs
        averages, record = runs.WeightAverages(0.75), runs.Recorder()
        trainer = runs.pl.Trainer(callbacks=[record, averages], max_epochs=1, **runs.QUIET)
        trainer.fit(runs.Model(), runs.batches())
        assert isinstance(averages, runs.pl.Callback) and runs.pl.__name__ == sys.argv[1]
        print(runs.same(runs.shown(averages), runs.replay(record.steps, 0.75)), averages.state_key)
    """
    assert output_of(code, package, LIGHTNING=package).splitlines()[-1] == "True WeightAverages"


# --- tests that train -------------------------------------------------------------------------------

TOLD = """
    import signal
    import processes

    processes.end_when_told()
    import lightning_runs as runs

    class Told(runs.pl.Callback):
        def on_train_batch_end(self, *_):
            signal.raise_signal(signal.SIGTERM)

    try:
        runs.pl.Trainer(callbacks=[Told()], max_epochs=1, **runs.QUIET).fit(runs.Model(), runs.batches())
    except BaseException:
        pass  # as pytest, which goes on with the next test
"""


def test_a_run_of_tests_that_is_told_to_end_ends(runs):
    """Else the test that trains just then fails."""
    del runs
    assert python(TOLD).returncode == -signal.SIGTERM
