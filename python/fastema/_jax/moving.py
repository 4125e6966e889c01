"""One update of all averages, as a jitted function of arrays."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _formula
from .._formula_jax import blend, number_of, rounded_at_random, widened, words_of
from .._types import Rounding, compute_type
from .decays import Decays
from .trees import kind_of


@dataclass(frozen=True)
class Rule:
    """How averages move; see `fastema.jax.ema`."""

    decays: Decays
    rounding: Rounding
    seed: int

    def next(self, average: jax.Array, value: jax.Array, move: "Move", pair: int) -> jax.Array:
        """Return what is kept of a leaf after an update that averages."""
        kind = kind_of(value)
        if kind == "copied":
            return jnp.copy(value)
        if kind == "complex":
            parts = (self._blend(part(average), part(value), move, pair) for part in (jnp.real, jnp.imag))
            return jax.lax.complex(*parts)
        return self._blend(average, value, move, pair)

    def _blend(self, average: jax.Array, value: jax.Array, move: "Move", pair: int) -> jax.Array:
        dtype = average.dtype
        if move.clears is not None:
            average = jnp.where(move.clears, jnp.zeros((), dtype), average)
        blended = blend(average, value, move.weight, move.copies)
        if self.rounding == "stochastic" and dtype.itemsize == 2:
            return rounded_at_random(blended, dtype, (self.seed, move.step, pair))
        return blended.astype(dtype)


class Move(NamedTuple):
    """What an update does to every average.

    Attributes:
        step: Its number.
        weight: One minus the decay, in double precision.
        copies: Whether the decay is 0.
        clears: Whether averages leave zero by it; None: they started at the values.
    """

    step: jax.Array
    weight: jax.Array
    copies: jax.Array
    clears: jax.Array | None


@partial(jax.jit, static_argnums=0, inline=True)
def moved(
    rule: Rule, step: jax.Array, product: jax.Array | None, kept: list[jax.Array], values: list[jax.Array]
) -> tuple[jax.Array, jax.Array | None, list[jax.Array]]:
    """Return the state after one more update, as its parts."""
    step = step + np.uint32(1)

    def move(product: jax.Array | None, kept: list[jax.Array]) -> tuple[jax.Array | None, list[jax.Array]]:
        decay, clears = rule.decays.at(step), None
        if product is not None:
            # XLA would multiply the decays of two updates first
            before = jax.lax.optimization_barrier(number_of(product))  # type: ignore[no-untyped-call]
            after = before * decay
            clears, product = (before == 1.0) & (after < 1.0), words_of(after)
        how = Move(step, *_formula.weigh(decay), clears)
        pairs = pairs_of(values)
        moved = [rule.next(a, v, how, pair) for a, v, pair in zip(kept, values, pairs, strict=True)]
        return product, moved

    def skip(product: jax.Array | None, kept: list[jax.Array]) -> tuple[jax.Array | None, list[jax.Array]]:
        if rule.decays.start_step > 1:  # the first step has averaged
            return product, kept
        blank = step < rule.decays.every  # until something is averaged, copies follow
        return product, [
            jnp.where(blank, v, a) if kind_of(v) == "copied" else a for a, v in zip(kept, values, strict=True)
        ]

    with jax.enable_x64(True):  # the weight is formed in float64
        if rule.decays.every == 1:
            return step, *move(product, kept)
        due = (step % np.uint32(rule.decays.every) == 0) | (step < rule.decays.start_step)
        return step, *jax.lax.cond(due, move, skip, product, kept)


@jax.jit
def divided(averages: list[jax.Array], product: jax.Array) -> list[jax.Array]:
    """Return averages that started at zeros as they are shown."""
    with jax.enable_x64(True):
        number = number_of(product)
        divisor = jnp.where(number == 1.0, 1.0, 1.0 - number)

        def quotient(x: jax.Array) -> jax.Array:
            if kind_of(x) == "complex":
                return jax.lax.complex(quotient(x.real), quotient(x.imag))
            wide = widened(x, np.dtype(compute_type(np.dtype(x.dtype))))
            # by one number XLA would not divide, but multiply by its inverse
            divisors = jnp.where(wide == wide, divisor.astype(wide.dtype), wide)  # noqa: PLR0124
            return (wide / divisors).astype(x.dtype)

        return [x if kind_of(x) == "copied" else quotient(x) for x in averages]


def pairs_of(values: list[jax.Array]) -> list[int]:
    """Return of each array its place among those that are averaged."""
    averaged = [kind_of(value) != "copied" for value in values]
    return [sum(averaged[:i]) for i in range(len(values))]
