"""Keras' variables: each is kept by the library that Keras runs on."""

import sys
from collections.abc import Sequence

from .._types import AnyArray
from .base import Leaf, Library, is_loaded
from .dispatch import leaf
from .jax import JaxLeaf


class _OnJax(JaxLeaf):
    """A variable on JAX: each assignment puts another array behind it."""

    immutable = False

    def __init__(self, variable: AnyArray) -> None:
        super().__init__(variable._value)
        self._variable = variable

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        return super().local_arrays(self._variable._value if value is None else value)

    def assign(self, arrays: Sequence[AnyArray]) -> AnyArray:
        self._variable.assign(super().assign(arrays))
        return self._variable

    def obstacle(self) -> str | None:
        return None


class _Keras(Library):
    def owns(self, value: object) -> bool:
        return is_loaded(value, "keras", "Variable")

    def leaf(self, value: AnyArray, name: str) -> Leaf:
        if value._value is None:
            raise ValueError(f"{name} must have a value, and its model is not built")
        native = leaf(value._value, name)
        return _OnJax(value) if isinstance(native, JaxLeaf) else native


library = _Keras()


def unwrapped(values: Sequence[AnyArray]) -> Sequence[AnyArray]:
    """Return what Keras keeps behind its variables, and other values as they are."""
    if "keras" not in sys.modules:
        return values
    return [value._value if library.owns(value) else value for value in values]
