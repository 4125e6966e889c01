"""Averaging and swapping tf.Variables: NumPy's bits, whichever engine there is, and what is refused."""

import re

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import fastema
import fastema.tensorflow as engines
import oracle
from mixes import MIXES
from modes import run
from processes import LINUX_ONLY, output_of

MODES = ["eager", "graph", "xla"]


@pytest.fixture(params=[np.float32, np.float64])
def lists(request, rng):
    shapes = [(), (7,), (33, 5), (0, 2), (70_000,)]
    return [[rng.standard_normal(s).astype(request.param) for s in shapes] for _ in range(2)]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_native_update_has_numpys_bits(lists, mode, decay):
    averages, values = [[tf.Variable(x) for x in arrays] for arrays in lists]
    said = []
    run(mode, lambda: said.append(engines.update(averages, values, decay)))
    assert said == ["native"]
    for average, a, v in zip(averages, *lists, strict=True):
        assert oracle.same_bits(average.numpy(), oracle.update(a, v, decay))


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("average_type", "value_type"), MIXES)
@pytest.mark.parametrize("size", [1001, 3_000_001])  # the second is written past the caches
def test_every_mix_of_types_has_numpys_bits(rng, mode, average_type, value_type, size):
    a, v = (rng.standard_normal(size, np.float32).astype(t) for t in (average_type, value_type))
    average, value = tf.Variable(a), tf.Variable(v)
    said = []
    run(mode, lambda: said.append(engines.update([average], [value], 0.9, engine="native")))
    assert said == ["native"]
    assert oracle.same_bits(average.numpy(), oracle.update(a, v, 0.9))
    assert oracle.same_bits(value.numpy(), v)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@given(data=st.data())
@settings(max_examples=25)
def test_lists_of_any_types_shapes_and_bytes_have_numpys_bits(mode, data):
    shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(MIXES), shapes), min_size=1, max_size=5))

    def draw(dtype, shape):
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array = np.frombuffer(data.draw(st.binary(min_size=count, max_size=count)), dtype)
        return array.reshape(shape)

    pairs = [(draw(a, shape), draw(v, shape)) for (a, v), shape in drawn]
    averages, values = ([tf.Variable(x) for x in arrays] for arrays in zip(*pairs, strict=True))
    decay = data.draw(st.floats(0, 1))

    def both():
        engines.update(averages, values, decay, engine="native")
        engines.update(averages, values, 0.5, engine="native")

    run(mode, both)
    for average, (a, v) in zip(averages, pairs, strict=True):
        assert oracle.same_bits(average.numpy(), oracle.update(oracle.update(a, v, decay), v, 0.5))


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_subnormals_are_kept_on_tensorflows_threads(mode):
    """TensorFlow sets flush-to-zero on them."""
    tiny = np.full(1_500_000, 3e-44, np.float32)
    averages, values = [tf.Variable(tf.zeros(tiny.size)) for _ in range(4)], [tf.Variable(tiny)] * 4

    def each():
        for average, value in zip(averages, values, strict=True):  # in a graph they run beside each other
            engines.update([average], [value], 0.5, engine="native")

    run(mode, each)
    expected = oracle.update(np.zeros_like(tiny), tiny, 0.5)
    assert expected[0] > 0
    assert all(oracle.same_bits(average.numpy(), expected) for average in averages)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_framework_update_has_numpys_bits(lists, mode, decay):
    averages, values = [[tf.Variable(x) for x in arrays] for arrays in lists]
    said = []
    run(mode, lambda: said.append(engines.update(averages, values, decay, engine="graph")))
    assert said == ["graph"]
    for average, a, v in zip(averages, *lists, strict=True):
        assert oracle.same_bits(average.numpy(), oracle.update(a, v, decay))


def test_engine_auto_leaves_xla_to_the_framework_and_native_refuses_it():
    average, value = tf.Variable([1.0]), tf.Variable([2.0])
    said = []
    run("xla", lambda: said.append(engines.update([average], [value], 0.5)))
    assert said == ["graph"]
    with pytest.raises(RuntimeError, match="engine='native' cannot run here: this is compiled by XLA"):
        run("xla", lambda: engines.update([average], [value], 0.5, engine="native"))


def test_types_without_a_native_kernel_go_to_the_framework():
    average, value = tf.Variable([1.0]), tf.Variable(tf.constant([2.0], tf.float64))
    assert engines.update([average], [value], 0.5) == "graph"
    assert average.numpy() == 1.5
    with pytest.raises(RuntimeError, match=re.escape("averages[0] is float32, values[0] float64")):
        engines.update([average], [value], 0.5, engine="native")


def test_a_decay_may_be_a_tensor():
    for decay in (0.75, tf.constant(0.75), tf.constant(0.75, tf.float64), tf.Variable(0.75)):
        average = tf.Variable([1.0])
        engines.update([average], [tf.Variable([2.0])], decay)
        assert average.numpy() == 1.25


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_swap_is_exact_and_its_own_inverse(rng, mode, dtype):
    x, y = (np.frombuffer(rng.bytes(800), dtype) for _ in range(2))
    a, b = tf.Variable(x), tf.Variable(y)
    run(mode, lambda: engines.swap([a], [b]))
    assert (a.numpy().tobytes(), b.numpy().tobytes()) == (y.tobytes(), x.tobytes())
    run(mode, lambda: engines.swap([a], [b]))
    assert (a.numpy().tobytes(), b.numpy().tobytes()) == (x.tobytes(), y.tobytes())


def test_bad_input_is_refused_and_nothing_changes():
    a, b, c = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 2.0, 3.0]), tf.Variable([0.0, 0.0])
    with pytest.raises(ValueError, match="averages and values must have one length, got 1 and 0"):
        engines.update([a], [], 0.5)
    with pytest.raises(
        ValueError, match=re.escape("averages[0] and values[0] must have one shape, got (2,) and (3,)")
    ):
        engines.update([a], [b], 0.5)
    with pytest.raises(ValueError, match="engine must be 'auto' or 'native' or 'graph', got 'cuda'"):
        engines.update([a], [c], 0.5, engine="cuda")
    with pytest.raises(ValueError, match="decay must be from 0 to 1, got nan"):
        engines.update([a], [c], float("nan"))
    with pytest.raises(
        ValueError, match=re.escape("a[0] and b[0] must have one type, got float32 and float64")
    ):
        engines.swap([a], [tf.Variable([1.0, 2.0], dtype=tf.float64)])
    twice = "averages must be different variables, got one at 0 and at 2"
    with pytest.raises(ValueError, match=twice):
        engines.update([a, b, a], [c, tf.Variable(b), c], 0.5)
    with pytest.raises(ValueError, match=re.escape("values[1] must be no average, got averages[0]")):
        engines.update([a, c], [tf.Variable(a), a], 0.5)
    with pytest.raises(ValueError, match="a and b together must be different variables"):
        engines.swap([a], [a])
    with pytest.raises(ValueError, match="bucket_bytes must be at least 1, got 0"):
        engines.update([a], [c], 0.5, bucket_bytes=0)
    assert a.numpy().tolist() == [1.0, 2.0]


def test_averaging_nothing_is_nothing():
    assert engines.update([], [], 0.5) == "native"
    engines.swap([], [])


def test_build_config_names_the_tier_that_the_library_found():
    in_place = hasattr(engines._operations(), "fastema_update_in_place")
    assert fastema.build_config()["tensorflow_op"] == ("locked" if in_place else "functional")


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("bucket_bytes", [1, 600, 1 << 30])
def test_buckets_change_no_bits(lists, mode, bucket_bytes):
    averages, values = [[tf.Variable(x) for x in arrays] for arrays in lists]
    run(mode, lambda: engines.update(averages, values, 0.9, bucket_bytes=bucket_bytes) and None)
    for average, a, v in zip(averages, *lists, strict=True):
        assert oracle.same_bits(average.numpy(), oracle.update(a, v, 0.9))


def test_a_library_that_cannot_be_loaded_is_said_once_and_the_framework_averages():
    code = """
        import warnings
        import tensorflow as tf
        import fastema.tensorflow as engines
        from pathlib import Path

        engines.OP_LIBRARY = Path("/nowhere/op.so")
        average = tf.Variable([0.0])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert [engines.update([average], [tf.ones(1)], 0.5) for _ in range(2)] == ["graph"] * 2
        assert len([w for w in said if "op.so cannot be loaded" in str(w.message)]) == 1, said
        assert average.numpy() == 0.75
        try:
            engines.update([average], [tf.ones(1)], 0.5, engine="native")
        except RuntimeError as error:
            assert "cannot be loaded" in str(error)
            print("fine")
    """
    assert output_of(code) == "fine"


@LINUX_ONLY
def test_new_averages_take_no_fresh_pages_step_after_step():
    """Without oneDNN, TensorFlow gives freed memory back to the system: a fault for every page."""
    code = """
        import gc, resource
        from pathlib import Path
        import tensorflow as tf
        import fastema.tensorflow as engines

        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        def resident():  # pages
            return int(Path("/proc/self/statm").read_text().split()[1])

        sizes = (8_000_000, 3, 4_000_000)
        pages = sum(sizes) * 4 // resource.getpagesize()
        averages = [tf.Variable(tf.zeros(size)) for size in sizes]
        values = [tf.Variable(tf.ones(size)) for size in sizes]
        step = tf.function(lambda: engines.update(averages, values, 0.5) and None)
        for _ in range(6):
            step()
        before, held = faults(), [average.read_value() for average in averages]
        for _ in range(2):
            step()
        assert faults() - before < 1.5 * pages, (faults() - before, pages)  # for what is held
        before = faults()
        for _ in range(4):
            step()
        assert faults() - before < pages / 4, (faults() - before, pages)
        assert all(bool(tf.reduce_all(x == 1 - 0.5**6)) for x in held)
        assert all(bool(tf.reduce_all(x == 1 - 0.5**12)) for x in averages)
        before = resident()
        del averages, values, held, step
        gc.collect()
        assert before - resident() > 3 * pages, (before - resident(), pages)  # averages, values, held
        print("fine")
    """
    assert output_of(code, TF_ENABLE_ONEDNN_OPTS="0") == "fine"
