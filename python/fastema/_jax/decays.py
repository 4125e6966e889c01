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

Decay = float | schedules.Schedule


@dataclass(frozen=True)
class Decays:
    """The decays of steps; see `fastema.jax.ema`. What is traced needs 64 bits enabled.

    Attributes:
        each: Of each average.
        every: As for `fastema.EMA`.
        start_step: As for `fastema.EMA`.
    """

    each: tuple[Decay, ...]
    every: int
    start_step: int

    # --- by steps, of which each takes a span of 1 ------------------------------------------------

    def last(self, step: int) -> tuple[int, tuple[float, ...]]:
        """Return the last step that averaged until this one, and its decays; 0 and none: none has."""
        averaged = self._due_until(step)
        if averaged == 0:
            return 0, ()
        return averaged, self._pace.decays_over(self._due_until(averaged - 1), averaged)

    def _due_until(self, step: int) -> int:
        """Return the last step until this one that averages: before `start_step` each does."""
        return max(step - step % self.every, min(step, self.start_step - 1))

    @property
    def _pace(self) -> Pace:
        return Pace.of(self.each, self.every, self.start_step)

    @cached_property
    def _first(self) -> tuple[int, tuple[float, ...]]:
        """The first step from `start_step` on that averages, and its decays, of all since then."""
        step = max(-(-self.start_step // self.every), 1) * self.every
        return step, self._pace.decays_over(self._due_until(step - 1), step)

    def at(self, step: jax.Array) -> list[jax.Array]:
        """Return the decays of a step that averages, in double precision."""
        first, decays = self._first
        return [
            jnp.where(
                step < self.start_step,
                0.0,
                jnp.where(step == np.uint32(first), decay, self._of_steps(each, step.astype(np.float64))),
            )
            for each, decay in zip(self.each, decays, strict=True)
        ]

    def _of_steps(self, decay: Decay, step: jax.Array) -> jax.Array:
        """Return the decay of this step and those before it that it takes at once; see `Schedule.over`."""
        every = self.every
        if not isinstance(decay, schedules.Schedule):
            return jnp.asarray(schedules.compound(decay, every), np.float64)
        if every == 1 or isinstance(decay, _CLOSED):
            return _decay_or_none(decay.at_once(step, every, jnp))
        begin = step - (every - 1)
        found = _times(decay, begin, every, jnp.ones((), np.float64))
        if decay._limit is not None:
            at_limit = decay.at(begin, jnp) == decay._limit
            found = jnp.where(at_limit, schedules.compound(decay._limit, every), found)
        return _decay_or_none(found)

    # --- by a clock -------------------------------------------------------------------------------

    def over(self, t0: jax.Array, t1: jax.Array) -> list[jax.Array]:
        """Return the decays of an update that takes the clock's time from `t0` to `t1` at once."""
        copies = t0 < self.start_step - 1  # a step of it copies
        return [jnp.where(copies, 0.0, _decay_or_none(_over(decay, t0, t1))) for decay in self.each]


def _over(decay: Decay, t0: jax.Array, t1: jax.Array) -> jax.Array:
    """Return what `schedules.over` does, by the same operations; its formulas, where it has some."""
    if not isinstance(decay, schedules.Schedule):
        return _power(decay, t1 - t0)
    if isinstance(decay, schedules.constant):
        return jnp.where(t0 < decay.start_step - 1, 0.0, _power(decay.decay, t1 - t0))
    if isinstance(decay, schedules.equal_weights):
        before = decay.start_step - 1
        share = jnp.maximum(t0 - before, 0) / jnp.where(t1 > before, t1 - before, 1.0)
        return jnp.where(t1 > before, share, 0.0)
    if isinstance(decay, schedules.power):
        is_step = (t1 == t0 + 1.0) & (t1 == jnp.floor(t1))
        return jnp.where(is_step, decay.at(t1, jnp), (t0 / t1) ** (decay.gamma + 1.0))
    return _product(decay, jnp.floor(t0) + 1.0, jnp.floor(t1) + 1.0)


def _power(decay: float, span: jax.Array) -> jax.Array:
    """Return the decay of a constant one over a span: of whole steps as `schedules.compound` does."""
    whole = jnp.floor(span)
    bits, base = (
        whole.astype(np.uint64),
        decay + 0.0 * span,
    )  # no constant, whose power may be another function

    def halve(i: Any, product: jax.Array) -> jax.Array:
        number = bits >> (
            np.uint64(52) - jnp.asarray(i, np.uint64)
        )  # the steps so far, from the highest bit on
        twice = jnp.where(number > np.uint64(1), product * product, product)
        return jnp.where(number % np.uint64(2) == 1, jnp.where(number > 1, twice * base, base), twice)

    # in a loop, or XLA would compute all of it again for each array
    compounded = jax.lax.fori_loop(0, 53, halve, base)
    return jnp.where(span == whole, compounded, base**span)


def _product(schedule: schedules.Schedule, begin: jax.Array, end: jax.Array) -> jax.Array:
    """Return the product of the decays of steps, one by one and in blocks, as `Schedule.over` does."""
    limit = schedule._limit

    def is_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        step, product = state
        return (step < end) & (product != 0.0)

    def block(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, product = state
        until = jnp.minimum(step + schedules.BLOCK, end)
        if limit is None:
            return until, _times(schedule, step, until - step, product)
        at_limit = schedule.at(step, jnp) == limit
        # no step, where all that follow are at the limit
        product = _times(schedule, step, jnp.where(at_limit, 0.0, until - step), product)
        product = jnp.where(at_limit, product * _power(limit, end - step), product)
        return jnp.where(at_limit, end, until), product

    return jax.lax.while_loop(is_on, block, (begin, jnp.ones((), np.float64)))[1]


def _times(schedule: schedules.Schedule, begin: jax.Array, steps: Any, product: jax.Array) -> jax.Array:
    """Return a product times the decays of so many steps, one by one as `Schedule.over` does."""

    def times(i: jax.Array, product: jax.Array) -> Any:
        return product * schedule.at(begin + i, jnp)

    found: jax.Array = jax.lax.fori_loop(
        0, steps if isinstance(steps, int) else steps.astype(np.int64), times, product
    )
    return found


def _decay_or_none(found: jax.Array) -> jax.Array:
    """Return a decay that a schedule gave, or 1 where it is none, so that averages stay as they are."""
    return jnp.where((found >= 0.0) & (found <= 1.0), found, 1.0)


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
