"""fastema.EMA with variables of TensorFlow, and of Keras on every backend."""

import numpy as np
import pytest

import fastema
from processes import output_of, skip_without

KERAS = """
    import numpy as np
    import keras
    import fastema, oracle

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    variables = model.trainable_variables
    ema = fastema.EMA(variables, 0.9)
    expected = [keras.ops.convert_to_numpy(v).copy() for v in variables]
    rng = np.random.default_rng(0)
    for _ in range(3):
        model.train_on_batch(rng.standard_normal((8, 4)), rng.standard_normal((8, 2)))
        ema.update()
        values = [keras.ops.convert_to_numpy(v).copy() for v in variables]
        expected = [oracle.update(a, v, 0.9) for a, v in zip(expected, values)]
    assert all(oracle.same_bits(keras.ops.convert_to_numpy(a), e) for a, e in zip(ema.averages, expected))
    assert type(ema.averages[0]) is not np.ndarray
    with ema.swapped():
        assert all(oracle.same_bits(keras.ops.convert_to_numpy(v), e) for v, e in zip(variables, expected))
    assert all(oracle.same_bits(keras.ops.convert_to_numpy(v), x) for v, x in zip(variables, values))
    model.train_on_batch(rng.standard_normal((8, 4)), rng.standard_normal((8, 2)))
    ema.update()
    ema.copy_to()
    print(np.allclose(keras.ops.convert_to_numpy(variables[0]), keras.ops.convert_to_numpy(ema.averages[0])))
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_variables_of_keras_are_averaged_and_swapped(backend):
    skip_without("keras")
    skip_without(backend)
    assert output_of(KERAS, KERAS_BACKEND=backend) == "True"


def test_variables_of_tensorflow_of_every_type():
    tf = pytest.importorskip("tensorflow")
    dtypes = [tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.int64, tf.bool]
    variables = [tf.Variable(tf.cast([1, 0, 3], dtype)) for dtype in dtypes]
    ema = fastema.EMA(variables, 0.5)
    for variable in variables:
        variable.assign(tf.cast([0, 1, 7], variable.dtype))
    ema.update()
    averages = ema.averages
    assert [average.dtype for average in averages[:2]] == [tf.float32, tf.float32]
    assert all(average.numpy().tolist() == [0.5, 0.5, 5.0] for average in averages[:4])
    assert averages[4].numpy().tolist() == [0, 1, 7]
    assert averages[5].numpy().tolist() == [False, True, True]
    with ema.swapped():
        assert all(variable.numpy().tolist() == [0.5, 0.5, 5.0] for variable in variables[:4])
        ema_state = ema.state_dict()
    assert all(variable.numpy().tolist() == [0, 1, 7] for variable in variables[:5])
    assert ema_state["values"]["2"].tolist() == [0, 1, 7]


def test_what_was_read_of_a_variable_of_tensorflow_before_never_changes():
    tf = pytest.importorskip("tensorflow")
    variable = tf.Variable(tf.zeros(1000))
    ema = fastema.EMA([variable], 0.5)
    variable.assign_add(tf.ones(1000))
    ema.update()
    read, shown = variable.read_value(), ema.averages[0]
    ema.swap()
    assert read.numpy()[0] == 1
    ema.swap()
    variable.assign_add(tf.ones(1000))
    ema.update()
    assert read.numpy()[0] == 1
    assert shown.numpy()[0] == 0.5


def test_a_module_is_refused_with_what_to_give_instead():
    tf = pytest.importorskip("tensorflow")
    with pytest.raises(TypeError, match=r"values must be an array, .* got Module: give its variables"):
        fastema.EMA(tf.Module())


def test_variables_within_a_graph_are_refused_and_no_step_is_counted():
    tf = pytest.importorskip("tensorflow")
    for count in (1, 2):
        ema = fastema.EMA([tf.Variable(0.0) for _ in range(count)])
        with pytest.raises(RuntimeError, match=r"can be read only outside of tf.function"):
            tf.function(ema.update, autograph=False)()
        assert ema.step == 0


def test_variables_of_texts_are_refused_by_name():
    """Asked for their memory, TensorFlow aborts the process."""
    tf = pytest.importorskip("tensorflow")
    with pytest.raises(TypeError, match=r"values\['vocabulary'\] must be of numbers, got string"):
        fastema.EMA({"vocabulary": tf.Variable(["a", "b"])})


def test_new_values_are_read_in_place_of_variables_one_or_all():
    tf = pytest.importorskip("tensorflow")
    variables = [tf.Variable([0.0]), tf.Variable([0.0])]
    ema = fastema.EMA(variables, 0.5)
    variables[1].assign([2.0])
    ema.update()
    ema.update([tf.constant([4.0]), variables[1]])
    ema.update([tf.constant([4.0]), tf.constant([0.5])])
    assert [average.numpy().tolist() for average in ema.averages] == [[3.0], [1.0]]


def test_a_new_value_with_a_mask_is_refused():
    tf = pytest.importorskip("tensorflow")
    ema = fastema.EMA([tf.Variable([0.0, 0.0])], 0.5)
    with pytest.raises(TypeError, match="values must be an array without a mask"):
        ema.update([np.ma.array([1.0, 2.0], np.float32, mask=[False, True])])
    assert ema.step == 0
