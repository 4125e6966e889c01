"""16-bit averages that move, and averages more exact than their type."""

import ml_dtypes
import numpy as np
import pytest

import fastema
import oracle

bfloat16 = ml_dtypes.bfloat16
ROUND = {bfloat16: oracle.round_bf16_at_random, np.float16: oracle.round_f16_at_random}
every = pytest.mark.usefixtures("every_instruction_set")
both = pytest.mark.parametrize("dtype", [np.float16, bfloat16])
# averages, values
NARROW = [(dtype, value) for dtype in (np.float16, bfloat16) for value in (dtype, np.float32)]
narrow = pytest.mark.parametrize(("dtype", "value_dtype"), NARROW)


def test_plain_bfloat16_stands_still_and_stochastic_rounding_moves_it():
    """Decay .999 from 1 towards 2: after 1,000 updates 1.632 is right, and to nearest it never leaves 1."""
    plain, moving = np.ones(20_000, bfloat16), np.ones(20_000, bfloat16)
    values = np.full(20_000, 2, bfloat16)
    for step in range(1000):
        fastema.update(plain, values, 0.999)
        fastema.update(moving, values, 0.999, rounding="stochastic", step=step)
    assert (plain == 1).all()
    assert abs(moving.astype(float).mean() - (2 - 0.999**1000)) < 1e-3  # 7 standard errors of the mean


@every
@narrow
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("decay", [0.99, 0.0])
def test_stochastic_rounding_has_the_bits_of_its_definition(rng, dtype, value_dtype, threads, decay):
    """A decay of 0 has no average to keep anything of: a value that fits is copied, others are rounded."""
    sizes = [1, 2, 31, 33, 64, 1000, 300_001]
    arrays = [
        [rng.standard_normal(n).astype(kind) * kind(0.01) for n in sizes] for kind in (dtype, value_dtype)
    ]
    expected = []
    for pair, (a, v) in enumerate(zip(*arrays, strict=True)):
        x, new = a.astype(np.float32), v.astype(np.float32)
        x = x + np.float32(1 - decay) * (new - x) if decay > 0 else new
        random = oracle.random_bits(a.size, seed=5, step=2**40, pair=pair)
        expected.append(ROUND[dtype](x, random).view(dtype))
    fastema.update(*arrays, decay, threads=threads, rounding="stochastic", seed=5, step=2**40)
    assert all(oracle.same_bits(a, e) for a, e in zip(arrays[0], expected, strict=True))


@every
@narrow
def test_stochastic_rounding_of_slices_at_any_address(rng, dtype, value_dtype):
    """The random bits belong to an element's place in its array, not to its place in memory."""
    for offset in range(8):
        memory = [rng.standard_normal(1008).astype(kind) for kind in (dtype, value_dtype)]
        a, v = memory[0][offset : offset + 999], memory[1][:999]
        packed = a.copy()
        fastema.update(packed, v, 0.9, rounding="stochastic")
        fastema.update(a, v, 0.9, rounding="stochastic")
        assert oracle.same_bits(a, packed)


@every
@narrow
def test_stochastic_rounding_keeps_nan_infinities_and_what_fits(dtype, value_dtype):
    a = np.array([np.nan, np.inf, -np.inf, 1.0, -0.0, 6e-8 if dtype is np.float16 else 1e-40] * 20, dtype)
    before = a.copy()
    copied = np.zeros_like(a)
    fastema.update(copied, a.astype(value_dtype), 0.0, rounding="stochastic")
    assert oracle.same_bits(copied, before)
    fastema.update(a, a.astype(value_dtype), 0.5, rounding="stochastic")
    with np.errstate(invalid="ignore"):
        expected = np.where(np.isinf(before.astype(float)), np.nan, before.astype(float))  # inf - inf
    np.testing.assert_array_equal(a.astype(float), expected)


@every
@pytest.mark.parametrize(
    ("dtype", "value_dtype", "copied"),
    [*((*mix, False) for mix in NARROW), *((*NARROW[i], True) for i in (1, 3))],
)
@pytest.mark.parametrize("exact", [1.0 + 1 / 3000, -0.0123456, 3.1e-6, 60_001.7])
def test_stochastic_rounding_is_unbiased(dtype, value_dtype, copied, exact):
    """The mean over n draws is the exact number, within 5 standard errors of a Bernoulli variable."""
    n = 400_000
    average = np.zeros(n, dtype)
    if copied:
        value, decay, target = np.float32(exact), 0.0, float(np.float32(exact))
    else:
        value = value_dtype(np.copysign(min(abs(2 * exact), 65_000), exact))
        decay = 1 - exact / float(value)  # a weight that lands between two 16-bit numbers
        target = float(np.float32(1 - decay) * np.float32(value))
    fastema.update(average, np.full(n, value), decay, rounding="stochastic", seed=1)
    drawn = average.astype(np.float64)
    low, high = drawn.min(), drawn.max()
    assert low <= target <= high
    assert len(np.unique(drawn)) == 2
    share = (target - low) / (high - low)
    error = np.sqrt(share * (1 - share) / n)
    assert abs((drawn == high).mean() - share) < 5 * error + 2**-13  # float16 draws with 13 bits


@both
def test_seed_step_and_place_change_the_random_bits(dtype):
    value = np.full(1000, 1 / 3, dtype)

    def draw(**options):
        averages = [np.full(1000, 0.1, dtype) for _ in range(2)]
        fastema.update(averages, [value, value], 0.9, rounding="stochastic", **options)
        return averages

    base = draw()
    assert oracle.same_bits(base[0], draw()[0])
    for other in (base[1], draw(seed=1)[0], draw(step=1)[0]):
        differing = (other != base[0]).mean()
        assert 0.1 < differing < 0.9


def test_stochastic_rounding_leaves_wider_averages_to_nearest(rng):
    a, v = rng.standard_normal(100), rng.standard_normal(100)
    expected = oracle.update(a, v, 0.9)
    fastema.update(a, v, 0.9, rounding="stochastic")
    assert oracle.same_bits(a, expected)


@every
@pytest.mark.parametrize("value_dtype", [bfloat16, np.float32])
@pytest.mark.parametrize("copied_at", [0, 7, -1])
def test_a_bfloat16_average_with_its_carry_is_a_float32_average(rng, value_dtype, copied_at):
    values = rng.standard_normal((500, 1003)).astype(value_dtype)
    average, carry = np.zeros(1003, bfloat16), np.zeros(1003, np.int16)
    expected = np.zeros(1003, np.float32)
    pairs = fastema.Pairs(average, values[0], carries=carry)
    for i, value in enumerate(values):
        pairs = fastema.Pairs(average, value, carries=carry)
        decay = 0.0 if i == copied_at % len(values) else 0.999
        pairs.update(decay, threads=2)
        expected = oracle.update(expected, value, decay)
    bits = (average.view(np.uint16).astype(np.uint32) << 16) + carry.astype(np.uint32)
    assert oracle.same_bits(bits.view(np.float32), expected)
    nearest = np.abs(average.astype(np.float64) - expected)
    assert (nearest <= np.abs(expected.astype(bfloat16).astype(np.float64) - expected)).all()


@every
@pytest.mark.parametrize("value_dtype", [np.float32, np.float16, bfloat16])
def test_a_compensated_float32_average_is_as_good_as_float64(rng, value_dtype):
    """Decay .99999: float32 alone loses every step below 0.6 % of the weight."""
    value = (1 + 0.001 * rng.random(101)).astype(value_dtype)
    plain, average, carry = (np.ones(101, np.float32) for _ in range(3))
    carry[:] = 0
    exact = np.ones(101)
    pairs, alone = fastema.Pairs(average, value, carries=carry), fastema.Pairs(plain, value)
    for _ in range(30_000):
        pairs.update(0.99999)
        alone.update(0.99999)
        exact += (1 - 0.99999) * (value.astype(np.float64) - exact)
    assert np.abs((average.astype(np.float64) + carry) / exact - 1).max() < 1e-9
    assert np.abs(average / exact - 1).max() < 2.0**-23
    moved = value.astype(np.float64) != 1
    assert (plain == 1)[moved].all(), "float32 alone moved: the test proves nothing"


@every
def test_a_bfloat16_average_and_its_carry_hold_nan_infinities_and_any_float32():
    value = np.array([np.nan, np.inf, -np.inf, 1 + 2**-9, -0.0, 1e-45, 3.4e38, -1 / 3] * 20, np.float32)
    average, carry = np.zeros(value.size, bfloat16), np.ones(value.size, np.int16)
    fastema.update(average, value, 0.0, carries=carry)
    bits = (average.view(np.uint16).astype(np.uint32) << 16) + carry.astype(np.uint32)
    assert oracle.same_bits(bits.view(np.float32), value)


def test_a_decay_of_zero_empties_the_carry():
    average, carry = np.ones(5, np.float32), np.full(5, 1e-9, np.float32)
    fastema.update(average, np.full(5, 3, np.float32), 0.0, carries=carry)
    assert (average == 3).all()
    assert (carry == 0).all()
