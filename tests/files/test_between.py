"""The mean of what came between two running means: exact on their bits, and refused where rounding rules."""

import re
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import oracle
from fastema import EMA, checkpoint, schedules
from fastema import __main__ as command

SIZE = 300_000  # more than a piece


def trained(folder, marks, *, spans=None, kind=np.float32, **options):
    """Save running means at some steps; return the paths, and the values of all steps."""
    rng = np.random.default_rng(3)
    weights = {"w": np.zeros(7, kind), "b": np.zeros((2, 2), kind), "n": np.array(0)}
    ema, values, paths = EMA(weights, options.pop("decay", schedules.equal_weights()), **options), [], []
    for step in range(1, max(marks) + 1):
        weights["w"][:] = rng.standard_normal(7)
        weights["b"][:] = rng.standard_normal((2, 2))
        weights["n"][...] = step
        values.append({name: value.copy() for name, value in weights.items()})
        ema.update(span=spans[step - 1] if spans else 1)
        if step in marks:
            paths.append(folder / f"{step}.safetensors")
            ema.save(paths[-1])
    return paths, values


def replayed(paths, n1, n2, name="w"):
    """Return what NumPy makes of the averages in two files."""
    m1, m2 = (checkpoint.File(path)[name].astype(np.float64) for path in paths)
    return (n2 * m2 - n1 * m1) / (n2 - n1)


def error_of(found, values, first, last, name="w"):
    """Return the largest error of a mean of the values of some steps, which are added up exactly."""
    exact = [
        sum(Fraction(float(value[name][i])) for value in values[first - 1 : last]) / (last - first + 1)
        for i in range(7)
    ]
    return max(abs(Fraction(float(x)) - y) for x, y in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_mean_between_is_numpys_in_float64_rounded_once(tmp_path, dtype):
    paths, _ = trained(tmp_path, (40, 100), kind=dtype)
    assert checkpoint.between(*paths, tmp_path / "between") == ["n"]
    file = checkpoint.File(tmp_path / "between")
    for name in ("w", "b"):
        assert oracle.same_bits(file[name], replayed(paths, 40, 100, name).astype(dtype))
    assert file["n"] == 100
    assert file.metadata == {"format": "pt"}


def test_it_is_the_mean_of_the_values_of_the_interval(tmp_path):
    paths, values = trained(tmp_path, (40, 100))
    checkpoint.between(*paths, tmp_path / "between")
    error = error_of(checkpoint.File(tmp_path / "between")["w"], values, 41, 100)
    assert error < 100 * 2.0**-24, "n2 * u of averages below 1"


def test_carries_of_compensated_averages_are_read(tmp_path):
    paths, values = trained(tmp_path, (3000, 3002), rounding="compensated")
    checkpoint.between(*paths, tmp_path / "between", dtype=np.float64)
    found = checkpoint.File(tmp_path / "between")["w"]
    means = []
    for path in paths:
        file = checkpoint.File(path)
        means.append(file["w"].astype(np.float64) + file["fastema.carries.0.w"])
    assert oracle.same_bits(found, (3002 * means[1] - 3000 * means[0]) / 2)
    assert error_of(found, values, 3001, 3002) < 1e-6
    plain = replayed(paths, 3000, 3002)
    assert error_of(plain, values, 3001, 3002) > 1e-6, "carries were needed"


def test_carries_of_bfloat16_averages_are_the_lower_half_of_a_float32(tmp_path):
    paths, values = trained(tmp_path, (50, 100), rounding="compensated", dtype="bfloat16")
    checkpoint.between(*paths, tmp_path / "between", dtype=np.float32)
    means = []
    for path in paths:
        file = checkpoint.File(path)
        high = file["w"].view(np.uint16).astype(np.int64) << 16
        means.append(
            (high + file["fastema.carries.0.w"]).astype(np.uint32).view(np.float32).astype(np.float64)
        )
    expected = ((100 * means[1] - 50 * means[0]) / 50).astype(np.float32)
    assert oracle.same_bits(checkpoint.File(tmp_path / "between")["w"], expected)
    assert error_of(expected, values, 51, 100) < 100 * 2.0**-24


def test_times_are_those_of_the_clock(tmp_path):
    rng = np.random.default_rng(5)
    spans = rng.uniform(0.5, 2.0, 60).tolist()
    paths, values = trained(tmp_path, (20, 60), spans=spans, kind=np.float64)
    checkpoint.between(*paths, tmp_path / "between")
    total = sum(span * value["w"] for span, value in zip(spans[20:], values[20:], strict=True))
    found = checkpoint.File(tmp_path / "between")["w"]
    assert np.abs(found - total / sum(spans[20:])).max() < 1e-13


@pytest.mark.parametrize(
    "options",
    [
        {"every": 4},
        {"decay": schedules.equal_weights(start_step=11)},
        {"start_step": 15},
        {"decay": [0.9, schedules.equal_weights()]},
        {"initial": "zeros"},
    ],
    ids=["every", "start of the schedule", "start of the EMA", "several decays", "zeros"],
)
def test_however_it_is_averaged(tmp_path, options):
    paths, values = trained(tmp_path, (20, 60), kind=np.float64, **options)
    checkpoint.between(*paths, tmp_path / "between")
    every = options.get("every", 1)
    expected = np.mean([value["w"] for value in values[20:]][every - 1 :: every], axis=0)
    assert np.abs(checkpoint.File(tmp_path / "between")["w"] - expected).max() < 1e-13


def test_a_file_that_was_saved_while_swapped_holds_the_same_mean(tmp_path):
    weights = {"w": np.zeros(7)}
    ema = EMA(weights, schedules.equal_weights())
    for step in range(1, 9):
        weights["w"][:] = step
        ema.update()
        if step in (4, 8):
            with ema.swapped():
                ema.save(tmp_path / f"{step}")
    checkpoint.between(tmp_path / "4", tmp_path / "8", tmp_path / "between")
    assert checkpoint.File(tmp_path / "between")["w"].tolist() == [6.5] * 7


def test_means_of_others_may_be_given_with_their_clocks_in_any_layout(tmp_path):
    rng = np.random.default_rng(1)
    m1, m2 = rng.standard_normal((2, SIZE)).astype(np.float32)
    for name, mean, count in (("a", m1, 10), ("b", m2, 30)):
        (tmp_path / name).mkdir()
        tensors = {"w": mean, "n": np.array(count), "x._extra_state": np.full(count, 1.0)}
        checkpoint.write(tmp_path / name / "model.safetensors", tensors)
    kept = checkpoint.between(tmp_path / "a", tmp_path / "b", tmp_path / "out", clocks=(10, 30))
    assert sorted(kept) == ["n", "x._extra_state"]
    file = checkpoint.File(tmp_path / "out" / "model.safetensors")
    expected = ((30.0 * m2.astype(np.float64) - 10.0 * m1.astype(np.float64)) / 20.0).astype(np.float32)
    assert oracle.same_bits(file["w"], expected)
    assert file["n"] == 30


# --- what is refused ----------------------------------------------------------------------------------------


def means_at(folder, clocks, dtype=np.float32):
    paths = [folder / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        checkpoint.write(path, {"w": np.ones(3, dtype)})
    return lambda: checkpoint.between(*paths, folder / "between", clocks=clocks)


@pytest.mark.parametrize(
    ("clocks", "dtype"),
    [
        ((60_000, 65_000), np.float32),
        ((1, 2), np.float32),
        ((1, 2), np.float16),
        ((1e12, 2e12), np.float64),
    ],
)
def test_what_rounding_leaves_is_averaged(tmp_path, clocks, dtype):
    means_at(tmp_path, clocks, dtype)()
    assert np.abs(checkpoint.File(tmp_path / "between")["w"] - 1).max() < 2.0**-8


@pytest.mark.parametrize(
    ("clocks", "dtype", "error"),
    [
        ((60_000, 66_000), np.float32, "0.00394"),
        ((1_000_000, 1_000_001), np.float32, "0.179"),
        ((1_000_000, 2_000_000), np.float32, "0.119"),
        ((2, 7), np.float16, "0.0043"),
        ((1, 2), ml_dtypes.bfloat16, "0.0195"),
        ((1e14, 2e14), np.float64, "0.0222"),
    ],
)
def test_what_rounding_does_not_leave_is_refused_with_the_cure(tmp_path, clocks, dtype, error):
    with pytest.raises(ValueError, match="must leave more than rounding between them") as raised:
        means_at(tmp_path, clocks, dtype)()
    text = str(raised.value)
    assert (
        f"'w' in {np.dtype(dtype)}, at clocks {clocks[0]} and {clocks[1]}, is known within {error} of" in text
    )
    assert text.endswith(
        "Keep such averages in float32 with EMA(rounding='compensated'), or with dtype='float64'"
    )
    assert not (tmp_path / "between").exists()


def test_a_float32_mean_that_stands_still_is_refused_and_a_compensated_one_is_right(tmp_path):
    """A million steps with 1, then 1,000 with 1.01: each of these moves the mean by less than half an ulp."""
    files = {}
    for rounding in ("nearest", "compensated"):
        weight = {"w": np.ones(1, np.float32)}
        ema = EMA(weight, schedules.equal_weights(), rounding=rounding)
        ema.update()
        ema.step = 1_000_000
        ema.save(tmp_path / "1.safetensors")
        weight["w"][:] = 1.01
        for _ in range(1000):
            ema.update()
        ema.save(tmp_path / "2.safetensors")
        files[rounding] = (tmp_path / "1.safetensors", tmp_path / "2.safetensors", tmp_path / rounding)
        if rounding == "nearest":
            assert ema.averages["w"] == 1
            with pytest.raises(ValueError, match="must leave more than rounding"):
                checkpoint.between(*files[rounding])
    checkpoint.between(*files["compensated"])
    assert abs(checkpoint.File(tmp_path / "compensated")["w"][0] - np.float32(1.01)) < 1e-6


@pytest.mark.parametrize(
    ("options", "marks", "message"),
    [
        (
            {"decay": 0.9},
            (2, 4),
            "2.safetensors must hold an average of schedules.equal_weights(), and has none",
        ),
        (
            {"decay": schedules.equal_weights(start_step=3)},
            (2, 4),
            "2.safetensors must hold a mean from step 3 on",
        ),
        ({"start_step": 3}, (2, 4), "2.safetensors must hold a mean from step 3 on, and its clock is at 2"),
        ({"every": 4}, (2, 4), "2.safetensors must hold a mean from step 1 on, and its clock is at 0"),
    ],
)
def test_files_that_hold_no_running_mean_are_refused(tmp_path, options, marks, message):
    paths, _ = trained(tmp_path, marks, **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.between(*paths, tmp_path / "between")
    assert not (tmp_path / "between").exists()


def test_files_that_do_not_fit_each_other_are_refused(tmp_path):
    paths, _ = trained(tmp_path, (2, 4))
    with pytest.raises(
        ValueError, match="must be means over times of which the later is longer, got 4 and 2"
    ):
        checkpoint.between(paths[1], paths[0], tmp_path / "between")
    with pytest.raises(ValueError, match="got 2 and 2"):
        checkpoint.between(paths[0], paths[0], tmp_path / "between")
    checkpoint.write(tmp_path / "plain", {"w": np.zeros(7)})
    with pytest.raises(ValueError, match="plain holds no state of an EMA"):
        checkpoint.between(paths[0], tmp_path / "plain", tmp_path / "between")
    with pytest.raises(ValueError, match="all files must have the same tensors"):
        checkpoint.between(paths[0], tmp_path / "plain", tmp_path / "between", clocks=(1, 2))
    with pytest.raises(TypeError, match="clocks must be numbers, got '1'"):
        checkpoint.between(*paths, tmp_path / "between", clocks=("1", 2))
    ema = EMA({"w": np.zeros(3), "b": np.zeros((2, 2)), "n": np.array(0)}, schedules.equal_weights())
    for _ in range(9):
        ema.update()
    ema.save(tmp_path / "other")
    with pytest.raises(ValueError, match="'w' must have one shape in all files"):
        checkpoint.between(paths[0], tmp_path / "other", tmp_path / "between")
    assert not (tmp_path / "between").exists()


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_writes_the_mean_between_two_files(tmp_path, capsys):
    paths, _ = trained(tmp_path, (20, 100))
    target = str(tmp_path / "between")
    assert command.main(["average", *map(str, reversed(paths)), "-o", target, "--between"]) == 0
    assert oracle.same_bits(checkpoint.File(target)["w"], replayed(paths, 20, 100).astype(np.float32))
    printed = capsys.readouterr().out
    assert f"{target}: the mean between {paths[0]} and {paths[1]}" in printed
    assert f"1 tensors taken from {paths[1]}: n" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a", "--between"], "--between must have two files, and no others to choose from, got 1"),
        (["a", "b", "--between", "--last", "2"], "--between must have two files, and no others"),
        (["a", "b", "--clocks", "1", "2"], "--clocks must be given with --between"),
    ],
)
def test_the_command_says_what_goes_together(tmp_path, capsys, options, message):
    assert command.main(["average", *options, "-o", str(tmp_path / "between")]) == 1
    assert message in capsys.readouterr().err
