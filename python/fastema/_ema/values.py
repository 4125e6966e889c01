"""The user's values: which arrays they are, by which names, and where each of them lies by now."""

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .. import _leaves, _memory
from .tree import Array, Arrays, Buffers, Nested, Tree


class Values:
    """The arrays that were given to be averaged, each once, however often it was given (tied weights).

    Nothing is kept of arrays that never change (JAX's), since every step of training leaves others.

    Attributes:
        leaves: The distinct arrays.
        names: Of each leaf, the first one that it was given under.
        local_names: Of each leaf, the names of its local arrays: several only where it is sharded.
        copied: The names of a module's buffers that are not to be averaged.
    """

    def __init__(self, tree: Tree, module: Nested | None) -> None:
        self._tree = tree
        self._module = module
        self.copied = tree.copied
        self.leaves: list[_leaves.Leaf] = []
        self.names: list[str] = []
        self.local_names: list[list[str]] = []
        self._given: Arrays = []  # of each value in the tree the array, or None if it never changes
        self._places: list[int] = []  # of each value in the tree, its leaf
        self._firsts: list[int] = []  # of each leaf, its first value in the tree
        self._reader = _leaves.Reader(self.leaves)
        self._moving: list[_leaves.Leaf] = []

    @classmethod
    def of(cls, given: Nested, buffers: Buffers, *, unchanging: bool) -> tuple["Values", list[Arrays]]:
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
        tree, arrays = Tree.of(given, _leaves.is_leaf, buffers)
        values = cls(tree, given if hasattr(given, "named_parameters") else None)
        return values, values._take(arrays, unchanging)

    def _take(self, arrays: Arrays, unchanging: bool) -> list[Arrays]:
        local_arrays: list[Arrays] = []
        places: dict[object, int] = {}
        for array, name in zip(arrays, self._tree.names, strict=True):
            leaf = _leaves.leaf(array, f"values[{name!r}]")
            if unchanging and not leaf.immutable:
                raise ValueError(
                    "background must be False unless values cannot change meanwhile, as JAX arrays; "
                    f"values[{name!r}] is of {type(array).__name__}"
                )
            local = leaf.parts(array if leaf.immutable else None)
            # an immutable array that is given twice may well become two
            key = id(leaf) if leaf.immutable else _memory_of(local[0]) if leaf.fixed else id(array)
            place = places.setdefault(key or id(array), len(self.leaves))
            if place == len(self.leaves):
                self.leaves.append(leaf)
                self.names.append(name)
                several = len(local) > 1
                self.local_names.append([f"{name}/{j}" for j in range(len(local))] if several else [name])
                self._firsts.append(len(self._places))
                local_arrays.append(local)
            self._places.append(place)
            self._given.append(None if leaf.immutable else array)
        self._reader = _leaves.Reader(self.leaves)
        self._moving = [leaf for leaf in self.leaves if leaf.followed]
        return local_arrays

    # --- shape ------------------------------------------------------------------------------------

    def matched(self, other: Nested) -> Arrays:
        """Return the arrays of other values of this shape, one for each that was given, in order.

        Raises:
            ValueError: They have another shape.
        """
        return self._tree.arrays(other)

    def targets(self, others: Arrays | None = None) -> list["Target"]:
        """Return what averages are written into for good: the values, or others in their order.

        Raises:
            TypeError: One of the others is no array, or its memory cannot be viewed.
            ValueError: One is sharded otherwise than the value.
        """
        if others is None:
            given = zip(self._tree.names, self._places, strict=True)
            return [Target(name, place, self.leaves[place], []) for name, place in given]
        targets = []
        for array, name, place in zip(others, self._tree.names, self._places, strict=True):
            leaf = _leaves.leaf(array, f"values[{name!r}]")
            if leaf.shards != self.leaves[place].shards:
                raise ValueError(f"values[{name!r}] must be sharded, or whole, as it was at first")
            targets.append(Target(name, place, leaf, _viewed(leaf.parts(array), name)))
        return targets

    def by_name(self, arrays: Mapping[int, Arrays]) -> dict[str, Array]:
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

    def are_given(self, arrays: Arrays) -> bool:
        """Tell whether arrays in order are those that were given at first."""
        return all(map(operator.is_, arrays, self._given))

    def sources(self, arrays: Arrays | None) -> Arrays:
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

    def local_arrays(self, sources: Arrays | None = None) -> list[Arrays]:
        """Return the local arrays of each leaf, read from what `sources` returned; None: from its own."""
        if sources is None:
            return [leaf.parts() for leaf in self.leaves]
        return self._reader.parts(sources)

    def views(self, i: int, local_arrays: Arrays | None = None) -> Arrays:
        """Return local arrays of a leaf as what is worked on where they lie; None: its own."""
        found = self.leaves[i].parts() if local_arrays is None else local_arrays
        return _viewed(found, self.names[i])

    @property
    def are_stable(self) -> bool:
        """Whether the values' memory is paired once, and not read anew at each update."""
        return all(leaf.fixed for leaf in self.leaves)

    def addresses(self) -> list[object]:
        """Return where those stable values lie that can be given other memory all the same (FSDP's)."""
        return [leaf.place() for leaf in self._moving]

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

    def named(self, error: Exception, leaves: Sequence[int]) -> Exception:
        """Return an error of the core, which knows numbers in a list, with the names of these leaves."""
        names = [self.names[i] for i in leaves for _ in self.local_names[i]]

        def named(found: re.Match[str]) -> str:
            return f"{found[1]}[{names[int(found[2])]!r}]"

        numbers = r"\b((?:averages|carries)(?:\[\d+\](?=\[))?|values)\[(\d+)\]"
        return type(error)(re.sub(numbers, named, str(error)))


class Target(NamedTuple):
    """An array that is given averages for good.

    Attributes:
        name: What errors call it.
        place: The leaf whose averages it is given.
        leaf: What can be done with it.
        views: Its local arrays, where it is none of the values.
    """

    name: str
    place: int
    leaf: _leaves.Leaf
    views: Arrays


def check_writable(leaf: _leaves.Leaf, name: str, call: str) -> None:
    """Raise if something keeps one value from being changed."""
    obstacle = leaf.obstacle()
    if leaf.immutable:
        raise TypeError(f"{call} must change values[{name!r}], which {obstacle}: use `averages` or copy_to()")
    if obstacle is not None:
        raise ValueError(f"{call} must change values[{name!r}], which {obstacle}")


def by_device(leaves: Iterable[int], views: Mapping[int, Arrays]) -> list[list[int]]:
    """Return leaves whose values lie in one memory together; those in host memory come first."""
    groups: dict[int, list[int]] = {}
    for i in leaves:
        device = _memory.device(views[i][0])
        groups.setdefault(-1 if device is None else device, []).append(i)
    return [groups[device] for device in sorted(groups)]


def _viewed(local_arrays: Arrays, name: str) -> Arrays:
    return [x if isinstance(x, np.ndarray) else _memory.view(x, f"values[{name!r}]") for x in local_arrays]


def _memory_of(array: Array) -> object:
    """Return what tells an array's memory from others'; nothing for arrays without elements."""
    face = _memory.face(_memory.view(array, "values"))
    return (face.ctypes.data, face.shape, face.strides, face.dtype) if face.size else None
