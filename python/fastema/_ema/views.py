"""Modules that compute in the memory of averages, also after these were made anew."""

from typing import NamedTuple
from weakref import ReferenceType, ref

from .. import _arrays
from .._arrays.teacher import teacher_of
from .._arrays.torch import written
from .._types import AnyArray
from .averages import Averages
from .count import Count
from .values import Values


class _View(NamedTuple):
    """One module's tensors.

    Attributes:
        k: Of which decay the averages are.
        tensors: By the name of a value, those in the memory of its average, as far as they live.
    """

    k: int
    tensors: dict[str, "ReferenceType[AnyArray]"]


class Views:
    """Modules whose tensors lie in the memory of averages, as long as one of those tensors is used.

    Attributes:
        each: These, and some that are gone.
    """

    def __init__(self) -> None:
        self.each: list[_View] = []
        self._seen: Averages | None = None

    def are_used(self) -> bool:
        """Tell whether a tensor of such a module lives."""
        self.each = [view for view in self.each if any(x() is not None for x in view.tensors.values())]
        return bool(self.each)

    def follow(self, values: Values, averages: Averages) -> None:
        """Have the modules compute in the memory of these averages, which change now."""
        if averages is not self._seen:
            self._point_at(values, averages)
            self._seen = averages
        written([x for view in self.each for each in view.tensors.values() if (x := each()) is not None])

    def _point_at(self, values: Values, averages: Averages) -> None:
        for view in self.each if self.are_used() else ():
            for name, reference in view.tensors.items():
                tensor, place = reference(), values.leaf_named(name)
                if tensor is not None and place is not None:
                    tensor.data = _shown(values, averages, view.k, place)

    def module(self, values: Values, averages: Averages, k: int, count: Count) -> AnyArray:
        """Return a module of the averages; see `EMA.module`."""
        module = values.module()
        if (obstacle := averages.shown.obstacle(k, count)) is not None:
            raise ValueError(obstacle)
        value: AnyArray
        tensors: dict[int, AnyArray] = {}
        named: dict[int, str] = {}
        kinds: dict[AnyArray, AnyArray] = {}
        for name, place, value in values.placed():
            leaf = values.leaves[place]
            if leaf.shards is not None:
                raise ValueError(
                    f"values[{name!r}] must be whole for module(), and is sharded: shard another model "
                    "alike, and call ema.copy_to(other)"
                )
            if place in averages.carried or value is None:
                continue
            if averages.on_host and _arrays.device(leaf.local_arrays()[0]) is not None:
                raise ValueError(
                    "device must be None for module(), which computes where its model does, got 'cpu'"
                )
            tensors[id(value)] = _shown(values, averages, k, place)
            named[id(value)] = name
            if tensors[id(value)].dtype != value.dtype:
                kinds[value.dtype] = tensors[id(value)].dtype
        made, placed = teacher_of(module, tensors, kinds)
        self.follow(values, averages)  # those made before
        self.each.append(_View(k, {name: ref(placed[key]) for key, name in named.items()}))
        return made


def _shown(values: Values, averages: Averages, k: int, place: int) -> AnyArray:
    """Return a tensor in the memory of an average.

    Raises:
        ValueError: No tensor can be, as of complex averages whose parts are of 16 bits.
    """
    local = averages.by_decay[k][place]
    tensor: AnyArray = values.leaves[place].to_library(local)
    address = _arrays.describe(local[0]).address
    if tensor.numel() and _arrays.describe(tensor).address != address:
        raise ValueError(
            f"values[{values.names[place]!r}] must have an average that a tensor can be for module(), and "
            f"has a complex one of {local[0].dtype}: give dtype='float32'"
        )
    return tensor
