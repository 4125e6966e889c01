"""Nested values and the list of their arrays: taken apart, matched again and put together."""

import numbers
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import numpy as np

from .._arrays import flax
from .._arrays.jax import Registered, registered
from .._arrays.modules import members_of
from .._types import Array

Nested = Any  # arrays in sequences, mappings and modules, within each other
Buffers = Literal["copy", "average", "ignore"]
Only = Callable[[str, Array], bool] | str | Sequence[str]


class _Alone(Enum):
    """What holds nothing else."""

    LEAF = 0  # an array, or something that is carried along
    NONE = 1  # as in a JAX tree of a layer without a bias
    OUT = 2  # an array that was not chosen


class _Mapped(NamedTuple):
    """A mapping or module: what makes it of a dictionary, and its entries."""

    make: Callable[[dict[Hashable, Nested]], Nested]
    children: dict[Hashable, "_Node"]


class _Listed(NamedTuple):
    """A sequence: what makes it of a list, and its entries."""

    make: Callable[[list[Nested]], Nested]
    children: list["_Node"]


class _Tree(NamedTuple):
    """What JAX knows as a tree, as dataclasses and modules of flax and equinox."""

    kind: type
    taken: Registered
    children: list["_Node"]


_Node = _Mapped | _Listed | _Tree | _Alone


class Selection:
    """Which of the arrays that are given are meant.

    Args:
        buffers: What happens to a module's buffers.
        only: A function of the name and the array, or patterns of names. None: all are.

    Attributes:
        buffers: As given.

    Raises:
        TypeError: `only` is nothing of the kind.
    """

    def __init__(self, buffers: Buffers, only: Only | None) -> None:
        self.buffers: Buffers = buffers
        self._chooses = only if callable(only) else None
        self._patterns: Sequence[str] = [only] if isinstance(only, str) else []
        if only is not None and not callable(only) and not isinstance(only, str):
            self._patterns = list(only)
            if not self._patterns or not all(isinstance(pattern, str) for pattern in self._patterns):
                raise TypeError(
                    f"only must be a function of name and array, or patterns of names, got {only!r}"
                )

    def has(self, name: str, array: Array) -> bool:
        """Tell whether an array is meant."""
        if self._chooses is not None:
            return bool(self._chooses(name, array))
        return not self._patterns or any(fnmatchcase(name, pattern) for pattern in self._patterns)

    def check(self, names: Sequence[str], left_out: Sequence[str]) -> None:
        """Raise if a pattern means nothing, or all that was given is left out.

        Raises:
            ValueError: So it is.
        """
        for pattern in self._patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"only must name values, and {pattern!r} names none of {sorted([*names, *left_out])}"
                )
        if not names and left_out:
            raise ValueError(f"only must choose an array or more, and leaves out all of {sorted(left_out)}")


class Tree:
    """The shape of nested sequences, mappings, modules and JAX' trees, and the name of each array in it.

    A module is a mapping of its parameters' names, with those of its buffers after them: the names of its
    state dict, without what wrappers add to them. No array is kept.

    Attributes:
        names: Of the arrays and of what is carried along, in order; those of nested ones are joined by dots.
        constants: The names of what is no array, and is carried along.
        buffers: The names of a module's buffers.
        containers: What holds the arrays and may hold others later. None: something does that cannot be
            watched.
        buffers_of: Of each part of a module its buffers, and the names of those that no checkpoint holds.
    """

    def __init__(self, is_array: Callable[[Nested], bool], selection: Selection) -> None:
        self._is_array = is_array
        self._selection = selection
        self._root: _Node = _Alone.NONE
        self.names: list[str] = []
        self.constants: set[str] = set()
        self.buffers: set[str] = set()
        self.containers: list[dict[Any, Any] | list[Any]] | None = []
        self.buffers_of: list[tuple[dict[str, Array], set[str]]] = []

    @classmethod
    def of(
        cls, values: Nested, is_array: Callable[[Nested], bool], selection: Selection
    ) -> tuple["Tree", list[Array]]:
        """Take values apart, in one walk.

        Args:
            values: No iterators, which can be gone through only once.
            is_array: Tells an array from what holds arrays.
            selection: Which of them are meant.

        Returns:
            Their shape and their arrays, in order.

        Raises:
            TypeError: Something among them is neither an array nor holds arrays.
            ValueError: Two arrays have one name, or there are none.
        """
        tree = cls(is_array, selection)
        arrays: list[Array] = []
        left_out: list[str] = []
        tree._root = tree._walk(values, "", arrays, left_out)
        if len(set(tree.names)) < len(tree.names):
            twice = next(name for name in tree.names if tree.names.count(name) > 1)
            raise ValueError(f"values must have one name each, and two of them are {twice!r}")
        chosen = [name for name in tree.names if name not in tree.constants]
        selection.check(chosen, left_out)
        if not chosen and tree.constants:
            constant = type(arrays[0]).__name__
            raise TypeError(
                f"values[{tree.names[0]!r}] must be an array, got {constant}, and there is no other"
            )
        if not chosen:
            raise ValueError(
                f"values must hold an array or more, got none in {type(values).__name__} "
                "(an iterator gives its arrays only once)"
            )
        return tree, arrays

    def _walk(
        self, values: Nested, name: str, found: list[Array], left_out: list[str], *, in_tree: bool = False
    ) -> _Node:
        if self._is_array(values):
            return self._chosen(values, name, found, left_out)
        if values is None and name:
            return _Alone.NONE
        if name and isinstance(values, numbers.Number | np.generic):
            return self._constant(values, name, found)
        values = flax.state_of(values)
        if hasattr(values, "named_parameters"):
            return self._walk_module(values, name, found, left_out)
        taken = None if values is None or isinstance(values, dict | list | tuple) else registered(values)
        if taken is not None or (isinstance(values, Iterable) and not isinstance(values, str | bytes)):
            in_tree = in_tree or taken is not None
            return self._walk_container(values, taken, name, found, left_out, in_tree=in_tree)
        if in_tree:
            return self._constant(values, name, found)
        raise TypeError(
            f"{_place(name)} must be an array, a sequence or mapping of them, or have "
            f"named_parameters(), got {type(values).__name__}{_cure(values)}"
        )

    def _walk_container(
        self,
        values: Nested,
        taken: Registered | None,
        name: str,
        found: list[Array],
        left_out: list[str],
        *,
        in_tree: bool,
    ) -> _Node:
        self._watch(values)
        keyed: Iterable[tuple[Hashable, Nested]]
        if taken is not None:
            keyed = zip(taken.keys, taken.children, strict=True)
        else:
            keyed = values.items() if isinstance(values, Mapping) else enumerate(values)
        children = [
            (key, self._walk(x, _joined(name, key), found, left_out, in_tree=in_tree)) for key, x in keyed
        ]
        if taken is not None:
            return _Tree(type(values), taken._replace(children=()), [child for _, child in children])
        if isinstance(values, Mapping):
            return _Mapped(_maker_of_mapping(values), dict(children))
        return _Listed(_maker(values), [child for _, child in children])

    def _walk_module(self, module: Nested, name: str, found: list[Array], left_out: list[str]) -> _Node:
        members = members_of(module, buffers=self._selection.buffers != "ignore")
        if members.containers is None:
            self.containers = None
        elif self.containers is not None:
            self.containers += members.containers
        self.buffers_of += members.buffers_of
        self.buffers.update(_joined(name, key) for key in members.buffers)
        tensors = {**members.parameters, **members.buffers}
        return _Mapped(
            dict,
            {key: self._chosen(x, _joined(name, key), found, left_out) for key, x in tensors.items()},
        )

    def _chosen(self, array: Array, name: str, found: list[Array], left_out: list[str]) -> _Node:
        if not self._selection.has(name or "0", array):
            left_out.append(name)
            return _Alone.OUT
        self.names.append(name or "0")
        found.append(array)
        return _Alone.LEAF

    def _constant(self, value: Nested, name: str, found: list[Array]) -> _Node:
        self.names.append(name)
        self.constants.add(name)
        found.append(value)
        return _Alone.LEAF

    def _watch(self, container: Nested) -> None:
        if isinstance(container, tuple):
            return  # it never holds others
        if not isinstance(container, dict | list):
            self.containers = None
        elif self.containers is not None:
            self.containers.append(container)

    def arrays(self, values: Nested) -> list[Array]:
        """Return the arrays of these or other values of this shape, in order.

        Raises:
            ValueError: They have another shape.
        """
        found: list[Array] = []
        self._collect(self._root, values, "", found)
        return found

    def _collect(self, node: _Node, values: Nested, name: str, found: list[Array]) -> None:
        if isinstance(node, _Alone):
            if node is _Alone.LEAF:
                found.append(values)
            elif node is _Alone.NONE and values is not None:
                raise ValueError(f"{_place(name)} must be None as at first, got {type(values).__name__}")
            return
        for key, child, x in self._children(node, values, name):
            if child is _Alone.LEAF:  # most are, and a call for each takes twice the time
                if x is None:
                    raise ValueError(f"{_place(_joined(name, key))} must be an array as at first, got None")
                found.append(x)
            else:
                self._collect(child, x, _joined(name, key), found)

    def _children(
        self, node: _Mapped | _Listed | _Tree, values: Nested, name: str
    ) -> Iterable[tuple[Hashable, _Node, Nested]]:
        """Return the key, the node and the values of each child, where values are as the node was."""
        values = flax.state_of(values)
        if isinstance(node, _Tree):
            taken = registered(values) if isinstance(values, node.kind) else None
            if taken is None or taken.keys != node.taken.keys:
                raise ValueError(
                    f"{_place(name)} must be a {node.kind.__name__} of the same parts as at first"
                )
            return zip(node.taken.keys, node.children, taken.children, strict=True)
        if isinstance(node, _Mapped):
            return self._entries(node, values, name)
        if not isinstance(values, Iterable) or isinstance(values, Mapping) or self._is_array(values):
            raise ValueError(f"{_place(name)} must be a sequence, got {type(values).__name__}")
        children = list(values)
        if len(children) != len(node.children):
            raise ValueError(f"{_place(name)} must have {len(node.children)} entries, got {len(children)}")
        return zip(range(len(children)), node.children, children, strict=True)

    def _entries(self, node: _Mapped, values: Nested, name: str) -> Iterable[tuple[Hashable, _Node, Nested]]:
        if hasattr(values, "named_parameters"):
            members = members_of(values, buffers=self._selection.buffers != "ignore")
            values = {**members.parameters, **members.buffers}
        if not isinstance(values, Mapping):
            raise ValueError(f"{_place(name)} must be a mapping, got {type(values).__name__}")
        children = node.children
        if children.keys() != values.keys():
            missing = [
                key for key, child in children.items() if key not in values and child is not _Alone.OUT
            ]
            if missing or (more := list(values.keys() - children.keys())):
                raise ValueError(
                    f"{_place(name)} must have the names given at first; missing: {missing}, "
                    f"unknown: {[] if missing else more}"
                )
        return [(key, child, values[key]) for key, child in children.items() if child is not _Alone.OUT]

    def build(self, arrays: Iterable[Array]) -> Nested:
        """Put arrays together as the values were, without those that were not chosen."""
        return _built(self._root, iter(arrays))


def _built(node: _Node, arrays: Iterator[Array]) -> Nested:
    if isinstance(node, _Alone):
        return next(arrays) if node is _Alone.LEAF else None
    if isinstance(node, _Mapped):
        return node.make(
            {key: _built(child, arrays) for key, child in node.children.items() if child is not _Alone.OUT}
        )
    children = [_built(child, arrays) for child in node.children]
    return node.taken.build(children) if isinstance(node, _Tree) else node.make(children)


def _maker(values: Iterable[Nested]) -> Callable[[list[Nested]], Nested]:
    if isinstance(values, tuple):
        make: Callable[[list[Nested]], Nested] = getattr(values, "_make", tuple)  # a named tuple stays one
        return make
    return list


def _maker_of_mapping(values: Mapping[Any, Nested]) -> Callable[[dict[Hashable, Nested]], Nested]:
    if isinstance(values, OrderedDict):
        return OrderedDict
    if isinstance(values, defaultdict):
        factory = values.default_factory
        return lambda entries: defaultdict(factory, entries)
    return dict


def _joined(name: str, key: Hashable) -> str:
    return f"{name}.{key}" if name else str(key)


def _place(name: str) -> str:
    return f"values[{name!r}]" if name else "values"


def _cure(values: object) -> str:
    if hasattr(type(values), "variables"):  # as models of Keras and modules of TensorFlow have
        return ": give its variables"
    return ": give its arrays in a dictionary, as those of jax.tree.leaves(values)"
