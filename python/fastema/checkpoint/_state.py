"""The state of an EMA in a file, or in a set of files."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import schedules
from . import _sets
from ._format import File, write
from ._replace import StrPath

_OFFSETS = "DCP_SHARDING_INFO"  # in the metadata; torch.distributed.checkpoint reads it, too
STATE = "fastema"  # in the metadata, and where names of tensors begin that are for an EMA alone
_VERSION = 1  # of what is kept there


def write_state(
    path: StrPath,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    shown: Sequence[Mapping[str, np.ndarray]],
    layout: _sets.Layout | None = None,
) -> None:
    """Write the state of an EMA, its first averages under the names of the values.

    Args:
        path: As for `write`.
        state: As `EMA.state_dict` returns it.
        config: The constructor's arguments, beside those in the state.
        shown: For each decay the averages as their users see them, where they are kept otherwise.
        layout: Of sharded values: the files to write are those of a set.

    Raises:
        ValueError: A value has a name that would be taken for the state.
    """
    decay = config["decay"]
    plain = {
        "version": _VERSION,
        **{key: state[key] for key in ("step", "decay", "products", "swapped")},
        "copied": list(dict.fromkeys(layout.names[part] if layout else part for part in state["copied"])),
        "config": {
            **state["config"],
            **config,
            "decay": [_described(d) for d in decay] if isinstance(decay, list) else _described(decay),
        },
    }
    # transformers refuses a file whose metadata lack a format; all other readers pass over it
    if layout is None:
        write(path, _tensors_of(state, shown), {"format": "pt", STATE: json.dumps(plain)})
        return
    for number, blocks in layout.files.items():
        tensors = _tensors_of(
            {
                **state,
                **{key: [layout.of_file(number, x) for x in state[key]] for key in ("averages", "carries")},
                **{key: layout.of_file(number, state[key]) for key in ("copied", "values")},
            },
            [layout.of_file(number, arrays) for arrays in shown],
        )
        begins = {name: {"saved_offsets": blocks[_value_of(name)].begin} for name in tensors}
        shapes = {name: block.whole for name, block in blocks.items()}
        metadata = {"set": [number, layout.total], "shapes": shapes, **plain}
        write(
            _sets.path_of(Path(path), number, layout.total),
            tensors,
            {"format": "pt", _OFFSETS: json.dumps(begins), STATE: json.dumps(metadata)},
        )


def _tensors_of(state: Mapping[str, Any], shown: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    tensors = _prefixed("", 0, state["copied"])
    for k, kept in enumerate(state["averages"]):
        tensors |= _prefixed("averages" if k else "", k, shown[k] or kept)
        tensors |= _prefixed("kept", k, kept if shown[k] else {})
    for k, carries in enumerate(state["carries"]):
        tensors |= _prefixed("carries", k, carries)
    return tensors | _prefixed("values", 0, state["values"])


def read_state(path: StrPath, decay: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `write_state` wrote, the arrays as views of mapped files, and all of the configuration.

    Args:
        path: Of the file, or of a set of them, or of one of a set.
        decay: What takes the place of the file's. None: the file's.

    Returns:
        The state, of which the arrays are NumPy's, or `_sets.Pieces` from a set, and the configuration.

    Raises:
        ValueError: The file holds no state, or one of a later version, or of a schedule only the name; or a
            set holds files of more than one save.
        FileNotFoundError: The file, or one of the set, is not there.
    """
    path = Path(path)
    try:
        state, config = _parsed_state(path)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as reason:
        raise ValueError(f"{path} holds a state that EMA.save() did not write: {reason!r}") from None
    if decay is not None:
        config["decay"] = decay
    elif isinstance(config["decay"], list):
        config["decay"] = [_restored(d, path) for d in config["decay"]]
    else:
        config["decay"] = _restored(config["decay"], path)
    return state, config


def _parsed_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    # a name alone makes no set: a single file may have numbers in it, too
    alone = path.exists() and "set" not in _state_in(File(path), path)
    members = [] if alone and _sets.is_numbered(path) else _sets.set_of(path)
    is_set, paths = bool(members), members or [path]
    files = [File(one) for one in paths]
    states = [_state_in(file, one) for file, one in zip(files, paths, strict=True)]
    found: dict[tuple[str, int], dict[str, Any]] = defaultdict(dict)
    for number, (file, state) in enumerate(zip(files, states, strict=True), 1):
        place, shapes = state.pop("set", None), state.pop("shapes", {})
        if place != ([number, len(paths)] if is_set else None):
            raise ValueError(f"{paths[number - 1]} must have the name that it was saved under")
        for key in state:
            if state[key] != states[0][key]:
                raise ValueError(
                    f"{paths[0]} and {paths[number - 1]} must be of one save, and their {key} is "
                    f"{states[0][key]} and {state[key]}"
                )
        begins = json.loads(file.metadata[_OFFSETS]) if is_set else {}
        for name, array in file.items():
            own = _value_of(name)
            kind, k = ("copied" if own in state["copied"] else "averages"), 0
            if is_state(name):
                kind, k = name.split(".", 3)[1], int(name.split(".", 3)[2])
            if is_set:
                pieces = found[kind, k].setdefault(own, _sets.Pieces(own, tuple(shapes[own])))
                pieces.add(tuple(begins[name]["saved_offsets"]), array)
            else:
                found[kind, k][own] = array
    state = states[0]
    lists, config = range(len(state["products"])), state["config"]
    state["averages"] = [found["kept", k] or found["averages", k] for k in lists]
    state["carries"] = [found["carries", k] for k in lists if config["rounding"] == "compensated"]
    state["copied"], state["values"] = found["copied", 0], found["values", 0]
    return state, config


def _state_in(file: File, path: StrPath) -> dict[str, Any]:
    """Return the plain values of a state in a file's metadata."""
    if STATE not in file.metadata:
        raise ValueError(f"{path} holds no state of an EMA: EMA.save() did not write it")
    state: dict[str, Any] = json.loads(file.metadata[STATE])
    if state.pop("version") != _VERSION:
        raise ValueError(f"{path} was written by a later fastema, in a way that this one does not know")
    return state


def _value_of(name: str) -> str:
    """Return the name of the value that a tensor in a file is of."""
    return name.split(".", 3)[3] if is_state(name) else name


def is_state(name: str) -> bool:
    return name.startswith(f"{STATE}.")


def _prefixed(kind: str, k: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name in arrays:
        if is_state(name):
            raise ValueError(f"values must not have names that begin with '{STATE}.', got {name!r}")
    return {f"{STATE}.{kind}.{k}.{name}" if kind else name: array for name, array in arrays.items()}


def _described(decay: Any) -> Any:
    """Describe a decay in JSON: a schedule of the user's own only by its name."""
    if not callable(decay):
        return decay
    kind = type(decay)
    if kind.__module__ == schedules.__name__:
        return {"schedule": kind.__name__, **asdict(decay)}
    named = decay if hasattr(decay, "__qualname__") else kind
    return {"schedule": f"{named.__module__}.{named.__qualname__}"}


def _restored(decay: Any, path: StrPath) -> Any:
    if not isinstance(decay, dict):
        return decay
    kind = decay.pop("schedule")
    if kind not in schedules.__all__:
        raise ValueError(f"decay must be given: of the schedule {kind} {path} holds only the name")
    return getattr(schedules, kind)(**decay)
