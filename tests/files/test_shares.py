"""fastema.checkpoint.shares: what checkpoints weigh in a merge, from the decay that it stands for."""

import math
from fractions import Fraction

import numpy as np
import pytest

import oracle
from fastema import checkpoint
from fastema.checkpoint._shares import STYLES

DECAYS = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus-sqrt": lambda x: 1 - math.sqrt(x),
}


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves checkpoints of a single tensor and returns their paths."""

    def save(values):
        paths = [tmp_path / f"{i}.safetensors" for i in range(len(values))]
        for path, value in zip(paths, values, strict=True):
            checkpoint.write(path, {"w": np.asarray(value, np.float64)})
        return paths

    return save


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000])
def test_shares_are_as_many_as_checkpoints_and_sum_to_one(style, count):
    shares = checkpoint.shares(style, count)
    assert shares.shape == (count,)
    assert shares.dtype == np.float64
    assert (shares > 0).all()
    assert abs(math.fsum(shares) - 1) < count * 2.0**-53


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_a_linear_merge_is_the_training_with_linearly_decayed_updates_exactly(count, saved, tmp_path, rng):
    """Of updates that do not depend on the rate: each is made in full, or at the part that is left then."""
    updates = rng.integers(-(2**20), 2**20, (count - 1, 50))
    constant = np.cumsum([rng.integers(-(2**20), 2**20, 50), *updates], axis=0)
    decayed = constant[0].astype(np.float64)
    for i, update in enumerate(updates, start=1):
        decayed += (1 - i / count) * update
    checkpoint.average(saved(constant), tmp_path / "merged", style="linear")
    assert oracle.same_bits(checkpoint.File(tmp_path / "merged")["w"], decayed)


@pytest.mark.parametrize("style", DECAYS)
@pytest.mark.parametrize("count", [2, 5, 12])
def test_what_is_newer_than_an_update_weighs_together_what_the_decay_leaves_of_it(style, count):
    shares = checkpoint.shares(style, count)
    for i in range(1, count):
        assert abs(math.fsum(shares[i:]) - DECAYS[style](i / count)) < 1e-15


def test_a_mean_is_the_merge_that_stands_for_a_linear_decay():
    assert oracle.same_bits(checkpoint.shares("mean", 7), checkpoint.shares("linear", 7))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_shares_of_an_ema_are_what_its_recursion_leaves_of_each(alpha, count):
    average = [Fraction(0)] * count
    average[0] = Fraction(1)
    for i in range(1, count):
        average = [(1 - Fraction(alpha)) * x for x in average]
        average[i] += Fraction(alpha)
    shares = checkpoint.shares("ema", count, alpha=alpha)
    assert np.abs(shares - np.array(average, np.float64)).max() < 1e-15


@pytest.mark.parametrize("style", STYLES)
def test_a_merge_by_style_is_that_by_its_shares(style, saved, tmp_path, rng):
    values = rng.standard_normal((5, 100))
    shares = checkpoint.shares(style, 5)
    checkpoint.average(saved(values), tmp_path / "merged", style=style)
    merged = checkpoint.File(tmp_path / "merged")["w"]
    weights = np.ones(5) if style in ("mean", "linear") else shares
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total += weight * value
    assert oracle.same_bits(merged, total / sum(weights.tolist()))
    assert np.abs(merged - shares @ values).max() < 1e-15


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("wsd", 3), {}, ValueError, "style must be one of 'mean', 'linear', .*, got 'wsd'"),
        ((["mean"], 3), {}, ValueError, r"style must be one of .*, got \['mean'\]"),
        (("mean", 0), {}, ValueError, "count must be at least 1, got 0"),
        (("mean", 2.0), {}, TypeError, "integer"),
        (("ema", 2), {"alpha": 1.5}, ValueError, r"alpha must be from 0 to 1, got 1\.5"),
        (("ema", 2), {"alpha": None}, TypeError, "alpha must be a number from 0 to 1, got None"),
    ],
)
def test_what_has_no_shares_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        checkpoint.shares(*arguments, **options)


def test_a_style_that_is_none_and_weights_beside_a_style_are_refused(saved, tmp_path):
    paths = saved([[1.0], [2.0]])
    with pytest.raises(ValueError, match=r"style must be one of .*, got 'swa'"):
        checkpoint.average(paths, tmp_path / "merged", style="swa")
    with pytest.raises(ValueError, match="weights must not be given beside style='cosine'"):
        checkpoint.average(paths, tmp_path / "merged", style="cosine", weights=[1, 2])
    assert not (tmp_path / "merged").exists()
