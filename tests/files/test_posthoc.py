"""Averages that were not kept: the closest sum of snapshots, and how close it is."""

import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import fastema
import oracle
import tolerances
from fastema import checkpoint, posthoc, schedules
from processes import skip_without

KEPT = (0.05, 0.10)


def regular(last, count):
    """Return the steps and sigma_rels of snapshots at regular steps."""
    return np.repeat(np.arange(1, count + 1) * last // count, 2), np.tile(KEPT, count)


def tracked(values, schedule):
    """Return the average after each step, in float64; it starts at the first value."""
    average, history = values[0].copy(), []
    for step, value in enumerate(values, start=1):
        fastema.update(average, value, schedule(step))
        history.append(average.copy())
    return np.array(history)


LAST = 3000


@pytest.fixture(scope="module")
def training():
    """Return weights that walk at random with a trend, step by step."""
    rng = np.random.default_rng(7)
    start, trend = rng.standard_normal((2, 32))
    return start + np.cumsum(3 * trend / LAST + rng.standard_normal((LAST, 32)) / LAST**0.5 / 3, axis=0)


@pytest.fixture(scope="module")
def kept(training):
    """Return sigma_rel -> its average after each step."""
    return {sigma_rel: tracked(training, schedules.power(sigma_rel)) for sigma_rel in KEPT}


def error(training, kept, target, count, step=None):
    """Return how far the sum of snapshots is from the target that was tracked.

    Relative to the distance of the weights from it: 1 is as bad as the weights themselves.
    """
    steps, sigma_rels = regular(LAST, count)
    snapshots = np.array([kept[sigma_rel][t - 1] for t, sigma_rel in zip(steps, sigma_rels, strict=True)])
    schedule = target if isinstance(target, schedules.Schedule) else schedules.power(target)
    step = step or LAST
    exact = tracked(training[:step], schedule)[-1]
    made = posthoc.weights(steps, sigma_rels, target, step) @ snapshots
    return np.linalg.norm(made - exact) / np.linalg.norm(training[step - 1] - exact)


TARGETS = [
    0.03,
    0.07,
    0.15,
    0.25,
    schedules.constant(0.99),
    schedules.half_life(150),
    schedules.warmup(0.999),
]


@pytest.mark.parametrize("target", TARGETS)
def test_the_error_falls_with_the_number_of_snapshots(training, kept, target):
    errors = [error(training, kept, target, count) for count in (4, 16, 64)]
    assert errors[0] < 1
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


@pytest.mark.parametrize(("target", "bound"), [(0.03, 2e-3), (0.07, 1e-4), (0.15, 1e-4), (0.25, 2e-2)])
def test_32_snapshots_are_enough_around_the_profiles_that_were_kept(training, kept, target, bound):
    assert error(training, kept, target, 32) < bound


@pytest.mark.parametrize("step", [LAST // 2, 2000, LAST - 1])
def test_any_step_up_to_the_last_snapshot_can_be_had(training, kept, step):
    assert error(training, kept, 0.07, 32, step) < 0.02


def products(t, gamma, other_t, other_gamma):
    """The inner products of power functions, from their definition."""
    a, b = gamma + 1, other_gamma + 1
    return a * b / (a + b - 1) * np.minimum(t, other_t) ** (a + b - 1.0) / t**a / other_t**b


def closest(steps, sigma_rels, target, step):
    """Solve for the closest sum of mass 1 at once, with a multiplier of Lagrange for the mass."""
    t = np.asarray(steps, np.float64) / max(steps)  # powers of the steps themselves overflow
    gamma = np.array([schedules.power(sigma_rel).gamma for sigma_rel in sigma_rels])
    ones = np.ones((len(t), 1))
    system = np.block([[products(t[:, None], gamma[:, None], t, gamma), ones], [ones.T, np.zeros((1, 1))]])
    side = products(t, gamma, step / max(steps), schedules.power(target).gamma)
    return np.linalg.solve(system, np.append(side, 1.0))[:-1]


@pytest.mark.parametrize("target", [0.01, 0.03, 0.0500001, 0.07, 0.15, 0.28])
@pytest.mark.parametrize(
    ("steps", "sigma_rels", "step"),
    [
        (*regular(1000, 1), 1000),
        (*regular(1000, 2), 900),
        (*regular(1000, 8), 1000),
        ([100, 300, 700, 1000, 150, 600, 900, 1000], [0.05] * 4 + [0.1] * 4, 950),
        ([500, 1000, 1000, 250, 750, 1000], [0.05, 0.05, 0.1, 0.2, 0.2, 0.2], 1000),
        ([10, 20, 30], [0.1] * 3, 30),
    ],
)
def test_no_sum_of_mass_one_is_closer(steps, sigma_rels, step, target):
    weights = posthoc.weights(steps, sigma_rels, target, step)
    tolerances.assert_close(weights, closest(steps, sigma_rels, target, step), tolerances.LEAST_SQUARES)


def test_a_profile_among_the_snapshots_is_that_snapshot():
    steps, sigma_rels = regular(1000, 10)
    for i, (step, sigma_rel) in enumerate(zip(steps, sigma_rels, strict=True)):
        assert posthoc.weights(steps, sigma_rels, sigma_rel, step).tolist() == np.eye(20)[i].tolist()
    assert posthoc.weights(steps, sigma_rels, schedules.power(0.1)).tolist() == np.eye(20)[-1].tolist()


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_that_never_moved_keeps_its_value(target):
    steps, sigma_rels = regular(LAST, 20)
    tolerances.assert_close(posthoc.weights(steps, sigma_rels, target).sum(), 1.0, tolerances.FLOAT64)


@pytest.mark.parametrize(("target", "growth"), [(0.02, 60), (0.07, 2), (0.2, 3)])
def test_weights_are_the_same_at_step_ten_million(target, growth):
    """They depend on the ratios of the steps alone."""
    steps, sigma_rels = regular(1000, 1000)
    weights = posthoc.weights(steps, sigma_rels, target)
    assert np.abs(weights).sum() < growth, "so much would errors of the snapshots grow"
    late = posthoc.weights(steps * 10_000, sigma_rels, target)
    tolerances.assert_close(late, weights, tolerances.LEAST_SQUARES)


def test_the_order_of_snapshots_does_not_matter(rng):
    steps, sigma_rels = regular(1000, 12)
    order = rng.permutation(24)
    weights = posthoc.weights(steps, sigma_rels, 0.08, 960)
    assert oracle.same_bits(posthoc.weights(steps[order], sigma_rels[order], 0.08, 960), weights[order])


def test_a_schedules_profile_is_that_of_its_power_function():
    steps, sigma_rels = regular(1000, 12)
    weights = posthoc.weights(steps, sigma_rels, schedules.equal_weights())
    same = posthoc.weights(steps, sigma_rels, 12**-0.5)
    tolerances.assert_close(weights, same, tolerances.LEAST_SQUARES)


@pytest.mark.parametrize(
    "schedule", [schedules.constant(0.9), schedules.dynamic(0.99), schedules.warmup(0.99)]
)
def test_a_schedules_profile_is_what_each_value_weighs(schedule, monkeypatch):
    exact = tracked(np.eye(50), schedule)[-1]
    monkeypatch.setattr(posthoc, "_PIECE", 7)
    profile = np.zeros(50)
    for first, part in posthoc._profile(schedule, 50):
        profile[first - 1 : first - 1 + len(part)] = part
    tolerances.assert_close(profile, exact, tolerances.FLOAT64)


def test_pieces_of_a_long_profile_change_nothing(monkeypatch):
    steps, sigma_rels = regular(1000, 5)
    weights = posthoc.weights(steps, sigma_rels, schedules.warmup(0.999))
    monkeypatch.setattr(posthoc, "_PIECE", 64)
    pieces = posthoc.weights(steps, sigma_rels, schedules.warmup(0.999))
    tolerances.assert_close(pieces, weights, tolerances.LEAST_SQUARES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 0.1), "steps and sigma_rels must hold a number for each of one snapshot or more"),
        (([1, 2], [0.1], 0.1), r"steps and sigma_rels must .*, got shapes \(2,\) and \(1,\)"),
        (([0, 2], [0.1, 0.1], 0.1), "steps must be finite and at least 1, the first update, got 0"),
        (([1, np.inf], [0.1, 0.1], 0.1), "steps must be finite and at least 1, the first update, got inf"),
        (([5, 5], [0.1, 0.1], 0.2), r"snapshots must be different, got step 5 of 0\.1 twice"),
        (([5, 7], [0.1, 0.5], 0.1), r"sigma_rel must be above 0 .*, got 0\.5"),
        (([5, 7], [0.1, 0.1], 0.5), r"sigma_rel must be above 0 .*, got 0\.5"),
        (([5, 7], [0.1, 0.1], 0.1, 8), "target_step must be from 1 to 7, the last snapshot, got 8"),
        (([5, 7], [0.1, 0.1], 0.1, 0), "target_step must be from 1 to 7, the last snapshot, got 0"),
    ],
)
def test_snapshots_that_cannot_be_summed_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        posthoc.weights(*arguments)


# Snapshots on disk


def filled(folder, training, dtypes, count=15):
    """Train with two power averages in one pass, and keep snapshots of both."""
    halves = [training[0, :16].astype(dtypes[0]), training[0, 16:].reshape(4, 4).astype(dtypes[1])]
    ema = fastema.EMA(halves, [schedules.power(sigma_rel) for sigma_rel in KEPT], dtype=dtypes[1])
    snapshots = posthoc.Snapshots(folder)
    for step, value in enumerate(training, start=1):
        halves[0][:], halves[1][:] = value[:16], value[16:].reshape(4, 4)
        ema.update()
        if step % (LAST // count) == 0:
            snapshots.add(ema.step, {sigma_rel: ema.averages_of(k) for k, sigma_rel in enumerate(KEPT)})
    return snapshots, [ema.averages_of(k) for k in range(2)]


def test_snapshots_in_a_folder_give_the_average_that_was_not_kept(tmp_path, training):
    snapshots, _ = filled(tmp_path / "made" / "here", training, (np.float64, np.float64), count=30)
    made = snapshots.average(0.07)
    assert [average.shape for average in made] == [(16,), (4, 4)]
    exact = tracked(training, schedules.power(0.07))[-1]
    made = np.concatenate([average.reshape(-1) for average in made])
    assert np.linalg.norm(made - exact) < 1e-4 * np.linalg.norm(training[-1] - exact)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        *((t, t) for t in (np.float16, ml_dtypes.bfloat16, np.float32)),
        (np.float32, ml_dtypes.bfloat16),
        (np.float32, np.float16),
    ],
)
def test_an_average_that_was_kept_comes_back_bit_for_bit(tmp_path, training, value, dtype):
    snapshots, averages = filled(tmp_path, training, (value, dtype))
    assert len(snapshots.paths) == 30
    for sigma_rel, kept in zip(KEPT, averages, strict=True):
        for back, average in zip(snapshots.average(sigma_rel), kept, strict=True):
            assert oracle.same_bits(back, average)
    assert snapshots.average(0.07)[1].dtype == dtype
    assert snapshots.average(0.07, dtype=np.float32)[1].dtype == np.float32


A = np.arange(3.0)


@pytest.mark.parametrize(
    ("averages", "expected"),
    [
        (A, A),
        ([A, A], [A, A]),
        ({"w": A}, {"w": A}),
        ({"a": {"w": A}, "b": [A]}, {"a.w": A, "b.0": A}),
    ],
)
def test_averages_come_back_as_they_were_added(tmp_path, averages, expected):
    snapshots = posthoc.Snapshots(tmp_path)
    snapshots.add(np.int64(1), {np.float64(0.1): averages})
    made = snapshots.average(0.1)
    np.testing.assert_equal(dict(made) if isinstance(expected, dict) else made, expected)


def test_an_average_leaves_nothing_but_snapshots_in_their_folder(tmp_path):
    snapshots = posthoc.Snapshots(tmp_path)
    snapshots.add(10, {sigma_rel: {"b": np.ones(3), "a": np.full((), 2.0)} for sigma_rel in KEPT})
    snapshots.add(20, {sigma_rel: {"b": np.ones(3), "a": np.full((), 4.0)} for sigma_rel in KEPT})
    assert list(snapshots.paths) == [(10, 0.05), (10, 0.1), (20, 0.05), (20, 0.1)]
    before = sorted(tmp_path.rglob("*"))
    made = snapshots.average(0.07, 15)
    assert sorted(tmp_path.rglob("*")) == before
    assert made["a"].shape == ()
    assert 2 < made["a"] < 4
    tolerances.assert_close(made["b"], np.ones(3), tolerances.FLOAT64)


def test_an_average_can_be_written_to_a_file(tmp_path):
    snapshots = posthoc.Snapshots(tmp_path / "snapshots")
    for step in (10, 20):
        snapshots.add(step, {0.05: [np.full(3, step, np.float32)], 0.1: [np.full(3, step, np.float32)]})
    made = snapshots.average(0.07, 15, output=tmp_path / "average.safetensors")
    assert oracle.same_bits(checkpoint.File(tmp_path / "average.safetensors")["0"], made[0])


def test_a_step_that_is_trained_again_replaces_its_snapshot(tmp_path):
    snapshots = posthoc.Snapshots(tmp_path)
    for value in (1.0, 2.0):
        snapshots.add(10, {0.1: [np.full(2, value)]})
    assert len(snapshots.paths) == 1
    assert snapshots.average(0.1)[0].tolist() == [2.0, 2.0]


def test_tensors_of_torch_can_be_kept(tmp_path):
    skip_without("torch")
    import torch

    snapshots = posthoc.Snapshots(tmp_path)
    snapshots.add(1, {0.1: {"w": torch.full((2, 2), 1.5, dtype=torch.bfloat16)}})
    assert snapshots.average(0.1)["w"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert snapshots.average(0.1)["w"].dtype == ml_dtypes.bfloat16


def test_memory_is_bounded_by_a_piece_whatever_the_snapshots(tmp_path, monkeypatch):
    snapshots, size = posthoc.Snapshots(tmp_path), 1_000_000
    for step in range(1, 9):
        snapshots.add(step, {sigma_rel: [np.full(size, step, np.float32)] for sigma_rel in KEPT})
    monkeypatch.setattr(checkpoint._pieces, "_PIECE", 1 << 12)  # of which each thread holds some
    tracemalloc.start()
    made = snapshots.average(0.07)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size, "a quarter of one snapshot in bytes"
    shares = posthoc.weights(*zip(*snapshots.paths, strict=True), 0.07)
    tolerances.assert_close(made[0][-1], shares @ np.repeat(np.arange(1.0, 9.0), 2), tolerances.IN_FLOAT32)


@pytest.mark.parametrize(
    ("step", "averages", "kind", "message"),
    [
        (0, {0.1: [np.ones(2)]}, ValueError, "step must be at least 1, the first update, got 0"),
        (2, {0.5: [np.ones(2)]}, ValueError, "sigma_rel must be above 0"),
        (2, {0.1: [np.ones(2)], 0.05: ["relu"]}, TypeError, "averages[0.05] cannot be kept"),
        (2, {0.1: 7}, TypeError, "averages[0.1] cannot be kept"),
        (
            2,
            {0.1: [np.ones(2)], 0.05: [np.ones(3)]},
            ValueError,
            "averages[0.05] must have the names, shapes and types of the other snapshots, got ((3,), "
            "dtype('float64')) for '0', which is ((2,), dtype('float64')) there",
        ),
        (2, {0.1: {"w": np.ones(2)}}, ValueError, "averages[0.1] must have the names"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_changes_nothing(tmp_path, step, averages, kind, message):
    snapshots = posthoc.Snapshots(tmp_path)
    snapshots.add(1, {0.1: [np.ones(2)]})
    before = [(path, path.read_bytes()) for path in sorted(tmp_path.rglob("*"))]
    with pytest.raises(kind, match=re.escape(message)):
        snapshots.add(step, averages)
    assert [(path, path.read_bytes()) for path in sorted(tmp_path.rglob("*"))] == before


def test_a_folder_without_snapshots_has_no_average(tmp_path):
    with pytest.raises(ValueError, match="must have snapshots to average, has none"):
        posthoc.Snapshots(tmp_path).average(0.1)
    with pytest.raises(ValueError, match="must have snapshots to average, has none"):
        posthoc.Snapshots(tmp_path / "nowhere").average(0.1)
