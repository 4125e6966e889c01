"""NumPy's bits where XLA compiles an update: it fuses operations, and leaves roundings out, where it can."""

import numpy as np
import pytest
import tensorflow as tf

import fastema.tensorflow as engines
import oracle
from fastema import _formula
from mixes import MIXES, bfloat16
from modes import run
from processes import output_of

SIZE = 1_000_000  # of which 2,600 differ if a product and a sum are fused


def arrays(rng, average_type, value_type):
    return [rng.standard_normal(SIZE, np.float32).astype(t) for t in (average_type, value_type)]


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "tensor"])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 1.0])
@pytest.mark.parametrize(("average_type", "value_type"), [*MIXES, (np.float32, np.float64)])
def test_every_mix_of_types_has_numpys_bits(rng, average_type, value_type, decay, constant):
    a, v = arrays(rng, average_type, value_type)
    average, value = tf.Variable(a), tf.Variable(v)
    given = decay if constant else tf.Variable(decay, dtype=tf.float64)
    said = []
    run("xla", lambda: said.append(engines.update([average], [value], given)))
    assert said == ["graph"]
    assert oracle.same_bits(average.numpy(), oracle.update(a, v, decay))


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64], ids=lambda x: x.name)
def test_xla_does_fuse_what_is_not_kept_from_it(rng, dtype):
    """If this fails, XLA fuses no longer: what keeps it from that can go."""
    a, v = arrays(rng, dtype.as_numpy_dtype, dtype.as_numpy_dtype)
    weight, copies = _formula.weigh(tf.constant(0.999, tf.float64), tf.equal)

    def blended(bitcast):
        lists, how = (tf.constant(a), tf.constant(v)), {"cast": tf.cast, "where": tf.where}
        return run(
            "xla", lambda: _formula.blend(*lists, weight, copies, compute=dtype, bitcast=bitcast, **how)
        ).numpy()

    expected = oracle.update(a, v, 0.999)
    assert np.count_nonzero(blended(None) != expected) > SIZE / 1000
    assert oracle.same_bits(blended(tf.bitcast), expected)


@pytest.mark.parametrize("value_type", [bfloat16, np.float16])
def test_a_weight_that_was_just_computed_is_averaged_as_it_stays(rng, value_type):
    """Of the sum before it is rounded to bfloat16: two of three elements were averaged so."""
    a, v = arrays(rng, np.float32, value_type)
    change = rng.standard_normal(SIZE, np.float32).astype(value_type)
    average, value = tf.Variable(a), tf.Variable(v)

    def step():
        value.assign_add(tf.constant(change) * tf.cast(0.3, value.dtype))
        engines.update([average], [value], 0.9)

    run("xla", step)
    assert not oracle.same_bits(value.numpy(), v)
    assert oracle.same_bits(average.numpy(), oracle.update(a, value.numpy(), 0.9))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, bfloat16])
def test_updates_in_a_row_have_numpys_bits(rng, dtype):
    a, v = arrays(rng, dtype, dtype)
    average, value = tf.Variable(a), tf.Variable(v)
    run("xla", lambda: [engines.update([average], [value], decay) for decay in (0.9, 0.3)] and None)
    assert oracle.same_bits(average.numpy(), oracle.update(oracle.update(a, v, 0.9), v, 0.3))


def test_a_graph_that_is_compiled_later_has_numpys_bits(rng):
    a, v = arrays(rng, np.float32, np.float32)
    average, value = tf.Variable(a), tf.Variable(v)
    inner = tf.function(lambda: engines.update([average], [value], 0.999, engine="graph") and None)
    inner.get_concrete_function()
    run("xla", inner)
    assert oracle.same_bits(average.numpy(), oracle.update(a, v, 0.999))


CLUSTERED = """
    import numpy as np
    import tensorflow as tf

    import fastema.tensorflow as engines
    import oracle
    from fastema import _formula

    rng = np.random.default_rng(0)
    a, v = rng.standard_normal((2, 1_000_000)).astype(np.float32)

    def differing(value, of=lambda: tf.Variable(a), **arguments):
        average = of()
        tf.function(lambda: engines.update([average], [value], 0.999, **arguments) and None)()
        print(np.count_nonzero(average.numpy() != oracle.update(a, value.numpy(), 0.999)))

    def of_a_strategy():
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
            return tf.Variable(a)

    same, other = tf.Variable(v), tf.Variable(v, dtype=tf.float64)
    differing(same)
    differing(same, engine="graph")
    differing(same, of_a_strategy)
    differing(other)  # offered by no native code
    differing(other, when=tf.Variable(True))

    how = {"compute": tf.float32, "cast": tf.cast, "where": tf.where}
    weight, copies = _formula.weigh(tf.constant(0.999, tf.float64), tf.equal)
    average = tf.Variable(a)
    plain = tf.function(lambda: _formula.blend(average, same, weight, copies, **how))()
    print(np.count_nonzero(plain.numpy() != oracle.update(a, v, 0.999)) > 1000)
"""


def test_what_xla_clusters_of_itself_has_numpys_bits():
    """The last line says that it does: it fuses what is not kept from it."""
    flags = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit"
    said = output_of(CLUSTERED, TF_XLA_FLAGS=flags).split("\n")
    assert said == ["0", "0", "0", "0", "0", "True"]


def test_copies_are_exact_whatever_the_bits():
    every = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (np.float16, bfloat16):
        average, value = tf.Variable(tf.zeros(1 << 16, dtype)), tf.Variable(every.view(dtype))
        run("xla", lambda average=average, value=value: engines.update([average], [value], 0.0) and None)
        assert oracle.same_bits(average.numpy(), every.view(dtype))
    tiny = np.float32([1e-45, -1e-40, np.inf, -0.0])
    average, value = tf.Variable(np.float32([np.nan, 1e38, np.inf, 1])), tf.Variable(tiny)
    run("xla", lambda: engines.update([average], [value], 0.0) and None)
    assert oracle.same_bits(average.numpy(), tiny)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("average_type", [np.float16, np.float32])
def test_every_float16_is_averaged_as_by_numpy(rng, average_type, mode):
    """Subnormal ones too: they are normal numbers of float32."""
    every = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaN
        start = rng.permutation(every).view(np.float16).astype(average_type)
    average, value = tf.Variable(start), tf.Variable(every.view(np.float16))
    run(mode, lambda: engines.update([average], [value], 0.9, engine="graph") and None)
    assert oracle.same_bits(average.numpy(), oracle.update(start, every.view(np.float16), 0.9))


def test_subnormals_are_zeros():
    """TensorFlow has XLA's code run so; the native op keeps them."""
    average = tf.Variable(np.float32([1e-40]))
    run("xla", lambda: engines.update([average], [tf.constant([3e-40])], 0.5) and None)
    assert average.numpy() == 0
