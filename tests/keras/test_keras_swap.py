"""Weights and averages change places: exactly, and back on every way out."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import oracle
from keras_replay import assert_same_bits, averages_of, fit, problem, small_model, weights_of, wrap


@pytest.fixture
def trained():
    model = small_model()
    optimizer = wrap()
    fit(model, optimizer, epochs=1)
    return model, optimizer


def test_swap_exchanges_and_swap_twice_is_nothing(trained):
    model, optimizer = trained
    weights, averages = weights_of(model), averages_of(optimizer)
    optimizer.swap_weights()
    assert optimizer.is_swapped
    assert_same_bits(weights_of(model), averages)
    assert_same_bits(averages_of(optimizer), weights)
    optimizer.swap_weights()
    assert not optimizer.is_swapped
    assert_same_bits(weights_of(model), weights)
    assert_same_bits(averages_of(optimizer), averages)


def test_swap_in_a_graph(trained):
    model, optimizer = trained
    weights, averages = weights_of(model), averages_of(optimizer)
    swap = tf.function(optimizer.swap_weights)
    swap()
    assert optimizer.is_swapped
    assert_same_bits(weights_of(model), averages)
    swap()
    assert_same_bits(weights_of(model) + averages_of(optimizer), weights + averages)


def test_what_arithmetic_swaps_lose_comes_back():
    """The original swaps by a+b, a-b, a-b: 3e38 becomes inf, inf becomes NaN, half of all averages change."""
    values = np.array([1e8, 3e38, np.inf, np.nan, -0.0, 1e-45], np.float32)
    weight = keras.Variable(values)
    optimizer = wrap()
    optimizer.shadow_copy([weight])
    optimizer.variables[-1].assign(np.array([1e-8, -3e38, 1.0, 2.0, 0.0, 1e30], np.float32))
    average = averages_of(optimizer)[0].tobytes()
    optimizer.swap_weights()
    optimizer.swap_weights()
    assert weight.numpy().tobytes() == values.tobytes()
    assert averages_of(optimizer)[0].tobytes() == average


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_come_back_and_their_float32_averages_stay(dtype):
    weight = keras.Variable([1.0, 2.0, 3.0], dtype=dtype)
    optimizer = wrap()
    optimizer.shadow_copy([weight])
    optimizer.variables[-1].assign([1.0001, 2.0001, 3.0001])
    raw, average = weight.numpy(), averages_of(optimizer)[0]
    optimizer.swap_weights()
    assert_same_bits([weight.numpy()], [average.astype(raw.dtype)])
    optimizer.swap_weights()
    assert_same_bits([weight.numpy(), averages_of(optimizer)[0]], [raw, average])


def test_averaged_weights_evaluates_averages_and_restores(trained):
    model, optimizer = trained
    weights, averages = weights_of(model), averages_of(optimizer)
    with optimizer.averaged_weights():
        assert_same_bits(weights_of(model), averages)
        model.evaluate(*problem(), verbose=0)
    assert_same_bits(weights_of(model) + averages_of(optimizer), weights + averages)


def test_averaged_weights_restores_after_an_exception(trained):
    model, optimizer = trained
    weights = weights_of(model)
    with pytest.raises(KeyError), optimizer.averaged_weights():
        raise KeyError
    assert_same_bits(weights_of(model), weights)


def test_averaged_weights_leaves_weights_that_were_swapped_back_within(trained):
    model, optimizer = trained
    weights = weights_of(model)
    with optimizer.averaged_weights():
        optimizer.swap_weights()
    assert_same_bits(weights_of(model), weights)


def test_averaged_weights_does_not_nest(trained):
    model, optimizer = trained
    weights = weights_of(model)
    with optimizer.averaged_weights():
        with pytest.raises(RuntimeError, match="averaged_weights does not nest"):
            optimizer.averaged_weights().__enter__()
        assert optimizer.is_swapped
    assert_same_bits(weights_of(model), weights)


@pytest.mark.parametrize("eagerly", [True, False])
def test_training_while_swapped_is_refused_and_nothing_changes(trained, eagerly):
    """It would train the averages and average the weights."""
    model, optimizer = trained
    optimizer.swap_weights()
    before = [v.numpy() for v in [*model.trainable_variables, *optimizer.variables]]
    gradients = [tf.ones(v.shape) for v in model.trainable_variables]

    def step():
        optimizer.apply(gradients, model.trainable_variables)

    with pytest.raises(
        (RuntimeError, tf.errors.InvalidArgumentError), match="cannot train while the weights are swapped"
    ):
        step() if eagerly else tf.function(step)()
    for forbidden in (
        optimizer.update_average,
        lambda: optimizer.assign_average_vars(model.trainable_variables),
    ):
        with pytest.raises(RuntimeError, match="while the weights are swapped"):
            forbidden()
    assert_same_bits([v.numpy() for v in [*model.trainable_variables, *optimizer.variables]], before)


def test_assign_average_vars_assigns_what_was_asked_and_warns_of_the_rest(trained):
    model, optimizer = trained
    averages = averages_of(optimizer)
    statistics = model.non_trainable_variables[0]
    before = statistics.numpy()
    with pytest.warns(UserWarning, match=r"moving_mean has no average and keeps its value"):
        optimizer.assign_average_vars([*model.trainable_variables, statistics])
    assert_same_bits(weights_of(model), averages)
    assert oracle.same_bits(before, statistics.numpy())


def test_assign_average_vars_in_a_graph_returns_its_operation(trained):
    model, optimizer = trained
    averages = averages_of(optimizer)

    @tf.function
    def assign():
        operation = optimizer.assign_average_vars(model.trainable_variables)
        assert isinstance(operation, tf.Operation)

    assign()
    assert_same_bits(weights_of(model), averages)


def test_swapping_without_averages_says_what_to_do():
    with pytest.raises(
        RuntimeError, match=r"there are no averages to swap: train a step, or call shadow_copy"
    ):
        wrap().swap_weights()
    with pytest.raises(RuntimeError, match="there are no averages"), wrap().averaged_weights():
        pass


def test_swapping_in_a_replica_context_is_refused():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        weight = keras.Variable([1.0])
        optimizer = wrap()
        optimizer.shadow_copy([weight])
    with pytest.raises(RuntimeError, match="must be called outside of a replica context"):
        strategy.run(optimizer.swap_weights)
    optimizer.swap_weights()  # outside of the scope, where the original raises
    assert weight.numpy() == 0
