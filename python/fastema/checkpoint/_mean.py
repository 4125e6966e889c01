"""The mean of checkpoints: read piece by piece, so that any number and size fits into little memory."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ._checkpoints import EXTRA, Checkpoint, check_fit, shared_metadata
from ._pieces import Computed, Piece, Progress, Scratch, has_mean, in_type, real_type, rounded, wide_type
from ._replace import StrPath
from ._shares import Style, shares


def average(
    files: Iterable[StrPath],
    target: StrPath,
    *,
    style: Style = "mean",
    weights: Sequence[float] | None = None,
    dtype: npt.DTypeLike | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write the mean of checkpoints, all or nothing: of safetensors files, or of Hugging Face's folders.

    ``sum(weight * tensor) / sum(weights)`` in float64, in the order of `files`, rounded once to the type in
    the file. Files are read piece by piece: about 30 MB of memory, whatever their number and size.

    Tensors of integers and booleans have no mean: they are taken from the newest checkpoint, the last one, as
    are those whose names end in ``_extra_state``, which need not even have one shape. The metadata on which
    all files agree are kept. Of files of `EMA.save`, what only an EMA reads is left out.

    A folder has ``model.safetensors``, or shards with ``model.safetensors.index.json``; or others of these
    endings, where there is only one. The target is what the newest checkpoint is: a file; or a folder with
    tensors in the same shards, and with its other files, such as ``config.json`` and those of a tokenizer,
    copied as they are. Weights in other formats, the state of a training (``optimizer.pt``,
    ``trainer_state.json``), hidden files and folders within are left out.

    Args:
        files: The checkpoints, one or more, the newest last; with tensors of the same names, shapes and
            types, in whatever shards.
        target: The file to write, which may be one of `files`; or a folder that is not there yet, or empty.
        style: What each checkpoint weighs, as `shares` has it.
        weights: A number for each checkpoint, in the place of a style. None: by `style`.
        dtype: Of the averages: one of the real types of the format. None: as in the files. Complex averages
            keep theirs.
        progress: Called with the bytes done and the bytes in all, after each piece.

    Returns:
        The names of the tensors that were taken from the newest checkpoint.

    Raises:
        TypeError: `files` is a single path, or `dtype` is none of the format's real types.
        ValueError: A file is no safetensors file, a folder no whole checkpoint, or one does not fit the
            first; there is no such style, or `weights` are given beside one, are not finite, not as many as
            the files, or add up to 0 or beyond float64; the target is a folder that is there; or a file is
            changed meanwhile.
        OSError: A file cannot be read, or `target` cannot be written. It is as it was, in all these cases.

    Example:
        >>> import tempfile, numpy as np
        >>> from fastema import checkpoint
        >>> paths = [f"{tempfile.mkdtemp()}/{i}.safetensors" for i in range(3)]
        >>> for i, path in enumerate(paths):
        ...     checkpoint.write(path, {"w": np.full(2, float(i)), "step": np.array(100 * i)})
        >>> checkpoint.average(paths[:2], paths[2], weights=[1, 3])
        ['step']
        >>> checkpoint.File(paths[2])["w"]
        array([0.75, 0.75])
    """
    if isinstance(files, str | os.PathLike):
        raise TypeError(f"files must be a sequence of paths, got {files!r}")
    files = list(files)
    if not files:
        raise ValueError("files must hold one path or more, got none")
    relative = relative_weights(len(files), style, weights)
    narrow = real_type(dtype)
    checkpoints = [Checkpoint.at(path) for path in files]
    newest = checkpoints[-1]
    for checkpoint in checkpoints[1:]:
        check_fit(checkpoints[0], checkpoint)

    scratch = Scratch()

    def compute(piece: Piece) -> np.ndarray:
        name, begin, size, dtype = piece
        own = newest.layout[name].dtype
        if not _has_mean(name, own):
            return newest.piece(name, begin, size)
        read, total = scratch.array("read", size, own), scratch.array("total", size, wide_type(own))
        for i, (checkpoint, weight) in enumerate(zip(checkpoints, relative, strict=True)):
            checkpoint.read_piece(name, begin, read)
            _add(total, read, weight, scratch, first=i == 0)
        with np.errstate(all="ignore"):
            total /= sum(relative)
            return rounded(total, dtype)

    tensors = {
        name: tensor if name.endswith(EXTRA) else in_type(tensor, narrow)
        for name, tensor in newest.layout.items()
    }
    sources = [source for checkpoint in checkpoints for source in checkpoint.shards.values()]
    newest.write_alike(target, Computed(tensors, shared_metadata(checkpoints), compute, sources, progress))
    return [name for name, tensor in tensors.items() if not _has_mean(name, tensor.dtype)]


def relative_weights(count: int, style: Style, weights: Sequence[float] | None) -> list[float]:
    """Return what each of so many checkpoints weighs in `average`, relative to the others.

    Raises:
        ValueError: As `average` does.
    """
    by_style: list[float] = shares(style, count).tolist()
    if weights is None:
        return [1.0] * count if style in ("mean", "linear") else by_style  # ones are not rounded
    if style != "mean":
        raise ValueError(f"weights must not be given beside style={style!r}: either says what files weigh")
    relative = [float(weight) for weight in weights]
    if len(relative) != count:
        raise ValueError(f"weights must hold a number for each of the {count} files, got {len(relative)}")
    if not np.isfinite([*relative, sum(relative)]).all() or sum(relative) == 0:
        raise ValueError(f"weights must be finite and not add up to 0 or to infinity, got {relative}")
    return relative


def _has_mean(name: str, dtype: np.dtype) -> bool:
    return not name.endswith(EXTRA) and has_mean(dtype)


def _add(total: np.ndarray, array: np.ndarray, weight: float, scratch: Scratch, *, first: bool) -> None:
    """Add an array times a weight to a total in float64, or let the total be the first one."""
    with np.errstate(all="ignore"):  # infinities and NaN pass as they do in sums
        if first:
            np.copyto(total, array)
            if weight != 1.0:
                total *= weight
        elif weight == 1.0:
            np.add(total, array, out=total)
        else:
            term = scratch.array("term", total.size, total.dtype)
            np.copyto(term, array)
            term *= weight
            total += term
