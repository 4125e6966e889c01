"""Which of several checkpoints are merged: the last ones, or the best by numbers in a file."""

import csv
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ._json import Entry, parsed, shown
from ._replace import StrPath
from ._source import opened

_MOST = 100_000_000  # bytes of a file of numbers
_STEP = re.compile(r"checkpoint-([0-9]{1,18})")


def by_number(files: Sequence[StrPath]) -> list[StrPath]:
    """Return files in the order of the numbers in their names, where these differ in numbers alone.

    A shell has ``checkpoint-1000`` before ``checkpoint-200``. Files of other names stay in their order.
    """
    parts = [re.split(r"([0-9]+)", os.fspath(file)) for file in files]
    if len({tuple(each[::2]) for each in parts}) != 1:
        return list(files)
    numbers = [[int(number) for number in each[1::2]] for each in parts]
    return [files[i] for i in sorted(range(len(files)), key=lambda i: numbers[i])]


def last(files: Sequence[StrPath], count: int) -> list[StrPath]:
    """Return the last files.

    Raises:
        ValueError: There are not so many.
    """
    return list(files[len(files) - _checked(count, "last", files) :])


def best(
    files: Sequence[StrPath], metric: StrPath, count: int, *, higher: bool = False, name: str = "eval_loss"
) -> list[StrPath]:
    """Return the files with the best numbers, in the order in which they were given.

    Args:
        files: The paths of checkpoints.
        metric: A file of numbers. JSON: an object of path -> number; or a ``trainer_state.json`` of Hugging
            Face, of whose evaluations that at the step in the name counts (``checkpoint-500``). Else CSV: a
            path and a number in each line, below a line of headings or not. Paths are as in `files`, or from
            the folder of the file.
        count: How many are wanted. Of equal numbers those of later files are better.
        higher: Whether higher numbers are better. Lower ones are, of losses.
        name: Of the number in a ``trainer_state.json``.

    Raises:
        ValueError: There are not so many files; the file is none of these, or has no number for one of them.
        OSError: The file cannot be read.
    """
    _checked(count, "best", files)
    numbers = _numbers_of(files, Path(metric), name)
    ranked = sorted(range(len(files)), key=lambda i: (numbers[i] if higher else -numbers[i], i))
    return [files[i] for i in sorted(ranked[-count:])]


def _checked(count: int, name: str, files: Sequence[StrPath]) -> int:
    if not 1 <= count <= len(files):
        raise ValueError(f"{name} must be from 1 to {len(files)}, the number of files, got {count}")
    return count


def _numbers_of(files: Sequence[StrPath], metric: Path, name: str) -> list[float]:
    with opened(metric) as file:
        data = file.read(_MOST + 1)
    if len(data) > _MOST:
        raise ValueError(f"{metric} must have at most {_MOST} bytes, and has more")
    try:
        text = data.decode("utf-8-sig")
        if not text.lstrip().startswith("{"):
            return _by_path(files, metric, _lines(text))
        entry = parsed(text, "it")
        if entry.has("log_history"):
            return _by_step(files, _evaluations(entry, name))
        return _by_path(files, metric, {key: number.number() for key, number in entry.fields()})
    except ValueError as reason:  # of UTF-8, too
        raise ValueError(f"{metric} must have a number for each file: {reason}") from None


def _lines(text: str) -> dict[str, float]:
    """Return path -> number of a text in CSV."""
    numbers: dict[str, float] = {}
    for i, row in enumerate(csv.reader(text.splitlines()), start=1):
        if not row:
            continue
        number = _number(row[1]) if len(row) == 2 else None
        if number is None and i == 1 and len(row) == 2:
            continue  # headings
        if number is None or row[0] in numbers:
            raise ValueError(f"line {i} must have a path of its own and a finite number, got {shown(row)}")
        numbers[row[0]] = number
    return numbers


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _by_path(files: Sequence[StrPath], metric: Path, numbers: Mapping[str, float]) -> list[float]:
    given = {os.path.normpath(path): number for path, number in numbers.items()}
    beside = {os.path.realpath(metric.parent / path): number for path, number in numbers.items()}
    found: list[float] = []
    for file in files:
        these = {
            number
            for number in (given.get(os.path.normpath(file)), beside.get(os.path.realpath(file)))
            if number is not None
        }
        if len(these) != 1:
            raise ValueError(
                f"{file} has {'two of them' if these else 'none'} by its path, of {len(numbers)}"
            )
        found += these
    return found


def _evaluations(state: Entry, name: str) -> dict[int, float]:
    """Return step -> number of a state of Hugging Face's Trainer, the last one of each step."""
    entries = [entry for entry in state.field("log_history").entries() if entry.has("step")]
    found = {entry.field("step").whole(): entry.field(name).number() for entry in entries if entry.has(name)}
    if not found:
        names = sorted({key for entry in entries for key in entry.value if key.startswith("eval_")})
        raise ValueError(f"log_history has no {shown(name)}, but {shown(names)}")
    return found


def _by_step(files: Sequence[StrPath], numbers: Mapping[int, float]) -> list[float]:
    found = []
    for file in files:
        steps = _STEP.findall(os.fspath(file))
        if not steps or int(steps[-1]) not in numbers:
            what = f"of step {steps[-1]}" if steps else "whose name must tell its step, as checkpoint-500"
            raise ValueError(f"{file}, {what}, has none, of {len(numbers)} evaluations")
        found.append(numbers[int(steps[-1])])
    return found
