"""fastema.update and Pairs.update: the bits of NumPy, always."""

import ctypes
import platform
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
import oracle
from mixes import MIXES, TYPES, of_many_magnitudes

pytestmark = pytest.mark.usefixtures("every_instruction_set")

bfloat16 = ml_dtypes.bfloat16
PIECE = 512 << 10  # bytes: how the core cuts large arrays
SIZES = [0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000]


@pytest.mark.parametrize(("average", "value"), MIXES)
@pytest.mark.parametrize("threads", [1, 2])
def test_update_has_numpys_bits_around_every_vector_and_piece(rng, average, value, threads):
    per_piece = PIECE // np.dtype(average).itemsize
    for size in [*SIZES, per_piece - 1, per_piece, per_piece + 1, 3 * per_piece + 17]:
        a, v = of_many_magnitudes(rng, size, average), of_many_magnitudes(rng, size, value)
        expected = oracle.update(a, v, 0.999)
        fastema.update(a, v, 0.999, threads=threads)
        assert oracle.same_bits(a, expected), size


@pytest.mark.parametrize(("average", "value"), MIXES)
@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 1), (3, 5)])
def test_alignment_changes_no_bit(rng, average, value, offsets):
    size = 1001
    a = of_many_magnitudes(rng, size + 8, average)[offsets[0] : offsets[0] + size]
    v = of_many_magnitudes(rng, size + 8, value)[offsets[1] : offsets[1] + size]
    expected = oracle.update(a, v, 0.9)
    fastema.update(a, v, 0.9)
    assert oracle.same_bits(a, expected)


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 16])
def test_a_list_of_many_sizes_is_its_arrays_one_by_one(rng, threads):
    sizes = [0, 5, 70_000, 1, 64, 65_536, 3, 200_001, 0, 17]
    mixes = [MIXES[i % len(MIXES)] for i in range(len(sizes))]
    averages = [of_many_magnitudes(rng, n, a) for n, (a, _) in zip(sizes, mixes, strict=True)]
    values = [of_many_magnitudes(rng, n, v) for n, (_, v) in zip(sizes, mixes, strict=True)]
    expected = [oracle.update(a, v, 0.99) for a, v in zip(averages, values, strict=True)]
    fastema.update(averages, values, 0.99, threads=threads)
    assert all(oracle.same_bits(a, e) for a, e in zip(averages, expected, strict=True))


@pytest.mark.parametrize(("average", "value"), MIXES)
@given(data=st.data())
def test_any_bytes_average_as_in_numpy(average, value, data):
    size = data.draw(st.integers(0, 70))

    def draw(dtype):
        count = size * np.dtype(dtype).itemsize
        return np.frombuffer(data.draw(st.binary(min_size=count, max_size=count)), dtype).copy()

    a, v = draw(average), draw(value)
    decay = data.draw(st.floats(0, 1))
    expected = oracle.update(a, v, decay)
    fastema.update(a, v, decay)
    assert oracle.same_bits(a, expected)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
@pytest.mark.parametrize("role", ["average", "value"])
def test_all_65536_patterns_of_16_bits_in_both_roles(rng, dtype, role):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    others = [np.full(2**16, x, dtype) for x in (0.0, 1.5, -6e-6, 6e4, np.inf, np.nan)]
    for other in (*others, rng.permutation(every)):
        a, v = (every, other) if role == "average" else (other, every)
        for decay in (0.0, 0.5, 0.9, 0.999, 1.0):
            average = a.copy()
            fastema.update(average, v, decay)
            assert oracle.same_bits(average, oracle.update(a, v, decay))
        if role == "value":
            for wider in (np.float32, np.float64):
                with np.errstate(invalid="ignore"):  # signalling NaN
                    average = a.astype(wider)
                expected = oracle.update(average, v, 0.9)
                fastema.update(average, v, 0.9)
                assert oracle.same_bits(average, expected)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_float32_values_at_and_around_every_tie_round_as_in_numpy(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(all="ignore"):
        wide = every.astype(np.float32)
        up = np.roll(every, -1).astype(np.float32)
        ties = ((wide.astype(np.float64) + up) / 2).astype(np.float32).view(np.uint32)
    v = np.concatenate([wide.view(np.uint32), *(ties + np.uint32(d) for d in (-1 % 2**32, 0, 1))])
    v = v.view(np.float32)
    with np.errstate(all="ignore"):
        twice = 2 * v
    for value, decay in ((v, 0.0), (twice, 0.5)):
        a = np.zeros(v.size, dtype)
        expected = oracle.update(a, value, decay)
        fastema.update(a, value, decay)
        assert oracle.same_bits(a, expected)


def test_lists_larger_than_caches_have_the_same_bits(rng):
    """They take other loops, which ask for memory ahead of its use."""
    for average, value in MIXES:
        a, v = (rng.standard_normal(10_000_019, np.float32).astype(t) for t in (average, value))
        expected = oracle.update(a, v, 0.99)
        fastema.update(a, v, 0.99)
        assert oracle.same_bits(a, expected), (average, value)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_decay_of_zero_copies_every_bit(dtype):
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    v = np.array([1.0, -0.0, np.inf, np.nan, 6e-8, 6e4], dtype)
    v.view(bits)[3] |= bits.type(5)  # a NaN's payload
    a = np.array([1e4, 1e4, np.nan, 0.0, np.inf, 1.0], dtype)
    fastema.update(a, v, 0.0)
    assert (a.view(bits) == v.view(bits)).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_decay_of_one_still_lets_a_nan_through(dtype):
    a = np.array([1.0, 2.0], dtype)
    fastema.update(a, np.array([np.nan, 5.0], dtype), 1.0)
    assert np.isnan(float(a[0]))
    assert a[1] == 2.0


def test_the_weight_is_formed_in_float64():
    # float32(1) - float32(0.99) is 0.00999999046, a ratio of 1e-6 off
    a = np.zeros(1, np.float32)
    fastema.update(a, np.ones(1, np.float32), 0.99)
    assert a[0] == np.float32(1.0 - 0.99)


@pytest.mark.parametrize("order", ["C", "F"])
def test_dense_arrays_in_any_order(rng, order):
    a = np.asarray(rng.standard_normal((3, 4, 5)), order=order)
    v = np.asarray(rng.standard_normal((3, 4, 5)), order=order)
    expected = oracle.update(a, v, 0.5)
    fastema.update(a, v, 0.5)
    assert oracle.same_bits(a, expected)


def test_permuted_axes_and_axes_of_length_one(rng):
    a, v = (rng.standard_normal((2, 3, 4)).transpose(1, 0, 2)[:, None] for _ in range(2))
    expected = oracle.update(a, v, 0.5)
    fastema.update(a, v, 0.5)
    assert oracle.same_bits(a, expected)


def test_scalars_arrays_without_elements_and_no_arrays():
    a = np.array(1.0)
    fastema.update(a, np.array(2.0), 0.5)
    assert a == 1.5
    fastema.update(np.zeros((0, 3)), np.zeros((0, 3)), 0.5)
    fastema.update([], [], 0.5)


def test_values_may_be_read_only_and_shared(rng):
    v = rng.standard_normal(10)
    v.flags.writeable = False
    averages = [np.zeros(10), np.ones(10)]
    expected = [oracle.update(a, v, 0.5) for a in averages]
    fastema.update(averages, [v, v], 0.5)
    assert all(oracle.same_bits(a, e) for a, e in zip(averages, expected, strict=True))


def test_pairs_see_new_contents_and_keep_their_arrays_alive(rng):
    a, v = np.zeros(100), rng.standard_normal(100)
    pairs = fastema.Pairs([a], [v.copy()])  # nobody else holds this value
    assert len(pairs) == 1
    expected = a.copy()
    for _ in range(3):
        expected = oracle.update(expected, v, 0.9)
        pairs.update(0.9)
    assert oracle.same_bits(a, expected)


def test_several_averages_of_the_same_values_are_those_averages_one_by_one(rng):
    values = [rng.standard_normal(n).astype(np.float32) for n in (5, 0, 100_003, 64)]
    decays, dtypes = [0.9, 0.999, 0.0], [np.float32, np.float64, np.float32]
    lists = [[rng.standard_normal(v.size).astype(dtype) for v in values] for dtype in dtypes]
    expected = [
        [oracle.update(a, v, decay) for a, v in zip(averages, values, strict=True)]
        for averages, decay in zip(lists, decays, strict=True)
    ]
    pairs = fastema.Pairs.several(lists, values)
    assert len(pairs) == len(values)
    pairs.update(decays, threads=2)
    for averages, right in zip(lists, expected, strict=True):
        assert all(oracle.same_bits(a, e) for a, e in zip(averages, right, strict=True))


def test_a_memory_mapped_average(tmp_path, rng):
    a = np.memmap(tmp_path / "average", np.float32, "w+", shape=1000)
    v = rng.standard_normal(1000).astype(np.float32)
    expected = oracle.update(a, v, 0.5)
    fastema.update(a, v, 0.5)
    a.flush()
    assert oracle.same_bits(np.fromfile(tmp_path / "average", np.float32), expected)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux",
    reason="sets flush-to-zero through the layout of glibc's fenv_t on x86-64",
)
def test_subnormals_are_kept_on_a_thread_that_flushes_them():
    """Frameworks set flush-to-zero on their own threads; an average has the same bits there."""
    tiny = np.full(40, 3e-44, np.float32)
    expected = oracle.update(np.zeros(40, np.float32), tiny, 0.5)
    libm = ctypes.CDLL("libm.so.6")
    saved, flushing = ctypes.create_string_buffer(32), ctypes.create_string_buffer(32)
    libm.fegetenv(saved)
    flushing.raw = saved.raw
    mxcsr = int.from_bytes(saved.raw[28:32], "little") | 0x8040  # FTZ and DAZ
    flushing[28:32] = mxcsr.to_bytes(4, "little")
    a, b = np.zeros(40, np.float32), np.zeros(40, np.float32)
    try:
        libm.fesetenv(flushing)
        fastema.update(a, tiny, 0.5)
        np.multiply(tiny, np.float32(0.5), out=b)  # what the flag does to others
    finally:
        libm.fesetenv(saved)
    assert expected[0] > 0
    assert b[0] == 0, "flush-to-zero was not on: the test proves nothing"
    assert oracle.same_bits(a, expected)
