"""One update of all averages, as a jitted function of arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _formula
from .._formula_jax import (
    blend,
    blend_compensated,
    number_of,
    numbers_of,
    rounded_at_random,
    widened,
    words_of,
)
from .._types import compute_type
from .decays import Decays
from .trees import kind_of

Rounding = Literal["nearest", "stochastic", "compensated"]


class Arrays(NamedTuple):
    """What is kept: how far averaging has come, and averages of each decay; see `State`.

    Attributes:
        step: How many updates were seen.
        products: The products of all decays of each average, as words; None: averages started at the values.
        times: The clock, the time until which values were averaged, and the decays last used (NaN: none was),
            as words; None: each update takes a span of 1.
        averages: For each decay, the average of each array.
        carries: For each decay, what rounding lost of each average; None where nothing is averaged. No lists:
            averages are not compensated.
    """

    step: jax.Array
    products: jax.Array | None
    times: jax.Array | None
    averages: list[list[jax.Array]]
    carries: list[list[jax.Array | None]]


@dataclass(frozen=True)
class Rule:
    """How averages move; see `fastema.jax.ema`."""

    decays: Decays
    rounding: Rounding
    seed: int


class _Move(NamedTuple):
    """What an update does to every average of one decay.

    Attributes:
        weight: One minus the decay, in double precision.
        copies: Whether the decay is 0.
        clears: Whether averages leave zero by it; None: they started at the values.
        random: What random bits depend on: the seed, the step, how many decays there are, and the place of
            this one among them. None: averages are not rounded at random.
    """

    weight: jax.Array
    copies: jax.Array
    clears: jax.Array | None
    random: tuple[int, jax.Array, int, int] | None

    def next(
        self, average: jax.Array, value: jax.Array, carry: jax.Array | None, place: int
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return what is kept of a leaf after an update that averages; the carry, if there is one, too."""
        kind = kind_of(value)
        if kind == "copied":
            return jnp.copy(value), None
        if kind == "complex":
            parts = [
                self._next(part(average), part(value), None if carry is None else part(carry), place)
                for part in (jnp.real, jnp.imag)
            ]
            (real, real_carry), (imaginary, imaginary_carry) = parts
            if real_carry is None or imaginary_carry is None:
                return jax.lax.complex(real, imaginary), None
            return jax.lax.complex(real, imaginary), jax.lax.complex(real_carry, imaginary_carry)
        return self._next(average, value, carry, place)

    def _next(
        self, average: jax.Array, value: jax.Array, carry: jax.Array | None, place: int
    ) -> tuple[jax.Array, jax.Array | None]:
        dtype = average.dtype
        if self.clears is not None:
            average = jnp.where(self.clears, jnp.zeros((), dtype), average)
        if carry is not None:
            return blend_compensated(average, carry, value, self.weight, self.copies)
        blended = blend(average, value, self.weight, self.copies)
        if self.random is not None and dtype.itemsize == 2:
            seed, step, decays, k = self.random
            return rounded_at_random(blended, dtype, (seed, step, place * decays + k)), None
        return blended.astype(dtype), None


class _Clock(NamedTuple):
    """The times of an update.

    Attributes:
        now: When it ends.
        averaged: Until when values were averaged before.
        decays: Those used then; NaN: nothing was averaged so far.
        passes: Whether time passes by it.
    """

    now: jax.Array
    averaged: jax.Array
    decays: list[jax.Array]
    passes: jax.Array

    @classmethod
    def after(cls, times: jax.Array, span: jax.Array) -> "_Clock":
        """Return the times of an update of a span; both are words."""
        clock, averaged, *decays = numbers_of(times)
        passed = number_of(span)
        passes = (passed > 0.0) & (passed < np.inf)
        return cls(clock + jnp.where(passes, passed, 0.0), averaged, decays, passes)


@partial(jax.jit, static_argnums=0, inline=True)
def moved(rule: Rule, before: Arrays, values: list[jax.Array], span: jax.Array | None) -> Arrays:
    """Return what is kept after one more update.

    Args:
        rule: How averages move.
        before: What is kept now.
        values: What they move towards.
        span: How much time passes on the clock, as words of a float64; None: there is no clock.
    """
    decays, several = rule.decays, len(rule.decays.each)
    step = before.step + np.uint32(1)
    with jax.enable_x64(True):  # the weight is formed in float64
        times = before.times
        clock = None if times is None or span is None else _Clock.after(times, span)

        def move(before: Arrays) -> Arrays:
            found = decays.at(step) if clock is None else decays.over(clock.averaged, clock.now)
            products, clears = _multiplied(before.products, found)
            times = None if clock is None else _words([clock.now, clock.now, *found])
            averages, carries = [], []
            for k, (decay, old) in enumerate(zip(found, before.averages, strict=True)):
                random = (rule.seed, step, several, k) if rule.rounding == "stochastic" else None
                how = _Move(*_formula.weigh(decay), clears[k], random)
                kept = before.carries[k] if before.carries else [None] * len(old)
                each = zip(old, values, kept, _places_of(values), strict=True)
                new = [how.next(*one) for one in each]
                averages.append([average for average, _ in new])
                if before.carries:
                    carries.append([carry for _, carry in new])
            return Arrays(step, products, times, averages, carries)

        def skip(before: Arrays) -> Arrays:
            if clock is not None:
                times = _words([clock.now, clock.averaged, *clock.decays])
                blank = jnp.isnan(clock.decays[0])
            elif decays.start_step > 1:  # the first step has averaged
                return before._replace(step=step)
            else:
                times, blank = None, step < decays.every
            followed = [  # until something is averaged, copies follow
                [
                    jnp.where(blank, v, a) if kind_of(v) == "copied" else a
                    for a, v in zip(old, values, strict=True)
                ]
                for old in before.averages
            ]
            return before._replace(step=step, times=times, averages=followed)

        if decays.every == 1 and clock is None:
            return move(before)
        time = step if clock is None else clock.now
        due = (step % np.uint32(decays.every) == 0) | (time < decays.start_step)
        after: Arrays = jax.lax.cond(due if clock is None else due & clock.passes, move, skip, before)
        return after


def _multiplied(
    products: jax.Array | None, decays: list[jax.Array]
) -> tuple[jax.Array | None, list[jax.Array | None]]:
    """Return the products of all decays after an update, and which averages leave zero by it."""
    if products is None:
        return None, [None] * len(decays)
    # XLA would multiply the decays of two updates first
    before = jax.lax.optimization_barrier(numbers_of(products))  # type: ignore[no-untyped-call]
    after = [product * decay for product, decay in zip(before, decays, strict=True)]
    return _words(after), [(old == 1.0) & (new < 1.0) for old, new in zip(before, after, strict=True)]


def _words(numbers: Sequence[jax.Array]) -> jax.Array:
    return words_of(jnp.stack(numbers)).reshape(-1)


@partial(jax.jit, static_argnums=2)
def divided(averages: list[jax.Array], products: jax.Array, k: int) -> list[jax.Array]:
    """Return the k-th averages, which started at zeros, as they are shown."""
    with jax.enable_x64(True):
        number = numbers_of(products)[k]
        divisor = jnp.where(number == 1.0, 1.0, 1.0 - number)

        def quotient(x: jax.Array) -> jax.Array:
            if kind_of(x) == "complex":
                return jax.lax.complex(quotient(x.real), quotient(x.imag))
            wide = widened(x, np.dtype(compute_type(np.dtype(x.dtype))))
            # by one number XLA would not divide, but multiply by its inverse
            divisors = jnp.where(wide == wide, divisor.astype(wide.dtype), wide)  # noqa: PLR0124
            return (wide / divisors).astype(x.dtype)

        return [x if kind_of(x) == "copied" else quotient(x) for x in averages]


def _places_of(values: list[jax.Array]) -> list[int]:
    """Return of each array its place among those that are averaged."""
    averaged = [kind_of(value) != "copied" for value in values]
    return [sum(averaged[:i]) for i in range(len(values))]
