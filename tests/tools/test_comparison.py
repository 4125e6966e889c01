"""The comparison of methods is honest: averages are what they are called, and test data choose nothing."""

import dataclasses

import numpy as np
import pytest

import tolerances
from fastema import __main__ as command
from fastema import checkpoint, schedules
from fastema._comparison import network, protocol, tasks
from fastema._comparison.averages import TAILS
from fastema._comparison.network import Data, Training


@pytest.fixture(scope="module")
def judged():
    """Return a quick task and its scores."""
    task = tasks.digits(0, quick=True)
    task = dataclasses.replace(task, measure=task.measure._replace(of=network.loss))  # no ties, and no steps
    return task, protocol.judge(task).scores


@pytest.fixture(scope="module")
def trajectory(judged):
    """Return the weights after each step of a training of its own, in float64."""
    return replayed(judged[0])


def replayed(task, decay=0.0, share=1.0):
    """Return weights after each step, with the rate going to zero in the last share of the training."""
    weights = {name: weight.copy() for name, weight in task.start.items()}
    momentum = {name: np.zeros_like(weight) for name, weight in weights.items()}
    training = Training(weights, momentum, task.train, task.batch, np.random.default_rng([task.seed, 3]))
    phase, steps = task.steps * decay, []
    training.run(
        task.steps,
        lambda step: share * task.rate * min(1.0, (task.steps + 1 - step) / phase if phase else 1.0),
        lambda _: steps.append({name: weight.astype(np.float64) for name, weight in weights.items()}),
    )
    return steps


def summed(steps, shares):
    assert abs(sum(shares) - 1.0) < 1e-12
    return {
        name: sum(share * step[name] for share, step in zip(shares, steps, strict=True)) for name in steps[0]
    }


def exponential(start, steps, decays):
    average = {name: weight.astype(np.float64) for name, weight in start.items()}
    for step, decay in zip(steps, decays, strict=True):
        average = {name: decay * x + (1 - decay) * step[name] for name, x in average.items()}
    return average


def bema(start, steps, eta):
    """Return BEMA's average of steps that it takes all, by the paper's formula."""
    average = start
    for t, step in enumerate(steps, 1):
        beta = (10 + t) ** -0.5
        average = {name: (1 - beta) * x + beta * step[name] for name, x in average.items()}
    alpha = (10 + len(steps)) ** -eta
    return {name: x + alpha * (steps[-1][name] - start[name]) for name, x in average.items()}


EXPECTED = {  # of a hundred steps, every second of which is a checkpoint
    ("raw", "constant rate"): lambda x, _: x[-1],
    ("EMA", "decay 0.9"): lambda x, start: exponential(start, x, [0.9] * 100),
    ("EMA", "decay 0.9999, dynamic"): lambda x, start: exponential(
        start, x, [min(0.9999, (1 + k) / (10 + k)) for k in range(1, 101)]
    ),
    ("power EMA", "sigma_rel 0.10"): lambda x, start: exponential(
        start, x, [(1 - 1 / t) ** (schedules.power(0.1).gamma + 1) for t in range(1, 101)]
    ),
    ("SWA", "last 40%"): lambda x, _: summed(x[60:], [1 / 40] * 40),
    ("LAWA", "last 20%"): lambda x, _: summed(x[83::4], [1 / 5] * 5),
    ("BEMA", "eta 0.4"): lambda x, start: bema(start, x, 0.4),
    ("BEMA's EMA", "uncorrected"): lambda x, start: bema(start, x, np.inf),
    ("WSM", "linear, last 10%"): lambda x, _: summed(x[91::2], [1 / 5] * 5),
    ("WSM", "cosine, last 20%"): lambda x, _: summed(x[81::2], checkpoint.shares("cosine", 10)),
    ("PMA", "last 20%"): lambda x, _: summed(x[81::2], checkpoint.shares("ema", 10)),
}


@pytest.mark.parametrize("setting", EXPECTED, ids=" ".join)
def test_an_average_is_what_it_is_called(judged, trajectory, setting):
    task, scores = judged
    (score,) = (each for each in scores if each[:2] == setting)
    expected = EXPECTED[setting](trajectory, task.start)
    tolerances.assert_close(score.test, network.loss(expected, task.test), tolerances.LOSS)
    tolerances.assert_close(score.validation, network.loss(expected, task.validation), tolerances.LOSS)


@pytest.mark.parametrize("tail", TAILS)
def test_a_decay_phase_has_the_batches_of_the_constant_rate(judged, tail):
    task, scores = judged
    (score,) = (each for each in scores if each[:2] == ("decay phase", f"last {tail:.0%}"))
    tolerances.assert_close(score.test, network.loss(replayed(task, tail)[-1], task.test), tolerances.LOSS)


def test_a_lower_rate_has_the_same_batches(judged):
    task, scores = judged
    (score,) = (each for each in scores if each[:2] == ("lower rate", "a third"))
    tolerances.assert_close(
        score.test, network.loss(replayed(task, share=1 / 3)[-1], task.test), tolerances.LOSS
    )


def test_averages_go_on_in_a_decay_phase(judged):
    task, scores = judged
    (score,) = (each for each in scores if each[:2] == ("decay phase, EMA", "decay 0.9"))
    expected = exponential(task.start, replayed(task, 0.2), [0.9] * 100)
    tolerances.assert_close(score.test, network.loss(expected, task.test), tolerances.LOSS)


def test_test_data_choose_nothing(judged):
    """With other labels there all scores by test data differ, and neither choices nor what made them do."""
    task, scores = judged
    labels = np.random.default_rng(0).permutation(task.test.labels)
    others = protocol.judge(dataclasses.replace(task, test=Data(task.test.inputs, labels))).scores
    assert [score[:3] for score in others] == [score[:3] for score in scores]
    assert all(other.test != score.test for other, score in zip(others, scores, strict=True))
    choices, other_choices = protocol.chosen(scores), protocol.chosen(others)
    assert {m: s.setting for m, s in choices.items()} == {m: s.setting for m, s in other_choices.items()}


def test_the_best_in_validation_is_chosen_whatever_its_test():
    scores = [
        protocol.Score("EMA", "a", 2.0, 0.0),
        protocol.Score("EMA", "b", 1.0, 9.0),
        protocol.Score("EMA", "c", 1.0, 1.0),
        protocol.Score("SWA", "d", 3.0, 3.0),
    ]
    assert protocol.chosen(scores) == {"EMA": scores[1], "SWA": scores[3]}


def test_no_image_is_in_two_parts_and_only_training_labels_are_wrong():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    right = {}
    for image, label in zip(images, labels, strict=True):
        right.setdefault(image.tobytes(), []).append(label)
    task = tasks.digits(3)
    wrong = {}
    for name in ("train", "validation", "test"):
        data = getattr(task, name)
        known = [right[(16 * image).astype(np.float64).tobytes()] for image in data.inputs]
        wrong[name] = sum(label not in those for label, those in zip(data.labels, known, strict=True))
    assert len(task.train) + len(task.validation) + len(task.test) == len(images)
    parts = np.concatenate([task.train.inputs, task.validation.inputs, task.test.inputs])
    assert sorted(map(bytes, parts)) == sorted(map(bytes, (images / 16.0).astype(np.float32)))
    assert wrong["validation"] == wrong["test"] == 0
    assert (
        0.2 * len(task.train) < wrong["train"] < 0.34 * len(task.train)
    )  # a tenth of the drawn ones are right


def test_no_paragraph_of_a_text_is_in_two_parts():
    random = np.random.default_rng(0)
    texts = ["\n\n".join(f"{chr(33 + i)}" * 50 for i in range(60)), "!" * 50]  # one paragraph, one letter
    parts = tasks._split(texts, random, quick=False)
    letters = [set(part.labels) - {0} for part in parts]  # 0 is the end of a line
    assert sum(map(len, letters)) == len(set.union(*letters)) == 60


@pytest.mark.parametrize("embedded", [False, True])
def test_gradients_are_those_of_finite_differences(rng, embedded):
    if embedded:
        weights = network.embedded(rng, symbols=7, size=3, context=4, hidden=6)
        data = Data(rng.integers(0, 7, (10, 4)), rng.integers(0, 7, 10))
    else:
        weights = network.initial(rng, inputs=5, hidden=6, classes=7)
        data = Data(rng.standard_normal((10, 5)), rng.integers(0, 7, 10))
    weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
    gradients = network.gradient(weights, data)
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        direction = rng.standard_normal(weight.shape)
        losses = [network.loss({**weights, name: weight + step * direction}, data) for step in (1e-6, -1e-6)]
        slope = (losses[0] - losses[1]) / 2e-6
        # what is cut off of a difference over 2e-6, and its rounding
        assert (gradients[name] * direction).sum() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_the_command_prints_all_methods_and_writes_its_picture(tmp_path, capsys):
    picture = tmp_path / "methods.png"
    assert command.main(["demo", "--methods", "--quick", "--seeds", "2", "--picture", str(picture)]) == 0
    table = capsys.readouterr().out.split("\n\n")[2].splitlines()
    methods = (
        "raw",
        "best checkpoint",
        "EMA",
        "LAWA",
        "power EMA",
        "SWA",
        "BEMA",
        "BEMA's EMA",
        "WSM",
        "PMA",
    )
    decayed = ("lower rate", "decay phase", "decay phase, EMA", "decay phase, LAWA")
    found = dict.fromkeys(line[:20].strip() for line in table[2:])
    assert set(found) == {*methods, *decayed, "power EMA, post hoc"}
    for line in table[2:]:
        numbers = [float(word) for word in line[43:].replace("+-", " ").split() if word != "of"]
        assert len(numbers) == (3 if line.startswith("raw") else 15), line
        assert np.isfinite(numbers).all(), line
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["demo", "--methods", "--seeds", "1"])
    assert "--seeds: must be at least 2, as differences have a spread, got 1" in capsys.readouterr().err
