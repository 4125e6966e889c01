"""The documented API, member by member, and what the original and Keras' own averaging get wrong."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastema.keras
import oracle
from fastema.keras import ExponentialMovingAverage
from keras_replay import (
    assert_same_bits,
    averages_of,
    custom_loop,
    fit,
    problem,
    replay,
    small_model,
    wrap,
)
from processes import output_of, skip_without

ATTRIBUTES = (
    *("clipnorm", "clipvalue", "global_clipnorm", "has_shadow_copy", "iterations", "learning_rate", "lr"),
    "weights",
)
METHODS = (
    *("add_slot", "add_weight", "apply_gradients", "assign_average_vars", "from_config", "get_config"),
    *("get_gradients", "get_slot", "get_slot_names", "get_updates", "get_weights", "minimize"),
    *("set_weights", "shadow_copy", "swap_weights", "update_average", "variables"),
)


@pytest.fixture
def trained():
    model = small_model()
    optimizer = wrap(keras.optimizers.Adam(0.01))
    fit(model, optimizer, epochs=1)
    return model, optimizer


def numpy_of(variables):
    return [v.numpy() for v in variables]


def test_the_table_names_every_documented_member_and_each_exists(trained):
    _, optimizer = trained
    table = re.search(r"^=+ =+$(.*)^=+ =+$", fastema.keras.__doc__, re.DOTALL | re.MULTILINE)[1]
    assert sorted(re.findall(r"^``(\w+)``", table, re.MULTILINE)) == sorted((*ATTRIBUTES, *METHODS, "decay"))
    assert all(hasattr(optimizer, name) for name in ATTRIBUTES)
    assert all(callable(getattr(optimizer, name)) for name in METHODS)


def test_the_documented_example_runs():
    model, learning_rate = small_model(), 0.1

    opt = keras.optimizers.SGD(learning_rate)
    opt = ExponentialMovingAverage(opt)
    opt.shadow_copy(model)
    steps = custom_loop(model, opt)
    opt.swap_weights()
    assert_same_bits(numpy_of(model.trainable_variables), replay(steps))
    opt.swap_weights()
    assert_same_bits(numpy_of(model.trainable_variables), steps[-1])


def test_the_documented_example_of_weights_runs():
    """Of an RMSprop, wrapped: beside its three arrays there is an average of kernel and bias."""
    opt = ExponentialMovingAverage(keras.optimizers.RMSprop())
    m = keras.models.Sequential([keras.layers.Dense(10)])
    m.compile(opt, loss="mse")
    m.fit(np.arange(100).reshape(5, 20), np.zeros((5, 10)), verbose=0)
    assert len(opt.get_weights()) == 3 + 2
    opt.set_weights([np.array(10), np.ones([20, 10]), np.zeros([10])])
    assert opt.iterations.numpy() == 10
    assert (opt.get_slot(m.trainable_variables[0], "rms").numpy() == 1).all()


# --- members: attributes --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_clipping_is_that_of_the_wrapped_optimizer(name):
    inner = keras.optimizers.SGD(**{name: 2.0})
    assert getattr(wrap(inner), name) == 2.0
    assert getattr(wrap(keras.optimizers.LossScaleOptimizer(inner)), name) == 2.0
    optimizer = wrap(keras.optimizers.SGD(), **{name: 3.0})
    assert getattr(optimizer, name) == getattr(optimizer._optimizer, name) == 3.0


def test_has_shadow_copy():
    optimizer = wrap()
    assert not optimizer.has_shadow_copy
    optimizer.shadow_copy([keras.Variable(1.0)])
    assert optimizer.has_shadow_copy


def test_iterations_is_a_variable_and_counts_the_steps(trained):
    _, optimizer = trained
    assert isinstance(optimizer.iterations, keras.Variable)
    assert optimizer.iterations.numpy() == 4


def test_learning_rate_and_lr_are_one():
    optimizer = wrap(keras.optimizers.SGD(0.5))
    assert optimizer.lr is optimizer.learning_rate
    optimizer.lr = 0.25
    assert optimizer._optimizer.learning_rate.numpy() == 0.25


@pytest.mark.parametrize("name", ["weights", "variables"])
def test_weights_and_variables_are_complete_and_in_order(trained, name):
    model, optimizer = trained
    slot = optimizer.add_slot(model.trainable_variables[0], "mine")
    weight = optimizer.add_weight("counter", ())
    averages = [optimizer.get_slot(v, "average") for v in model.trainable_variables]
    expected = [*optimizer._optimizer.variables, *averages, slot, weight]
    for listed in (getattr(optimizer, name), getattr(optimizer, name)()):
        assert [id(v) for v in listed] == [id(v) for v in expected]


# --- members: slots -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("initializer", "first"),
    [
        ("ones", 1),
        (keras.initializers.Constant(3.0), 3),
        (lambda shape, dtype: tf.fill(shape, tf.constant(2, dtype)), 2),
        (np.full((4, 9), 5.0), 5),
        (tf.fill((4, 9), 6.0), 6),
    ],
    ids=["name", "initializer", "callable", "array", "tensor"],
)
def test_add_slot_starts_as_its_initializer_says(initializer, first):
    variable = small_model().trainable_variables[0]
    slot = wrap().add_slot(variable, "mine", initializer)
    assert slot.shape == variable.shape
    assert slot.dtype == "float32"
    assert not slot.trainable
    assert (slot.numpy() == first).all()


def test_add_slot_of_other_shapes():
    optimizer, variable = wrap(), keras.Variable([1.0, 2.0])
    assert optimizer.add_slot(variable, "scalar", "ones", shape=()).shape == ()
    assert optimizer.add_slot(variable, "of the tensor", tf.zeros(3)).shape == (3,)
    with pytest.raises(ValueError, match=re.escape("a tensor of shape (5,), got a tensor of shape (3,)")):
        optimizer.add_slot(variable, "both", tf.zeros(3), shape=(5,))
    assert len(optimizer.get_slot_names()) == 2


def test_add_slot_a_second_time_is_the_first_one():
    optimizer, variable = wrap(), keras.Variable([1.0, 2.0])
    slot = optimizer.add_slot(variable, "mine", "ones")
    assert optimizer.add_slot(variable, "mine", "zeros") is slot
    assert optimizer.add_slot(variable, "other") is not slot
    assert optimizer.add_slot(keras.Variable([1.0, 2.0]), "mine") is not slot
    assert slot.numpy().tolist() == [1, 1]


def test_add_slot_takes_a_tf_variable_as_what_holds_a_keras_variable():
    optimizer, variable = wrap(), keras.Variable([1.0, 2.0], dtype="bfloat16")
    slot = optimizer.add_slot(variable.value, "mine")
    assert slot.dtype == "bfloat16"
    assert optimizer.get_slot(variable, "mine") is slot
    assert optimizer.add_slot(tf.Variable([1.0]), "mine").shape == (1,)


def test_add_slot_in_a_graph_outlives_it():
    optimizer, variable = wrap(), keras.Variable([1.0, 2.0])

    @tf.function
    def count():
        optimizer.add_slot(variable, "steps").assign_add([1.0, 1.0])

    count()
    count()
    assert optimizer.get_slot(variable, "steps").numpy().tolist() == [2, 2]


def test_slots_of_a_built_optimizer_are_those_of_each_variable(trained):
    model, optimizer = trained
    inner = optimizer._optimizer
    for i, variable in enumerate(model.trainable_variables):
        for names, slots in (
            (("momentum", "m"), inner._momentums),
            (("velocity", "v"), inner._velocities),
            (("average",), list(optimizer._averages)),
        ):
            for name in names:
                assert optimizer.get_slot(variable, name) is slots[i]
                assert optimizer.get_slot(variable.value, name) is slots[i]


@pytest.mark.parametrize(
    ("inner", "names"),
    [
        (keras.optimizers.SGD(0.1), ["average"]),
        (keras.optimizers.SGD(0.1, momentum=0.9), ["momentum", "average"]),
        (
            keras.optimizers.RMSprop(momentum=0.9, centered=True),
            ["velocity", "momentum", "average_gradient", "average"],
        ),
        (keras.optimizers.Adam(amsgrad=True), ["momentum", "velocity", "velocity_hat", "average"]),
        (keras.optimizers.Adadelta(), ["accumulated_grad", "accumulated_delta_var", "average"]),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.Adamax()), ["momentum", "norm", "average"]),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_get_slot_names_are_all_that_get_slot_knows(inner, names):
    optimizer, variables = wrap(inner), small_model().trainable_variables
    optimizer.build(variables)
    assert optimizer.get_slot_names() == names
    optimizer.add_slot(variables[0], "mine")
    assert optimizer.get_slot_names() == [*names, "mine"]
    slots = [optimizer.get_slot(variable, name) for variable in variables for name in names]
    assert len({id(slot) for slot in slots}) == len(variables) * len(names)
    assert all(
        slot.shape == variable.shape
        for variable in variables
        for slot in [optimizer.get_slot(variable, name) for name in names]
    )


def test_get_slot_tells_variables_of_one_path_apart():
    variables = [keras.layers.Dense(1, name="same") for _ in range(2)]
    for layer in variables:
        layer.build((1, 3))
    variables = [layer.kernel for layer in variables]
    assert variables[0].path == variables[1].path
    optimizer = wrap(keras.optimizers.SGD(0.1, momentum=0.9))
    optimizer.build(variables)
    momentums = [optimizer.get_slot(variable, "momentum") for variable in variables]
    assert [id(x) for x in momentums] == [id(x) for x in optimizer._optimizer.momentums]


def test_get_slot_of_what_is_not_there_says_what_is(trained):
    """A KeyError, as the original's."""
    model, optimizer = trained
    kernel = model.trainable_variables[0]
    with pytest.raises(KeyError, match="kernel has no slot 'mg'; the slots are momentum, velocity, average"):
        optimizer.get_slot(kernel, "mg")
    with pytest.raises(KeyError, match="moving_mean has no slot 'average'"):
        optimizer.get_slot(model.non_trainable_variables[0], "average")


# --- members: weights -----------------------------------------------------------------------------


def test_add_weight():
    optimizer = wrap()
    weight = optimizer.add_weight(
        "total",
        [2],
        dtype="float64",
        initializer="ones",
        trainable=True,
        synchronization=tf.VariableSynchronization.AUTO,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
    assert (weight.name, weight.shape, weight.dtype) == ("total", (2,), "float64")
    assert weight.aggregation == "only_first_replica"
    assert weight.numpy().tolist() == [1, 1]
    assert optimizer.add_weight("scalar", ()).dtype == "float32"
    with pytest.raises(ValueError, match="synchronization must not be ON_READ"):
        optimizer.add_weight("sum", (), synchronization=tf.VariableSynchronization.ON_READ)
    assert [v.name for v in optimizer.variables[-2:]] == ["total", "scalar"]


@pytest.mark.parametrize(
    "rate", [0.01, keras.optimizers.schedules.CosineDecay(0.01, 9)], ids=["", "schedule"]
)
def test_get_weights_are_iterations_state_averages_and_no_learning_rate(rate):
    model, optimizer = small_model(), wrap(keras.optimizers.Adam(rate))
    fit(model, optimizer, epochs=1)
    slot = optimizer.add_slot(model.trainable_variables[0], "mine", "ones")
    inner = optimizer._optimizer
    state = [x for pair in zip(inner._momentums, inner._velocities, strict=True) for x in pair]
    weights = optimizer.get_weights()
    assert all(isinstance(w, np.ndarray) for w in weights)
    assert weights[0] == 4
    assert_same_bits(weights[1:], [*numpy_of(state), *averages_of(optimizer)[:-1], slot.numpy()])


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(lambda: keras.optimizers.SGD(0.1), id="SGD"),
        pytest.param(lambda: keras.optimizers.Nadam(0.01), id="Nadam", marks=pytest.mark.slow),
        pytest.param(
            lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
            id="accumulating",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)), id="scaling"),
    ],
)
def test_weights_set_in_another_optimizer_train_on_as_the_first(inner):
    model, optimizer = small_model(), wrap(inner())
    custom_loop(model, optimizer, steps=5)
    again, fresh = small_model(seed=9), wrap(inner())
    fresh.build(again.trainable_variables)
    again.set_weights(model.get_weights())
    fresh.set_weights(optimizer.get_weights())
    steps = [custom_loop(m, o, steps=5) for m, o in ((model, optimizer), (again, fresh))]
    assert_same_bits(steps[0][-1], steps[1][-1])
    assert_same_bits(optimizer.get_weights(), fresh.get_weights())


def test_set_weights_takes_keras_own_list(trained):
    _, optimizer = trained
    fresh = wrap(keras.optimizers.Adam(0.5))
    fresh.build(small_model(seed=9).trainable_variables)
    fresh.set_weights(numpy_of(optimizer.variables))
    assert_same_bits(numpy_of(fresh.variables), numpy_of(optimizer.variables))
    assert fresh.learning_rate.numpy() == np.float32(0.01)


def test_set_weights_without_the_averages_leaves_them_and_added_ones_are_set(trained):
    model, optimizer = trained
    optimizer.add_slot(model.trainable_variables[0], "mine")
    before = averages_of(optimizer)[:6]
    weights = [np.full_like(w, 2) for w in optimizer.get_weights()]
    optimizer.set_weights(weights[:13] + weights[-1:])
    assert_same_bits(averages_of(optimizer), [*before, weights[-1]])
    assert_same_bits(optimizer.get_weights()[:13], weights[:13])


def test_set_weights_that_do_not_fit_change_nothing(trained):
    _, optimizer = trained
    before = optimizer.get_weights()
    with pytest.raises(
        ValueError,
        match=r"weights must have 19 arrays as from get_weights\(\), 20 with the learning rate or 13 without "
        "the averages, got 18$",
    ):
        optimizer.set_weights(before[:-1])
    other = [w + 1 for w in before[:-1]] + [np.zeros(7)]
    with pytest.raises(
        ValueError, match=re.escape("weights[18] must have the shape of") + r".*\(2,\), got \(7,\)$"
    ):
        optimizer.set_weights(other)
    assert_same_bits(optimizer.get_weights(), before)
    with pytest.raises(ValueError, match=r"not built: call build\(variables\) first"):
        wrap().set_weights(before)


def test_weights_are_not_given_out_or_set_while_swapped(trained):
    """The weights stand where the averages should."""
    _, optimizer = trained
    before = optimizer.get_weights()
    with optimizer.averaged_weights():
        with pytest.raises(RuntimeError, match="cannot get weights while the weights are swapped"):
            optimizer.get_weights()
        with pytest.raises(RuntimeError, match="cannot set weights while the weights are swapped"):
            optimizer.set_weights([w + 1 for w in before])
    assert_same_bits(optimizer.get_weights(), before)


# --- members: gradients ---------------------------------------------------------------------------


def test_apply_gradients_takes_the_documented_arguments():
    optimizer, weight = wrap(keras.optimizers.SGD(1.0)), keras.Variable(0.0)
    for aggregate in (True, False):
        returned = optimizer.apply_gradients(
            [(tf.constant(-1.0), weight)], name="step", experimental_aggregate_gradients=aggregate
        )
        assert returned is optimizer.iterations
    assert weight.numpy() == returned.numpy() == 2


def loss_of(model):
    x, y = problem()
    return lambda: tf.reduce_mean((model(x, training=True) - y) ** 2)


@pytest.mark.parametrize("graph", [False, True])
def test_minimize_trains_as_a_custom_loop(graph):
    expected = small_model()
    custom_loop(expected, wrap(), steps=5, graph=graph)
    model, optimizer = small_model(), wrap()
    step = lambda: optimizer.minimize(loss_of(model), model.trainable_variables)  # noqa: E731
    step = tf.function(step) if graph else step
    for _ in range(5):
        step()
    assert_same_bits(numpy_of(model.variables), numpy_of(expected.variables))
    assert optimizer.iterations.numpy() == 5


def test_minimize_returns_iterations_and_names_nothing():
    optimizer, weight = wrap(keras.optimizers.SGD(1.0)), keras.Variable(3.0)
    assert optimizer.minimize(lambda: weight * 2, [weight], name="step") is optimizer.iterations
    assert weight.numpy() == 1


def test_minimize_takes_variables_that_the_loss_creates():
    model = keras.Sequential([keras.layers.Dense(2)])
    optimizer = wrap()
    optimizer.minimize(loss_of(model), lambda: model.trainable_variables)
    assert len(averages_of(optimizer)) == 2


def test_minimize_takes_a_tensor_with_its_tape():
    optimizer, weight = wrap(keras.optimizers.SGD(1.0)), tf.Variable(3.0)
    with tf.GradientTape() as tape:
        loss = weight**2
    optimizer.minimize(loss, (weight,), tape=tape)
    assert weight.numpy() == -3
    with pytest.raises(ValueError, match=r"tape must be the tf\.GradientTape that recorded the loss"):
        optimizer.minimize(loss, [weight])
    assert optimizer.iterations.numpy() == 1


def test_minimize_takes_the_gradient_of_the_loss():
    optimizer, weight = wrap(keras.optimizers.SGD(1.0)), keras.Variable([1.0, 1.0])
    optimizer.minimize(lambda: weight * 2, [weight], grad_loss=tf.constant([1.0, 10.0]))
    assert weight.numpy().tolist() == [-1, -19]


def test_minimize_scales_the_loss_as_the_wrapped_optimizer_wants_it():
    """The gradient is below float16's range; scaled by 2 ** 15 it is not."""
    inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(2.0**20))
    optimizer, weight = wrap(inner), keras.Variable(0.0)
    for _ in range(2):
        optimizer.minimize(
            lambda: tf.cast(tf.cast(weight, "float16"), "float32") * 2.0**-26, lambda: [weight]
        )
    assert weight.numpy() == -2 * 2.0**-6


@pytest.mark.parametrize(
    ("var_list", "message"),
    [
        ([tf.constant(1.0)], r"var_list\[0\] must be a variable, got EagerTensor"),
        (None, "var_list must be a list of variables, got NoneType"),
    ],
)
def test_minimize_refuses_what_is_no_variable_before_the_loss_is_computed(var_list, message):
    with pytest.raises(ValueError, match=message):
        wrap().minimize(lambda: pytest.fail("computed"), var_list)


def test_get_gradients_and_get_updates_in_a_graph():
    optimizer, weight = wrap(keras.optimizers.SGD(1.0)), keras.Variable(3.0)

    @tf.function
    def step():
        (gradient,) = optimizer.get_gradients(weight * weight, [weight])
        assert len(optimizer.get_updates(weight * weight, [weight])) == 1
        return gradient

    assert step().numpy() == 6
    assert weight.numpy() == -3
    assert optimizer.iterations.numpy() == 1


def test_get_gradients_refuses_eager_code_and_what_has_no_gradient():
    optimizer, weight, other = wrap(), keras.Variable(3.0), keras.Variable(1.0, name="other")
    for member in (optimizer.get_gradients, optimizer.get_updates):
        with pytest.raises(RuntimeError, match="need TensorFlow's graph mode"):
            member(weight * weight, [weight])
        refused = tf.function(lambda member=member: member(weight * weight, [weight, other]))
        with pytest.raises(ValueError, match="the loss has no gradient with respect to other"):
            refused()
    assert not optimizer.built


# --- members: averages and configs ------------------------------------------------------------------


def test_update_average_takes_the_originals_strategy():
    weight, optimizer = keras.Variable(1.0), wrap()
    optimizer.shadow_copy([weight])
    optimizer.update_average(tf.distribute.get_strategy())
    optimizer.update_average()
    expected = oracle.update(np.float32(0), np.float32(1), oracle.decay_at(0))
    expected = oracle.update(expected, np.float32(1), oracle.decay_at(0))
    assert_same_bits(averages_of(optimizer), [expected])


def test_assign_average_vars_assigns_those_listed_only(trained):
    model, optimizer = trained
    first, *others = model.trainable_variables
    before = numpy_of(others)
    optimizer.assign_average_vars([first])
    assert_same_bits([first.numpy()], averages_of(optimizer)[:1])
    assert_same_bits(numpy_of(others), before)


def test_from_config_takes_custom_objects():
    class Mine(keras.optimizers.SGD):
        pass

    config = wrap(Mine(0.25)).get_config()
    again = ExponentialMovingAverage.from_config(config, custom_objects={"Mine": Mine})
    assert type(again._optimizer) is Mine
    assert again.get_config() == config
    with pytest.raises(TypeError, match="Mine"):
        ExponentialMovingAverage.from_config(config)


def test_swap_weights_exchanges_slots_and_weights(trained):
    model, optimizer = trained
    weights = numpy_of(model.trainable_variables)
    optimizer.swap_weights()
    slots = [optimizer.get_slot(v, "average").numpy() for v in model.trainable_variables]
    assert_same_bits(slots, weights)


# --- slots and weights added, saved -----------------------------------------------------------------


def with_added(optimizer, variables):
    return [
        *(optimizer.add_slot(v, name) for name in ("a", "b") for v in variables),
        optimizer.add_weight("total", (2,)),
        optimizer.add_weight("total", (3,)),
    ]


def test_what_was_added_is_saved_and_loaded_whenever_it_is_added(tmp_path, trained):
    model, optimizer = trained
    added = with_added(optimizer, model.trainable_variables)
    for i, variable in enumerate(added):
        variable.assign(np.full(variable.shape, i))
    model.save(tmp_path / "first.keras")
    loaded = keras.saving.load_model(tmp_path / "first.keras")
    loaded.save(tmp_path / "second.keras")  # before it is added again
    loaded = keras.saving.load_model(tmp_path / "second.keras")
    again = with_added(loaded.optimizer, loaded.trainable_variables)
    assert_same_bits(numpy_of(again), numpy_of(added))
    assert_same_bits(loaded.optimizer.get_weights(), optimizer.get_weights())

    store = {}
    optimizer.save_own_variables(store)
    for variable in added:
        variable.assign(np.zeros(variable.shape))
    optimizer.load_own_variables(store)
    assert_same_bits(numpy_of(added), numpy_of(again))


def test_what_was_added_and_does_not_fit_the_file_is_refused_and_nothing_changes(trained):
    model, optimizer = trained
    store = {}
    optimizer.save_own_variables(store)
    store["average_trained_0"] = store["average_trained_0"] + 1
    optimizer.add_slot(model.trainable_variables[0], "mine")
    before = averages_of(optimizer)
    with pytest.raises(ValueError, match=r"the file lacks slot_mine_0, the value of .*kernel_mine"):
        optimizer.load_own_variables(store)
    store["slot_mine_0"] = np.zeros(3)
    with pytest.raises(ValueError, match=re.escape("slot_mine_0 must have shape (4, 9), got (3,) from the")):
        optimizer.load_own_variables(store)
    assert_same_bits(averages_of(optimizer), before)
    fresh, variables = wrap(), small_model().trainable_variables
    fresh.load_own_variables(store)
    with pytest.raises(ValueError, match=re.escape("slot_mine_0 must have shape (4, 9), got (3,) from the")):
        fresh.add_slot(variables[0], "mine")
    assert fresh.get_slot_names() == []


def test_a_checkpoint_of_tensorflow_holds_averages_and_what_was_added(tmp_path, trained):
    """It takes what has get_slot_names for one of its own optimizers, whose slots are not children."""
    model, optimizer = trained
    added = with_added(optimizer, model.trainable_variables)
    for i, variable in enumerate(added):
        variable.assign(np.full(variable.shape, i))
    path = tf.train.Checkpoint(model=model, optimizer=optimizer).save(tmp_path / "checkpoint")
    fresh, again = wrap(keras.optimizers.Adam(0.01)), small_model(seed=9)
    status = tf.train.Checkpoint(model=again, optimizer=fresh).restore(path)
    fresh.build(again.trainable_variables)
    with_added(fresh, again.trainable_variables)
    status.assert_consumed()
    assert_same_bits(fresh.get_weights(), optimizer.get_weights())
    assert_same_bits(numpy_of(again.variables), numpy_of(model.variables))


# --- other backends ---------------------------------------------------------------------------------

BACKENDS = """
    import sys
    import keras, numpy as np
    from fastema.keras import ExponentialMovingAverage

    def kernel():
        return keras.Variable(np.arange(6.0).reshape(2, 3), name="kernel")

    weight, optimizer = kernel(), ExponentialMovingAverage(keras.optimizers.Adam(0.5))
    optimizer.build([weight])
    slot = optimizer.add_slot(weight, "mine", "ones")
    tensor = optimizer.add_slot(weight, "tensor", keras.ops.ones(3) * 2)
    assert [float(keras.ops.sum(x)) for x in (slot, tensor)] == [6, 6]
    assert optimizer.get_slot_names() == ["momentum", "velocity", "average", "mine", "tensor"]
    assert optimizer.get_slot(weight, "m") is optimizer._optimizer._momentums[0]

    backend = keras.backend.backend()
    if backend == "torch":
        assert optimizer.minimize(lambda: keras.ops.sum(weight**2), lambda: [weight]) is optimizer.iterations
        assert optimizer.minimize(keras.ops.sum(weight**2), [weight]) is optimizer.iterations
        assert int(optimizer.iterations) == 2
        assert weight.value.requires_grad and weight.value.grad is None
        assert keras.ops.convert_to_numpy(weight).sum() < 15 - 4
        for wrong in ({"var_list": [slot * 2.0, 3]}, {"var_list": weight}, {"var_list": [weight], "tape": 1}):
            try:
                optimizer.minimize(lambda: keras.ops.sum(weight**2), **wrong)
            except ValueError as error:
                print(error)
    else:
        optimizer.apply([keras.ops.ones((2, 3))], [weight])
        try:
            optimizer.minimize(lambda: keras.ops.sum(weight**2), [weight])
        except NotImplementedError as error:
            print(error)
    try:
        optimizer.get_updates(keras.ops.sum(weight**2), [weight])
    except RuntimeError as error:
        print(error)

    weights = optimizer.get_weights()
    fresh, again = ExponentialMovingAverage(keras.optimizers.Adam(0.5)), kernel()
    fresh.build([again])
    store = {}
    optimizer.save_own_variables(store)
    fresh.load_own_variables(store)
    fresh.add_slot(again, "mine")
    fresh.add_slot(again, "tensor", shape=(3,))
    assert np.array_equal(fresh.get_weights()[-2], weights[-2])
    fresh.set_weights(weights)
    assert all(np.array_equal(x, y) for x, y in zip(fresh.get_weights(), weights, strict=True))
    assert weights[0] == int(fresh.iterations) and len(weights) == 6
    fresh.set_weights([np.asarray(optimizer._backend.numpy(v)) for v in optimizer.variables])
"""


@pytest.mark.parametrize(
    ("backend", "messages"),
    [
        ("jax", ["minimize cannot work with JAX", "get_gradients and get_updates need TensorFlow's graph"]),
        (
            "torch",
            [
                r"var_list\[1\] must be a variable, got int",
                "var_list must be a list of variables, got .*Variable",
                "tape must be None with torch",
                "get_gradients and get_updates need TensorFlow's graph",
            ],
        ),
    ],
)
def test_members_on_other_backends(backend, messages):
    skip_without(backend)
    printed = output_of(BACKENDS, KERAS_BACKEND=backend).splitlines()
    assert len(printed) == len(messages)
    for line, message in zip(printed, messages, strict=True):
        assert re.match(message, line)


# --- what the original gets wrong -------------------------------------------------------------------


def test_gradients_applied_before_shadow_copy_are_averaged():
    """The original trained, then crashed."""
    optimizer, weight = wrap(keras.optimizers.SGD(1.0)), keras.Variable(0.0)
    optimizer.apply_gradients([(tf.constant(-1.0), weight)])
    expected = oracle.update(np.float32(0), np.float32(1), oracle.decay_at(1))
    assert_same_bits(averages_of(optimizer), [expected])


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("path", ["model.keras", "model.h5"])
def test_a_model_is_saved_with_its_optimizer(tmp_path, path, trained):
    """The original's config holds a tensor, so neither file can be written."""
    model, optimizer = trained
    model.compile(optimizer, loss=keras.losses.MeanSquaredError())  # Keras cannot load "mse" from HDF5
    model.save(tmp_path / path)
    loaded = keras.saving.load_model(tmp_path / path)
    assert loaded.optimizer.get_config() == optimizer.get_config()
    assert_same_bits(numpy_of(loaded.variables), numpy_of(model.variables))


def test_a_model_is_exported_as_a_saved_model(tmp_path, trained):
    model, _ = trained
    x, _ = problem()
    tf.saved_model.save(model, tmp_path / "saved")
    served = tf.saved_model.load(tmp_path / "saved").signatures["serving_default"](tf.constant(x))
    assert_same_bits([next(iter(served.values())).numpy()], [tf.function(model)(x).numpy()])


def test_mixed_float16_trains_where_keras_scales_the_loss_around_the_wrapper():
    """The original cannot be wrapped so."""

    def model():
        keras.utils.set_random_seed(3)
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_float16")])

    plain = fit(model(), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    optimizer = wrap(keras.optimizers.SGD(0.1))
    keras.config.set_dtype_policy("mixed_float16")  # compile then wraps what is no LossScaleOptimizer
    try:
        steps = fit(model(), optimizer)
    finally:
        keras.config.set_dtype_policy("float32")
    assert_same_bits(steps[-1], plain[-1])
    assert_same_bits(averages_of(optimizer), replay(steps))


def test_variables_built_after_shadow_copy_are_averaged():
    class Growing(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = keras.layers.Dense(3), keras.layers.Dense(2)
            self.first.build((None, 4))

        def call(self, x):
            return self.second(self.first(x))

    keras.utils.set_random_seed(3)
    model, optimizer = Growing(), wrap()
    optimizer.shadow_copy(model)
    assert len(averages_of(optimizer)) == 2
    steps = fit(model, optimizer)
    assert_same_bits(
        [optimizer.get_slot(v, "average").numpy() for v in model.trainable_variables], replay(steps)
    )


def test_a_second_shadow_copy_takes_effect_in_a_fit_that_was_traced_before():
    """The original goes on averaging what it did in its traces."""
    model, optimizer = small_model(), wrap(trainable_weights_only=False)
    x, y = problem()
    model.compile(optimizer, loss="mse")
    model.fit(x, y, epochs=1, verbose=0)
    optimizer.shadow_copy(model)
    model.fit(x, y, epochs=1, verbose=0)
    variance = model.layers[1].moving_variance
    assert optimizer.get_slot(variance, "average").numpy().any()


def test_a_second_shadow_copy_warns_of_functions_that_were_traced_before():
    first, second = keras.Variable([1.0]), keras.Variable([2.0])
    optimizer = wrap()
    optimizer.shadow_copy([first])
    update = tf.function(optimizer.update_average)
    update()
    optimizer.shadow_copy([first])
    with pytest.warns(UserWarning, match="functions that were traced before this shadow_copy go on"):
        optimizer.shadow_copy([second])


# --- what Keras' own averaging gets wrong -----------------------------------------------------------


def test_update_every_counts_updates_not_accumulated_gradients():
    """Keras' ema_overwrite_frequency fires on every micro-step of the period."""
    optimizer = wrap(keras.optimizers.SGD(0.1, gradient_accumulation_steps=3), update_every=2)
    steps = fit(small_model(), optimizer, run_eagerly=True)
    assert_same_bits(averages_of(optimizer), replay(steps[2::3], every=2))


def test_constrained_weights_are_averaged_after_their_constraint():
    keras.utils.set_random_seed(3)
    constraint = keras.constraints.MaxNorm(0.5)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_constraint=constraint)])
    optimizer = wrap(keras.optimizers.SGD(0.5), start_step=10**6)  # copies the weight
    fit(model, optimizer)
    assert_same_bits(averages_of(optimizer), numpy_of(model.trainable_variables))
    assert np.linalg.norm(averages_of(optimizer)[0], axis=0).max() < 0.5 + 1e-6  # a norm is rounded


def test_fit_leaves_the_raw_weights_in_the_model():
    model, optimizer = small_model(), wrap()
    steps = fit(model, optimizer)
    assert_same_bits(numpy_of(model.trainable_variables), steps[-1])


def test_a_layer_frozen_and_recompiled_keeps_its_average_and_the_others_theirs():
    """Keras pairs by position: the averages of a model's rest go to other variables."""
    model, optimizer = small_model(), wrap()
    first = fit(model, optimizer, of="weights")
    trainable = list(model.trainable_variables)
    model.layers[0].trainable = False
    recorded = fit(model, optimizer, of="weights")
    places = [next(i for i, w in enumerate(model.weights) if w is v) for v in trainable]
    expected = replay([[step[i] for i in places] for step in [*first, *recorded]])
    assert_same_bits(averages_of(optimizer), expected)
    optimizer.swap_weights()
    assert_same_bits(numpy_of(trainable), expected)


def test_variables_that_are_overwritten_with_their_gradients_are_averaged():
    scale, weight = keras.Variable([1.0]), keras.Variable([2.0])
    scale.overwrite_with_gradient = True
    optimizer = wrap(keras.optimizers.Adam(0.5))
    for step in (1.0, 2.0):
        optimizer.apply_gradients([(tf.constant([step]), scale), (tf.constant([1.0]), weight)])
    assert scale.numpy() == 2
    assert_same_bits(averages_of(optimizer)[:1], replay([[np.float32([1])], [np.float32([2])]]))
    assert optimizer.get_slot(weight, "m") is optimizer._optimizer._momentums[1]
    with pytest.raises(KeyError):
        optimizer.get_slot(scale, "m")


@pytest.mark.parametrize(
    "scaled",
    [pytest.param(False, id="plain"), pytest.param(True, id="scaled", marks=pytest.mark.slow)],
)
def test_weights_loaded_into_a_compiled_model_keep_the_optimizers_state(tmp_path, scaled):
    """Keras drops what an optimizer has no variables for yet."""

    def inner():
        adam = keras.optimizers.Adam(0.01)
        return keras.optimizers.LossScaleOptimizer(adam) if scaled else adam

    model, optimizer = small_model(), wrap(inner())
    fit(model, optimizer, epochs=1)
    model.save_weights(tmp_path / "all.weights.h5")
    fresh, again = wrap(inner()), small_model(seed=9)
    again.compile(fresh, loss="mse")
    again.load_weights(tmp_path / "all.weights.h5")
    x, y = problem()
    for m in (model, again):
        m.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    assert_same_bits(numpy_of(again.variables), numpy_of(model.variables))
    assert_same_bits(fresh.get_weights(), optimizer.get_weights())
