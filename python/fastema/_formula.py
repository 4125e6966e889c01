"""The formula of an average, for libraries that compute their own arrays: NumPy's bits, as in C++."""

import operator
from collections.abc import Callable
from typing import Any

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
    """
    old, new = cast(average, compute), cast(value, compute)
    blended = old + cast(weight, compute) * (new - old)
    return cast(where(copies, new, blended), average.dtype)
