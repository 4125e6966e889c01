"""Averages where native code cannot move them in place: large ones by XLA, eager lists as functions."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

import fastema.tensorflow as engines
import oracle
from mixes import MIXES
from modes import ready
from processes import output_of

MODES = ["eager", "graph"]
LARGE = 300_000
SIZES = [3, LARGE, 7]

pytestmark = pytest.mark.skipif(
    hasattr(engines._operations(), "fastema_update_in_place"),
    reason=f"the native op moves averages in place in TensorFlow {tf.__version__}",
)


@pytest.fixture
def lists(rng):
    return [[tf.Variable(rng.standard_normal(n).astype(np.float32)) for n in SIZES] for _ in range(2)]


@pytest.fixture(autouse=True)
def no_functions_of_other_tests():
    engines._lists.clear()


def address(variable):
    return np.asarray(memoryview(variable.read_value())).ctypes.data


def arrays(variables):
    return [variable.numpy() for variable in variables]


def moved(averages, values, decay):
    return [oracle.update(a, v, decay) for a, v in zip(averages, values, strict=True)]


def same(variables, expected):
    return all(oracle.same_bits(x.numpy(), y) for x, y in zip(variables, expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_they_stay_where_they_are(lists, mode):
    averages, values = lists
    a, v = map(arrays, lists)
    said, addresses = [], []
    step = ready(mode, lambda: said.append(engines.update(averages, values, 0.9)))
    for _ in range(4):
        step()
        a = moved(a, v, 0.9)
        assert same(averages, a)
        addresses.append(address(averages[1]))
    assert set(said) == {"graph"}
    assert len(set(addresses)) == 1  # before, it was memory of NumPy's


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("average_type", "value_type"), MIXES)
def test_every_mix_of_types_has_numpys_bits(rng, mode, average_type, value_type):
    a, v = (rng.standard_normal(600_000, np.float32).astype(t) for t in (average_type, value_type))
    average, value = tf.Variable(a), tf.Variable(v)
    said = []
    ready(mode, lambda: said.append(engines.update([average], [value], 0.9)))()
    assert said == ["graph"]
    assert oracle.same_bits(average.numpy(), oracle.update(a, v, 0.9))


@pytest.mark.parametrize("mode", MODES)
def test_somebody_who_holds_one_keeps_it(lists, mode):
    held = lists[0][1].read_value()
    before = held.numpy().copy()
    ready(mode, lambda: engines.update(*lists, 0.5) and None)()
    assert oracle.same_bits(held.numpy(), before)


@pytest.mark.parametrize("mode", MODES)
def test_those_who_ask_for_native_code_get_it(mode):
    tiny = np.full(LARGE, 3e-44, np.float32)  # XLA's would be zeros
    average, value = tf.Variable(tf.zeros(LARGE)), tf.Variable(tiny)
    ready(mode, lambda: engines.update([average], [value], 0.5, engine="native") and None)()
    assert oracle.same_bits(average.numpy(), oracle.update(0 * tiny, tiny, 0.5))


def test_of_unknown_shapes_they_are_moved_natively():
    average, value = tf.Variable(tf.zeros(LARGE), shape=tf.TensorShape(None)), tf.Variable(tf.ones(LARGE))
    said = []
    ready("graph", lambda: said.append(engines.update([average], [value], 0.5)))()
    assert said == ["native"]
    assert np.unique(average.numpy()) == 0.5


@pytest.mark.parametrize("wrong", ["decay", "shape"])
def test_what_a_graph_refuses_when_it_runs_changes_none(lists, wrong):
    averages, values = lists
    values[0] = tf.Variable(values[0], shape=tf.TensorShape(None))

    @tf.function
    def step(decay):
        engines.update(averages, values, decay)

    step(tf.constant(0.5))
    if wrong == "shape":
        values[0].assign([1.0])
    before = arrays(averages)
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(tf.constant(2.0 if wrong == "decay" else 0.5))
    assert same(averages, before)


def test_where_xla_fails_none_has_changed(lists):
    averages, values = lists
    step = ready("graph", lambda: engines.update(averages, values, 0.5) and None)
    step()
    before = arrays(averages)
    tf.raw_ops.AssignVariableOp(resource=values[1].handle, value=tf.ones(5))  # as no variable lets
    with pytest.raises(tf.errors.InvalidArgumentError):
        step()
    assert same(averages, before)


def test_eager_updates_of_a_list_are_one_function_for_all_decays(lists):
    averages, values = lists
    a, v = map(arrays, lists)
    for decay in (0.5, tf.constant(0.25), 0.0, tf.Variable(0.9)):
        assert engines.update(averages, values, decay) == "graph"
        a = moved(a, v, float(decay))
    assert same(averages, a)
    [again] = engines._lists.values()
    assert again.function.experimental_get_tracing_count() == 1
    assert engines.update(averages, values, 0.5, when=tf.constant(False)) == "graph"
    assert same(averages, a)
    with pytest.raises(ValueError, match="decay must be from 0 to 1"):
        engines.update(averages, values, 2.0)
    assert same(averages, a)


def test_many_small_ones_are_a_function_from_the_second_time_on(rng):
    a, v = rng.standard_normal((2, 40, 5)).astype(np.float32)
    averages, values = ([tf.Variable(row) for row in x] for x in (a, v))
    for count in (0, 1, 1):
        assert engines.update(averages, values, 0.9) == "native"
        assert [x.function.experimental_get_tracing_count() for x in engines._lists.values()] == [count]
        a = oracle.update(a, v, 0.9)
    assert same(averages, a)


def test_no_function_keeps_variables_alive(lists):
    averages, values = lists
    engines.update(averages, values, 0.5)
    [again] = engines._lists.values()
    gone = [weakref.ref(averages[0]), weakref.ref(again.function)]
    del averages, again, lists[0][0]
    gc.collect()
    assert [x() for x in gone] == [None, None]
    assert not engines._lists


def test_few_lists_are_functions_and_the_others_move_as_well():
    averages = [tf.Variable(tf.zeros(LARGE)) for _ in range(20)]
    value = tf.Variable(tf.ones(LARGE))
    for _ in range(2):
        for average in averages:
            engines.update([average], [value], 0.5)
    assert len(engines._lists) == engines._MOST
    assert all(np.unique(average.numpy()) == 0.75 for average in averages)


def test_tensors_are_compiled_in_no_eager_call(lists):
    averages, values = lists
    a, v = map(arrays, lists)
    assert engines.update(averages, [value.read_value() for value in values], 0.5) == "native"
    assert not engines._lists
    assert same(averages, moved(a, v, 0.5))


def test_gradients_pass_eager_updates_by():
    average, weight = tf.Variable(tf.zeros(LARGE)), tf.Variable(tf.fill([LARGE], 3.0))
    for _ in range(2):
        tangent = tf.ones(LARGE)
        with tf.autodiff.ForwardAccumulator(weight, tangent) as forward, tf.GradientTape() as tape:
            engines.update([average], [weight], 0.5)
            y = weight * weight * average
            engines.update([average], [weight], 0.0)
        assert np.unique(forward.jvp(y)) == np.unique(tape.gradient(y, weight)) > 0
        assert np.unique(average.numpy()) == 3.0


def test_functions_that_run_eagerly_average_as_well(lists):
    a, v = map(arrays, lists)
    tf.config.run_functions_eagerly(True)
    try:
        engines.update(*lists, 0.5)
        ready("graph", lambda: engines.update(*lists, 0.5) and None)()
    finally:
        tf.config.run_functions_eagerly(False)
    assert same(lists[0], moved(moved(a, v, 0.5), v, 0.5))


@pytest.mark.slow
def test_beside_other_devices_they_are_moved_natively():
    code = """
        import tensorflow as tf
        import fastema.tensorflow as engines

        [cpu] = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        for device in ("CPU:0", "CPU:1"):
            with tf.device(device):
                average, value = tf.Variable(tf.zeros(300_000)), tf.Variable(tf.ones(300_000))
            said = []
            tf.function(lambda: said.append(engines.update([average], [value], 0.5)))()
            said.append(engines.update([average], [value], 0.5))
            print(*said, set(average.numpy()) == {0.75})
    """
    assert output_of(code).splitlines() == ["native native True"] * 2
