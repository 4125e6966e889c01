"""The decay of each step."""

import pickle

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import oracle
from fastema import schedules


@given(st.integers(1, 2**40), st.floats(0, 1), st.integers(0, 2**20))
def test_dynamic_is_the_documented_schedule(step, decay, start):
    assert schedules.dynamic(decay, start)(step) == oracle.decay_at(step, decay, start)
    assert schedules.constant(decay, start)(step) == oracle.decay_at(step, decay, start, dynamic=False)


@pytest.mark.parametrize(("decay", "reached"), [(0.99, 890), (0.999, 8990), (0.9999, 89_990)])
def test_dynamic_reaches_its_limit_when_the_original_does(decay, reached):
    schedule = schedules.dynamic(decay)
    assert schedule(reached - 1) < decay
    assert schedule(reached + 1) == decay


def test_dynamic_is_right_where_float32_cannot_count():
    step = 2**24 + 1
    assert schedules.dynamic(1.0)(step) == (1 + step) / (10 + step) != schedules.dynamic(1.0)(step - 1)


@pytest.mark.parametrize("kind", [schedules.dynamic, schedules.constant])
def test_a_tensor_gives_the_bits_of_a_number(kind):
    schedule = kind(0.999, 3)

    @tf.function
    def at(step):
        return schedules.compound(schedule.at(tf.cast(step, tf.float64), tf), 7)

    for step in (1, 2, 3, 4, 100, 8992, 8993, 10**9):
        assert at(tf.constant(step)).numpy() == schedules.compound(schedule(step), 7)


@pytest.mark.parametrize("updates", range(1, 20))
def test_compound_is_a_power(updates):
    assert np.isclose(schedules.compound(0.99, updates), 0.99**updates, rtol=1e-15, atol=0)


def test_schedules_are_values():
    schedule = schedules.dynamic(0.9, start_step=2)
    assert pickle.loads(pickle.dumps(schedule)) == schedule == schedules.dynamic(0.9, 2)
    with pytest.raises(ValueError, match=r"decay must be from 0 to 1, got 1\.5"):
        schedules.constant(1.5)
