"""The mean of what came between two running means, and whether their rounding leaves anything of it."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .. import schedules
from .._types import as_number
from ._checkpoints import EXTRA, Checkpoint, check_fit, shared_metadata
from ._header import Tensor
from ._pieces import Computed, Piece, Progress, has_mean, in_type, real_type, rounded, wide_type
from ._plain import Plain
from ._replace import StrPath
from ._source import Stored
from ._state import Saved

_MOST = 2.0**-8  # of rounding errors, relative to the averages: as much as bfloat16 rounds
_COMPENSATED = 2.0**-46  # of two float32 together: their rounding is some squares of 2**-24


class _Running(NamedTuple):
    """A running mean that can be read by name.

    Attributes:
        checkpoint: Its tensors, as any reader sees them.
        layout: What is averaged: name -> type and shape.
        mean: Returns a piece of a mean in float64, or complex128: of a name, from an element on, of a size.
        time: How much time the mean is over.
        updates: How many updates it has seen; as many as steps of the clock, where nothing tells.
        stored: Whether the mean may have been rounded once more when it was stored.
        unit: Of a type what an update rounds at most, relative to the mean.
    """

    checkpoint: Checkpoint
    layout: Mapping[str, Tensor]
    mean: Callable[[str, int, int], np.ndarray]
    time: float
    updates: float
    stored: bool
    unit: Callable[[np.dtype], float]


def between(
    earlier: StrPath,
    later: StrPath,
    target: StrPath,
    *,
    clocks: tuple[float, float] | None = None,
    dtype: npt.DTypeLike | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write the mean of the weights that came between two running means of one training.

    ``(n2 * m2 - n1 * m1) / (n2 - n1)`` in float64, rounded once, of the means m1, m2 over times n1 < n2. So
    equal weights of the whole training (`schedules.equal_weights`), saved now and then by `EMA.save`, give
    the mean of any stretch that is wanted afterwards.

    Where it is refused: each update rounds a running mean by up to u of its size; u is 2**-24 in float32. At
    time t that is ``t * u`` of the sum that the mean stands for, and sums are what is subtracted here. So U
    updates in the interval leave an error of up to ``U * n2 * u / (n2 - n1)`` of the averages' size, which is
    ``n2 * u`` where each step was averaged. What was rounded before n1 is in both sums and cancels. Beyond
    2**-8, what bfloat16 rounds, it is an error: from 65,536 steps on in float32. Of averages that are kept in
    float64, or in float32 with ``rounding="compensated"``, whose carries are read here, u is 2**-53 or below
    2**-46, and nothing is ever lost. Files of others, with `clocks`, may have been rounded when they were
    stored as well, which adds ``(n1 + n2) * u / (n2 - n1)``.

    What is not averaged, as buffers of integers, comes from the later file.

    Args:
        earlier: A file of `EMA.save` with an average of equal weights; or, with `clocks`, any checkpoint as
            for `average` that holds a running mean.
        later: Another one of the same training.
        target: As for `average`.
        clocks: The times that the means are over, n1 and n2. None: as the files say.
        dtype: Of the result, as for `average`.
        progress: As for `average`.

    Returns:
        The names of the tensors that were taken from the later file.

    Raises:
        TypeError: A clock is no number, or `dtype` is none of the format's real types.
        ValueError: A file holds no running mean, or a sharded one; they do not fit each other; the clocks do
            not grow; or rounding has left too little.
        OSError: A file cannot be read, or `target` cannot be written. It is as it was, in all these cases.

    Example:
        >>> import tempfile, fastema, numpy as np
        >>> from fastema import checkpoint, schedules
        >>> folder, weights = tempfile.mkdtemp(), {"w": np.zeros(2)}
        >>> ema = fastema.EMA(weights, schedules.equal_weights())
        >>> for step in range(1, 9):
        ...     weights["w"][:] = step  # the training
        ...     ema.update()
        ...     if step in (4, 8):
        ...         ema.save(f"{folder}/{step}.safetensors")
        >>> files = f"{folder}/4.safetensors", f"{folder}/8.safetensors"
        >>> checkpoint.between(*files, f"{folder}/between.safetensors")
        []
        >>> checkpoint.File(f"{folder}/between.safetensors")["w"]  # of 5, 6, 7, 8
        array([6.5, 6.5])
    """
    narrow = real_type(dtype)
    with ExitStack() as opened:
        if clocks is None:
            first, second = (_of_ema(path, opened) for path in (earlier, later))
        else:
            first, second = (_of_any(path, n) for path, n in zip((earlier, later), clocks, strict=True))
        _check_pair(first, second)
        n1, n2 = first.time, second.time
        newest = second.checkpoint

        def compute(piece: Piece) -> np.ndarray:
            name, begin, size, dtype = piece
            if name not in second.layout:
                return newest.piece(name, begin, size)
            with np.errstate(all="ignore"):  # infinities and NaN pass as they do in sums
                sums = n2 * second.mean(name, begin, size) - n1 * first.mean(name, begin, size)
                return rounded(sums / (n2 - n1), dtype)

        checkpoints = [first.checkpoint, newest]
        tensors = {
            name: in_type(tensor, narrow) if name in second.layout else tensor
            for name, tensor in newest.layout.items()
        }
        sources = [source for each in checkpoints for source in each.shards.values()]
        newest.write_alike(
            target, Computed(tensors, shared_metadata(checkpoints), compute, sources, progress)
        )
    return [name for name in tensors if name not in second.layout]


def _of_any(path: StrPath, clock: float) -> _Running:
    """Return a running mean over a time that is known."""
    checkpoint = Checkpoint.at(path)
    layout = {
        name: tensor
        for name, tensor in checkpoint.layout.items()
        if has_mean(tensor.dtype) and not name.endswith(EXTRA)
    }
    time = as_number(clock, "clocks must be numbers")

    def mean(name: str, begin: int, size: int) -> np.ndarray:
        return _wide(checkpoint.piece(name, begin, size))

    return _Running(checkpoint, layout, mean, time, time, True, _unit)


def _of_ema(path: StrPath, opened: ExitStack) -> _Running:
    """Return the running mean in a file of `EMA.save`, which stays open.

    Raises:
        ValueError: There is none, or it is sharded.
    """
    saved = opened.enter_context(Saved.opened(path))
    plain = saved.plain
    k, time = _equal_weights(path, plain)
    averages = _whole(path, saved.averages[k])
    carries = _whole(path, saved.carries[k]) if saved.carries else None

    def mean(name: str, begin: int, size: int) -> np.ndarray:
        average = averages[name].flat(begin, size)
        if carries is None:
            return _wide(average)
        carry = carries[name].flat(begin, size)
        if average.dtype == ml_dtypes.bfloat16:
            bits = average.view(np.uint16).astype(np.uint32) << 16
            return _wide((bits + carry.astype(np.uint32)).view(np.float32))  # modulo 2**32, as the core
        wide = _wide(average)
        wide += carry
        return wide

    return _Running(
        Checkpoint.at(path),
        {name: Tensor(array.dtype, array.shape) for name, array in averages.items()},
        mean,
        time,
        plain.step // plain.config.every,
        False,
        _unit if carries is None else _compensated_unit,
    )


def _equal_weights(path: StrPath, plain: Plain) -> tuple[int, float]:
    """Return which average of an EMA is a running mean, and over how much time.

    Raises:
        ValueError: None is, or not yet.
    """
    means = [(k, d) for k, d in enumerate(plain.config.decay) if isinstance(d, schedules.equal_weights)]
    if not means:
        raise ValueError(f"{path} must hold an average of schedules.equal_weights(), and has none")
    k, schedule = means[0]
    start = max(schedule.start_step, plain.config.start_step)
    if plain.averaged < start:
        raise ValueError(
            f"{path} must hold a mean from step {start} on, and its clock is at {plain.averaged}"
        )
    return k, plain.averaged - (schedule.start_step - 1)


def _whole(path: StrPath, arrays: Mapping[str, object]) -> dict[str, Stored]:
    found = {name: array for name, array in arrays.items() if isinstance(array, Stored)}
    if len(found) < len(arrays):
        raise ValueError(
            f"{path} must be a single file, and is one of a set of shards: load it, and save whole averages"
        )
    return found


def _wide(array: np.ndarray) -> np.ndarray:
    wide: np.ndarray = array.astype(wide_type(array.dtype))
    return wide


def _unit(dtype: np.dtype) -> float:
    """Return what rounding to the nearest number of a type changes at most, relative to it."""
    return float(ml_dtypes.finfo(dtype).eps) / 2  # type: ignore[no-untyped-call]


def _compensated_unit(dtype: np.dtype) -> float:
    return 2.0**-24 if dtype == ml_dtypes.bfloat16 else _COMPENSATED


def _check_pair(first: _Running, second: _Running) -> None:
    """Raise ValueError unless there is an interval between two means, and more of it than rounding."""
    check_fit(first.checkpoint, second.checkpoint)
    paths = f"{first.checkpoint.path} and {second.checkpoint.path}"
    n1, n2 = first.time, second.time
    if not 0 < n1 < n2 < np.inf:
        raise ValueError(f"{paths} must be means over times of which the later is longer, got {n1} and {n2}")
    updates = max(second.updates - first.updates, 1)
    stored = n1 + n2 if first.stored else 0
    for name, tensor in second.layout.items():
        unit = second.unit(tensor.dtype)
        error = unit * (updates * n2 + stored) / (n2 - n1)
        if error > _MOST:
            raise ValueError(
                f"{paths} must leave more than rounding between them: {name!r} in {tensor.dtype}, at clocks "
                f"{n1} and {n2}, is known within {error:.3g} of its size, and {_MOST:.3g} is the most. Keep "
                "such averages in float32 with EMA(rounding='compensated'), or with dtype='float64'"
            )
