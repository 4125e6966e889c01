"""When averages move within a jitted step, and by how much."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import schedules
from .._ema.count import Pace

_CLOSED = (schedules.constant, schedules.equal_weights, schedules.power)  # their products have a formula


@dataclass(frozen=True)
class Decays:
    """The decays of steps; see `fastema.jax.ema`."""

    decay: float | schedules.Schedule
    every: int
    start_step: int

    def last(self, step: int) -> tuple[int, float | None]:
        """Return the last step that averaged until this one, and its decay; 0 and None: none has."""
        pace = Pace.of(self.decay, self.every, self.start_step)
        averaged = self.due_until(step)
        if averaged == 0:
            return 0, None
        return averaged, pace.decays_over(self.due_until(averaged - 1), averaged)[0]

    def due_until(self, step: int) -> int:
        """Return the last step until this one that averages: before `start_step` each does."""
        return max(step - step % self.every, min(step, self.start_step - 1))

    @cached_property
    def _first(self) -> tuple[int, float]:
        """The first step from `start_step` on that averages, and its decay, of all since then."""
        step = max(-(-self.start_step // self.every), 1) * self.every
        decays = Pace.of(self.decay, self.every, self.start_step).decays_over(self.due_until(step - 1), step)
        return step, decays[0]

    def at(self, step: jax.Array) -> jax.Array:
        """Return the decay of a step that averages, in double precision; with 64 bits enabled."""
        first, decay = self._first
        later = self._over(step.astype(np.float64))
        return jnp.where(step < self.start_step, 0.0, jnp.where(step == np.uint32(first), decay, later))

    def _over(self, step: jax.Array) -> jax.Array:
        """Return the decay of this step and those before it that it takes at once; see `Schedule.over`."""
        schedule, every = self.decay, self.every
        if not isinstance(schedule, schedules.Schedule):
            return jnp.asarray(schedules.compound(schedule, every), np.float64)
        if every == 1 or isinstance(schedule, _CLOSED):
            found = schedule.at_once(step, every, jnp)
        else:
            begin = step - (every - 1)

            def times(i: jax.Array, product: jax.Array) -> Any:
                return product * schedule.at(begin + i, jnp)  # one by one, as `over` does

            found = jax.lax.fori_loop(0, every, times, jnp.ones((), np.float64))
            if schedule._limit is not None:
                at_limit = schedule.at(begin, jnp) == schedule._limit
                found = jnp.where(at_limit, schedules.compound(schedule._limit, every), found)
        decay: jax.Array = jnp.where((found >= 0.0) & (found <= 1.0), found, 1.0)
        return decay


def check_can_be_traced(schedule: schedules.Schedule, every: int) -> None:
    """Raise unless a schedule can be computed in a step.

    Raises:
        TypeError: It cannot.
        ValueError: It takes too many steps at once.
    """
    try:
        hash(schedule)
        with jax.enable_x64(True):
            jax.eval_shape(lambda step: schedule.at(step, jnp), np.ones((), np.float64))
    except Exception as error:
        raise TypeError(
            "decay must be a schedule that can be hashed, and whose method at takes tensors, got "
            f"{schedule!r}: {error}"
        ) from error
    if every > schedules.BLOCK and not isinstance(schedule, _CLOSED):
        raise ValueError(f"every must be at most {schedules.BLOCK} with {schedule!r}, got {every}")
