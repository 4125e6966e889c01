"""What of an EMA's state is no array: JSON in the metadata of a file, checked as a whole when it is read."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, NamedTuple

from .. import schedules
from .._types import FLOATS
from ._json import LARGEST, Entry, parsed, shown
from ._replace import StrPath
from ._source import Source

METHODS = {
    "BEMA": ("ema_power", "bias_power", "lag", "multiplier", "min_decay"),
    "Window": ("size",),
}
"""Of what is no EMA but kept alike, the arguments of its own."""
_SHARED = {"BEMA": ("every", "start_step", "dtype", "buffers"), "Window": ("every", "start_step", "buffers")}

STATE = "fastema"  # in the metadata, and where names of tensors begin that are for an EMA alone
VERSION = 1  # of what is written here


@dataclass(frozen=True)
class Config:
    """Arguments of the constructor that a file holds: those that `EMA.save` writes, and no others.

    Attributes:
        decay: Of each average a number or a schedule, or what only the name is known of.
        several: Whether they were given as a sequence.
        every, start_step, rounding, seed, dtype, buffers: As of `EMA`.
        method: Of what is no EMA its name, and the arguments of its own. None: it is one.
    """

    decay: tuple[Any, ...]
    several: bool
    every: int
    start_step: int
    rounding: str
    seed: int
    dtype: str | None
    buffers: str
    method: tuple[str, dict[str, float]] | None

    @classmethod
    def of(cls, entry: Entry) -> "Config":
        """Check what a file holds.

        An argument that this version has not would be of another average: it is refused by its name.

        Raises:
            ValueError: Something is missing, unknown, or not what it must be.
        """
        known = [field.name for field in fields(cls) if field.name != "several"]
        for key, _ in entry.fields():
            if key not in known:
                raise entry.refused(f"of {', '.join(known)} alone, without {shown(key)}")
        decay = entry.field("decay")
        several = isinstance(decay.value, list)
        decays = tuple(map(_restored, decay.entries() if several else [decay]))
        method = _method(entry.field("method"), len(decays)) if entry.has("method") else None
        return cls(
            decays,
            several,
            entry.field("every").whole(1),
            entry.field("start_step").whole(),
            entry.field("rounding").choice("nearest", "stochastic", "compensated"),
            entry.field("seed").whole(0, 2**64 - 1),
            entry.field("dtype").choice(None, *map(str, FLOATS)),
            entry.field("buffers").choice("copy", "average", "ignore"),
            method,
        )

    def arguments(self, method: str | None, decay: Any, path: StrPath) -> dict[str, Any]:
        """Return the arguments of the constructor.

        Args:
            method: What is to be made. None: an EMA.
            decay: Takes the place of the file's. None: the file's.
            path: Of the file, for errors.

        Raises:
            ValueError: The file is of something else, or `decay` must be given, or must not.
        """
        name, own = self.method or (None, {})
        if name != method:
            raise ValueError(
                f"{path} must hold the state of {_called(method)}, and holds that of {_called(name)}: use "
                f"{_called(name)}.load()"
            )
        if name is not None:
            if decay is not None:
                raise ValueError(f"decay must be None for {_called(name)}, got {shown(decay)}")
            return {**{key: getattr(self, key) for key in _SHARED[name]}, **own}
        if decay is None:
            for named in (each for each in self.decay if isinstance(each, _Named)):
                name = shown(named.name)[1:-1]
                raise ValueError(f"decay must be given: of the schedule {name} {path} holds only the name")
            decay = list(self.decay) if self.several else self.decay[0]
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("several", "method")}
        return {**known, "decay": decay}


def _called(method: str | None) -> str:
    return f"fastema.{method or 'EMA'}"


def _method(entry: Entry, lists: int) -> tuple[str, dict[str, float]]:
    """Return the name and the arguments of what is no EMA, of so many lists of arrays."""
    name = entry.field("name").choice(*METHODS)
    if sorted([*METHODS[name], "name"]) != sorted(key for key, _ in entry.fields()):
        raise entry.refused(" or ".join(f"{known} with {', '.join(own)}" for known, own in METHODS.items()))
    own = {key: entry.field(key) for key in METHODS[name]}
    found = {key: x.whole(1) if key == "size" else x.number() for key, x in own.items()}
    if lists != found.get("size", 3):  # before so many are made
        raise entry.refused(f"of {lists} lists")
    return name, found


@dataclass(frozen=True)
class Plain:
    """What of a state is no array, checked: a file has it in its metadata.

    Attributes:
        step, clock, averaged, decay, products, swapped: As of `EMA.state_dict`.
        copied: The names of values that are copied at each update.
        config: Arguments of the constructor.
        save: The same in all files of a save, see `_state.write_state`.
        place: Of a file of a set its number and how many there are.
        shapes: Of a file of a set the shapes of the values that it has blocks of.
    """

    step: int
    clock: float
    averaged: float
    decay: tuple[float, ...]
    products: tuple[float, ...]
    swapped: int | None
    copied: frozenset[str]
    config: Config
    save: str | None
    place: tuple[int, ...] | None
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def in_file(cls, source: Source) -> "Plain":
        """Return what a file has.

        What a later fastema adds beside these is passed over: where it changes what they mean, it changes the
        version.

        Raises:
            ValueError: There is no state, one of a later version, or rounded averages alone; or something is
                not what it must be.
        """
        path = source.path
        if STATE not in source.metadata:
            raise ValueError(f"{path} holds no state of an EMA: EMA.save() did not write it")
        try:
            state = parsed(source.metadata[STATE], "state")
            is_known = state.field("version").whole() <= VERSION
            rounded = state.field("rounded").choice(*map(str, FLOATS)) if state.has("rounded") else None
            plain = cls._of(state) if is_known and rounded is None else None
        except ValueError as reason:
            raise ValueError(f"{path} holds a state that EMA.save() did not write: {reason}") from None
        if rounded is not None:
            raise ValueError(
                f"{path} holds averages rounded to {rounded} by EMA.save(dtype=), and nothing to go on from: "
                "load a file that EMA.save() wrote without dtype"
            )
        if plain is None:
            raise ValueError(f"{path} was written by a later fastema, in a way that this one does not know")
        return plain

    @classmethod
    def _of(cls, state: Entry) -> "Plain":
        config = Config.of(state.field("config"))
        products = [entry.number(0.0, 1.0) for entry in state.field("products").entries()]
        if len(products) != len(config.decay):
            raise state.field("products").refused(
                f"a list of {len(config.decay)} numbers, one for each decay"
            )
        last, swapped, place = state.field("decay"), state.field("swapped"), None
        decay = [] if last.value is None else [entry.number(0.0, 1.0) for entry in last.entries()]
        if len(decay) not in (0, len(products)):
            raise last.refused(f"None or a list of a number for each of {len(products)} decays")
        if state.has("set"):
            place = state.field("set").wholes()
            if len(place) != 2 or not 1 <= place[0] <= place[1]:
                raise state.field("set").refused("a number and how many there are")
        step = state.field("step").whole()
        clock: float = step
        averaged: float = step - step % config.every
        if state.has("clock"):
            clock = _time(state.field("clock"), LARGEST)
            averaged = _time(state.field("averaged"), clock)
        return cls(
            step,
            clock,
            averaged,
            tuple(decay),
            tuple(products),
            None if swapped.value is None else swapped.whole(0, len(products) - 1),
            frozenset(state.field("copied").texts()),
            config,
            state.field("save").text() if state.has("save") else None,
            place,
            {name: entry.wholes() for name, entry in state.field("shapes").fields()} if place else {},
        )


def _time(entry: Entry, most: float) -> float:
    """Return a time of the clock: an int where it is whole, which adds up exactly."""
    if type(entry.value) is int and 0 <= entry.value <= most:
        return entry.value  # a float may have no room for it
    number = entry.number(0.0, most)
    return int(number) if number.is_integer() else number


def described(decay: Any) -> Any:
    """Return a decay as JSON holds it: our own schedules whole, those of users by their name alone."""
    if not callable(decay):
        return decay
    kind = type(decay)
    if kind.__module__ == schedules.__name__:
        given = {name: number for name, number in asdict(decay).items() if number != math.inf}
        return {"schedule": kind.__name__, **given}  # JSON has no infinity, which is a default
    named = decay if hasattr(decay, "__qualname__") else kind
    return {"schedule": f"{named.__module__}.{named.__qualname__}"}


class _Named(NamedTuple):
    """A schedule of which a file holds only the name."""

    name: str


_SCHEDULES: dict[str, Any] = {
    name: kind for name in schedules.__all__ if is_dataclass(kind := getattr(schedules, name))
}


def _restored(decay: Entry) -> Any:
    """Return the decay that was described: a number, a schedule of ours, or the name of another."""
    if not isinstance(decay.value, dict):
        return decay.number(0.0, 1.0)
    name = decay.field("schedule").text()
    kind = _SCHEDULES.get(name)
    if kind is None:
        return _Named(name)
    known = {field.name: field for field in fields(kind)}
    given = {}
    for key, entry in decay.fields():
        if key == "schedule":
            continue
        if key not in known:
            raise decay.refused(f"of the fields of schedules.{name}, without {shown(key)}")
        given[key] = entry.whole(-LARGEST) if known[key].type is int else entry.number()
    try:
        return kind(**given)
    except (TypeError, ValueError) as reason:  # a field is missing or out of range
        raise decay.refused(f"a schedules.{name} ({reason})") from None
