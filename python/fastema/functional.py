"""Averaging and swapping lists of arrays, without any state of its own."""

from typing import Any

from . import _core
from ._arrays import as_list


def _pair(a: Any, b: Any, names: tuple[str, str], exchanged: bool) -> _core.Pairs:
    a_list, a_single = as_list(a, names[0])
    b_list, b_single = as_list(b, names[1])
    return _core.Pairs(a_list, b_list, *names, single=a_single and b_single, exchanged=exchanged)


def update(averages: Any, values: Any, decay: float, *, threads: int = 0) -> None:
    """Move averages towards values, in place: ``average += (1 - decay) * (value - average)``.

    The weight ``1 - decay`` is formed in float64 and rounded once to the averages' type; each
    operation is rounded as NumPy rounds it, so the result has NumPy's bits on every machine and
    with any number of threads. A decay of 0 copies exactly.

    For arrays that are averaged again and again, `Pairs` checks them once.

    Args:
        averages: One array, or a sequence of arrays. Float32 or float64, any shape, dense (in any
            order), writable. Changed in place.
        values: As `averages`, in shapes, types and order in memory; may be read-only.
        decay: From 0 to 1; towards 1 is slower.
        threads: How many threads to use at most; 0 leaves it to OpenMP (``OMP_NUM_THREADS``).

    Raises:
        TypeError: An array is none, or its type is not offered.
        ValueError: Sizes, shapes or orders differ, an average is read-only, overlaps another array
            of the call or has holes, or `decay` is outside of [0, 1]. Nothing has changed then.

    Example:
        >>> import fastema, numpy as np
        >>> average, value = np.zeros(3), np.array([1.0, 2.0, 4.0])
        >>> fastema.update(average, value, decay=0.75)
        >>> average
        array([0.25, 0.5 , 1.  ])
    """
    _pair(averages, values, ("averages", "values"), exchanged=False).update(decay, threads)


def swap(a: Any, b: Any, *, threads: int = 0) -> None:
    """Exchange the contents of arrays, in place and bit for bit.

    No temporary copy is made, and no arithmetic: swapping twice is nothing, for NaN payloads,
    signed zeros and infinities too.

    Args:
        a: One array, or a sequence of arrays. Float32 or float64, any shape, dense, writable.
        b: As `a`, in shapes, types and order in memory.
        threads: How many threads to use at most; 0 leaves it to OpenMP (``OMP_NUM_THREADS``).

    Raises:
        TypeError: An array is none, or its type is not offered.
        ValueError: Sizes, shapes or orders differ, or an array is read-only, overlaps another or
            has holes. Nothing has changed then.

    Example:
        >>> import fastema, numpy as np
        >>> a, b = np.zeros(2), np.ones(2)
        >>> fastema.swap(a, b)
        >>> a, b
        (array([1., 1.]), array([0., 0.]))
    """
    _pair(a, b, ("a", "b"), exchanged=True).swap(threads)


class Pairs:
    """Averages and values that were checked once, to be updated or swapped many times.

    The arrays are kept alive, never copied. An array whose memory moved since (``resize``) is
    noticed at the next call.

    Args:
        averages: As for `update`.
        values: As for `update`.

    Raises:
        TypeError: As for `update`.
        ValueError: As for `update`.

    Example:
        >>> import fastema, numpy as np
        >>> weights = [np.ones((2, 2)), np.ones(3)]
        >>> averages = [np.zeros_like(w) for w in weights]
        >>> pairs = fastema.Pairs(averages, weights)
        >>> for _ in range(2):
        ...     pairs.update(0.5)
        >>> averages[1]
        array([0.75, 0.75, 0.75])
        >>> pairs.swap()
        >>> weights[1]
        array([0.75, 0.75, 0.75])
    """

    __slots__ = ("_native",)

    def __init__(self, averages: Any, values: Any) -> None:
        self._native = _pair(averages, values, ("averages", "values"), exchanged=False)

    def __len__(self) -> int:
        return len(self._native)

    def update(self, decay: float, threads: int = 0) -> None:
        """Move the averages towards the values; see `fastema.update`."""
        self._native.update(decay, threads)

    def swap(self, threads: int = 0) -> None:
        """Exchange averages and values; see `fastema.swap`.

        Raises:
            TypeError: A pair's types differ.
            ValueError: A value is read-only, or shares memory with another.
        """
        self._native.swap(threads)
