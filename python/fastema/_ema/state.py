"""All that is needed to go on, as one value: taken from an EMA, and checked against another."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from .. import _arrays
from .._arrays import Leaf
from .._arrays.shards import Shards
from .._arrays.torch import plain
from .._types import AnyArray, Array, DType, check_count, check_share, float_type, narrowed
from ..checkpoint import _sets
from ..checkpoint._replace import StrPath
from ..checkpoint._state import PlainState, Saved, write_state
from .count import Count, Now, check_span, times_of
from .exchange import Exchange
from .tree import Nested, Selection
from .values import Locals, Values

_Named = Mapping[str, Any]  # NumPy arrays, or blocks of files, by the names of local arrays


@dataclass(frozen=True)
class State:
    """All that an EMA needs to go on; `EMA.state_dict` returns it as a dictionary.

    Attributes:
        averages: For each decay, averages as they are kept.
        carries: For each decay, carries; or none.
        copied: What is copied at each update.
        values: The weights, while averages are in their place; else nothing.
        count: How far averaging has come.
        swapped: Which averages are in the place of the weights, if any are.
        config: Arguments of the constructor, for the record.
    """

    averages: Sequence[_Named]
    carries: Sequence[_Named]
    copied: _Named
    values: _Named
    count: Count
    swapped: int | None
    config: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        exchange: Exchange,
        count: Count,
        config: Mapping[str, Any],
        contents: Callable[[Leaf, Array], Array],
    ) -> "State":
        """Take the state of an EMA.

        Args:
            exchange: Knows where everything is.
            count: How far averaging has come.
            config: For the record.
            contents: Returns the contents of a leaf's array. The arrays themselves are live.
        """
        averages, leaves = exchange.averages, exchange.values.leaves

        def named(arrays: Mapping[int, Locals]) -> dict[str, Array]:
            held = {i: [contents(leaves[i], x) for x in local] for i, local in arrays.items()}
            return exchange.values.by_name(held)

        return cls(
            averages=[
                named({i: exchange.kept(k, i) for i in averages.averaged})
                for k in range(len(averages.by_decay))
            ],
            carries=[named(carries) for carries in averages.carries],
            copied=named({i: exchange.kept(0, i) for i in averages.copied}),
            values=named(exchange.weights()),
            count=count,
            swapped=exchange.swapped.k if exchange.swapped is not None else None,
            config=config,
        )

    def to_dict(self) -> PlainState:
        """Return it as a dictionary of plain values, the same keys whatever has happened so far.

        torch.distributed.checkpoint reads no others than those of the state that it loads into.
        """
        count = self.count
        return {
            "averages": self.averages,
            "carries": self.carries,
            "copied": self.copied,
            "values": self.values,
            "step": count.step,
            "clock": count.clock,
            "averaged": count.averaged,
            "decay": list(count.decays) or None,
            "products": list(count.products),
            "swapped": self.swapped,
            "config": dict(self.config),
        }

    def write(
        self, path: StrPath, exchange: Exchange, config: Mapping[str, Any], dtype: DTypeLike | None = None
    ) -> None:
        """Write it into a file, or a set of files where values are sharded; see `EMA.save`.

        Args:
            path: Of the file.
            exchange: That the state was just taken from.
            config: All arguments of the constructor that are saved.
            dtype: Of the averages, which are all that is written then, with what is copied. None: as they are
                kept.

        Raises:
            TypeError: That is no type that is averaged.
            ValueError: An average is a number beyond that type.
        """
        chosen = None if dtype is None else float_type(dtype)
        averages = exchange.averages
        debiased = [
            {i: exchange.average_of(k, i, self.count) for i in averages.averaged}
            if k < averages.shown.lists and (self.count.is_blank or not averages.shown.is_kept(k, self.count))
            else {}
            for k in range(len(averages.by_decay))
        ]
        shown = [
            {name: file_content(x) for name, x in exchange.values.by_name(kept).items()} for kept in debiased
        ]
        layout, save = _sets.layout(_local_shapes(exchange)), token_hex(16)
        is_all = layout is None or len(layout.files) == layout.total  # else others write the rest
        agreed = save if is_all else _arrays.agreed(save)
        state = self
        if chosen is not None:
            rounded = [
                {name: _rounded(x, chosen, name) for name, x in (own or kept).items()}
                for own, kept in zip(shown, self.averages, strict=True)
            ]
            state, shown = replace(self, averages=rounded, carries=[], values={}), [{} for _ in rounded]
        name = None if chosen is None else chosen.name
        write_state(path, state.to_dict(), config, shown, layout=layout, save=agreed, rounded=name)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "State":
        """Return what `to_dict` was called on.

        Raises:
            KeyError: Something is missing.
            TypeError: A number is none.
            ValueError: A number is outside of its range.
        """
        step, swapped = check_count(state["step"], "state['step']"), state["swapped"]
        products = tuple(check_share(product, "state['products']") for product in state["products"])
        decays = tuple(check_share(decay, "state['decay']") for decay in state["decay"] or ())
        config = state.get("config", {})
        clock, averaged = times_of(step, config.get("every", 1))
        if "clock" in state:
            clock = _check_time(state["clock"], "state['clock']")
            averaged = _check_time(state["averaged"], "state['averaged']")
        if (step == 0) != (clock == 0):  # as where another step was written over a state's own
            raise ValueError(
                f"state['clock'] must be the time of state['step'], which is {step}, got {clock}: to go on "
                "from another step, set ema.step when the state is loaded"
            )
        if averaged > clock:
            raise ValueError(f"state['averaged'] must be at most {clock}, its clock, got {averaged}")
        return cls(
            averages=state["averages"],
            carries=state["carries"],
            copied=state["copied"],
            values={} if swapped is None else state["values"],
            count=Count(step, clock, averaged, decays, products),
            swapped=swapped,
            config=config,
        )

    @classmethod
    def of_saved(cls, saved: Saved) -> "State":
        """Return what is in files, which was checked when they were opened; its arrays are yet to be read."""
        plain = saved.plain
        count = Count(plain.step, plain.clock, plain.averaged, plain.decay, plain.products)
        arrays = (saved.averages, saved.carries, saved.copied, saved.values)
        return cls(*arrays, count, plain.swapped, {"every": plain.config.every})

    def check_is_of(self, given: Nested, selection: Selection) -> None:
        """Raise unless whole arrays are of the names and shapes of values, for which nothing is made yet.

        Raises:
            TypeError: Something is no array.
            ValueError: They are not.
        """
        values, local = Values.of(given, selection, unchanging=False)
        leaves = dict(zip(values.names, values.leaves, strict=True))
        theirs = {**self.averages[0], **self.copied}
        ours = [name for name, leaf in leaves.items() if not isinstance(leaf, _arrays.Carried)]
        _check_names("its averages and copies", ours, theirs)
        for name, arrays in zip(values.names, local, strict=True):
            shards = leaves[name].shards
            if shards is not None:
                for block in shards.blocks:
                    _sets.check_whole(block, theirs[name].shape, name)
            elif arrays and _arrays.shape_of(arrays[0]) != theirs[name].shape:
                shape = _arrays.shape_of(arrays[0])
                raise ValueError(f"state[{name!r}] must have shape {shape}, got {theirs[name].shape}")

    def _with(self, change: Callable[[_Named], _Named]) -> "State":
        """Return the state with what a function makes of each dictionary of arrays."""
        return replace(
            self,
            averages=[change(arrays) for arrays in self.averages],
            carries=[change(arrays) for arrays in self.carries],
            copied=change(self.copied),
            values=change(self.values),
        )

    def local(self, exchange: Exchange) -> "State":
        """Return the state with NumPy's arrays in the place of tensors, those that this process has parts of.

        Raises:
            ValueError: A tensor is another process' part, or of another shape.
        """
        values = exchange.values
        leaves = {
            name: leaf
            for names, leaf in zip(values.local_names, values.leaves, strict=True)
            for name in names
        }

        def local(arrays: _Named) -> _Named:
            return {
                name: plain(leaves[name].from_state(x, f"state[{name!r}]") if name in leaves else x, name)
                for name, x in arrays.items()
            }

        return self._with(local)

    def cut(self, exchange: Exchange) -> "State":
        """Return the state with those parts of whole arrays that this EMA's local arrays are of.

        Raises:
            ValueError: An array is of another shape.
        """
        places = {
            name: dict(zip(names, shards.blocks if shards else [None] * len(names), strict=True))
            for name, names, shards in _local_shapes(exchange)
        }

        def cut(arrays: _Named) -> _Named:
            return {
                part: _sets.cut(array, block, name)
                for name, array in arrays.items()
                for part, block in places.get(name, {name: None}).items()
            }

        return self._with(cut)

    def fitted(self, exchange: Exchange) -> "Fitted":
        """Check that an EMA can go on from this state, and change nothing.

        Raises:
            IndexError: There are no averages that could have been in the place of the weights.
            TypeError: A type differs, or a value that never changes was swapped.
            ValueError: Names, shapes or numbers of arrays differ.
        """
        averages, values = exchange.averages, exchange.values
        decays, count = len(averages.by_decay), self.count
        if len(count.products) != decays or len(count.decays) not in (0, decays):
            raise ValueError(f"state must be of {decays} decays, got {len(count.products)}")
        pairs = []
        for key, ours, theirs in (
            ("averages", averages.by_decay, self.averages),
            ("carries", averages.carries, self.carries),
        ):
            if len(theirs) != len(ours):
                raise ValueError(f"state[{key!r}] must hold {len(ours)} dictionaries, got {len(theirs)}")
            for k, (own, other) in enumerate(zip(ours, theirs, strict=True)):
                averaged = values.by_name({i: own[i] for i in averages.averaged})
                pairs += _fitting(f"state[{key!r}][{k}]", averaged, other)
        copied = values.by_name({i: averages.by_decay[0][i] for i in averages.copied})
        pairs += _fitting("state['copied']", copied, self.copied)
        weights: dict[int, Locals] = {}
        if self.swapped is not None:
            averages.checked_index(self.swapped)
            values.check_writable("load_state_dict() of a state saved while swapped")
            leaves = range(len(values.leaves))
            weights = {i: [_arrays.empty_like(x) for x in values.leaves[i].local_arrays()] for i in leaves}
            pairs += _fitting("state['values']", values.by_name(weights), self.values)
        return Fitted(pairs, weights, self)


@contextmanager
def fitting(path: StrPath) -> Iterator[None]:
    """Name a file in errors of what does not fit it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path} does not fit: {error}") from None


class Fitted(NamedTuple):
    """A state that fits an EMA.

    Attributes:
        pairs: Arrays of the EMA with what they are to hold.
        weights: What is put back by a swap, where the state was saved while swapped: among those arrays.
        state: That state.
    """

    pairs: list[tuple[Array, np.ndarray | _sets.Unread]]
    weights: dict[int, Locals]
    state: State

    def go_on(self, exchange: Exchange, now: Now) -> None:
        """Have the EMA go on from there; called again, from wherever that was interrupted.

        Raises:
            ValueError: A file was changed since it was opened. The values are as they were.
            OSError: A file cannot be read. The values are as they were.
        """
        exchange.views.follow(exchange.values, exchange.averages)
        for target, source in self.pairs:
            if isinstance(source, _sets.Unread) and isinstance(target, np.ndarray):
                source.read_into(target)
            else:
                _arrays.write(np.asarray(source), target)
        now[0] = self.state.count
        if self.state.swapped is not None:
            exchange.resume(self.state.swapped, self.weights, self.state.count)


def file_content(array: Array) -> AnyArray:
    """Return what is written into a file of a local array, wherever it lies; nothing is copied yet."""
    return array if isinstance(array, np.ndarray) else _arrays.Remote(array)


def _rounded(average: AnyArray, dtype: DType, name: str) -> np.ndarray:
    """Return an average in another type, rounded once; raises as `State.write`."""
    average = np.asarray(average)
    with np.errstate(over="ignore"):
        rounded = narrowed(average, dtype)
    if (np.isinf(rounded) & np.isfinite(average)).any():
        raise ValueError(f"dtype must hold the average of values[{name!r}], and it is beyond {dtype}")
    return rounded


def _check_time(time: object, name: str) -> float:
    """Return a time of the clock; raises as `check_span`."""
    return 0 if time == 0 else check_span(time, name)


def _local_shapes(exchange: Exchange) -> list[tuple[str, dict[str, tuple[int, ...]], Shards | None]]:
    """Return of each leaf its name, the names and shapes of its local arrays and how it is spread."""
    values, kept = exchange.values, exchange.averages.by_decay[0]
    return [
        (
            name,
            {part: _arrays.shape_of(x) for part, x in zip(values.local_names[i], kept[i], strict=True)},
            values.leaves[i].shards,
        )
        for i, name in enumerate(values.names)
    ]


def _check_names(place: str, ours: Iterable[str], theirs: Iterable[str]) -> None:
    """Raise ValueError unless the names are the same; it shows some of them."""
    missing, unknown = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if missing or unknown:
        raise ValueError(
            f"{place} must name the values; missing: {_some(missing)}, unknown: {_some(unknown)}"
        )


def _some(names: list[str]) -> str:
    return str(names) if len(names) <= 20 else f"{names[:20]} and {len(names) - 20} more"


def _fitting(
    place: str, ours: Mapping[str, Array], theirs: Mapping[str, Any]
) -> list[tuple[Array, np.ndarray | _sets.Unread]]:
    """Return our arrays with those of a state, where these fit."""
    _check_names(place, ours, theirs)
    pairs: list[tuple[Array, np.ndarray | _sets.Unread]] = []
    for name, array in ours.items():
        dtype, shape, source = _arrays.dtype_of(array), _arrays.shape_of(array), theirs[name]
        if not isinstance(source, _sets.Unread):
            source = _arrays.unmasked(np.asanyarray(source), f"{place}[{name!r}]")
        if dtype != source.dtype.newbyteorder("="):
            raise TypeError(f"{place}[{name!r}] must be {dtype}, got {source.dtype}")
        if shape != source.shape:
            raise ValueError(f"{place}[{name!r}] must have shape {shape}, got {source.shape}")
        pairs.append((array, source))
    return pairs
