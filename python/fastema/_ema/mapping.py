"""Which file must averages not be mapped from? One that a checkpoint is in, or the values themselves."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from .. import _arrays
from .._types import AnyArray
from ..checkpoint._replace import StrPath
from .values import Locals


def check_not_loaded_from(memory: StrPath, files: Iterable[Path]) -> None:
    """Raise if the file to map would be made anew in the place of one that a state is loaded from.

    Raises:
        ValueError: It would.
    """
    for file in files:
        if _is_one_file(memory, file):
            raise ValueError(
                f"memory must be the path of a file that may be made anew, got {os.fspath(memory)!r}: "
                f"the averages are loaded from it, as {str(file)!r}; give another path"
            )


def check_not_of_values(memory: StrPath, names: Sequence[str], local_arrays: Sequence[Locals]) -> None:
    """Raise if the file to map would be made anew in the place of one that values are mapped from.

    Raises:
        ValueError: It would.
    """
    if not os.path.exists(memory):
        return
    places = list(_places_of(memory))
    for name, local in zip(names, local_arrays, strict=True):
        if any(_is_mapped(array, memory, places) for array in local):
            raise ValueError(
                f"memory must be the path of a file that may be made anew, got {os.fspath(memory)!r}: "
                f"values[{name!r}] is mapped from it; give another path"
            )


def _is_mapped(array: AnyArray, memory: StrPath, places: Sequence[tuple[int, int]]) -> bool:
    if _arrays.device(array) is not None:
        return False
    found = _arrays.describe(array)
    if found.size and any(begin <= found.address < end for begin, end in places):
        return True
    base = array  # what systems that do not tell places know: NumPy's own maps
    while base is not None:
        if isinstance(base, np.memmap) and base.filename and _is_one_file(memory, base.filename):
            return True
        base = getattr(base, "base", None)
    return False


def _places_of(file: StrPath) -> Iterator[tuple[int, int]]:
    """Yield where a file is mapped, by whomever in this process; nothing where the system does not tell."""
    with suppress(OSError):
        lines = Path("/proc/self/maps").read_bytes().splitlines()
        known: dict[bytes, bool] = {}
        for columns in (line.split(maxsplit=5) for line in lines):
            path = columns[5] if len(columns) > 5 else b""
            if path.startswith(b"/"):
                if path not in known:
                    known[path] = _is_one_file(file, os.fsdecode(path.replace(rb"\012", b"\n")))
                if known[path]:
                    begin, end = columns[0].split(b"-")
                    yield int(begin, 16), int(end, 16)


def _is_one_file(a: StrPath, b: StrPath) -> bool:
    """Tell whether two paths lead to one file, by whatever links; or would, where there is none."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)
