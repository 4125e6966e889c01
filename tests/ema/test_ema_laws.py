"""The laws of the clock under Hypothesis, for each of what averages on the CPU; CUDA's are in tests/cuda."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
import keras  # noqa: E402

import fastema  # noqa: E402
import fastema.tensorflow  # noqa: E402
import laws  # noqa: E402
import other_devices  # noqa: E402
import tolerances  # noqa: E402
from fastema import schedules  # noqa: E402
from fastema.keras import ExponentialMovingAverage  # noqa: E402

every_kind = pytest.mark.parametrize("kind", laws.KINDS.values(), ids=laws.KINDS)


# --- EMA, of arrays of each library -----------------------------------------------------------------------


class NumPys:
    """An array that training changes in place."""

    place = contextlib.nullcontext

    def __init__(self):
        self.value = np.array(laws.FIRST)

    def set(self, number):
        self.value[...] = number

    given = None

    def shown(self, ema):
        return np.asarray(ema.averages)


class Torchs(NumPys):
    def __init__(self):
        torch = pytest.importorskip("torch")
        self.value = torch.tensor(laws.FIRST)

    def set(self, number):
        self.value.copy_(self.value.new_tensor(np.asarray(number)))


class TorchsElsewhere(Torchs):
    """Tensors that torch's own operations average."""

    place = other_devices.cpu_is_elsewhere


class TensorFlows(NumPys):
    def __init__(self):
        self.value = tf.Variable(laws.FIRST)

    def set(self, number):
        self.value.assign(np.broadcast_to(number, laws.FIRST.shape))


class Jaxs(NumPys):
    """Arrays that do not change: each update is given another."""

    def __init__(self):
        self.jax = pytest.importorskip("jax")
        self.set(laws.FIRST)

    def set(self, number):
        with self.jax.enable_x64(True):
            self.value = self.given = self.jax.numpy.asarray(np.asarray(number, np.float64))

    def shown(self, ema):
        with self.jax.enable_x64(True):
            return np.asarray(ema.averages)


LIBRARIES = {
    "numpy": NumPys,
    "torch": Torchs,
    "elsewhere": TorchsElsewhere,
    "tensorflow": TensorFlows,
    "jax": Jaxs,
}
every_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)


def averaged(library, values, spans, *options, **more):
    """Return what an EMA shows after an update with each of these values, over a span each."""
    with library.place():
        weight = library()
        ema = fastema.EMA(weight.value, *options, **more)
        for value, span in zip(values, spans, strict=True):
            weight.set(value)
            ema.update(weight.given, span=span)
        assert ema.step == len(spans)
        return weight.shown(ema)


def each_once(library, **options):
    """Return what averages values by an update for each."""
    return lambda schedule, every, values: averaged(
        library, values, [1] * len(values), schedule, every=every, **options
    )


@every_library
@every_kind
@settings(max_examples=25)
@given(every=laws.steps_at_once, start=laws.starts, held=laws.held_values)
def test_every_so_many_updates_is_an_update_at_each(library, kind, every, start, held):
    laws.assert_every_is_each(each_once(library), kind, every, start, held)


@every_library
@every_kind
@settings(max_examples=25)
@given(start=laws.starts, held=laws.held_values, data=st.data())
def test_updates_of_spans_are_so_many_updates(library, kind, start, held, data):
    every = data.draw(st.integers(1, 3))
    count = len(held) * every
    spans = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    at_once = np.reshape(spans, (-1, every)).sum(axis=1)
    needed = laws.replayed(np.repeat(held, at_once, axis=0), lambda step: kind.decay(step, start))
    got = averaged(library, np.repeat(held, every, axis=0), spans, kind.ours(start), every=every)
    tolerances.assert_close(got, needed, tolerances.CLOCK)


@every_kind
@settings(max_examples=25)
@given(every=laws.steps_at_once, start=laws.starts, own=laws.starts, held=laws.held_values)
def test_the_start_of_an_ema_counts_beside_that_of_its_schedule(kind, every, start, own, held):
    late = laws.Kind(kind.ours, lambda step, start: kind.decay(step, start) if step >= own else 0.0)
    laws.assert_every_is_each(each_once(NumPys, start_step=own), late, every, start, held)


@every_library
@every_kind
@settings(max_examples=25)
@given(data=st.data(), before=st.integers(0, 30), start=laws.starts)
def test_spans_of_a_value_that_is_held_add_up(library, kind, data, before, start):
    schedule = kind.ours(start)
    real = isinstance(  # of others only whole steps count
        schedule, schedules.constant | schedules.equal_weights | schedules.power
    )
    one, other = (data.draw(st.floats(0.01, 50) if real else st.integers(1, 50)) for _ in range(2))
    values, spans = [[0.5, -2.0]] * (before + 2), [1] * before
    split = averaged(library, values, [*spans, one, other], schedule)
    tolerances.assert_close(
        split, averaged(library, values[1:], [*spans, one + other], schedule), tolerances.CLOCK
    )


# --- TensorFlow's op and operations -----------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["native", "graph"])
@every_kind
@settings(max_examples=6)
@given(every=laws.steps_at_once, start=laws.starts, held=laws.held_values)
def test_every_so_many_steps_of_a_graph_is_each(engine, kind, every, start, held):
    def average(schedule, every, values):
        average, value = tf.Variable(laws.FIRST), tf.Variable(laws.FIRST)

        @tf.function
        def step(t):
            decay = schedule.at_once(tf.cast(t, tf.float64), every, tf)
            fastema.tensorflow.update([average], [value], decay, when=t % every == 0, engine=engine)

        for t, x in enumerate(values, 1):
            value.assign(x)
            step(tf.constant(t))
        return average.numpy()

    laws.assert_every_is_each(average, kind, every, start, held)


# --- the wrapper of Keras' optimizers ---------------------------------------------------------------------


def trained(optimizer, variable, values, average_of):
    """Return the average of a variable that an optimizer leaves as it is given."""
    for value in values:
        variable.assign(value)
        optimizer.apply_gradients([(tf.zeros(2, tf.float64), variable)])
    return average_of(optimizer, variable).numpy()


def wrapped(inner, schedule, every, **options):
    return ExponentialMovingAverage(
        inner,
        average_decay=schedule.decay,
        start_step=schedule.start_step,
        dynamic_decay=schedule == laws.KINDS["dynamic"].ours(schedule.start_step),
        update_every=every,
        initial_average="weights",
        **options,
    )


every_documented_kind = pytest.mark.parametrize(
    "kind", [laws.KINDS["constant"], laws.KINDS["dynamic"]], ids=["constant", "dynamic"]
)


@pytest.mark.parametrize("engine", ["native", "graph"])
@every_documented_kind
@settings(max_examples=15)
@given(every=laws.steps_at_once, start=laws.starts, held=laws.held_values)
def test_every_so_many_steps_of_keras_is_each(engine, kind, every, start, held):
    def average(schedule, every, values):
        optimizer = wrapped(keras.optimizers.SGD(0.0), schedule, every, engine=engine)
        variable = keras.Variable(laws.FIRST, dtype="float64")
        optimizer.build([variable])
        return trained(optimizer, variable, values, lambda own, x: own.get_slot(x, "average"))

    laws.assert_every_is_each(average, kind, every, start, held)


@pytest.mark.parametrize("legacy", [False, True], ids=["new", "legacy"])
@every_documented_kind
@settings(max_examples=15)
@given(every=laws.steps_at_once, start=laws.starts, held=laws.held_values)
def test_every_so_many_steps_of_tf_keras_is_each(legacy, kind, every, start, held):
    tf_keras = pytest.importorskip("tf_keras")
    optimizers = tf_keras.optimizers.legacy if legacy else tf_keras.optimizers

    def average(schedule, every, values):
        optimizer = wrapped(optimizers.SGD(0.0), schedule, every)
        variable = tf.Variable(laws.FIRST)
        optimizer.shadow_copy([variable])
        return trained(optimizer, variable, values, lambda own, x: own.get_slot(x, "average"))

    laws.assert_every_is_each(average, kind, every, start, held)
