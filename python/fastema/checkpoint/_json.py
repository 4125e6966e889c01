"""JSON in files of anyone: parsed in bounded memory, and taken apart into what it must be.

Whatever a text holds, errors are ValueError and say which entry, what was needed and what came.
"""

import json
import math
from collections.abc import Iterator
from reprlib import Repr
from typing import Any, NamedTuple, NoReturn

LARGEST = 2**63 - 1  # of whole numbers, as the core counts
_MOST_VALUES = 4_000_000  # in a text: such a one takes 0.8 GB at worst

_short = Repr()
_short.maxstring = _short.maxother = 200


def shown(value: object) -> str:
    """Return what errors show of a value: no more than some lines, whatever it is."""
    return _short.repr(value)


def parsed(text: str, name: str) -> "Entry":
    """Parse a text.

    Args:
        text: Of any length and depth.
        name: What errors call it.

    Raises:
        ValueError: It is no JSON, has a key twice, is deeper than Python goes or has too many values.
    """
    if text.count(",") + text.count("[") + text.count("{") > _MOST_VALUES:
        raise ValueError(f"{name} must have at most {_MOST_VALUES} values, got more")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"{name} must be JSON of moderate depth, got too many brackets") from None
    except ValueError as reason:
        raise ValueError(f"{name} must be JSON, got {shown(text)}: {reason}") from None
    return Entry(value, name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("an object has a key twice")
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


class Entry(NamedTuple):
    """A value in JSON, with what errors call it. Each method returns it as what it must be, or raises.

    Attributes:
        value: As it was parsed.
        name: As ``state['config']['every']``.
    """

    value: Any
    name: str

    def refused(self, needed: str) -> ValueError:
        """Return an error."""
        return ValueError(f"{self.name} must be {needed}, got {shown(self.value)}")

    def whole(self, least: int = 0, most: int = LARGEST) -> int:
        """Return a whole number."""
        if type(self.value) is not int or not least <= self.value <= most:
            raise self.refused(f"a whole number from {least} to {most}")
        return self.value

    def number(self, least: float = -math.inf, most: float = math.inf) -> float:
        """Return a finite number."""
        try:
            found = float(self.value) if type(self.value) in (int, float) else math.nan
        except OverflowError:
            found = math.inf
        if not math.isfinite(found) or not least <= found <= most:
            within = "" if math.isinf(most) else f" from {least:g} to {most:g}"
            raise self.refused(f"a finite number{within}")
        return found

    def text(self) -> str:
        """Return a text."""
        if type(self.value) is not str:
            raise self.refused("a text")
        return self.value

    def choice(self, *choices: object) -> Any:
        """Return one of several texts, or None."""
        if type(self.value) not in (str, type(None)) or self.value not in choices:
            raise self.refused(" or ".join(map(repr, choices)))
        return self.value

    def entries(self) -> "Iterator[Entry]":
        """Yield what a list holds."""
        if type(self.value) is not list:
            raise self.refused("a list")
        for i, value in enumerate(self.value):
            yield Entry(value, f"{self.name}[{i}]")

    def fields(self) -> "Iterator[tuple[str, Entry]]":
        """Yield what an object holds."""
        if type(self.value) is not dict:
            raise self.refused("an object")
        for key, value in self.value.items():
            yield key, Entry(value, f"{self.name}[{shown(key)}]")

    def has(self, key: str) -> bool:
        """Tell whether an object has a field."""
        if type(self.value) is not dict:
            raise self.refused("an object")
        return key in self.value

    def field(self, key: str) -> "Entry":
        """Return a field of an object."""
        if not self.has(key):
            raise ValueError(f"{self.name} must have {key!r}, got {shown(sorted(self.value))}")
        return Entry(self.value[key], f"{self.name}[{key!r}]")

    def wholes(self) -> tuple[int, ...]:
        """Return a list of whole numbers."""
        return tuple(entry.whole() for entry in self.entries())

    def texts(self) -> tuple[str, ...]:
        """Return a list of texts."""
        return tuple(entry.text() for entry in self.entries())
