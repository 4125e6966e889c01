"""How averages are compared: of settings fixed beforehand, by data that choose and by data that judge."""

import copy
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from .. import checkpoint, posthoc
from .averages import TAILS, Averages, Running, Setting, part
from .network import Training, Weights
from .tasks import Task

RAW: Setting = ("raw", "constant rate")
SEARCHED = ("best checkpoint", "power EMA, post hoc")  # among many settings, of which only the best is judged

_LOWER_RATES = {"a third": 1 / 3, "a tenth": 1 / 10}  # constant ones, too
_SIGMA_RELS = 0.03, 0.25  # between these a length is searched for after the training
_EVALUATIONS = 10
_POINTS = 20  # in the course of a training
_DECAY = 0.2  # the decay phase that averages go on in


class Score(NamedTuple):
    """What a setting came to.

    Attributes:
        method: Whose setting it is.
        setting: How it is called.
        validation: Chooses settings; less is better.
        test: Is reported, and chooses nothing.
    """

    method: str
    setting: str
    validation: float
    test: float


def chosen(scores: Iterable[Score]) -> dict[str, Score]:
    """Return for each method its best setting by validation alone, of equal ones the first."""
    best: dict[str, Score] = {}
    for score in scores:
        if score.method not in best or score.validation < best[score.method].validation:
            best[score.method] = score
    return best


class Judged(NamedTuple):
    """What came of one task with one seed.

    Attributes:
        scores: Of all settings, raw weights first.
        courses: By setting, the test data's judgement of it at equal distances in the course of the training.
        decayed: The raw weights after one decay phase.
    """

    scores: list[Score]
    courses: dict[Setting, list[float]]
    decayed: Weights


def judge(task: Task) -> Judged:
    """Train at a constant rate with all averages, from each start of a decay phase on, and at lower rates."""
    # one thread, as matrices are small: several would wait for each other
    with threadpool_limits(1), tempfile.TemporaryDirectory() as folder:
        training = _begun(task)
        averages = Averages(training.weights, task.steps, Path(folder))
        courses: dict[Setting, list[float]] = {}

        def after(step: int) -> None:
            averages.update(step)
            if step % part(task.steps, 1 / _POINTS) == 0:
                for setting, weights in ((RAW, training.weights), *averages.early()):
                    courses.setdefault(setting, []).append(task.measure.of(weights, task.test))

        decayed = []
        for tail in sorted(TAILS, reverse=True):
            training.run(round(task.steps * (1 - tail)), lambda _: task.rate, after)
            decayed.append(_Decayed.of(task, training, averages.running, tail))
        training.run(task.steps, lambda _: task.rate, after)

        scores = [_score(task, RAW, training.weights)]
        scores.append(_best_checkpoint(task, averages.checkpoints))
        for called, share in _LOWER_RATES.items():
            scores.append(_score(task, ("lower rate", called), _trained(task, share * task.rate)))
        scores += [_score(task, setting, weights) for setting, weights in averages.all()]
        scores.append(_post_hoc(task, averages.snapshots))
        for branch in reversed(decayed):
            scores.append(_score(task, ("decay phase", f"last {branch.tail:.0%}"), branch.weights))
        (matching,) = (branch for branch in decayed if branch.tail == _DECAY)
        for (method, setting), weights in matching.running.all():
            scores.append(_score(task, (f"decay phase, {method}", setting), weights))
    return Judged(scores, courses, matching.weights)


class _Decayed(NamedTuple):
    """A training whose rate went to zero at its end, and averages of it."""

    tail: float
    weights: Weights
    running: Running

    @classmethod
    def of(cls, task: Task, training: Training, running: Running, tail: float) -> "_Decayed":
        """Go on from where a training is, with the same batches as it."""
        branch = training.branch()
        watching, start = running.branch(branch.weights), training.step

        def rate(step: int) -> float:
            return task.rate * (task.steps + 1 - step) / (task.steps - start)

        branch.run(task.steps, rate, lambda _: watching.update())
        return cls(tail, branch.weights, watching)


def _begun(task: Task) -> Training:
    weights = copy.deepcopy(task.start)
    momentum = {name: np.zeros_like(weight) for name, weight in weights.items()}
    return Training(weights, momentum, task.train, task.batch, np.random.default_rng([task.seed, 3]))


def _trained(task: Task, rate: float) -> Weights:
    training = _begun(task)
    training.run(task.steps, lambda _: rate, lambda _: None)
    return training.weights


def _score(task: Task, setting: Setting, weights: Weights) -> Score:
    return Score(*setting, task.measure.of(weights, task.validation), task.measure.of(weights, task.test))


def _best_checkpoint(task: Task, checkpoints: Sequence[Path]) -> Score:
    """Judge the checkpoint that is the best by validation: early stopping."""
    best = min(checkpoints, key=lambda path: task.measure.of(checkpoint.File(path), task.validation))
    return _score(task, (SEARCHED[0], f"step {best.stem}"), checkpoint.File(best))


def _post_hoc(task: Task, snapshots: posthoc.Snapshots) -> Score:
    """Search the length of a power average, by validation, and judge the best."""
    found = posthoc.search(
        lambda sigma: task.measure.of(snapshots.average(sigma), task.validation), *_SIGMA_RELS, _EVALUATIONS
    )
    best = next(iter(found))
    return _score(task, (SEARCHED[1], f"sigma_rel {best:.3f}"), snapshots.average(best))
