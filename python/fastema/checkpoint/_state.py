"""An EMA's state in a safetensors file, or in a set of files: what `EMA.save` writes and `EMA.load` reads.

The averages of the first decay, as users see them, and what is copied have the names of the values. What
only an EMA reads is named ``fastema.<group>.<number of the decay>.<value>``; all that is no array is JSON in
the metadata.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ._format import write
from ._json import parsed, shown
from ._plain import STATE, VERSION, Plain, described
from ._replace import StrPath
from ._sets import Blocks, Layout, is_numbered, name_of, path_of, set_of
from ._source import Source, Stored

_OFFSETS = "DCP_SHARDING_INFO"  # in the metadata; torch.distributed.checkpoint reads it, too

_Arrays = Mapping[str, np.ndarray | Stored | Blocks]


class PlainState(TypedDict):
    """What an EMA needs to go on, as `EMA.state_dict` returns and explains it; arrays by names of values."""

    averages: Sequence[_Arrays]
    carries: Sequence[_Arrays]
    copied: _Arrays
    values: _Arrays
    step: int
    clock: float
    averaged: float
    decay: list[float] | None
    products: list[float]
    swapped: int | None
    config: dict[str, Any]


def write_state(
    path: StrPath,
    state: PlainState,
    config: Mapping[str, Any],
    debiased: Sequence[_Arrays],
    *,
    layout: Layout | None = None,
    save: str | None = None,
    rounded: str | None = None,
) -> None:
    """Write the state of an EMA, its first averages under the names of the values.

    Args:
        path: As for `write`; with a `layout`, of the set.
        state: Of sharded values it holds the local arrays.
        config: Arguments of the constructor, beside those in the state.
        debiased: For each decay the averages as users see them, where they are kept undivided; else nothing.
        layout: Which files of a set hold what. None: a single file holds all.
        save: Of a set, what is the same in all its files, and in no set that was saved otherwise, as far as
            processes know without asking each other. None: they know nothing.
        rounded: The type that averages were rounded to, which nothing goes on from. None: they were not.

    Raises:
        ValueError: A value has a name that would be taken for the state.
        OSError: A file cannot be written.
    """
    decay = config["decay"]
    values = layout.values if layout else {name: name for name in state["copied"]}
    plain: dict[str, Any] = {
        "version": VERSION,
        "step": state["step"],
        "clock": state["clock"],
        "averaged": state["averaged"],
        "decay": state["decay"],
        "products": state["products"],
        "swapped": state["swapped"],
        "copied": list(dict.fromkeys(values[name] for name in state["copied"])),
        "config": {
            **state["config"],
            **config,
            "decay": [described(d) for d in decay] if isinstance(decay, list) else described(decay),
        },
    }
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
        of_set = {
            "set": [number, layout.total],
            "shapes": shapes,
            **({"save": save} if save else {}),
            **plain,
        }
        write(
            path_of(Path(path), number, layout.total),
            tensors,
            {"format": "pt", _OFFSETS: json.dumps(begins), STATE: json.dumps(of_set)},
        )


def _arrays_of(state: PlainState, debiased: Sequence[_Arrays]) -> Iterator[tuple[str, str, Any]]:
    """Yield for each array of a state what its name in a file begins with, its own name, and the array."""
    groups = [("", state["copied"])]
    for k, (kept, seen) in enumerate(zip(state["averages"], debiased, strict=True)):
        groups.append((f"{STATE}.averages.{k}." if k else "", seen or kept))
        groups.append((f"{STATE}.kept.{k}.", kept if seen else {}))
    groups += [(f"{STATE}.carries.{k}.", carries) for k, carries in enumerate(state["carries"])]
    groups.append((f"{STATE}.values.0.", state["values"]))
    for prefix, arrays in groups:
        for name, array in arrays.items():
            if is_state(name):
                raise ValueError(f"values must not have names that begin with '{STATE}.', got {name!r}")
            yield prefix, name, array


@dataclass(frozen=True)
class Saved:
    """An EMA's state in a file or a set of files: checked, its arrays yet to be read.

    Attributes:
        paths: Of the files, and of a set that which it is named by.
        plain: What is no array.
        averages, carries: For each decay, by names of values.
        copied, values: By names of values.
    """

    paths: Sequence[Path]
    plain: Plain
    averages: Sequence[_Arrays]
    carries: Sequence[_Arrays]
    copied: _Arrays
    values: _Arrays

    @classmethod
    @contextmanager
    def opened(cls, path: StrPath) -> Iterator["Saved"]:
        """Open what `write_state` wrote: it can be read until the block ends.

        Args:
            path: Of the file, or of a set of them, or of one of a set.

        Raises:
            ValueError: A file holds no state, or one of a later version; or a set holds files of more than
                one save. No other file was touched, whatever is in it.
            OSError: A file cannot be read, or one of a set is not there.
        """
        path = Path(path)
        # a name alone makes no set: a single file may have numbers in it, too
        with ExitStack() as holder:
            alone = Source.at(path, holder) if path.exists() else None
            is_single = alone is not None and is_numbered(path) and Plain.in_file(alone).place is None
            members = [] if is_single else set_of(path)
            if members:
                yield cls._in([Source.at(member) for member in members], name_of(members[0]))
            else:
                yield cls._in([alone or Source.at(path, holder)], None)

    @classmethod
    def _in(cls, sources: Sequence[Source], named: Path | None) -> "Saved":
        """Return the state in a file; or in all files of a set, which has a name."""
        plains = [Plain.in_file(source) for source in sources]
        first, paths = plains[0], [Path(source.path) for source in sources]
        found: dict[tuple[str, int], dict[str, Stored | Blocks]] = defaultdict(dict)
        for number, (source, plain) in enumerate(zip(sources, plains, strict=True), 1):
            if plain.place != ((number, len(sources)) if named else None):
                raise ValueError(f"{source.path} must have the name that it was saved under")
            _check_one_save(paths[0], first, source.path, plain)
            try:
                _take(source, plain, found)
            except ValueError as reason:
                raise ValueError(f"{source.path} holds what EMA.save() did not write: {reason}") from None
        decays = range(len(first.products))
        compensated = first.config.rounding == "compensated"
        saved = cls(
            [*paths, named] if named else paths,
            first,
            [found["kept", k] or found["averages", k] for k in decays],
            [found["carries", k] for k in decays if compensated],
            found["copied", 0],
            found["values", 0],
        )
        try:
            saved._check()
        except ValueError as reason:
            raise ValueError(f"{named or paths[0]} holds what EMA.save() did not write: {reason}") from None
        return saved

    def _check(self) -> None:
        """Raise ValueError unless each decay has averages of the same values, in the type that is said."""
        dtype = self.plain.config.dtype
        for k, arrays in enumerate(self.averages):
            if k > 0 and _shapes(arrays) != _shapes(self.averages[0]):
                raise ValueError(f"averages of decay {k} must have the names and shapes of those of decay 0")
            for name, array in arrays.items() if dtype is not None else ():
                if array.dtype != dtype:
                    raise ValueError(f"the average of {shown(name)} must be {dtype}, got {array.dtype}")
        if unknown := self.plain.copied - self.copied.keys():
            raise ValueError(f"it must have a tensor {shown(min(unknown))}, which is copied")


def _shapes(arrays: _Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _check_one_save(path: StrPath, first: Plain, other_path: StrPath, other: Plain) -> None:
    """Raise ValueError unless the states in two files are one, but for the place in the set."""
    for field in fields(Plain):
        ours, theirs = getattr(first, field.name), getattr(other, field.name)
        if field.name not in ("place", "shapes") and ours != theirs:
            raise ValueError(
                f"{path} and {other_path} must be of one save, and their {field.name} is "
                f"{shown(ours)} and {shown(theirs)}"
            )


_TENSOR = re.compile(
    re.escape(STATE) + r"\.(averages|kept|carries|values)\.(0|[1-9][0-9]{0,8})\.(.*)", re.DOTALL
)


def _take(source: Source, plain: Plain, found: dict[tuple[str, int], dict[str, Stored | Blocks]]) -> None:
    """Put the tensors of a file to those of others, by group, decay and value."""
    places = parsed(source.metadata.get(_OFFSETS, "null"), _OFFSETS) if plain.place else None
    for tensor, entry in source.layout.items():
        group, k, name = _parsed(tensor, plain)
        array = Stored(source, entry)
        if places is None:
            found[group, k][name] = array
            continue
        begin = places.field(tensor).field("saved_offsets").wholes()
        shape = plain.shapes.get(name)
        whole = found[group, k].setdefault(name, Blocks(name, shape or ()))
        if shape is None or whole.shape != shape:
            raise ValueError(f"{shown(name)} must have one shape in all files, got {whole.shape} and {shape}")
        if isinstance(whole, Blocks):
            whole.add(begin, array)


def _parsed(tensor: str, plain: Plain) -> tuple[str, int, str]:
    """Return the group of a tensor in a file, the number of its decay and the name of its value."""
    if not is_state(tensor):
        return "copied" if tensor in plain.copied else "averages", 0, tensor
    match = _TENSOR.fullmatch(tensor)
    group, k, name = match.groups() if match else ("", "0", "")
    every = range(len(plain.products))
    decays = {
        "averages": every[1:],
        "kept": every,
        "carries": every if plain.config.rounding == "compensated" else (),
        "values": () if plain.swapped is None else every[:1],
    }
    if int(k) not in decays.get(group, ()):
        raise ValueError(f"it must have no tensor {shown(tensor)}, of a state of {len(every)} decays")
    return group, int(k), name


def is_state(tensor: str) -> bool:
    """Tell by its name whether a tensor is for an EMA alone."""
    return tensor.startswith(f"{STATE}.")
