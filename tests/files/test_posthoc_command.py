"""`python -m fastema posthoc`: other lengths of an average, their errors and scores, and the best of them."""

import sys

import numpy as np
import pytest

import oracle
from fastema import EMA, checkpoint, posthoc, schedules
from fastema import __main__ as command
from processes import skip_without

KEPT = (0.05, 0.10)
STEPS = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with snapshots of a noisy training towards ones."""
    path, rng = tmp_path_factory.mktemp("snapshots"), np.random.default_rng(0)
    weights, snapshots = {"w": np.zeros(500, np.float32)}, posthoc.Snapshots(path)
    ema = EMA(weights, [schedules.power(sigma_rel) for sigma_rel in KEPT])
    for step in range(1, STEPS + 1):
        weights["w"][:] = 1 - np.exp(-step / 75) + rng.standard_normal(500) * 0.3
        ema.update()
        if step % 50 == 0:
            snapshots.add(step, {sigma_rel: ema.averages_of(k) for k, sigma_rel in enumerate(KEPT)})
    return path


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command, and returns its status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("fastema._commands.posthoc.find_spec", lambda _: None)  # pictures take a second
    (tmp_path / "judge.py").write_text(
        "import pathlib, struct, sys\n"
        "def distance(path):\n"
        "    data = pathlib.Path(path).read_bytes()[-2000:]\n"
        "    return sum((x - 1) ** 2 for x in struct.unpack('500f', data)) / 500\n"
        "class Of:\n"
        "    minus = staticmethod(lambda path: -distance(path))\n"
        "    text = staticmethod(lambda path: 'good')\n"
        "    nan = staticmethod(lambda path: float('nan'))\n"
        "if __name__ == '__main__':\n"
        "    print('judging', sys.argv[1])\n"
        "    print('distance:', distance(sys.argv[1]))\n"
    )

    def posthoc_command(*options, where=folder):
        status = command.main(["posthoc", str(where), *map(str, options)])
        return status, *capsys.readouterr()

    yield posthoc_command
    sys.modules.pop("judge", None)


def distance(path):
    return float(((checkpoint.File(path)["w"] - 1) ** 2).mean())


def table(printed):
    """Return the rows of the table that was printed, by sigma_rel."""
    rows = [line.split() for line in printed.splitlines()]
    numbers = [list(map(float, row)) for row in rows if row and row[0][0].isdigit()]
    return {row[0]: row[1:] for row in numbers}


# --- errors and the search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.03, 0.07, 0.2])
@pytest.mark.parametrize("step", [1000, 930])
def test_an_error_is_the_distance_of_the_profiles_relative_to_the_targets_length(target, step):
    steps, sigma_rels = np.repeat([250, 500, 750, 1000], 2), np.tile(KEPT, 4)
    at = (np.arange(1_000_000) + 0.5) / 1000

    def profile(sigma_rel, end):
        gamma = schedules.power(sigma_rel).gamma
        return np.where(at <= end, (gamma + 1) / end * (at / end) ** gamma, 0.0)

    shares = posthoc.weights(steps, sigma_rels, target, step)
    made = sum(share * profile(s, t) for share, s, t in zip(shares, sigma_rels, steps, strict=True))
    wanted = profile(target, step)
    exact = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert abs(posthoc.error(steps, sigma_rels, target, step) / exact - 1) < 1e-4


def test_an_error_of_a_schedule_is_that_of_its_power_function():
    steps, sigma_rels = np.repeat(np.arange(1000, 100_001, 1000), 2), np.tile((0.05, 0.2), 100)
    exact = posthoc.error(steps, sigma_rels, 12**-0.5)
    assert abs(posthoc.error(steps, sigma_rels, schedules.equal_weights()) / exact - 1) < 1e-2


def test_a_snapshot_has_no_error_and_more_snapshots_have_less():
    assert posthoc.error([5, 10], [0.1, 0.1], 0.1) == 0.0
    errors = []
    for count in (2, 4, 8):
        steps = np.repeat(np.arange(1, count + 1) * 1000 // count, 2)
        errors.append(posthoc.error(steps, np.tile(KEPT, count), 0.07))
    assert errors[0] > errors[1] > errors[2] > 0


def test_what_weights_refuse_errors_refuse():
    with pytest.raises(ValueError, match="target_step must be from 1 to 7"):
        posthoc.error([5, 7], [0.1, 0.1], 0.2, 8)
    with pytest.raises(ValueError, match="snapshots must be different"):
        posthoc.error([5, 5], [0.1, 0.1], 0.2)


@pytest.mark.parametrize("best", [0.02, 0.033, 0.08, 0.19, 0.25])
@pytest.mark.parametrize("higher", [False, True])
def test_a_search_finds_the_optimum_of_a_score_that_has_one(best, higher):
    asked = []

    def score(sigma_rel):
        asked.append(sigma_rel)
        return (-1 if higher else 1) * abs(np.log(sigma_rel / best)) ** 1.5

    found = posthoc.search(score, 0.02, 0.25, 20, higher=higher)
    assert len(asked) == len(found) == 20
    assert min(asked) >= 0.02 * (1 - 1e-12)
    assert max(asked) <= 0.25 * (1 + 1e-12)
    assert abs(np.log(next(iter(found)) / best)) < 0.01
    assert list(found.values()) == sorted(found.values(), reverse=higher)


def test_scores_that_are_no_numbers_are_the_worst():
    found = posthoc.search(lambda sigma_rel: np.nan if sigma_rel > 0.1 else -sigma_rel, 0.02, 0.25, 9)
    assert next(iter(found)) <= 0.1
    assert np.isnan(list(found.values())[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 0.05, 5), r"low must be below high, got 0\.1 and 0\.05"),
        ((0.1, 0.5, 5), r"sigma_rel must be above 0 .*, got 0\.5"),
        ((0.0, 0.1, 5), "sigma_rel must be above 0"),
        ((0.05, 0.1, 2), "evaluations must be at least 3, got 2"),
    ],
)
def test_searches_of_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        posthoc.search(lambda sigma_rel: sigma_rel, *arguments)


# --- the command --------------------------------------------------------------------------------------------


def test_it_draws_profiles_errors_and_scores(run, tmp_path, monkeypatch):
    skip_without("matplotlib")
    monkeypatch.setattr("fastema._commands.posthoc.find_spec", lambda _: True)
    status, printed, errors = run("--output", "out", "--score", "judge:distance", "--evaluations", 3)
    assert status == 0, errors
    assert (tmp_path / "out" / "posthoc.png").read_bytes().startswith(b"\x89PNG")
    assert "picture: out/posthoc.png" in printed


def test_it_tells_errors_and_growth(run, folder, tmp_path):
    status, printed, errors = run("--output", "out")
    assert status == 0
    assert "no picture: matplotlib is not installed" in errors
    rows = table(printed)
    assert len(rows) == 9
    steps, sigma_rels = zip(*posthoc.Snapshots(folder).paths, strict=True)
    for sigma, (error, growth) in rows.items():
        exact = posthoc.error(steps, sigma_rels, sigma)
        assert abs(error - exact) < 0.1 * exact, "told in two digits"
        assert growth >= 1
    assert not list((tmp_path / "out").iterdir())


def test_it_writes_a_grid_of_lengths(run, folder, tmp_path):
    status, printed, _ = run("--sigmas", 0.03, 0.07, "--step", 375, "--dtype", "float64")
    assert status == 0
    assert list(table(printed)) == [0.03, 0.07]
    for sigma in (0.03, 0.07):
        made = checkpoint.File(tmp_path / "posthoc" / f"average-{sigma}.safetensors")
        expected = posthoc.Snapshots(folder).average(sigma, 375, dtype=np.float64)
        assert oracle.same_bits(made["w"], expected["w"])


@pytest.mark.parametrize(
    "judge",
    [
        ["--score", "judge:distance"],
        ["--score", "judge:Of.minus", "--higher"],
        ["--command", f"'{sys.executable}' judge.py"],
        ["--command", f"'{sys.executable}' judge.py {{}}"],
    ],
    ids=["function", "higher", "command", "command with a place for the path"],
)
def test_it_judges_a_grid_and_tells_the_best(run, tmp_path, judge):
    status, printed, errors = run("--sigmas", 0.05, 0.1, 0.2, *judge)
    assert status == 0, errors
    paths = {sigma: tmp_path / "posthoc" / f"average-{sigma}.safetensors" for sigma in (0.05, 0.1, 0.2)}
    exact = {sigma: distance(path) for sigma, path in paths.items()}
    for sigma, row in table(printed).items():
        assert abs(abs(row[2]) / exact[sigma] - 1) < 1e-4, "told in six digits"
    best = min(exact, key=exact.get)
    assert f"the best: sigma_rel {best} in posthoc/average-{best}.safetensors" in printed
    assert "3 of 3: sigma_rel 0.2, score " in errors


def test_it_searches_the_best_length_and_keeps_only_that(run, folder, tmp_path):
    status, printed, errors = run("--score", "judge:distance", "--range", 0.03, 0.25, "--evaluations", 8)
    assert status == 0, errors
    assert len(table(printed)) == 8

    def score(sigma_rel):
        posthoc.Snapshots(folder).average(sigma_rel, output=tmp_path / "one")
        return distance(tmp_path / "one")

    best, least = next(iter(posthoc.search(score, 0.03, 0.25, 8).items()))
    (path,) = (tmp_path / "posthoc").iterdir()
    assert path.name == f"average-{best:.6g}.safetensors"
    assert distance(path) == least
    assert f"in posthoc/{path.name}" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", 401], "target_step must be from 1 to 400"),
        (["--sigmas", 0.5], "sigma_rel must be above 0"),
        (["--sigmas", 0.07, 0.070000001], "--sigmas must differ within six digits"),
        (["--score", "judge"], "--score must be MODULE:FUNCTION that can be imported, got 'judge'"),
        (["--score", "nowhere:f"], "got 'nowhere:f': No module named 'nowhere'"),
        (["--score", "judge:missing"], "has no attribute 'missing'"),
        (["--score", "judge:Of.text"], "--score must return a number, and judge:Of.text returned 'good'"),
        (["--score", "judge:Of.nan", "--evaluations", 3], "scores must be numbers, and each of them was NaN"),
        (["--score", "judge:distance", "--evaluations", 1], "evaluations must be at least 3"),
        (["--score", "judge:distance", "--range", 0.2, 0.1], "low must be below high"),
        (["--command", "false"], "--command must succeed, and false posthoc/"),
        (
            ["--command", "echo good {}"],
            "--command must print a number as the last thing, got ['good posthoc/",
        ),
        (["--command", "no-such-program"], "No such file or directory: 'no-such-program'"),
        (["--command", ""], "--command must be a command, got none"),
    ],
)
def test_what_cannot_be_told_or_judged_is_an_error(run, tmp_path, options, message):
    status, _, errors = run(*options)
    assert status == 1
    assert message in errors
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_without_snapshots_is_an_error(run, tmp_path):
    status, _, errors = run(where=tmp_path)
    assert status == 1
    assert f"{tmp_path} must have snapshots of posthoc.Snapshots, and has none" in errors


def test_what_a_function_raises_is_shown_with_its_place(run, tmp_path):
    (tmp_path / "judge.py").write_text("def f(path):\n    raise ValueError('of mine')\n")
    with pytest.raises(RuntimeError, match="--score judge:f failed on posthoc/") as raised:
        run("--score", "judge:f")
    assert str(raised.value.__cause__) == "of mine"


def test_an_average_tells_its_progress(folder, tmp_path):
    told = []
    posthoc.Snapshots(folder).average(0.07, output=tmp_path / "one", progress=lambda *each: told.append(each))
    assert told == [(2000, 2000)]
