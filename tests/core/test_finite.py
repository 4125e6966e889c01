"""Pairs.first_non_finite: what NumPy's isfinite says of every value, whatever the instruction set."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
from mixes import MIXES, TYPES, bfloat16

pytestmark = pytest.mark.usefixtures("every_instruction_set")

NON_FINITE = [np.inf, -np.inf, np.nan, -np.nan]


def looked_at(values, threads=0, average=None):
    averages = [np.zeros(x.shape, average or x.dtype) for x in values]
    return fastema.Pairs(averages, values).first_non_finite(threads)


def by_numpy(values):
    with np.errstate(all="ignore"):
        return next((i for i, x in enumerate(values) if not np.isfinite(x).all()), None)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_every_pattern_of_16_bits_is_told_as_by_numpy(dtype):
    patterns = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(all="ignore"):
        finite = np.isfinite(patterns.astype(np.float32))
    assert looked_at([patterns[finite].copy()]) is None
    for pattern in patterns[~finite][:: 1 if dtype == bfloat16 else 17]:
        assert looked_at([np.full(1, pattern)]) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_edges_of_what_is_finite(dtype):
    limits = np.finfo(dtype)
    around = [0.0, limits.tiny, limits.smallest_subnormal, limits.max, np.nextafter(limits.max, dtype(0))]
    assert looked_at([np.array([*around, *(-x for x in around)], dtype)]) is None
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}").type
    inf = np.array(np.inf, dtype).view(bits)
    for pattern in (
        inf,
        inf + bits(1),
        ~bits(0),
        ~bits(0) >> bits(1),
        inf | bits(1) << bits(limits.nmant - 1),
    ):
        assert looked_at([np.full(1, pattern, bits).view(dtype)]) == 0  # signalling NaN among them


@pytest.mark.parametrize(("average", "value"), MIXES)
@given(data=st.data())
def test_any_bytes_are_told_as_by_numpy(average, value, data):
    itemsize = np.dtype(value).itemsize
    sizes = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=4))
    raw = [data.draw(st.binary(min_size=n * itemsize, max_size=n * itemsize)) for n in sizes]
    values = [np.frombuffer(x, value).copy() for x in raw]
    assert looked_at(values, average=average) == by_numpy(values)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_one_element_is_found_wherever_it_is(dtype, offset, rng):
    for size in (*range(1, 40), 63, 64, 65, 127, 128, 129, 255, 256, 257, 513):
        array = rng.standard_normal(size + offset).astype(dtype)[offset:]
        assert looked_at([array]) is None
        for place in {0, size // 2, size - 1}:
            before = array[place]
            array[place] = NON_FINITE[place % 4]
            assert looked_at([array]) == 0, (size, place)
            array[place] = before


@pytest.mark.parametrize("threads", [0, 1, 2, 7])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_first_of_several_is_told_with_any_number_of_threads(dtype, threads, rng):
    sizes = [5, 0, 400_000, 64, 700_001, 1, 300_000]
    values = [rng.standard_normal(n).astype(dtype) for n in sizes]
    assert looked_at(values, threads) is None
    for i in reversed(range(len(sizes))):
        if sizes[i]:
            values[i][-1] = np.nan
            assert looked_at(values, threads) == i


def test_a_value_that_several_averages_share_is_one_value():
    values = [np.ones(3), np.array([1.0, np.inf]), np.ones(2)]
    pairs = fastema.Pairs.several([fastema.copies(values) for _ in range(3)], values)
    assert pairs.first_non_finite() == 1
    values[1][1] = 0.0
    assert pairs.first_non_finite() is None


def test_averages_and_carries_are_not_looked_at_and_nothing_changes():
    values, averages, carries = [np.ones(3, "f")], [np.full(3, np.nan, "f")], [np.full(3, np.inf, "f")]
    pairs = fastema.Pairs(averages, values, carries=carries)
    assert pairs.first_non_finite() is None
    values[0][1] = np.nan
    before = [x.tobytes() for x in (*values, *averages, *carries)]
    assert pairs.first_non_finite() == 0
    assert [x.tobytes() for x in (*values, *averages, *carries)] == before


def test_arrays_in_any_order_and_read_only_ones():
    value = np.asfortranarray(np.ones((3, 4)))
    value[2, 0] = np.inf
    value.flags.writeable = False
    assert fastema.Pairs(np.zeros((3, 4), order="F"), value).first_non_finite() == 0


def test_a_list_of_nothing_is_finite():
    assert fastema.Pairs([], []).first_non_finite() is None
    assert looked_at([np.zeros((0, 3))]) is None


def test_an_array_that_was_resized_is_not_read():
    value = np.ones(1000)
    pairs = fastema.Pairs([np.zeros(1000)], [value])
    value.resize(3, refcheck=False)
    with pytest.raises(ValueError, match=r"values\[0\] was resized after it was paired"):
        pairs.first_non_finite()


def test_a_tensor_that_was_given_other_memory_is_not_read(torch):
    value = torch.ones(3)
    pairs = fastema.Pairs([torch.zeros(3)], [value])
    value.data = torch.full((3,), float("nan"))
    with pytest.raises(ValueError, match="was given other memory"):
        pairs.first_non_finite()


@pytest.mark.parametrize(("threads", "error"), [(-1, ValueError), ("two", TypeError)])
def test_bad_numbers_of_threads_are_refused(threads, error):
    with pytest.raises(error, match="threads must be"):
        looked_at([np.ones(1)], threads)
