"""Nested values and the list of their arrays: taken apart, matched again and put together."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from .._arrays.torch import check_sharded
from .._types import Array

Nested = Any  # arrays in sequences, mappings and modules, within each other
Buffers = Literal["copy", "average", "ignore"]


class _Listed(NamedTuple):
    """A sequence: what makes it of a list, and its entries."""

    make: Callable[[list[Nested]], Nested]
    children: list["_Node"]


# None is an array; the empty tuple a value that is None, as in a JAX tree of a layer without a bias
_Node = dict[Hashable, "_Node"] | _Listed | tuple[()] | None


class Tree:
    """The shape of nested sequences, mappings and modules, and the name of each array in it.

    A module is a mapping of its parameters' names, with those of its buffers after them. No array is kept.

    Attributes:
        names: Of the arrays, in order; those of nested ones are joined by dots.
        copied: The names of buffers that are not averaged.
    """

    def __init__(self, is_array: Callable[[Nested], bool], buffers: Buffers) -> None:
        self._is_array = is_array
        self._buffers: Buffers = buffers
        self._root: _Node = ()
        self.names: list[str] = []
        self.copied: set[str] = set()

    @classmethod
    def of(
        cls, values: Nested, is_array: Callable[[Nested], bool], buffers: Buffers = "copy"
    ) -> tuple["Tree", list[Array]]:
        """Take values apart, in one walk.

        Args:
            values: No iterators, which can be gone through only once.
            is_array: Tells an array from what holds arrays.
            buffers: What happens to a module's buffers.

        Returns:
            Their shape and their arrays, in order.

        Raises:
            TypeError: Something among them is neither an array nor holds arrays.
            ValueError: Two arrays have one name.
        """
        tree = cls(is_array, buffers)
        arrays: list[Array] = []
        tree._root = tree._walk(values, "", arrays)
        if len(set(tree.names)) < len(tree.names):
            twice = next(name for name in tree.names if tree.names.count(name) > 1)
            raise ValueError(f"values must have one name each, and two of them are {twice!r}")
        return tree, arrays

    def _walk(self, values: Nested, name: str, found: list[Array]) -> _Node:
        if self._is_array(values):
            self.names.append(name or "0")
            found.append(values)
            return None
        if values is None and name:
            return ()
        if hasattr(values, "named_parameters"):
            parameters, buffers = _tensors_of(values, self._buffers)
            if self._buffers == "copy":
                self.copied.update(_joined(name, key) for key in buffers)
            values = {**parameters, **buffers}
        if isinstance(values, Mapping):
            return {key: self._walk(child, _joined(name, key), found) for key, child in values.items()}
        if not isinstance(values, Iterable) or isinstance(values, str | bytes):
            # as models of Keras and modules of TensorFlow have
            hint = ": give its variables" if hasattr(type(values), "variables") else ""
            raise TypeError(
                f"{_place(name)} must be an array, a sequence or mapping of them, or have "
                f"named_parameters(), got {type(values).__name__}{hint}"
            )
        children = [self._walk(x, _joined(name, i), found) for i, x in enumerate(values)]
        return _Listed(_maker(values), children)

    def arrays(self, values: Nested) -> list[Array]:
        """Return the arrays of these or other values of this shape, in order.

        Raises:
            ValueError: They have another shape.
        """
        found: list[Array] = []
        self._collect(self._root, values, "", found)
        return found

    def _collect(self, node: _Node, values: Nested, name: str, found: list[Array]) -> None:
        if node is None:
            found.append(values)
            return
        if not isinstance(node, dict | _Listed):
            if values is not None:
                raise ValueError(f"{_place(name)} must be None as at first, got {type(values).__name__}")
            return
        for key, child, x in self._children(node, values, name):
            if child is None:  # most are, and a call for each takes twice the time
                found.append(x)
            else:
                self._collect(child, x, _joined(name, key), found)

    def _children(
        self, node: dict[Hashable, _Node] | _Listed, values: Nested, name: str
    ) -> Iterable[tuple[Hashable, _Node, Nested]]:
        """Return the key, the node and the values of each child, where values are as the node was."""
        if isinstance(node, dict):
            if hasattr(values, "named_parameters"):
                parameters, buffers = _tensors_of(values, self._buffers)
                values = {**parameters, **buffers}
            if not isinstance(values, Mapping):
                raise ValueError(f"{_place(name)} must be a mapping, got {type(values).__name__}")
            if node.keys() != values.keys():
                missing, more = list(node.keys() - values.keys()), list(values.keys() - node.keys())
                raise ValueError(
                    f"{_place(name)} must have the names given at first; missing: {missing}, unknown: {more}"
                )
            return [(key, child, values[key]) for key, child in node.items()]
        if not isinstance(values, Iterable) or isinstance(values, Mapping) or self._is_array(values):
            raise ValueError(f"{_place(name)} must be a sequence, got {type(values).__name__}")
        children = list(values)
        if len(children) != len(node.children):
            raise ValueError(f"{_place(name)} must have {len(node.children)} entries, got {len(children)}")
        return zip(range(len(children)), node.children, children, strict=True)

    def build(self, arrays: Iterable[Array]) -> Nested:
        """Put arrays together as the values were."""
        return _built(self._root, iter(arrays))


def _built(node: _Node, arrays: Iterator[Array]) -> Nested:
    if node is None:
        return next(arrays)
    if isinstance(node, dict):
        return {key: _built(child, arrays) for key, child in node.items()}
    if isinstance(node, _Listed):
        return node.make([_built(child, arrays) for child in node.children])
    return None


def _maker(values: Iterable[Nested]) -> Callable[[list[Nested]], Nested]:
    if isinstance(values, tuple):
        make: Callable[[list[Nested]], Nested] = getattr(values, "_make", tuple)  # a named tuple stays one
        return make
    return list


def _joined(name: str, key: Hashable) -> str:
    return f"{name}.{key}" if name else str(key)


def _place(name: str) -> str:
    return f"values[{name!r}]" if name else "values"


def _tensors_of(module: Nested, buffers: Buffers) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return a module's parameters and, unless they are ignored, the buffers that its checkpoints hold."""
    check_sharded(module)
    parameters = dict(module.named_parameters())
    found: dict[str, Array] = {}
    if buffers != "ignore" and hasattr(module, "named_modules"):
        for prefix, part in module.named_modules():
            for key, buffer in getattr(part, "_buffers", {}).items():
                if buffer is not None and key not in getattr(part, "_non_persistent_buffers_set", ()):
                    found[_joined(prefix, key)] = buffer
    return parameters, found
