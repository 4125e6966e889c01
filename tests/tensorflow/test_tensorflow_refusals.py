"""What `fastema.tensorflow` refuses: types that lose bits, decays out of range, other libraries' arrays."""

import re

import numpy as np
import pytest
import tensorflow as tf

import fastema.tensorflow as engines
from modes import run

ENGINES = ["auto", "native", "graph"]
ODD = {
    "int64": np.array([2**40 + 1, 3]),
    "int8": np.array([1, 2], np.int8),
    "bool": np.array([True, False]),
    "complex64": np.array([1 + 2j, 3j], np.complex64),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("odd", ODD)
def test_integers_booleans_and_complex_numbers_are_refused_and_nothing_changes(odd, mode, engine):
    """They lost their imaginary parts and what of them float32 does not hold, without a word."""
    array = ODD[odd]
    average, value = tf.Variable(array), tf.Variable(array[::-1])
    plain = tf.Variable([1.0, 2.0]), tf.Variable([3.0, 4.0])
    for averages, values, name in [
        ([plain[0], average], [plain[1], value], "averages[1]"),
        ([plain[0]], [value], "values[0]"),
        ([plain[0]], [tf.constant(array)], "values[0]"),
    ]:
        words = re.escape(f"{name} must be of a floating-point type, got {odd}")
        with pytest.raises(TypeError, match=words):
            run(mode, lambda a=averages, v=values: engines.update(a, v, 0.5, engine=engine))
    assert average.numpy().tolist() == array.tolist()
    assert plain[0].numpy().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", [tf.int32, tf.bool, tf.complex64])
def test_a_decay_of_another_than_a_floating_type_is_refused(kind):
    average = tf.Variable([1.0])
    with pytest.raises(TypeError, match=f"decay must be of a floating-point type, got {kind.name}"):
        engines.update([average], [tf.ones(1)], tf.cast(1, kind))


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_several_decays_are_refused(mode):
    average = tf.Variable([1.0, 2.0])
    with pytest.raises(ValueError, match=re.escape("decay must be a scalar, got shape (2,)")):
        run(mode, lambda: engines.update([average], [tf.ones(2)], tf.constant([0.5, 0.25])))
    assert average.numpy().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [tf.constant, tf.Variable])
@pytest.mark.parametrize("decay", [2.0, -1.0, float("nan"), 1.0000001])
def test_a_tensor_outside_of_0_to_1_is_refused_as_a_number_is(decay, kind, engine):
    average = tf.Variable([1.0])
    with pytest.raises(ValueError, match="decay must be from 0 to 1, got"):
        engines.update([average], [tf.zeros(1)], kind(decay), engine=engine)
    assert average.numpy() == 1.0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("decay", [2.0, -1.0, float("nan"), 1.0000001])
def test_a_graph_refuses_such_a_decay_when_it_runs(decay, engine):
    average = tf.Variable([1.0])

    @tf.function
    def step(decay):
        engines.update([average], [tf.zeros(1)], decay, engine=engine)

    step(tf.constant(0.5))
    with pytest.raises(tf.errors.InvalidArgumentError, match="decay must be from 0 to 1"):
        step(tf.constant(decay))
    assert average.numpy() == 0.5
    step(tf.constant(0.5))
    assert average.numpy() == 0.25


@pytest.mark.parametrize("decay", [2.0, -1.0, float("nan")])
def test_what_xla_compiled_leaves_averages_as_they_are_under_such_a_decay(decay):
    """XLA drops assertions: they became 2.0, -1.0 and NaN times too much of everything."""
    average = tf.Variable([1.0, 3.0])

    @tf.function(jit_compile=True)
    def step(decay):
        engines.update([average], [tf.zeros(2)], decay)

    step(tf.constant(decay))
    assert average.numpy().tolist() == [1.0, 3.0]
    step(tf.constant(0.5))
    assert average.numpy().tolist() == [0.5, 1.5]


@pytest.mark.parametrize("engine", ENGINES)
def test_numpy_arrays_are_refused_by_the_name_of_what_averages_them(engine):
    """It was an AttributeError: 'tuple' object has no attribute 'is_compatible_with'."""
    average, value = np.ones(2, np.float32), tf.ones(2)
    words = re.escape("averages[0] must be a tf.Variable, got ndarray; fastema.update takes other arrays")
    with pytest.raises(TypeError, match=words):
        engines.update([average], [value], 0.5, engine=engine)
    with pytest.raises(TypeError, match=re.escape("averages[0] must be a tf.Variable, got EagerTensor")):
        engines.update(tf.Variable([1.0, 2.0]), [1.0, 2.0], 0.5)  # no list
    with pytest.raises(TypeError, match=re.escape("values[0] must be a tf.Variable or a tensor, got list")):
        engines.update([tf.Variable([1.0])], [[1.0]], 0.5, engine=engine)
    words = re.escape("b[0] must be a tf.Variable, got ndarray; fastema.swap takes other arrays")
    with pytest.raises(TypeError, match=words):
        engines.swap([tf.Variable([1.0, 2.0])], [average])
    assert average.tolist() == [1.0, 1.0]


def test_a_value_with_a_mask_is_refused():
    """TensorFlow drops it."""
    masked, average = np.ma.array([1.0, 2.0], np.float32, mask=[False, True]), tf.Variable([0.0, 0.0])
    with pytest.raises(TypeError, match=re.escape("values[0] must be an array without a mask")):
        engines.update([average], [masked], 0.5)
    assert average.numpy().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("counts", [(3, 1), (1, 3), (2, 1), (1, 2)])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_the_raw_op_refuses_lists_of_two_lengths(mode, counts):
    """Without the Python around it: an average was taken for a value, and one output never made."""
    operations = engines._operations()
    averages, values = ([tf.Variable([float(i)]) for i in range(count)] for count in counts)
    decay = tf.constant(0.5, tf.float64)

    def call():
        read = [value.read_value() for value in values]
        if hasattr(operations, "fastema_update_in_place"):
            handles = [average.handle for average in averages]
            operations.fastema_update_in_place(decay=decay, averages=handles, values=read)
            return None
        made = operations.fastema_update(
            decay=decay, averages=[average.read_value() for average in averages], values=read
        )
        return list(made)

    words = f"averages and values must have one length, got {counts[0]} and {counts[1]}"
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        run(mode, call)
    assert [average.numpy() for average in averages] == list(range(counts[0]))
