"""What a user's values are made of: lists, mappings and modules, taken apart into arrays and put together."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from .._leaves import check_sharded

Buffers = Literal["copy", "average", "ignore"]
_Node = Any  # None: an array; a dict of nodes; (what makes it of a list, list of nodes); or nothing:
_NOTHING = ()  # where a value is None, as in a JAX tree of a layer without a bias


class Tree:
    """The shape of nested sequences, mappings and modules, and the name of each array in it.

    A module is a mapping of its parameters' names, with those of its buffers after them.

    Args:
        values: What to take apart; no iterators, which can be gone through only once.
        is_array: Tells an array from what holds arrays.
        buffers: What happens to a module's buffers.

    Attributes:
        names: Of the arrays, in order; those of nested ones are joined by dots.
        copied: The names of buffers that are not averaged.
    """

    def __init__(self, values: Any, is_array: Callable[[Any], bool], buffers: Buffers) -> None:
        self._is_array = is_array
        self._buffers: Buffers = buffers
        self.names: list[str] = []
        self.copied: set[str] = set()
        self._root = self._walk(values, "")
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"values must have one name each, and two of them are {twice!r}")

    def _walk(self, values: Any, name: str) -> _Node:
        if self._is_array(values):
            self.names.append(name or "0")
            return None
        if values is None and name:
            return _NOTHING
        if hasattr(values, "named_parameters"):
            parameters, buffers = _tensors_of(values, self._buffers)
            if self._buffers == "copy":
                self.copied.update(_joined(name, key) for key in buffers)
            values = {**parameters, **buffers}
        if isinstance(values, Mapping):
            return {key: self._walk(child, _joined(name, key)) for key, child in values.items()}
        if not isinstance(values, Iterable) or isinstance(values, str | bytes):
            # as models of Keras and modules of TensorFlow have
            hint = ": give its variables" if hasattr(type(values), "variables") else ""
            raise TypeError(
                f"{_place(name)} must be an array, a sequence or mapping of them, or have "
                f"named_parameters(), got {type(values).__name__}{hint}"
            )
        return _maker(values), [self._walk(x, _joined(name, i)) for i, x in enumerate(values)]

    def arrays(self, values: Any) -> list[Any]:
        """Return the arrays of these or other values of this shape, in order.

        Raises:
            ValueError: They have another shape.
        """
        found: list[Any] = []
        self._collect(self._root, values, "", found)
        return found

    def _collect(self, node: _Node, values: Any, name: str, found: list[Any]) -> None:
        if node is None:
            found.append(values)
            return
        if node is _NOTHING:
            if values is not None:
                raise ValueError(f"{_place(name)} must be None as at first, got {type(values).__name__}")
            return
        for key, child, x in self._children(node, values, name):
            if child is None:  # most are, and a call for each takes twice the time
                found.append(x)
            else:
                self._collect(child, x, _joined(name, key), found)

    def _children(self, node: _Node, values: Any, name: str) -> Iterable[tuple[Any, _Node, Any]]:
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
        if len(children) != len(node[1]):
            raise ValueError(f"{_place(name)} must have {len(node[1])} entries, got {len(children)}")
        return zip(range(len(children)), node[1], children, strict=True)

    def build(self, arrays: Iterable[Any]) -> Any:
        """Put arrays together as the values were."""
        return _built(self._root, iter(arrays))


def _built(node: _Node, arrays: Any) -> Any:
    if node is None:
        return next(arrays)
    if node is _NOTHING:
        return None
    if isinstance(node, dict):
        return {key: _built(child, arrays) for key, child in node.items()}
    make, children = node
    return make([_built(child, arrays) for child in children])


def _maker(values: Any) -> Callable[[list[Any]], Any]:
    if isinstance(values, tuple):
        make: Callable[[list[Any]], Any] = getattr(values, "_make", tuple)  # a named tuple stays one
        return make
    return list


def _joined(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)


def _place(name: str) -> str:
    return f"values[{name!r}]" if name else "values"


def _tensors_of(module: Any, buffers: Buffers) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a module's parameters and, unless they are ignored, the buffers that its checkpoints hold."""
    check_sharded(module)
    parameters = dict(module.named_parameters())
    found: dict[str, Any] = {}
    if buffers != "ignore" and hasattr(module, "named_modules"):
        for prefix, part in module.named_modules():
            for key, buffer in getattr(part, "_buffers", {}).items():
                if buffer is not None and key not in getattr(part, "_non_persistent_buffers_set", ()):
                    found[_joined(prefix, key)] = buffer
    return parameters, found
