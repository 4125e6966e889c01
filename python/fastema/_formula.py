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
