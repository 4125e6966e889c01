"""fastema.swap and Pairs.swap: exact, in place, its own inverse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
import oracle
from mixes import MIXES, TYPES

pytestmark = pytest.mark.usefixtures("every_instruction_set")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_swap_exchanges_every_bit_at_any_size(rng, dtype, threads):
    itemsize = np.dtype(dtype).itemsize
    for size in [0, 1, 3, 15, 16, 17, 63, 65, 1000, (256 << 10) // itemsize + 1, 300_007]:
        a, b = (np.frombuffer(rng.bytes(size * itemsize), dtype).copy() for _ in range(2))
        a_bytes, b_bytes = a.tobytes(), b.tobytes()
        fastema.swap(a, b, threads=threads)
        assert (a.tobytes(), b.tobytes()) == (b_bytes, a_bytes), size


@pytest.mark.parametrize("dtype", TYPES)
@given(data=st.data())
def test_swap_twice_is_nothing(dtype, data):
    itemsize = np.dtype(dtype).itemsize
    size = data.draw(st.integers(0, 70))
    raw = st.binary(min_size=size * itemsize, max_size=size * itemsize)
    a_bytes, b_bytes = data.draw(raw), data.draw(raw)
    a, b = np.frombuffer(a_bytes, dtype).copy(), np.frombuffer(b_bytes, dtype).copy()
    fastema.swap(a, b)
    assert (a.tobytes(), b.tobytes()) == (b_bytes, a_bytes)
    fastema.swap(a, b)
    assert (a.tobytes(), b.tobytes()) == (a_bytes, b_bytes)


def test_what_arithmetic_swaps_lose_comes_back():
    """Swapping by a+b, a-b, a-b loses half of all averages, and every one of these."""
    values = np.array([1e8, 3e38, np.inf, np.nan, -0.0, 1e-45], np.float32)
    averages = np.array([1e-8, -3e38, 1.0, 2.0, 0.0, 1e30], np.float32)
    values.view(np.uint32)[3] |= 4711
    before = values.tobytes(), averages.tobytes()
    pairs = fastema.Pairs([averages], [values])
    pairs.swap()
    assert (averages.tobytes(), values.tobytes()) == before
    pairs.swap()
    assert (values.tobytes(), averages.tobytes()) == before


@pytest.mark.parametrize(("average", "value"), [mix for mix in MIXES if mix[0] != mix[1]])
def test_a_swap_of_two_types_is_refused_and_nothing_changes(rng, average, value):
    a, b = rng.standard_normal(5).astype(average), rng.standard_normal(5).astype(value)
    before = a.tobytes(), b.tobytes()
    with pytest.raises(TypeError, match="a and b must have one type to be swapped, got"):
        fastema.swap(a, b)
    with pytest.raises(TypeError, match="averages and values must have one type to be swapped, got"):
        fastema.Pairs(a, b).swap()
    assert (a.tobytes(), b.tobytes()) == before


def test_a_list_of_many_sizes(rng):
    a = [rng.standard_normal(n) for n in (0, 5, 70_000, 1, 64, 3)]
    b = [rng.standard_normal(len(x)) for x in a]
    a_copy, b_copy = [x.copy() for x in a], [x.copy() for x in b]
    fastema.swap(a, b, threads=2)
    assert all(oracle.same_bits(x, y) for x, y in zip(a + b, b_copy + a_copy, strict=True))
