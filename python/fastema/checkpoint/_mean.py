"""The mean of safetensors files: read piece by piece, so that any number and size fits into little memory."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
import numpy.typing as npt

from .._types import narrowed
from ._header import REALS, header_of
from ._plain import STATE
from ._replace import StrPath, replacing
from ._shares import Style, shares
from ._source import Source
from ._state import is_state

_PIECE = 1 << 18  # elements: what `average` holds of a tensor at a time


def average(
    files: Iterable[StrPath],
    target: StrPath,
    *,
    style: Style = "mean",
    weights: Sequence[float] | None = None,
    dtype: npt.DTypeLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write the mean of safetensors files, as `write` does: all or nothing.

    ``sum(weight * tensor) / sum(weights)`` in float64, in the order of `files`, rounded once to the type in
    the file. Files are read piece by piece: about 10 MB of memory, whatever their number and size.

    Tensors of integers and booleans have no mean: they are taken from the last file. The metadata on which
    all files agree are kept. Of files of `EMA.save`, what only an EMA reads is left out.

    Args:
        files: The files, one or more, the newest last, with tensors of the same names, shapes and types.
        target: The file to write; may be one of `files`.
        style: What each file weighs, as `shares` has it.
        weights: A number for each file, in the place of a style. None: by `style`.
        dtype: Of the averages: one of the real types of the format. None: as in the files. Complex averages
            keep theirs.
        progress: Called with the bytes done and the bytes in all, after each piece.

    Returns:
        The names of the tensors that were taken from the last file.

    Raises:
        TypeError: `files` is a single path, or `dtype` is none of the format's real types.
        ValueError: A file is no safetensors file or does not fit the first; there is no such style, or
            `weights` are given beside one, are not finite, not as many as the files, or add up to 0 or beyond
            float64; or a file is changed meanwhile.
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
    relative = _relative(len(files), style, weights)
    narrow = None if dtype is None else np.dtype(dtype)
    if narrow and narrow not in REALS.values():
        raise TypeError(f"dtype must be one of {', '.join(map(str, REALS.values()))}, got {narrow}")
    sources = [_source(path) for path in files]
    first = sources[0].layout
    for source in sources[1:]:
        _check_fit(sources[0], source)
    means = {
        name: tensor._replace(dtype=narrow) if narrow and tensor.dtype in REALS.values() else tensor
        for name, tensor in first.items()
    }
    shared = set.intersection(*(set(source.metadata.items()) for source in sources))
    header, names = header_of(means, {key: text for key, text in sorted(shared) if key != STATE})
    done, total = 0, sum(tensor.nbytes for tensor in means.values())
    with replacing(target) as written:
        written.write(header)
        for name in names:
            for begin in range(0, first[name].size, _PIECE):
                piece = _piece_of_mean(sources, relative, name, begin, means[name].dtype)
                written.write(piece.view(np.uint8).data)
                done += piece.nbytes
                if progress:
                    progress(done, total)
    return [name for name, tensor in first.items() if not _has_mean(tensor.dtype)]


def _relative(count: int, style: Style, weights: Sequence[float] | None) -> list[float]:
    """Return what each of so many files weighs, relative to the others.

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


def _has_mean(dtype: np.dtype) -> bool:
    return dtype in REALS.values() or dtype.kind == "c"


def _source(path: StrPath) -> Source:
    """Return a file to average, without the tensors that only an EMA reads."""
    source = Source.at(path)
    own = {name: tensor for name, tensor in source.layout.items() if not is_state(name)}
    return replace(source, layout=own)


def _piece(source: Source, name: str, begin: int) -> np.ndarray:
    """Read a piece of a tensor, from element `begin` on."""
    tensor = source.layout[name]
    piece = np.empty(min(_PIECE, tensor.size - begin), tensor.dtype)
    source.read(tensor.begin + begin * tensor.dtype.itemsize, piece)
    return piece


def _piece_of_mean(
    sources: Sequence[Source], relative: Sequence[float], name: str, begin: int, dtype: np.dtype
) -> np.ndarray:
    """Return a piece of a tensor's mean, from element `begin` on; that of the last file if it has no mean."""
    own = sources[0].layout[name].dtype
    if not _has_mean(own):
        return _piece(sources[-1], name, begin)
    wide = np.result_type(own, np.float64)
    with np.errstate(all="ignore"):  # infinities and NaN pass as they do in sums
        terms = (
            np.multiply(_piece(source, name, begin), share, dtype=wide)
            for source, share in zip(sources, relative, strict=True)
        )
        return narrowed(reduce(np.add, terms) / sum(relative), dtype)


def _check_fit(first: Source, other: Source) -> None:
    """Raise ValueError unless two files have tensors of the same names, shapes and types."""
    for name in sorted(first.layout.keys() ^ other.layout.keys()):
        has, lacks = (first, other) if name in first.layout else (other, first)
        raise ValueError(
            f"all files must have the same tensors: {has.path} has {name!r}, {lacks.path} has not"
        )
    for name, tensor in first.layout.items():
        for what in ("shape", "dtype"):
            needed, got = getattr(tensor, what), getattr(other.layout[name], what)
            if needed != got:
                raise ValueError(
                    f"{name!r} must have one {what} in all files, "
                    f"got {needed} in {first.path} and {got} in {other.path}"
                )
