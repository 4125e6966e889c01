"""The formula of an average in operations of JAX: NumPy's bits, also where XLA compiles them.

All of it is for code that is traced with 64 bits enabled, so that weights are given in double precision.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _formula
from ._types import DType, compute_type


def blend(average: jax.Array, value: jax.Array, weight: Any, copies: Any) -> jax.Array:
    """Return the average one update later, in the type of the computation; see `_formula.blend`."""
    compute = np.dtype(compute_type(np.dtype(average.dtype)))
    old, new = widened(average, compute), widened(value, compute)
    blended: jax.Array = _formula.blend(
        old, new, weight, copies, compute=compute, cast=jnp.asarray, where=jnp.where, bitcast=bitcast
    )
    return blended


def blend_compensated(
    average: jax.Array, carry: jax.Array, value: jax.Array, weight: Any, copies: Any
) -> tuple[jax.Array, jax.Array]:
    """Return a float32 or bfloat16 average one update later, and what rounding lost of it."""
    new = widened(value, np.dtype(np.float32))
    if average.dtype == np.float32:
        return _formula.blend_compensated(
            average, carry, new, weight, copies, cast=jnp.asarray, where=jnp.where, bitcast=bitcast
        )
    lower = bitcast(carry.astype(np.int32), np.uint32)
    joined = bitcast(_formula.join_bf16(bitcast(average, np.uint16).astype(np.uint32), lower), np.float32)
    high, low = _formula.split_bf16(bitcast(blend(joined, new, weight, copies), np.uint32), jnp.where)
    return bitcast((high >> np.uint32(16)).astype(np.uint16), average.dtype), bitcast(
        low.astype(np.uint16), carry.dtype
    )


def widened(x: jax.Array, dtype: DType) -> jax.Array:
    """Return numbers in a type of more bits.

    XLA leaves out the rounding of what was just computed, and would average what is not kept: so these are
    widened from their bits. (`reduce_precision` would do, but takes float16's subnormal numbers for zero.)
    """
    if x.dtype == dtype:
        return x
    if x.dtype == np.float32:
        return jax.lax.reduce_precision(x.astype(dtype), 8, 23)
    half = bitcast(x, np.uint16).astype(np.uint32)
    if x.dtype == jnp.bfloat16:
        wide = bitcast(half << np.uint32(16), np.float32)
    else:
        wide = _formula.widen_f16(half, bitcast, jnp.asarray, jnp.where)
    return wide.astype(dtype)


def rounded_at_random(x: jax.Array, dtype: DType, place: tuple[int, jax.Array, int]) -> jax.Array:
    """Round float32 numbers to 16 bits, with random bits of a seed, a step and a place in the list."""
    seed, step, pair = place
    many = x.size > 2**32
    element = jax.lax.iota(np.uint64 if many else np.uint32, x.size).reshape(x.shape)
    key = _formula.key_of(
        jnp.asarray(seed, np.uint64),
        step.astype(np.uint64),
        jnp.asarray(pair, np.uint64),
        element if many else jnp.zeros((), np.uint64),
    )
    random = _formula.random_bits(element.astype(np.uint32), key, jnp.asarray, jnp.where)
    bits = bitcast(x, np.uint32)
    if dtype == jnp.bfloat16:
        half = _formula.round_bf16_at_random(bits, random, jnp.where) >> np.uint32(16)
    else:
        half = _formula.narrow_f16_at_random(bits, random, bitcast, jnp.asarray, jnp.where)
    return bitcast(half.astype(np.uint16), dtype)


def bitcast(x: jax.Array, dtype: str | DType | type[Any]) -> jax.Array:
    """Return the same bits in another type."""
    return jax.lax.bitcast_convert_type(x, dtype)


def words_of(number: jax.Array) -> jax.Array:
    """Return a float64, or several, as two words each."""
    return bitcast(number, np.uint32)


def number_of(words: jax.Array) -> jax.Array:
    """Return the float64 of two words."""
    return bitcast(words, np.float64)


def numbers_of(words: jax.Array) -> list[jax.Array]:
    """Return the float64s of a vector of words."""
    numbers = number_of(words.reshape(-1, 2))
    return [numbers[i] for i in range(numbers.shape[0])]
