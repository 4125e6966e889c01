"""Types and arguments that every room shares: what an array is, which are averaged, what a number must be.

Which types go together is asked of the core.
"""

import contextlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

import ml_dtypes
import numpy as np

from . import _core


class SupportsDLPack(Protocol):
    """An array of any library that exports its memory: torch's, JAX's, CuPy's, NumPy's."""

    def __dlpack__(self) -> object:
        """Export the memory."""


class SupportsCudaArrayInterface(Protocol):
    """An array in the memory of a CUDA device."""

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        """Where the memory is, and what lies in it."""


Array: TypeAlias = np.ndarray | SupportsDLPack | SupportsCudaArrayInterface
"""An array of any library."""

AnyArray: TypeAlias = Any
"""An array in code that only the file of its own library can check."""

DType: TypeAlias = np.dtype[Any]
"""NumPy's type of elements."""

Arrays: TypeAlias = Array | Sequence[Array]
"""One array or several."""

Decay: TypeAlias = float | Callable[[int], float]
"""From 0 to 1, towards 1 is slower; or a schedule, called with the number of updates."""

Rounding: TypeAlias = Literal["nearest", "stochastic"]
"""How an update rounds averages of 16 bits."""


class Terms(TypedDict, total=False):
    """What the core is told of lists beside the arrays themselves; each may be left out.

    Attributes:
        verb: What will be done. ``"update"``, the default, takes types that are averaged, and allows swaps
            too; the others move bytes, and take any types.
        only_floats: Whether the others, too, are to refuse types that cannot be averaged.
        arguments: What errors call both lists; ``("averages", "values")``.
        names: What errors call each value and its averages, as ``values['layer.weight']``. None: by their
            numbers.
        single: Whether errors are to call the only array by its argument alone.
        averages_per_value: How many averages in a row share each value; 1.
    """

    verb: Literal["update", "swap", "copy"]
    only_floats: bool
    arguments: tuple[str, str]
    names: Sequence[str] | None
    single: bool
    averages_per_value: int


FLOATS = tuple(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))
"""What is averaged; other types are copied."""

MIXES = frozenset(_core.mixes())
"""The names of the types of averages and of their values that the core offers."""


def compute_type(dtype: DType) -> DType:
    """Return the type in which averages of a type are computed."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def average_type(dtype: DType) -> DType:
    """Return the type of averages of values of a type, where none is asked for.

    An average of 16 bits stands still unless it is rounded stochastically or compensated.
    """
    return np.dtype(np.float32) if dtype in FLOATS and dtype.itemsize == 2 else dtype


def float_type(dtype: Any, name: str = "dtype") -> DType:
    """Return NumPy's type of a name, of a type of NumPy's or of torch's.

    Raises:
        TypeError: It is no type that is averaged.
    """
    text = str(dtype).removeprefix("torch.")
    chosen: DType = np.dtype(text if text in map(str, FLOATS) else dtype)
    if chosen not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {chosen}")
    return chosen


def narrowed(x: np.ndarray, dtype: DType) -> np.ndarray:
    """Round numbers once to a type; the casts of ml_dtypes round float64 to float32 first, and so twice.

    Float32 is therefore rounded to odd: what was cut off stays visible in the last bit, on the right side
    of every tie of a narrower type.
    """
    if dtype.isbuiltin == 1:
        return x.astype(dtype)
    near = x.astype(np.float32)
    bits = near.view(np.uint32)
    bits -= np.abs(near) > np.abs(x)
    bits |= near != x
    return near.astype(dtype)


shown = _core.shown
"""Return a number as errors show it, however many digits it has."""


def as_number(number: object, needed: str) -> float:
    """Return what says that it is a number as Python's own; an int if it is whole and says so.

    Args:
        number: What was given.
        needed: What an error begins with, as ``"decay must be a number"``.

    Returns:
        An infinity for what no float can hold.

    Raises:
        TypeError: It is no number.
    """
    if not isinstance(number, str | bytes | bytearray):  # float() would read them
        with contextlib.suppress(TypeError, ValueError):
            return _python_number(number)
    raise TypeError(f"{needed}, got {shown(number)}")


def _python_number(number: Any) -> float:
    try:
        whole = operator.index(number)
    except TypeError:
        whole = None
    try:
        real = float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
    return real if whole is None else whole


def check_share(number: object, name: str, also: str = "") -> float:
    """Return a number from 0 to 1.

    Args:
        number: What was given.
        name: What errors call it.
        also: What errors say may be given besides, as ``", or a schedule"``.

    Raises:
        TypeError: It is no number.
        ValueError: It is out of range.
    """
    share = as_number(number, f"{name} must be a number from 0 to 1{also}")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} must be from 0 to 1, got {shown(number)}")
    return float(share)


def check_decay(decay: Decay, name: str = "decay") -> Decay:
    """Return a decay as a float, or a schedule as it is; raises as `check_share`."""
    return decay if callable(decay) else check_share(decay, name, ", or a schedule")


def check_count(number: object, name: str, least: int = 0) -> int:
    """Return a whole number that is not below another, and fits into 64 bits.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is below, or too large.
    """
    try:
        count = operator.index(number)  # type: ignore[arg-type] # anything that says it is a number
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {number!r}") from None
    if count < least:
        raise ValueError(f"{name} must be {least} or more, got {shown(number)}")
    if count >= 2**64:
        raise ValueError(f"{name} must be below 2**64, got {shown(number)}")
    return count


def check_choice(choice: object, name: str, choices: tuple[object, ...]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ValueError: It is none.
    """
    if choice not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {choice!r}")
