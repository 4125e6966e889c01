"""Averaging and swapping lists of arrays, without any state of its own."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

from . import _core
from ._arrays import (
    as_list,
    interleaved,
    is_elsewhere,
    is_on_cuda,
    packed_copies,
    plain,
    rebinds,
    views,
    watch,
)
from ._types import FLOATS, Array, Arrays, Rounding, Terms, average_type

if TYPE_CHECKING:
    from ._elsewhere import ElsewherePairs
    from .cuda._pairs import DevicePairs

Engine = Literal["native", "cuda", "torch"]
"""What moves averages: the core, our kernels on CUDA devices, or torch's own operations elsewhere."""


def update(
    averages: Arrays,
    values: Arrays,
    decay: float,
    *,
    threads: int = 0,
    rounding: Rounding = "nearest",
    seed: int = 0,
    step: int = 0,
    carries: Arrays | None = None,
) -> None:
    """Move averages towards values, in place: ``average += (1 - decay) * (value - average)``.

    The weight ``1 - decay`` is formed in float64 and rounded once to the type of the computation,
    float64 for float64 averages and float32 for all others. Each operation is rounded as NumPy
    rounds it, and the result once to the average's type, so it has NumPy's bits on every machine
    and with any number of threads. A decay of 0 copies: exactly, but for values of more bits than
    their averages have, which are rounded as they are in any other update.

    For arrays that are averaged again and again, `Pairs` checks them once.

    Args:
        averages: One array, or a sequence of arrays: NumPy's, torch's (also those that require grad),
            CuPy's or anything with ``__dlpack__`` or ``__cuda_array_interface__``; all in CPU memory, or
            all on one CUDA device, or torch's on one other device. float16, bfloat16 (of ml_dtypes),
            float32 or float64 in native byte order, without a mask, any shape, dense (in any order),
            writable. Changed in place.
        values: As `averages`, in shapes and order in memory; may be read-only, as JAX's arrays are.
            Of the averages' types, or float16 or bfloat16 beside float32 averages, or any of these
            beside float64 ones, or float32 beside float16 or bfloat16 ones.
        decay: From 0 to 1; towards 1 is slower.
        threads: How many threads to use at most, and never more than processors. 0: as many as
            torch's OpenMP would, or another's that is loaded, or as ``OMP_NUM_THREADS`` says. Each takes
            512 KiB of averages at a time, so small lists have one. Has no meaning on a CUDA device.
        rounding: ``"nearest"``, or ``"stochastic"``: 16-bit averages are rounded up or down at
            random, without a bias, so that they move where rounding to nearest stands still (a
            bfloat16 average does with a decay of .999).
        seed: Of stochastic rounding. The random bits depend on `seed`, `step` and the places of the
            array in the list and of the element in its array, and on nothing else.
        step: The number of the update; give each another one.
        carries: One array beside each average, zeros at first, that keeps what rounding would lose:
            float32 beside float32 averages (about 48 bits together), int16 beside bfloat16 averages
            (exactly a float32 together). Changed in place.

    Raises:
        ImportError: Arrays lie on a CUDA device, and CuPy is not installed or cannot run.
        RuntimeError: A CUDA graph is being captured, which needs `Pairs` that were made before.
        TypeError: An array is none, its type is not offered, its memory cannot be viewed, or it lies
            elsewhere than the first average.
        ValueError: Sizes, shapes or orders differ, an average is read-only, overlaps another array
            of the call or has holes, or `decay` is outside of [0, 1]. Nothing has changed then.

    Example:
        >>> import fastema, numpy as np
        >>> average, value = np.zeros(3), np.array([1.0, 2.0, 4.0])
        >>> fastema.update(average, value, decay=0.75)
        >>> average
        array([0.25, 0.5 , 1.  ])
    """
    pairs = Pairs.__new__(Pairs)
    pairs._set_up(*as_lists([averages], values, None if carries is None else [carries]), watched=False)
    pairs.update(decay, threads, rounding=rounding, seed=seed, step=step)


def swap(a: Arrays, b: Arrays, *, threads: int = 0) -> None:
    """Exchange the contents of arrays, in place and bit for bit.

    No temporary copy is made, and no arithmetic: swapping twice is nothing, for NaN payloads,
    signed zeros and infinities too. (On devices other than CUDA's 64 MiB at most are copied at a time.)

    Args:
        a: One array, or a sequence of arrays: NumPy's, torch's, CuPy's or anything with ``__dlpack__`` or
            ``__cuda_array_interface__``; all in CPU memory, or all on one CUDA device, or torch's on one
            other device. float16, bfloat16, float32 or float64, any shape, dense, writable.
        b: As `a`, in shapes, types and order in memory.
        threads: How many threads to use at most, and never more than processors. 0: as many as
            torch's OpenMP would, or another's that is loaded, or as ``OMP_NUM_THREADS`` says. Each takes
            512 KiB of averages at a time, so small lists have one.

    Raises:
        ImportError: As for `update`.
        RuntimeError: As for `update`.
        TypeError: As for `update`.
        ValueError: Sizes, shapes or orders differ, or an array is read-only, overlaps another or
            has holes. Nothing has changed then.

    Example:
        >>> import fastema, numpy as np
        >>> a, b = np.zeros(2), np.ones(2)
        >>> fastema.swap(a, b)
        >>> a, b
        (array([1., 1.]), array([0., 0.]))
    """
    a_list, single = as_list(a, "a")
    b_list, _ = as_list(b, "b")
    _checked(a_list, b_list, [], _ONE_SWAP if single else _SWAP).swap(threads)


_SWAP: Terms = {"verb": "swap", "only_floats": True, "arguments": ("a", "b")}
_ONE_SWAP: Terms = {**_SWAP, "single": True}


def copies(values: Arrays, dtype: Any = None) -> Any:
    """Make averages that start at the values, packed in memory as updates like it best.

    Args:
        values: As for `update`; their order in memory is kept.
        dtype: Of the averages. None: float32 for float16 and bfloat16 values (a 16-bit average stands
            still unless it is rounded stochastically or compensated), for others their own.

    Returns:
        A list of NumPy arrays, or one array for one array.

    Raises:
        TypeError: A value is no array, or cannot be held by `dtype`.

    Example:
        >>> import fastema, numpy as np
        >>> weights = [np.ones((2, 2), np.float16), np.ones(3, np.float32)]
        >>> averages = fastema.copies(weights)
        >>> [average.dtype.name for average in averages]
        ['float32', 'float32']
        >>> fastema.update(averages, weights, 0.99)
    """
    arrays, single = as_list(values, "values")
    found = []
    for i, view in enumerate(views(arrays, "values", single)):
        name = "values" if single else f"values[{i}]"
        found.append(plain(view, name))
        if view.dtype not in FLOATS and view.dtype.kind not in "iub":
            raise TypeError(f"{name} must be of float16, bfloat16, float32 or float64, got {view.dtype}")
    dtypes = [average_type(view.dtype) if dtype is None else dtype for view in found]
    made = packed_copies(found, dtypes)
    return made[0] if single else made


class Pairs:
    """Averages and values that were checked once, to be updated or swapped many times.

    The arrays are kept alive, never copied. An array whose memory moved since (NumPy's ``resize``,
    torch's ``tensor.data = ...``) is noticed at the next call: in CPU memory that is an error, on a
    device the pairs go on with the tensor's new memory. So is one that was made read-only.

    On a CUDA device each call is one kernel launch in the current stream of the averages' library, and
    returns before the device is done. It allocates nothing and can be captured in a CUDA graph. On any other
    device of torch's a call is a few of torch's foreach operations, and allocates 64 MiB at most for each of
    float32 and float64.

    Args:
        averages: As for `update`.
        values: As for `update`.
        carries: As for `update`.

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

    __slots__ = ("_anew", "_compensated", "_native", "_watched")

    def __init__(self, averages: Arrays, values: Arrays, *, carries: Arrays | None = None) -> None:
        self._set_up(*as_lists([averages], values, None if carries is None else [carries]))

    @classmethod
    def several(
        cls, averages: Sequence[Arrays], values: Arrays, *, carries: Sequence[Arrays] | None = None
    ) -> "Pairs":
        """Pair several lists of averages with the same values, which an update reads only once.

        Args:
            averages: Of each list, what `update` takes.
            values: As for `update`.
            carries: Of each list, what `update` takes.

        Returns:
            Pairs whose `update` takes a sequence of decays, one for each list.

        Example:
            >>> import fastema, numpy as np
            >>> weights, slow, fast = [np.ones(2)], [np.zeros(2)], [np.zeros(2)]
            >>> fastema.Pairs.several([slow, fast], weights).update([0.75, 0.5])
            >>> slow, fast
            ([array([0.25, 0.25])], [array([0.5, 0.5])])
        """
        pairs = cls.__new__(cls)
        pairs._set_up(*as_lists(averages, values, carries))
        return pairs

    def _set_up(
        self,
        averages: list[Array],
        values: list[Array],
        carries: list[Array],
        terms: Terms,
        *,
        watched: bool = True,  # not where they are used at once
    ) -> None:
        self._native = _checked(averages, values, carries, terms)
        self._compensated = bool(carries)
        self._watched = watch((*averages, *values, *carries)) if watched else None
        anew = self._watched is not None and any(map(rebinds, (*averages, *values, *carries)))
        self._anew = (averages, values, carries, terms) if anew else None

    def _check_unmoved(self) -> None:
        if self._watched is None:
            return
        if self._anew is not None:
            if self._watched.moved():
                self._native = _checked(*self._anew)
                self._watched.accept()
        elif isinstance(self._native, _core.Pairs):
            self._watched.check("pairs")
        elif self._watched.moved():
            self._native.follow()
            self._watched.accept()

    def _check(self) -> None:
        """Raise what an update would raise of arrays that were given other memory, or made read-only."""
        self._check_unmoved()
        if isinstance(self._native, _core.Pairs):
            self._native.check_unmoved()

    def __len__(self) -> int:
        return len(self._native)

    def update(
        self,
        decay: Any,
        threads: int = 0,
        *,
        rounding: Rounding = "nearest",
        seed: int = 0,
        step: int = 0,
        check: bool = True,
    ) -> None:
        """Move the averages towards the values; see `fastema.update`.

        Args:
            decay: As for `update`; on a CUDA device also a `fastema.cuda.Schedule`.
            threads: As for `update`.
            rounding: As for `update`.
            seed: As for `update`.
            step: As for `update`.
            check: Whether to ask tensors if they were given other memory. Without, that goes unnoticed
                and other memory is written: for graphs captured on a CUDA device, whose addresses stay.
        """
        if check and self._watched is not None:
            self._check_unmoved()
        if rounding == "nearest" and seed == step == 0:
            self._native.update(decay, threads)
        elif rounding == "stochastic" and self._compensated:
            raise ValueError("rounding must be 'nearest' where averages have carries, got 'stochastic'")
        elif rounding in ("nearest", "stochastic"):
            self._native.update(decay, threads, stochastic=rounding == "stochastic", seed=seed, step=step)
        else:
            raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")

    def swap(self, threads: int = 0) -> None:
        """Exchange averages and values; see `fastema.swap`.

        Raises:
            TypeError: A pair's types differ, or its average is compensated.
            ValueError: A value is read-only, or shares memory with another.
        """
        if self._watched is not None:
            self._check_unmoved()
        self._native.swap(threads)

    def first_non_finite(self, threads: int = 0) -> int | None:
        """Look for infinities and NaN in the values, at the speed of the memory; nothing is changed.

        Args:
            threads: As for `update`.

        Returns:
            The place in the list of the first value that holds one; None: all are finite.

        Raises:
            ValueError: The arrays lie on a device, or one was given other memory.

        Example:
            >>> import fastema, numpy as np
            >>> weights = [np.ones(2), np.array([1.0, np.nan])]
            >>> pairs = fastema.Pairs(fastema.copies(weights), weights)
            >>> pairs.first_non_finite()
            1
        """
        self._check_unmoved()
        if not isinstance(self._native, _core.Pairs):
            raise ValueError("pairs must lie in host memory to be looked at, and lie on a device")
        return self._native.first_non_finite(threads)

    def _move(
        self,
        decay: Any,
        threads: int,
        done: list[Any],
        now: object,
        copies: "Pairs | None" = None,
        *,
        seed: int | None,
        step: int,
    ) -> None:
        """Update as `EMA` does.

        Args:
            decay: As for `update`.
            threads: As for `update`.
            done: A list of one item, which becomes `now` if averages have moved, and only then.
            now: That item.
            copies: Pairs that are copied in the same act, all of them in host memory. None: there are none.
            seed: Of stochastic rounding. None: averages are rounded to nearest.
            step: As for `update`.
        """
        if self._watched is not None:
            self._check_unmoved()
        if copies is not None:
            copies._check_unmoved()
        native: Any = None if copies is None else copies._native
        if seed is None:
            self._native.update(decay, threads, done, now, native)
        else:
            self._native.update(decay, threads, done, now, native, stochastic=True, seed=seed, step=step)

    @property
    def _engine(self) -> Engine:
        """What does it."""
        return "native" if isinstance(self._native, _core.Pairs) else self._native.engine

    def _swap(self, threads: int, then: tuple[Callable[..., object], object]) -> None:
        """Exchange contents on a device as `swap`, and call a function of C in the same act."""
        assert not isinstance(self._native, _core.Pairs)
        if self._watched is not None:
            self._check_unmoved()
        self._native.swap(threads, then)

    def _check_counted(self) -> None:
        """Raise if a step that is counted now is to be part of a CUDA graph."""
        if not isinstance(self._native, _core.Pairs) and self._native.engine == "cuda":
            self._native.check_counted()

    def _copy(self, threads: int = 0) -> None:
        """Make averages what their values are, bit for bit; of pairs that were made for it."""
        if self._watched is not None:
            self._check_unmoved()
        self._native.copy(threads)


def paired(
    averages: list[Array],
    values: list[Array],
    carries: Sequence[Array] = (),
    *,
    once: bool = False,
    **terms: Unpack[Terms],
) -> Pairs:
    """Pair lists as the rest of the library has them.

    Args:
        averages: Those that share a value follow each other.
        values: One for all averages in a row that share it.
        carries: None, or one for each average.
        once: Whether they are used at once and never again: then nobody watches for other memory.
        **terms: What will be done, and what errors call the arrays.

    Raises:
        TypeError: As for `update`.
        ValueError: As for `update`.
    """
    pairs = Pairs.__new__(Pairs)
    pairs._set_up(averages, values, list(carries), terms, watched=not once)
    return pairs


def _checked(
    averages: list[Array], values: list[Array], carries: list[Array], terms: Terms
) -> "_core.Pairs | DevicePairs | ElsewherePairs":
    """Return the core's pairs, or a device's where the first average lies on one."""
    if averages and is_elsewhere(averages[0]):
        from ._elsewhere import ElsewherePairs  # noqa: PLC0415 - most lists lie in host memory

        return ElsewherePairs(averages, values, carries, **terms)
    if averages and is_on_cuda(averages[0]):
        from .cuda._pairs import DevicePairs  # noqa: PLC0415 - no CPU needs it

        return DevicePairs(averages, values, carries, **terms)
    first, second = terms.get("arguments", ("averages", "values"))
    single = terms.get("single", False)
    a, b = views(averages, first, single), views(values, second, single)
    return _core.Pairs(a, b, views(carries, "carries", single) if carries else [], terms)


def as_lists(
    averages: Sequence[Arrays], values: Arrays, carries: Sequence[Arrays] | None
) -> tuple[list[Array], list[Array], list[Array], Terms]:
    """Return what a user gave as lists, and what the core is to be told of them."""
    if len(averages) == 0:
        raise ValueError("averages must hold one list or more, got none")
    b, single = as_list(values, "values")
    a = interleaved(averages, "averages", len(b))
    c = [] if carries is None else interleaved(carries, "carries", len(b))
    terms: Terms = {}  # what goes without saying costs nothing
    if len(averages) > 1:
        terms["averages_per_value"] = len(averages)
    elif single and len(a) == 1:
        terms["single"] = True
    return a, b, c, terms
