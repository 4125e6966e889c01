"""The formula of an average, for libraries that compute their own arrays: NumPy's bits, as in C++.

XLA would round a product and a sum once, as one operation, and 0.3 % of the elements would differ in the last
place. `blend` hides the product from it.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # of the library; scalars are arrays too
Dtype = Any  # of the library
Cast = Callable[[Array, Dtype], Array]  # converts an array
Where = Callable[[Array, Array, Array], Array]  # chooses one of two arrays
Bitcast = Callable[[Array, str], Array]  # has the same bits in a type of the same size


def weigh(decay: Array, equal: Callable[[Array, float], Array] = operator.eq) -> tuple[Array, Array]:
    """Return what `blend` asks of a decay: the weight of the value, and whether the value is copied.

    Args:
        decay: From 0 to 1, in double precision.
        equal: ``equal(x, y)`` compares.
    """
    return 1.0 - decay, equal(decay, 0.0)


def blend(
    average: Array,
    value: Array,
    weight: Array,
    copies: Array,
    *,
    compute: Dtype,
    cast: Callable[[Array, Dtype], Array],
    where: Callable[[Array, Array, Array], Array],
    bitcast: Callable[[Array, str], Array] | None = None,
) -> Array:
    """Return the average one update later: ``average + (1 - decay) * (value - average)``.

    The twin of ``blend`` in cpp/src/formula.hpp.

    Args:
        average: The average, of any floating type.
        value: What it moves towards, of the same shape and any floating type.
        weight: ``1 - decay`` in double precision; rounded here, once.
        copies: Whether the decay is 0: the average then becomes the value exactly, whatever it was.
        compute: The type to compute in: double precision for averages of that type, else float32.
        cast: ``cast(x, dtype)`` converts an array.
        where: ``where(condition, x, y)`` chooses one of two arrays.
        bitcast: ``bitcast(x, dtype)`` has the same bits in a type of the same size; given where XLA compiles
            this, None where each operation rounds for itself.
    """
    if bitcast is not None and value.dtype.name == "bfloat16":
        value = _widened(value, cast, bitcast)
    old, new = cast(average, compute), cast(value, compute)
    difference = new - old
    product = cast(weight, compute) * difference
    if bitcast is not None:
        product = _rounded(product, difference, bitcast)
    return cast(where(copies, new, old + product), average.dtype)


def blend_compensated(
    high: Array,
    low: Array,
    value: Array,
    weight: Array,
    copies: Array,
    *,
    cast: Cast,
    where: Where,
    bitcast: Bitcast,
) -> tuple[Array, Array]:
    """Return a float32 average and its carry one update later; the twin of ``blend_compensated`` in C++.

    Args:
        high: The average.
        low: What rounding lost of it: the average is the sum of both.
        value: What it moves towards, in float32.
        weight: As for `blend`.
        copies: As for `blend`; nothing is lost then.
        cast: As for `blend`.
        where: As for `blend`.
        bitcast: As for `blend`.
    """
    difference = (value - high) - low
    step = low + _rounded(cast(weight, np.float32) * difference, difference, bitcast)
    total = high + step
    taken = total - high
    lost = (high - (total - taken)) + (step - taken)
    return where(copies, value, total), where(copies, np.float32(0), lost)


def _rounded(product: Array, difference: Array, bitcast: Callable[[Array, str], Array]) -> Array:
    """Return the product as it is, in a way that only its rounded bits can be added to anything.

    Its sign is replaced by the one it has: that of the difference, as no weight is negative. XLA does not
    know that. (It removes a rounding to the type that a number has already; LLVM fuses across its barriers.)
    """
    integers = product.dtype.name.replace("float", "int")
    magnitude = int(np.iinfo(integers).max)
    bits = (bitcast(product, integers) & magnitude) | (bitcast(difference, integers) & ~magnitude)
    return bitcast(bits, product.dtype.name)


def _widened(
    value: Array, cast: Callable[[Array, Dtype], Array], bitcast: Callable[[Array, str], Array]
) -> Array:
    """Return a bfloat16 array in float32, by its bits: converted, it would not be rounded to bfloat16 before.

    So XLA does with a weight that was just computed; but the average is of the weight that stays.
    """
    return bitcast(cast(bitcast(value, "uint16"), "uint32") * 65536, "float32")


# --- 16 bits, in integers, and random ones: the twins of those in cpp/src/formula.hpp -------------


def widen_f16(half: Array, bitcast: Bitcast, cast: Cast, where: Where) -> Array:
    """Return the float32 of the bits of a float16 in the lower half of words of 32 bits."""
    rest, bias = half & np.uint32(0x7FFF), np.uint32((127 - 15) << 23)
    normal = (rest << np.uint32(13)) + bias
    special = (rest << np.uint32(13)) | np.uint32(0x7F800000)
    subnormal = bitcast(cast(rest, np.float32) * np.float32(2.0**-24), "uint32")
    bits = where(rest < np.uint32(0x400), subnormal, where(rest < np.uint32(0x7C00), normal, special))
    return bitcast(bits | ((half & np.uint32(0x8000)) << np.uint32(16)), "float32")


def splitmix64(x: Array) -> Array:
    """Return Sebastiano Vigna's splitmix64 of unsigned integers of 64 bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(seed: Array, step: Array, pair: Array, element: Array) -> Array:
    """Return the key of elements, by the array's place in the list and the element's in its array.

    All are unsigned integers of 64 bits; one key serves 2**32 elements.
    """
    call = splitmix64(splitmix64(seed) ^ step)
    return splitmix64(splitmix64(call ^ pair) ^ (element >> np.uint64(32)))


def random_bits(place: Array, key: Array, cast: Cast, where: Where) -> Array:
    """Return 16 random bits for each element: one hash serves two neighbours.

    Args:
        place: Of the elements in their array; unsigned integers of 32 bits.
        key: What `key_of` returned.
        cast: ``cast(x, dtype)`` converts an array; of integers, it takes the lower bits.
        where: ``where(condition, x, y)`` chooses one of two arrays.
    """
    x = ((place >> np.uint32(1)) ^ cast(key, np.uint32)) * np.uint32(0x7FEB352D)
    x = x ^ cast(key >> np.uint64(32), np.uint32)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    x = x ^ (x >> np.uint32(16))
    return where(place % np.uint32(2) == 0, x & np.uint32(0xFFFF), x >> np.uint32(16))


def round_bf16_at_random(bits: Array, random: Array, where: Where) -> Array:
    """Return the bfloat16 in the upper half of words of 32 bits, of those of float32 numbers."""
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return where(is_nan, bits | np.uint32(0x400000), bits + random)


def join_bf16(upper: Array, lower: Array) -> Array:
    """Return the bits of float32 numbers that were split, from words with a half each, in the lower half.

    Args:
        upper: The bfloat16.
        lower: The signed difference to it, with its sign extended.
    """
    return (upper << np.uint32(16)) + lower


def split_bf16(bits: Array, where: Where) -> tuple[Array, Array]:
    """Return words with the bfloat16 in the upper half, and the difference to it in the lower."""
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    high = where(is_nan, bits | np.uint32(0x400000), bits + np.uint32(0x8000))
    return high, where(is_nan, np.uint32(0), bits)


def narrow_f16_at_random(bits: Array, random: Array, bitcast: Bitcast, cast: Cast, where: Where) -> Array:
    """Return the float16 in the lower half of words of 32 bits, of those of float32 numbers."""
    least, infinite, bias = (np.uint32(x << 23) for x in (127 - 14, 127 + 16, 127 - 15))
    rest = bits & np.uint32(0x7FFFFFFF)
    normal = (rest - bias + (random >> np.uint32(3))) >> np.uint32(13)
    small = bitcast(where(rest < least, rest, np.uint32(0)), "float32")
    subnormal = (cast(small * np.float32(2.0**40), np.uint32) + random) >> np.uint32(16)
    special = where(rest > np.uint32(0x7F800000), np.uint32(0x7E00), np.uint32(0x7C00))
    half = where(rest < least, subnormal, where(rest < infinite, normal, special))
    return half | ((bits >> np.uint32(16)) & np.uint32(0x8000))
