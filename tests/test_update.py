"""fastema.update and Pairs.update: the bits of NumPy, always."""

import ctypes
import platform
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
import oracle

pytestmark = pytest.mark.usefixtures("every_instruction_set")

TYPES = [np.float32, np.float64]
PIECE = 256 << 10  # bytes: how the core cuts large arrays
SIZES = [0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000]


def of_many_magnitudes(rng, size, dtype):
    return (rng.standard_normal(size) * 10.0 ** rng.integers(-12, 12, size)).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_update_has_numpys_bits_around_every_vector_and_piece(rng, dtype, threads):
    per_piece = PIECE // np.dtype(dtype).itemsize
    for size in [*SIZES, per_piece - 1, per_piece, per_piece + 1, 3 * per_piece + 17]:
        a, v = of_many_magnitudes(rng, size, dtype), of_many_magnitudes(rng, size, dtype)
        expected = oracle.update(a, v, 0.999)
        fastema.update(a, v, 0.999, threads=threads)
        assert oracle.same_bits(a, expected), size


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 1), (3, 5)])
def test_alignment_changes_no_bit(rng, dtype, offsets):
    size = 1001
    a, v = (of_many_magnitudes(rng, size + 8, dtype)[o : o + size] for o in offsets)
    expected = oracle.update(a, v, 0.9)
    fastema.update(a, v, 0.9)
    assert oracle.same_bits(a, expected)


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 16])
def test_a_list_of_many_sizes_is_its_arrays_one_by_one(rng, threads):
    sizes = [0, 5, 70_000, 1, 64, 65_536, 3, 200_001, 0, 17]
    dtypes = [TYPES[i % 2] for i in range(len(sizes))]
    averages = [of_many_magnitudes(rng, n, d) for n, d in zip(sizes, dtypes, strict=True)]
    values = [of_many_magnitudes(rng, n, d) for n, d in zip(sizes, dtypes, strict=True)]
    expected = [oracle.update(a, v, 0.99) for a, v in zip(averages, values, strict=True)]
    fastema.update(averages, values, 0.99, threads=threads)
    assert all(oracle.same_bits(a, e) for a, e in zip(averages, expected, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@given(data=st.data())
def test_any_bytes_average_as_in_numpy(dtype, data):
    itemsize = np.dtype(dtype).itemsize
    size = data.draw(st.integers(0, 70))
    raw = st.binary(min_size=size * itemsize, max_size=size * itemsize)
    a = np.frombuffer(data.draw(raw), dtype).copy()
    v = np.frombuffer(data.draw(raw), dtype)
    decay = data.draw(st.floats(0, 1))
    expected = oracle.update(a, v, decay)
    fastema.update(a, v, decay)
    assert oracle.same_bits(a, expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_decay_of_zero_copies_every_bit(dtype):
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    v = np.array([1.0, -0.0, np.inf, np.nan, 1e-45, 1e30], dtype)
    v.view(bits)[3] |= 12345  # a NaN's payload
    a = np.array([1e8, 1e8, np.nan, 0.0, np.inf, 1.0], dtype)
    fastema.update(a, v, 0.0)
    assert (a.view(bits) == v.view(bits)).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_decay_of_one_still_lets_a_nan_through(dtype):
    a = np.array([1.0, 2.0], dtype)
    fastema.update(a, np.array([np.nan, 5.0], dtype), 1.0)
    assert np.isnan(a[0])
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
