"""What holds on every backend of Keras. test_keras_backends.py runs this on each, in a process of its own."""

import copy
import pickle

import keras
import ml_dtypes
import numpy as np
import pytest

import oracle
from keras_replay import (
    arguments_of,
    assert_same_bits,
    averages_of,
    fit,
    model_values,
    numpy,
    problem,
    replay,
    small_model,
    wrap,
)
from processes import output_of

BACKEND = keras.backend.backend()
ENGINE = {"tensorflow": "native", "jax": "graph", "torch": "native"}[BACKEND]


@pytest.mark.parametrize(
    "schedule",
    [
        {"decay": 0.99, "start_step": 0, "dynamic": True},
        {"decay": 0.999, "start_step": 3, "dynamic": False},
        {"decay": 0.9, "start_step": 5, "dynamic": True, "every": 3},
    ],
    ids=str,
)
def test_fit_averages_as_a_numpy_replay(schedule):
    optimizer = wrap(**arguments_of(schedule))
    steps = fit(small_model(), optimizer)
    assert optimizer.engine == ENGINE
    assert_same_bits(averages_of(optimizer), replay(steps, **schedule))


COMPILED = {"jit_compile": True} if BACKEND == "tensorflow" else {}


def test_a_thousand_steps_of_fit_average_as_a_numpy_replay():
    optimizer = wrap()
    steps = fit(small_model(), optimizer, epochs=250, **COMPILED)
    assert len(steps) == 1000
    assert_same_bits(averages_of(optimizer), replay(steps))


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have")
def test_a_swap_of_a_quantized_model_is_refused():
    optimizer, model = wrap(), keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile(optimizer, loss="mse")
    optimizer.shadow_copy(model)
    model.fit(np.ones((4, 2)), np.ones((4, 2)), verbose=0)
    model.quantize("int8")
    with pytest.raises(RuntimeError, match=r"dense.*/kernel, which is averaged, and has another variable"):
        optimizer.swap_weights()
    assert not optimizer.is_swapped


def test_wrapping_changes_nothing_about_training():
    plain, wrapped = fit(small_model(), keras.optimizers.Adam(0.01)), fit(small_model(), wrap())
    for these, those in zip(plain, wrapped, strict=True):
        assert_same_bits(these, those)


def gradients_of(model, x, y):
    """Return the gradients of the squared error, as users of each backend compute them."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        return tape.gradient(loss, model.trainable_variables)
    if BACKEND == "torch":
        model.zero_grad()
        keras.ops.mean((model(x, training=True) - keras.ops.convert_to_tensor(y)) ** 2).backward()
        return [v.value.grad for v in model.trainable_variables]
    import jax

    def loss(trained, others):
        out, others = model.stateless_call(trained, others, x, training=True)
        return keras.ops.mean((out - y) ** 2), others

    trained = [v.value for v in model.trainable_variables]
    others = [v.value for v in model.non_trainable_variables]
    gradients, others = jax.grad(loss, has_aux=True)(trained, others)
    for variable, value in zip(model.non_trainable_variables, others, strict=True):
        variable.assign(value)
    return gradients


def test_a_custom_loop_averages_as_a_numpy_replay():
    (x, y), model, optimizer, steps = problem(), small_model(), wrap(), []
    for _ in range(8):
        gradients = gradients_of(model, x, y)
        if BACKEND == "torch":
            import torch

            with torch.no_grad():
                optimizer.apply(gradients, model.trainable_variables)
        else:
            optimizer.apply(gradients, model.trainable_variables)
        steps.append(model_values(model))
    assert optimizer.engine == ENGINE
    assert_same_bits(averages_of(optimizer), replay(steps))


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras on TensorFlow has no stateless_apply")
def test_apply_without_state_is_apply():
    """What JAX users jit; no variable is assigned."""
    (x, y), model, optimizer = problem(), small_model(), wrap()
    gradients = gradients_of(model, x, y)
    optimizer.build(model.trainable_variables)
    before = model_values(model), [numpy(v) for v in optimizer.variables]

    def values(variables):
        return [keras.ops.copy(v.value) for v in variables]

    trained, state = values(model.trainable_variables), values(optimizer.variables)
    steps = []
    for _ in range(3):
        trained, state = optimizer.stateless_apply(state, gradients, trained)
        steps.append([numpy(value) for value in trained])
    assert_same_bits(before[0], model_values(model))
    assert_same_bits(before[1], [numpy(v) for v in optimizer.variables])
    assert optimizer.engine == "graph"
    assert_same_bits([numpy(value) for value in state[-len(trained) :]], replay(steps))


@pytest.mark.parametrize("weights", ["trainable_variables", "variables"])
def test_batch_normalisation_is_averaged_when_asked(weights):
    optimizer, model = wrap(trainable_weights_only=weights == "trainable_variables"), small_model()
    optimizer.shadow_copy(model)
    steps = fit(model, optimizer, of=weights)
    averages = [numpy(optimizer._averages.of(v)) for v in getattr(model, weights)]
    assert_same_bits(averages, replay(steps))


def test_batch_normalisation_is_averaged_by_an_optimizer_that_scales_its_loss():
    optimizer, model = wrap(trainable_weights_only=False), small_model()
    optimizer.shadow_copy(model)
    steps = fit(model, keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0), of="variables")
    assert_same_bits([numpy(optimizer._averages.of(v)) for v in model.variables], replay(steps))


def test_accumulated_gradients_average_once_per_real_update():
    optimizer = wrap(keras.optimizers.Adam(0.01, gradient_accumulation_steps=2))
    steps = fit(small_model(), optimizer)
    assert numpy(optimizer.iterations) == len(steps) // 2
    assert_same_bits(averages_of(optimizer), replay(steps[1::2]))


@pytest.mark.parametrize("outside", [True, False])
def test_a_scaled_loss_changes_nothing(outside):
    """Powers of two scale without rounding."""
    plain = wrap()
    fit(small_model(), plain)
    if outside:
        scaled = wrap()
        fit(small_model(), keras.optimizers.LossScaleOptimizer(scaled, initial_scale=16.0))
    else:
        scaled = wrap(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=16.0))
        fit(small_model(), scaled)
    assert_same_bits(averages_of(scaled), averages_of(plain))


def moves(steps, start):
    """Return the steps that changed a weight."""
    return [
        after
        for before, after in zip([start, *steps[:-1]], steps, strict=True)
        if any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    ]


@pytest.mark.parametrize("outside", [True, False])
def test_a_step_skipped_for_its_loss_scale_moves_no_average(outside):
    inner = wrap() if outside else keras.optimizers.Adam(0.01)
    scaled = keras.optimizers.LossScaleOptimizer(inner)
    optimizer, outermost = (inner, scaled) if outside else (wrap(scaled),) * 2
    x, y = problem()
    y[20] = np.inf  # in the second batch of four
    model = small_model()
    start = model_values(model)
    steps = moves(fit(model, outermost, data=(x, y)), start)
    assert len(steps) == numpy(optimizer.iterations) == 9
    assert_same_bits(averages_of(optimizer), replay(steps))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_16_bit_policies_have_float32_averages(policy):
    keras.config.set_dtype_policy(policy)
    try:
        # Keras' Adam cannot train bfloat16 weights: its beta_2 is 1 there
        model, optimizer = small_model(), wrap(keras.optimizers.SGD(0.1))
        start = model_values(model)
        steps = moves(fit(model, optimizer), start)  # mixed_float16 scales the loss, and may skip steps
    finally:
        keras.config.set_dtype_policy("float32")
    averages = averages_of(optimizer)
    assert {a.dtype.name for a in averages} == {"float32"}
    assert len(steps) > 8
    zeros = [np.zeros(a.shape, np.float32) for a in averages]
    assert_same_bits(averages, replay(steps, initial="given", start=zeros))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_averages_may_have_fewer_bits_than_their_weights(dtype):
    optimizer = wrap(keras.optimizers.SGD(1.0), initial_average="weights", average_dtype=dtype)
    weight = keras.Variable(np.array([1.1, -2.3, 0.01], np.float32))
    optimizer.shadow_copy([weight])
    expected = numpy(weight).astype(getattr(ml_dtypes, dtype, dtype))
    optimizer.apply_gradients([(keras.ops.array([-1.1, 0.3, 1e-3]), weight)])
    expected = oracle.update(expected, numpy(weight), 2 / 11)
    assert optimizer.engine == ENGINE
    assert_same_bits(averages_of(optimizer), [expected])
    raw = numpy(weight)
    optimizer.swap_weights()
    assert_same_bits([numpy(weight)], [expected.astype(np.float32)])
    optimizer.swap_weights()
    assert_same_bits([numpy(weight), *averages_of(optimizer)], [raw, expected])


@pytest.mark.parametrize("average", ["float16", "float32"])
def test_every_float16_weight_is_averaged_as_by_numpy(average):
    """Subnormal ones too, by `apply` and in a jitted step."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    optimizer = wrap(keras.optimizers.SGD(1.0), initial_average="weights", average_dtype=average)
    weight = keras.Variable(every, dtype="float16")
    optimizer.build([weight])
    start = np.random.default_rng(0).permutation(numpy(optimizer.variables[-1]))
    optimizer.variables[-1].assign(start)
    nothing = keras.ops.zeros(every.shape, "float16")
    if BACKEND == "jax":
        import jax

        state = [keras.ops.copy(v.value) for v in optimizer.variables]
        found = jax.jit(optimizer.stateless_apply)(state, [nothing], [weight.value])
        assert_same_bits([numpy(found[1][-1])], [oracle.update(start, every, 2 / 11)])
    optimizer.apply([nothing])
    assert_same_bits([numpy(optimizer.variables[-1])], [oracle.update(start, every, 2 / 11)])


def test_averages_that_start_at_the_weights():
    model, optimizer = small_model(), wrap(initial_average="weights")
    start = model_values(model)
    steps = fit(model, optimizer)
    assert_same_bits(averages_of(optimizer), replay(steps, initial="given", start=start))


def test_swap_exchanges_and_swap_twice_is_nothing():
    model, optimizer = small_model(), wrap()
    fit(model, optimizer)
    weights, averages = model_values(model), averages_of(optimizer)
    optimizer.swap_weights()
    assert optimizer.is_swapped
    assert_same_bits(model_values(model), averages)
    assert_same_bits(averages_of(optimizer), weights)
    with pytest.raises(RuntimeError, match="cannot average while the weights are swapped"):
        optimizer.update_average()
    optimizer.swap_weights()
    assert_same_bits(model_values(model), weights)
    assert_same_bits(averages_of(optimizer), averages)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_arithmetic_swaps_lose_comes_back(dtype):
    weight = keras.Variable(np.array([1e-8, -0.0, 3e4, np.inf, np.nan, 1.0], np.float32), dtype=dtype)
    optimizer = wrap()
    optimizer.shadow_copy([weight])
    optimizer.update_average()
    before = numpy(weight)
    for _ in range(2):
        optimizer.swap_weights()
    assert_same_bits([numpy(weight)], [before])


def test_averaged_weights_restores_after_an_exception():
    model, optimizer = small_model(), wrap()
    fit(model, optimizer)
    weights = model_values(model)
    averages = averages_of(optimizer)

    def fail():
        with optimizer.averaged_weights():
            assert_same_bits(model_values(model), averages)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_same_bits(model_values(model), weights)


def test_evaluating_averages_is_evaluating_a_model_that_holds_them():
    (x, y), model, optimizer = problem(), small_model(), wrap()
    fit(model, optimizer)
    with optimizer.averaged_weights():
        loss = model.evaluate(x, y, verbose=0)
    other = small_model()
    other.compile("sgd", "mse")
    for variable, value in zip(other.trainable_variables, averages_of(optimizer), strict=True):
        variable.assign(value)
    for mine, theirs in zip(other.non_trainable_variables, model.non_trainable_variables, strict=True):
        mine.assign(numpy(theirs))
    assert loss == other.evaluate(x, y, verbose=0)


RESUME = """
    import sys
    import keras, numpy as np
    from keras_replay import numpy, problem

    model = keras.models.load_model(sys.argv[1])
    if sys.argv[2] == "swap":
        model.optimizer.swap_weights()
    if sys.argv[2] == "all":
        model.optimizer.shadow_copy(model)
    model.fit(*problem(), batch_size=16, epochs=2, shuffle=False, verbose=0)
    variables = (*model.variables, *model.optimizer.variables)
    np.savez(sys.argv[3], *[numpy(v).astype("float64") for v in variables])
"""


@pytest.mark.parametrize("how", ["plain", "swap", "all"])
def test_saved_loaded_in_a_new_process_and_trained_on_is_bit_equal_to_never_stopping(how, tmp_path):
    (x, y), model, optimizer = problem(), small_model(), wrap(trainable_weights_only=how != "all")
    if how == "all":
        optimizer.shadow_copy(model)
    fit(model, optimizer)
    if how == "swap":
        optimizer.swap_weights()
    model.save(tmp_path / "m.keras")
    if how == "swap":
        optimizer.swap_weights()
    output_of(RESUME, tmp_path / "m.keras", how, tmp_path / "state.npz")
    model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    expected = [numpy(v).astype("float64") for v in (*model.variables, *optimizer.variables)]
    with np.load(tmp_path / "state.npz") as resumed:
        assert_same_bits(list(resumed.values()), expected)


def test_a_list_of_weights_is_read_by_variable_whatever_was_called_first():
    optimizers, models = [], []
    for first in (True, False):
        model, optimizer = small_model(), wrap(trainable_weights_only=False)
        if first:
            optimizer.shadow_copy(model)
        optimizer.build(model.trainable_variables)
        optimizer.shadow_copy(model)
        fit(model, optimizer, epochs=1)
        optimizers.append(optimizer)
        models.append(model)
    for i, variable in enumerate(models[0].variables):
        average = optimizers[0].get_slot(variable, "average")
        average.assign(np.full(average.shape, i + 1, np.float32))
    optimizers[1].set_weights(optimizers[0].get_weights())
    averages = [
        [numpy(o.get_slot(v, "average")) for v in m.variables]
        for o, m in zip(optimizers, models, strict=True)
    ]
    assert_same_bits(*averages)


def test_copies_and_pickles_train_on_alike():
    model = small_model()
    fit(model, wrap())
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    runs = []
    for twin in (model, *twins):
        x, y = problem()
        twin.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
        runs.append([*model_values(twin), *(numpy(v) for v in twin.optimizer.variables)])
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch has no steps_per_execution")
def test_several_steps_per_execution_average_after_each():
    x, y = problem()
    one, several = small_model(), small_model()
    for model, steps in ((one, 1), (several, 2)):
        model.compile(wrap(), loss="mse", steps_per_execution=steps)
        model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    assert_same_bits(averages_of(several.optimizer), averages_of(one.optimizer))


def test_engine_native_runs_or_says_why_not():
    optimizer, model = wrap(engine="native"), small_model()
    if BACKEND != "jax":
        fit(model, optimizer, jit_compile=False) if BACKEND == "tensorflow" else fit(model, optimizer)
        assert optimizer.engine == "native"
        return
    with pytest.raises(RuntimeError, match="engine='native' cannot run here"):
        fit(model, optimizer)


def test_engine_graph_has_the_same_bits():
    native, graph = wrap(), wrap(engine="graph")
    fit(small_model(), native)
    fit(small_model(), graph)
    assert graph.engine == "graph"
    assert_same_bits(averages_of(graph), averages_of(native))
