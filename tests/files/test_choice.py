"""Which checkpoints `python -m fastema average` takes: in order, the last, the best by a file of numbers."""

import json

import numpy as np
import pytest

import oracle
from fastema import __main__ as command
from fastema import checkpoint
from fastema.checkpoint._choice import best, by_number

STEPS = (100, 200, 1000)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that averages checkpoints of three steps, and returns which ones with what shares."""
    monkeypatch.chdir(tmp_path)
    for step in STEPS:
        (tmp_path / f"checkpoint-{step}").mkdir()
        checkpoint.write(
            tmp_path / f"checkpoint-{step}" / "model.safetensors",
            {"w": np.full(2, float(step)), "n": np.array(step)},
        )

    def average(*options, files=None):
        names = files or sorted(path.name for path in tmp_path.glob("checkpoint-*"))
        status = command.main(["average", *names, "-o", "mean", *map(str, options)])
        printed, errors = capsys.readouterr()
        if status:
            return errors
        lines = [line.split() for line in printed.splitlines() if line.startswith("  ")]
        (tmp_path / "mean").rename(tmp_path / f"mean-{len(list(tmp_path.iterdir()))}")
        return {name: float(share) for share, name in lines}

    return average


def test_checkpoints_are_taken_in_the_order_of_their_steps(run, tmp_path):
    assert list(run()) == ["checkpoint-100", "checkpoint-200", "checkpoint-1000"]
    (mean,) = tmp_path.glob("mean-*/model.safetensors")
    assert checkpoint.File(mean)["n"] == 1000


def test_other_names_stay_in_the_order_in_which_they_were_given():
    assert by_number(["b", "a"]) == ["b", "a"]
    assert by_number(["run-2/last", "run-1/best"]) == ["run-2/last", "run-1/best"]
    assert by_number(["s2/e10", "s2/e9", "s1/e30"]) == ["s1/e30", "s2/e9", "s2/e10"]
    assert by_number(["x-010", "x-9"]) == ["x-9", "x-010"]


def test_files_with_weights_stay_in_their_order(run):
    assert run("--weights", 1, 2, 1) == {
        "checkpoint-100": 0.25,
        "checkpoint-1000": 0.5,
        "checkpoint-200": 0.25,
    }


@pytest.mark.parametrize("style", ["mean", "linear", "cosine", "minus-sqrt", "ema"])
def test_a_style_gives_files_its_shares(run, tmp_path, style):
    shares = run("--style", style)
    assert list(shares.values()) == [float(f"{share:.4f}") for share in checkpoint.shares(style, 3)]
    (mean,) = tmp_path.glob("mean-*/model.safetensors")
    checkpoint.average([f"checkpoint-{step}" for step in STEPS], tmp_path / "same", style=style)
    same = checkpoint.File(tmp_path / "same" / "model.safetensors")["w"]
    assert oracle.same_bits(checkpoint.File(mean)["w"], same)


def test_the_last_are_those_of_the_latest_steps(run):
    assert list(run("--last", 2)) == ["checkpoint-200", "checkpoint-1000"]


NUMBERS = {"checkpoint-100": 3.0, "checkpoint-200": 1.0, "checkpoint-1000": 2.0}
TRAINER = {
    "best_metric": 1.0,
    "log_history": [
        {"step": 100, "eval_loss": 9.0, "eval_accuracy": 0.1},
        {"step": 100, "eval_loss": 3.0, "eval_accuracy": 0.1},
        {"step": 150, "loss": 5.0},
        {"step": 200, "eval_loss": 1.0, "eval_accuracy": 0.9},
        {"step": 1000, "eval_loss": 2.0, "eval_accuracy": 0.5},
        {"train_runtime": 3.0, "step": 1000},
    ],
}
FORMATS = {
    "JSON": json.dumps(NUMBERS),
    "CSV": "\ufeffcheckpoint,loss\r\n" + "\r\n".join(f"./{name},{x}" for name, x in NUMBERS.items()),
    "CSV without headings": "\n".join(f'"{name}",{x:e}\n' for name, x in NUMBERS.items()),
    "trainer_state.json": json.dumps(TRAINER),
}


@pytest.mark.parametrize("text", FORMATS.values(), ids=FORMATS)
def test_the_best_are_those_of_the_lowest_numbers_or_the_highest(run, tmp_path, text):
    (tmp_path / "numbers").write_text(text)
    assert list(run("--best", 2, "--metric", "numbers")) == ["checkpoint-200", "checkpoint-1000"]
    assert list(run("--best", 1, "--metric", "numbers", "--higher")) == ["checkpoint-100"]
    assert list(run("--best", 1, "--last", 1, "--metric", "numbers")) == ["checkpoint-1000"]


def test_another_number_of_a_trainer_can_be_named(run, tmp_path):
    (tmp_path / "numbers").write_text(json.dumps(TRAINER))
    chosen = run("--best", 2, "--metric", "numbers", "--metric-name", "eval_accuracy", "--higher")
    assert list(chosen) == ["checkpoint-200", "checkpoint-1000"]
    error = run("--best", 2, "--metric", "numbers", "--metric-name", "eval_f1")
    assert "log_history has no 'eval_f1', but ['eval_accuracy', 'eval_loss']" in error


def test_paths_may_be_from_the_folder_of_the_numbers(tmp_path, monkeypatch):
    (tmp_path / "run" / "a").mkdir(parents=True)
    (tmp_path / "run" / "b").mkdir()
    (tmp_path / "run" / "numbers.csv").write_text("a,1\nb,0\n")
    monkeypatch.chdir(tmp_path)
    assert best(["run/a", "run/b"], "run/numbers.csv", 1) == ["run/b"]
    (tmp_path / "numbers.json").write_text(json.dumps({str(tmp_path / "run" / "a"): 1, "run//b": 2}))
    assert best(["run/a", "run/b"], "numbers.json", 1) == ["run/a"]


def test_of_equal_numbers_the_later_checkpoints_are_better(tmp_path):
    (tmp_path / "numbers").write_text("a,1\nb,1\nc,1\n")
    for higher in (False, True):
        assert best(["a", "b", "c"], tmp_path / "numbers", 2, higher=higher) == ["b", "c"]


@pytest.mark.parametrize(
    ("options", "numbers", "message"),
    [
        (["--last", 4], "", "last must be from 1 to 3, the number of files, got 4"),
        (["--last", 0], "", "last must be from 1 to 3"),
        (["--best", 9, "--metric", "numbers"], "", "best must be from 1 to 3"),
        (["--best", 1], "", "--best must be given with --metric, and --metric with --best"),
        (["--metric", "numbers"], "", "--best must be given with --metric"),
        (
            ["--weights", 1, 2, "--last", 2],
            "",
            "--weights must have one for each file, and not go with --last",
        ),
        (["--best", 1, "--metric", "nowhere"], "", "No such file"),
        (["--best", 1, "--metric", "numbers"], "", "checkpoint-100 has none by its path, of 0"),
        (
            ["--best", 1, "--metric", "numbers"],
            "checkpoint-100,1\n",
            "checkpoint-200 has none by its path, of 1",
        ),
        (
            ["--best", 1, "--metric", "numbers"],
            "a,b\nc,d\n",
            "line 2 must have a path of its own and a finite",
        ),
        (["--best", 1, "--metric", "numbers"], "a,1\na,2\n", "line 2 must have a path of its own"),
        (
            ["--best", 1, "--metric", "numbers"],
            "a,nan\nb,inf\n",
            "line 2 must have a path of its own and a finite",
        ),
        (["--best", 1, "--metric", "numbers"], "a,1,2\n", "line 1 must have a path of its own"),
        (["--best", 1, "--metric", "numbers"], "{", "it must be JSON"),
        (["--best", 1, "--metric", "numbers"], '{"a": NaN}', "NaN is no number"),
        (["--best", 1, "--metric", "numbers"], '{"a": "1"}', r"it['a'] must be a finite number, got '1'"),
        (
            ["--best", 1, "--metric", "numbers"],
            '{"log_history": [{"step": 100, "eval_loss": 1}]}',
            "checkpoint-200, of step 200, has none, of 1 evaluations",
        ),
        (["--best", 1, "--metric", "numbers"], '{"log_history": 3}', "['log_history'] must be a list, got 3"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused_and_nothing_is_written(
    run, tmp_path, options, numbers, message
):
    (tmp_path / "numbers").write_text(numbers)
    error = run(*options)
    assert message in error
    assert error.startswith("mean is not written: ")
    assert not (tmp_path / "mean").exists()


def test_two_numbers_for_one_checkpoint_are_refused(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "numbers").write_text("a,1\nrun/a,2\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run/a has two of them by its path"):
        best(["run/a"], "run/numbers", 1)


def test_a_checkpoint_without_a_step_in_its_name_has_no_evaluation(tmp_path):
    (tmp_path / "numbers").write_text(json.dumps(TRAINER))
    with pytest.raises(ValueError, match="last, whose name must tell its step, as checkpoint-500, has none"):
        best(["last"], tmp_path / "numbers", 1)
