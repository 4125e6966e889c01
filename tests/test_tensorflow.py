"""Averaging tf.Variables: NumPy's bits, and never a write into memory that TensorFlow shares."""

import re
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf

import fastema
import fastema.tensorflow as engines
import oracle
from processes import output_of

MODES = ["eager", "graph", "xla"]


def run(mode, function):
    if mode == "eager":
        return function()
    return tf.function(function, jit_compile=mode == "xla")()


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
@pytest.mark.parametrize(
    ("average_type", "value_type"),
    [("float32", "bfloat16"), ("float32", "float16"), ("float64", "float32"), ("bfloat16", "bfloat16")],
)
def test_mixed_types_have_numpys_bits(rng, mode, average_type, value_type):
    average = tf.Variable(tf.cast(rng.standard_normal(1001), average_type))
    value = tf.Variable(tf.cast(rng.standard_normal(1001), value_type))
    expected = oracle.update(average.numpy(), value.numpy(), 0.9)
    said = []
    run(mode, lambda: said.append(engines.update([average], [value], 0.9)))
    assert said == ["native"]
    assert oracle.same_bits(average.numpy(), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_framework_update_is_the_same_within_a_unit_in_the_last_place(lists, mode, decay):
    averages, values = [[tf.Variable(x) for x in arrays] for arrays in lists]
    said = []
    run(mode, lambda: said.append(engines.update(averages, values, decay, engine="graph")))
    assert said == ["graph"]
    for average, a, v in zip(averages, *lists, strict=True):
        # XLA fuses a multiplication with an addition; the difference is of the terms' last place
        last_place = np.spacing(np.maximum(np.abs(a), np.abs(v)))
        assert (np.abs(average.numpy() - oracle.update(a, v, decay)) <= 2 * last_place).all()


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


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_nobody_who_shares_the_buffer_sees_an_update_or_a_swap(mode):
    """A variable shares its buffer with what was read from it, and with what it was made from."""
    constant = tf.constant(np.full(1000, 3.0, np.float32))
    average, twin = tf.Variable(constant), tf.Variable(constant)
    value = tf.Variable(tf.zeros(1000))
    held = [average.read_value(), tf.identity(average), average.value(), constant]
    view = np.asarray(memoryview(average.read_value()))
    run(mode, lambda: engines.update([average], [value], 0.5) and None)
    run(mode, lambda: engines.swap([average], [value]))
    assert (value.numpy() == 1.5).all()
    assert (average.numpy() == 0).all()
    assert all((x.numpy() == 3).all() for x in [*held, twin])
    assert (view == 3).all()


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_gradient_sees_the_value_that_was_read(mode):
    average, value = tf.Variable([2.0]), tf.Variable([100.0])

    def gradient():
        with tf.GradientTape() as tape:
            y = average * average
            engines.update([average], [value], 0.0)
        return tape.gradient(y, average)

    assert run(mode, gradient).numpy() == 4.0


def test_a_decay_may_be_a_tensor():
    for decay in (0.75, tf.constant(0.75), tf.constant(0.75, tf.float64), tf.Variable(0.75)):
        average = tf.Variable([1.0])
        engines.update([average], [tf.Variable([2.0])], decay)
        assert average.numpy() == 1.25


def test_reads_and_writes_keep_their_order_in_a_graph():
    average, value = tf.Variable([0.0]), tf.Variable([0.0])

    @tf.function
    def chain():
        before = average.read_value()
        value.assign_add([1.0])
        engines.update([average], [value], 0.5)
        middle = average.read_value()
        value.assign_add([1.0])
        engines.update([average], [value], 0.5)
        return before, middle, average.read_value()

    a = v = 0.0
    for _ in range(200):
        b = a + 0.5 * (v + 1 - a)
        c = b + 0.5 * (v + 2 - b)
        assert [float(x.numpy()[0]) for x in chain()] == [np.float32(a), np.float32(b), np.float32(c)]
        a, v = float(np.float32(c)), v + 2


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
    with pytest.raises(ValueError, match="engine must be 'auto', 'native' or 'graph', got 'cuda'"):
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


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_lists_larger_than_caches_have_numpys_bits(rng, mode):
    """They are written past the caches."""
    a, v = (rng.standard_normal(2_300_001).astype(np.float32) for _ in range(2))
    average, value = tf.Variable(a), tf.Variable(v)
    run(mode, lambda: engines.update([average], [value], 0.9))
    assert oracle.same_bits(average.numpy(), oracle.update(a, v, 0.9))
    assert oracle.same_bits(value.numpy(), v)


def test_a_reader_in_another_thread_never_sees_half_an_update():
    """All elements are alike, before and after each update."""
    average, value = tf.Variable(tf.zeros(3_000_000)), tf.Variable(tf.ones(3_000_000))
    update = tf.function(lambda: engines.update([average], [value], 0.999, engine="native") and None)
    update()
    torn, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            seen = average.read_value().numpy()
            torn.append(bool(seen[0] != seen[-1] or seen.min() != seen.max()))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while len(torn) < 300:
            update()
    finally:
        stop.set()
        reader.join()
    assert not any(torn)


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and counts Linux' page faults")
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
        step = tf.function(lambda: engines.update(averages, values, 0.5, engine="native") and None)
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
