"""An EMA's state in a safetensors file, or in a set of files: what `EMA.save` writes and `EMA.load` reads.

The averages of the first decay, as users see them, and what is copied have the names of the values. What
only an EMA reads is named ``fastema.<group>.<number of the decay>.<value>``; all that is no array is JSON in
the metadata.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from .. import schedules
from ._format import File, write
from ._replace import StrPath
from ._sets import Blocks, Layout, is_numbered, name_of, path_of, set_of

STATE = "fastema"  # in the metadata, and where names of tensors begin that are for an EMA alone
_OFFSETS = "DCP_SHARDING_INFO"  # in the metadata; torch.distributed.checkpoint reads it, too
_VERSION = 1  # of what is written here

_Arrays = Mapping[str, np.ndarray | Blocks]


class PlainState(TypedDict):
    """What an EMA needs to go on, as `EMA.state_dict` returns and explains it; arrays by names of values."""

    averages: Sequence[_Arrays]
    carries: Sequence[_Arrays]
    copied: _Arrays
    values: _Arrays
    step: int
    clock: NotRequired[float]  # where it is not the step
    averaged: NotRequired[float]
    decay: list[float] | None
    products: list[float]
    swapped: int | None
    config: dict[str, Any]


def write_state(
    path: StrPath,
    state: PlainState,
    config: Mapping[str, Any],
    debiased: Sequence[_Arrays],
    layout: Layout | None = None,
    *,
    rounded: str | None = None,
) -> None:
    """Write the state of an EMA, its first averages under the names of the values.

    Args:
        path: As for `write`; with a `layout`, of the set.
        state: Of sharded values it holds the local arrays.
        config: Arguments of the constructor, beside those in the state.
        debiased: For each decay the averages as users see them, where they are kept undivided; else nothing.
        layout: Which files of a set hold what. None: a single file holds all.
        rounded: The type that averages were rounded to, which nothing goes on from. None: they were not.

    Raises:
        ValueError: A value has a name that would be taken for the state.
        OSError: A file cannot be written.
    """
    decay = config["decay"]
    values = layout.values if layout else {name: name for name in state["copied"]}
    plain: dict[str, Any] = {
        "version": _VERSION,
        "step": state["step"],
        "decay": state["decay"],
        "products": state["products"],
        "swapped": state["swapped"],
        "copied": list(dict.fromkeys(values[name] for name in state["copied"])),
        "config": {
            **state["config"],
            **config,
            "decay": [_described(d) for d in decay] if isinstance(decay, list) else _described(decay),
        },
    }
    if "clock" in state:
        plain |= {"clock": state["clock"], "averaged": state["averaged"]}
    if rounded is not None:
        plain["rounded"] = rounded
    arrays = list(_arrays_of(state, debiased))
    # transformers refuses a file whose metadata lack a format; all other readers pass over it
    if layout is None:
        tensors = {prefix + name: array for prefix, name, array in arrays}
        write(path, tensors, {"format": "pt", STATE: json.dumps(plain)})
        return
    for number, saved in layout.files.items():
        tensors, begins = {}, {}
        for prefix, name, array in arrays:
            if name in saved:
                value, block = saved[name]
                tensors[prefix + value] = array
                begins[prefix + value] = {"saved_offsets": block.begin}
        shapes = {value: block.whole for value, block in saved.values()}
        of_set = {"set": [number, layout.total], "shapes": shapes, **plain}
        write(
            path_of(Path(path), number, layout.total),
            tensors,
            {"format": "pt", _OFFSETS: json.dumps(begins), STATE: json.dumps(of_set)},
        )


def _arrays_of(
    state: PlainState, debiased: Sequence[_Arrays]
) -> Iterator[tuple[str, str, np.ndarray | Blocks]]:
    """Yield for each array of a state what its name in a file begins with, its own name, and the array."""
    groups = [("", state["copied"])]
    for k, (kept, shown) in enumerate(zip(state["averages"], debiased, strict=True)):
        groups.append((f"{STATE}.averages.{k}." if k else "", shown or kept))
        groups.append((f"{STATE}.kept.{k}.", kept if shown else {}))
    groups += [(f"{STATE}.carries.{k}.", carries) for k, carries in enumerate(state["carries"])]
    groups.append((f"{STATE}.values.0.", state["values"]))
    for prefix, arrays in groups:
        for name, array in arrays.items():
            if is_state(name):
                raise ValueError(f"values must not have names that begin with '{STATE}.', got {name!r}")
            yield prefix, name, array


def read_state(path: StrPath, decay: Any = None) -> tuple[PlainState, dict[str, Any]]:
    """Return what `write_state` wrote: the state, and all arguments of the constructor.

    Args:
        path: Of the file, or of a set of them, or of one of a set.
        decay: Takes the place of the file's. None: the file's.

    Returns:
        The state, whose arrays are views of the mapped file, or `Blocks` of a set's; and the arguments.

    Raises:
        ValueError: The file holds no state, or one of a later version, or rounded averages alone, or of a
            schedule only the name; or a set holds files of more than one save.
        FileNotFoundError: The file, or one of the set, is not there.
    """
    path = Path(path)
    try:
        members = _members_of(path)
        state = _state_in(members or [path], is_set=bool(members))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as reason:
        raise ValueError(f"{path} holds a state that EMA.save() did not write: {reason!r}") from None
    config = state["config"]
    if decay is not None:
        config["decay"] = decay
    elif isinstance(config["decay"], list):
        config["decay"] = [_restored(d, path) for d in config["decay"]]
    else:
        config["decay"] = _restored(config["decay"], path)
    return state, config


def files_of(path: StrPath) -> list[Path]:
    """Return the path of a state's file; of a set, those of all its files and that which it is named by."""
    members = _members_of(Path(path))
    return [*members, name_of(members[0])] if members else [Path(path)]


def _members_of(path: Path) -> list[Path]:
    """Return the files of a set; none where there is a single file."""
    # a name alone makes no set: a single file may have numbers in it, too
    is_alone = path.exists() and "set" not in _plain_in(File(path), path)
    return [] if is_alone and is_numbered(path) else set_of(path)


def _state_in(paths: Sequence[Path], *, is_set: bool) -> PlainState:
    """Return the state in a file, or in all files of a set."""
    files = [File(path) for path in paths]
    plains = [_plain_in(file, path) for file, path in zip(files, paths, strict=True)]
    first = plains[0]
    found: dict[tuple[str, int], dict[str, np.ndarray | Blocks]] = defaultdict(dict)
    for number, (path, file, plain) in enumerate(zip(paths, files, plains, strict=True), 1):
        shapes = plain.pop("shapes", {})
        if plain.pop("set", None) != ([number, len(paths)] if is_set else None):
            raise ValueError(f"{path} must have the name that it was saved under")
        for key in plain:
            if plain[key] != first[key]:
                raise ValueError(
                    f"{paths[0]} and {path} must be of one save, and their {key} is "
                    f"{first[key]} and {plain[key]}"
                )
        begins = json.loads(file.metadata[_OFFSETS]) if is_set else {}
        for tensor, array in file.items():
            group, k, name = _parsed(tensor, plain["copied"])
            whole = Blocks(name, tuple(shapes[name])) if is_set else array
            whole = found[group, k].setdefault(name, whole)
            if isinstance(whole, Blocks):
                whole.add(tuple(begins[tensor]["saved_offsets"]), array)
    decays, config = range(len(first["products"])), first["config"]
    state: PlainState = {
        "averages": [found["kept", k] or found["averages", k] for k in decays],
        "carries": [found["carries", k] for k in decays if config["rounding"] == "compensated"],
        "copied": found["copied", 0],
        "values": found["values", 0],
        "step": first["step"],
        "decay": first["decay"],
        "products": first["products"],
        "swapped": first["swapped"],
        "config": config,
    }
    if "clock" in first:
        state["clock"], state["averaged"] = first["clock"], first["averaged"]
    return state


def _plain_in(file: File, path: Path) -> dict[str, Any]:
    """Return what of a state is no array: a file has it in its metadata."""
    if STATE not in file.metadata:
        raise ValueError(f"{path} holds no state of an EMA: EMA.save() did not write it")
    plain: dict[str, Any] = json.loads(file.metadata[STATE])
    if plain.pop("version") != _VERSION:
        raise ValueError(f"{path} was written by a later fastema, in a way that this one does not know")
    if "rounded" in plain:
        raise ValueError(
            f"{path} holds averages rounded to {plain['rounded']} by EMA.save(dtype=), and nothing to go on "
            "from: load a file that EMA.save() wrote without dtype"
        )
    return plain


def _parsed(tensor: str, copied: Sequence[str]) -> tuple[str, int, str]:
    """Return the group of a tensor in a file, the number of its decay and the name of its value."""
    if is_state(tensor):
        _, group, k, name = tensor.split(".", 3)
        return group, int(k), name
    return "copied" if tensor in copied else "averages", 0, tensor


def is_state(tensor: str) -> bool:
    """Tell by its name whether a tensor is for an EMA alone."""
    return tensor.startswith(f"{STATE}.")


def _described(decay: Any) -> Any:
    """Return a decay as JSON holds it: our own schedules whole, those of users by their name alone."""
    if not callable(decay):
        return decay
    kind = type(decay)
    if kind.__module__ == schedules.__name__:
        return {"schedule": kind.__name__, **asdict(decay)}
    named = decay if hasattr(decay, "__qualname__") else kind
    return {"schedule": f"{named.__module__}.{named.__qualname__}"}


def _restored(description: Any, path: Path) -> Any:
    """Return the decay that was described."""
    if not isinstance(description, dict):
        return description
    name = description.pop("schedule")
    if name not in schedules.__all__:
        raise ValueError(f"decay must be given: of the schedule {name} {path} holds only the name")
    return getattr(schedules, name)(**description)
