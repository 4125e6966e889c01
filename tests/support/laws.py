"""Laws of the clock, for whatever averages: several steps at once are these steps, one after the other.

Needed values come from a loop over single steps in float64, and from decays that are written down here again.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

import tolerances
from fastema import schedules

FIRST = np.array([1e3, -7.0])  # where averages start: what is left of it shows


class Kind(NamedTuple):
    """A schedule of the library, and what it is defined to be.

    Attributes:
        ours: Makes it, for a first step that averages.
        decay: ``decay(step, start)``, of a single step.
    """

    ours: Callable
    decay: Callable


def _dynamic(step, start):
    return 0.0 if step < start else min(0.95, (1 + step - start) / (10 + step - start))


def _warmup(step, start):
    after = step - start - 1
    return min(0.99, max(0.3, 1 - (1 + after / 1.5) ** -0.75)) if after > 0 else 0.0


def _power(step, start):  # noqa: ARG001 - it starts with the training
    s = 0.1**2  # sigma_rel ** 2 == (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
    gamma = max(np.roots([s, 7 * s, 16 * s - 1, 12 * s - 1]).real)
    return (1 - 1 / step) ** (gamma + 1)


def _cosine(step, start):  # noqa: ARG001 - it starts with the training
    return 0.98 - 0.58 * (np.cos(np.pi * min(step, 20) / 20) + 1) / 2


KINDS = {
    "constant": Kind(lambda start: schedules.constant(0.9, start), lambda t, start: 0.9 * (t >= start)),
    "dynamic": Kind(lambda start: schedules.dynamic(0.95, start), _dynamic),
    "warmup": Kind(lambda start: schedules.warmup(0.99, 1.5, 0.75, start, min_decay=0.3), _warmup),
    "equal weights": Kind(
        lambda start: schedules.equal_weights(start + 1),
        lambda t, start: (t - start - 1) / (t - start) if t > start else 0.0,
    ),
    "half-life": Kind(lambda start: schedules.half_life(5), lambda t, start: 0.5**0.2),  # noqa: ARG005
    "power": Kind(lambda start: schedules.power(0.1), _power),  # noqa: ARG005
    "ramp": Kind(lambda start: schedules.ramp(0.9, 8), lambda t, start: 0.9 - 0.9 * np.exp(-t / 8)),  # noqa: ARG005
    "cosine": Kind(lambda start: schedules.cosine(0.4, 0.98, 20), _cosine),  # noqa: ARG005
    "linear": Kind(
        lambda start: schedules.linear(0.4, 0.98, 20),  # noqa: ARG005
        lambda t, start: 0.4 + 0.029 * min(t, 20),  # noqa: ARG005
    ),
    "growing": Kind(
        lambda start: schedules.growing(0.25, 6),  # noqa: ARG005
        lambda t, start: 0.5 ** (1 / min(6, t / 4)),  # noqa: ARG005
    ),
}

starts = st.integers(0, 20)
steps_at_once = st.integers(1, 6)
held_values = st.lists(st.integers(-9, 9), min_size=1, max_size=6).map(
    lambda numbers: np.stack([np.array([x, 10.0 - x]) for x in numbers])
)


def replayed(values, decay):
    """Return the average after a single step for each value."""
    average = FIRST
    for step, value in enumerate(values, 1):
        d = decay(step)
        average = d * average + (1 - d) * value
    return average


def assert_every_is_each(average, kind, every, start, held):
    """Assert that every so many steps give the average of each step, where values stand still in between.

    Args:
        average: ``average(schedule, every, values)`` trains from `FIRST` and returns the average.
        kind: One of `KINDS`.
        every: So many steps.
        start: The first step that averages.
        held: A value for each time that it averages.
    """
    values = np.repeat(held, every, axis=0)
    needed = replayed(values, lambda step: kind.decay(step, start))
    tolerances.assert_close(average(kind.ours(start), every, values), needed, tolerances.CLOCK)
