"""The user's values: which arrays they are, by which names, and where each of them lies by now."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from .. import _arrays
from .._arrays import Leaf
from .._types import AnyArray, Array
from .tree import Buffers, Nested, Tree

Locals = list[AnyArray]  # the local arrays of a leaf, as they are worked on: NumPy's, or on a device


class Values:
    """The arrays that were given to be averaged, each once, however often it was given (tied weights).

    Nothing is kept of arrays that never change (JAX's), since every step of training leaves others.

    Attributes:
        leaves: The distinct arrays.
        names: Of each leaf, the first one that it was given under.
        local_names: Of each leaf, the names of its local arrays: several only where it is sharded.
        copied: The names of a module's buffers that are not to be averaged.
        latest: Of each leaf the array that an update was given which averaged nothing; while none has.
        moving: Where those leaves lie that stay where they are, unless their library moves them (FSDP).
    """

    def __init__(self, tree: Tree, module: Nested | None) -> None:
        self._tree = tree
        self._module = module
        self.copied = tree.copied
        self.leaves: list[Leaf] = []
        self.names: list[str] = []
        self.local_names: list[list[str]] = []
        self.latest: list[Array | None] | None = None
        self._given: list[Array | None] = []  # of each value in the tree; None if it never changes
        self._places: list[int] = []  # of each value in the tree, its leaf
        self._firsts: list[int] = []  # of each leaf, its first value in the tree

    @classmethod
    def of(cls, given: Nested, buffers: Buffers, *, unchanging: bool) -> tuple["Values", list[Locals]]:
        """Take the user's values apart.

        Args:
            given: What `fastema.EMA` is given.
            buffers: What to do with a module's buffers.
            unchanging: Whether values that can change are refused.

        Returns:
            The values, and of each leaf the local arrays as they are now.

        Raises:
            TypeError: Something is no array, or its memory cannot be viewed.
            ValueError: A value can change, and must not.
        """
        if isinstance(given, Iterator):
            given = list(given)
        tree, arrays = Tree.of(given, _arrays.is_leaf, buffers)
        values = cls(tree, given if hasattr(given, "named_parameters") else None)
        return values, values._take(arrays, unchanging)

    def _take(self, arrays: list[Array], unchanging: bool) -> list[Locals]:
        found: list[Locals] = []
        places: dict[object, int] = {}
        for array, name in zip(arrays, self._tree.names, strict=True):
            leaf = _arrays.leaf(array, f"values[{name!r}]")
            if unchanging and not leaf.immutable:
                raise ValueError(
                    "background must be False unless values cannot change meanwhile, as JAX arrays; "
                    f"values[{name!r}] is of {type(array).__name__}"
                )
            local = leaf.local_arrays(array if leaf.immutable else None)
            # an immutable array that is given twice may well become two
            key = id(leaf) if leaf.immutable else _memory_of(local[0]) if leaf.stable else id(array)
            place = places.setdefault(key or id(array), len(self.leaves))
            if place == len(self.leaves):
                self.leaves.append(leaf)
                self.names.append(name)
                several = len(local) > 1
                self.local_names.append([f"{name}/{j}" for j in range(len(local))] if several else [name])
                self._firsts.append(len(self._places))
                found.append(local)
            self._places.append(place)
            self._given.append(None if leaf.immutable else array)
        self._reader = _arrays.Reader(self.leaves)
        self.moving = _arrays.Addresses(leaf.address for leaf in self.leaves if leaf.may_move)
        return found

    # --- shape ------------------------------------------------------------------------------------

    def matched(self, other: Nested) -> list[Array]:
        """Return the arrays of other values of this shape, one for each that was given, in order.

        Raises:
            ValueError: They have another shape.
        """
        return self._tree.arrays(other)

    def targets(self, others: Nested | None = None) -> list["Target"]:
        """Return what averages are written into for good: the values, or others of their shape.

        Raises:
            TypeError: One of the others is no array, or its memory cannot be viewed.
            ValueError: They have another shape, or one is sharded otherwise than the value.
        """
        given = zip(self._tree.names, self._places, strict=True)
        if others is None:
            return [Target(name, place, self.leaves[place], []) for name, place in given]
        targets = []
        for array, (name, place) in zip(self.matched(others), given, strict=True):
            leaf = _arrays.leaf(array, f"values[{name!r}]")
            if leaf.shards != self.leaves[place].shards:
                raise ValueError(f"values[{name!r}] must be sharded, or whole, as it was at first")
            targets.append(Target(name, place, leaf, leaf.local_arrays(array)))
        return targets

    def by_name(self, arrays: Mapping[int, Locals]) -> dict[str, Array]:
        """Return the local arrays of some leaves by their names."""
        return {
            name: array
            for i, local in arrays.items()
            for name, array in zip(self.local_names[i], local, strict=True)
        }

    def build(self, of_leaves: Sequence[Array]) -> Nested:
        """Put one array for each leaf together as the values were given."""
        return self._tree.build(of_leaves[place] for place in self._places)

    def build_given(self, arrays: Iterable[Array]) -> Nested:
        """Put one array for each that was given together as the values were."""
        return self._tree.build(arrays)

    # --- reading ----------------------------------------------------------------------------------

    @property
    def are_stable(self) -> bool:
        """Whether the values' memory is paired once, and not read anew at each update."""
        return all(leaf.stable for leaf in self.leaves)

    def are_given(self, arrays: list[Array]) -> bool:
        """Tell whether arrays in order are those that were given at first."""
        return all(map(operator.is_, arrays, self._given))

    def sources(self, arrays: list[Array] | None) -> list[Array | None]:
        """Return for each leaf the array to read; None: its own, as it is by then.

        Raises:
            ValueError: None were given, and a leaf never changes.
        """
        if arrays is not None:
            return [arrays[place] for place in self._firsts]
        for leaf, name in zip(self.leaves, self.names, strict=True):
            if leaf.immutable:
                raise ValueError(
                    f"values must be given: values[{name!r}] {leaf.obstacle()}, and a step leaves others"
                )
        return [None] * len(self.leaves)

    def local_arrays(self, sources: Sequence[Array | None] | None = None) -> list[Locals]:
        """Return the local arrays of each leaf, read from what `sources` returned; None: from its own."""
        if sources is None:
            return [leaf.local_arrays() for leaf in self.leaves]
        return self._reader.local_arrays(sources)

    # --- checks -----------------------------------------------------------------------------------

    def check_module(self) -> None:
        """Raise if a module has other tensors by now: they would be neither averaged nor swapped."""
        if self._module is None:
            return
        for now, first, name in zip(self.matched(self._module), self._given, self._tree.names, strict=True):
            if now is not first:
                raise RuntimeError(
                    f"values[{name!r}] is no longer the tensor that was given at first; make the EMA anew"
                )

    def check_writable(self, call: str) -> None:
        """Raise if something keeps a value from being changed."""
        for leaf, name in zip(self.leaves, self.names, strict=True):
            check_writable(leaf, name, call)


class Target(NamedTuple):
    """An array that is given averages for good.

    Attributes:
        name: What errors call it.
        place: The leaf whose averages it is given.
        leaf: What can be done with it.
        local_arrays: Where it is none of the values.
    """

    name: str
    place: int
    leaf: Leaf
    local_arrays: Locals


def check_writable(leaf: Leaf, name: str, call: str) -> None:
    """Raise if something keeps one value from being changed."""
    obstacle = leaf.obstacle()
    if leaf.immutable:
        raise TypeError(f"{call} must change values[{name!r}], which {obstacle}: use `averages` or copy_to()")
    if obstacle is not None:
        raise ValueError(f"{call} must change values[{name!r}], which {obstacle}")


def by_device(
    leaves: Iterable[int], local_arrays: Sequence[Locals] | Mapping[int, Locals]
) -> list[list[int]]:
    """Return leaves whose values lie in one memory together; those in host memory come first."""
    groups: dict[int, list[int]] = {}
    for i in leaves:
        device = _arrays.device(local_arrays[i][0])
        groups.setdefault(-1 if device is None else device, []).append(i)
    return [groups[device] for device in sorted(groups)]


def _memory_of(array: Array) -> object:
    """Return what tells an array's memory from others'; nothing for arrays without elements."""
    found = _arrays.describe(array)
    return (found.address, found.shape, found.strides, found.dtype) if found.size else None
