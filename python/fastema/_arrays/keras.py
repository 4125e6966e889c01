"""Keras' variables: each is kept by the library that Keras runs on."""

import sys
from collections.abc import Sequence

from .._types import AnyArray
from .base import Leaf, Library, is_loaded
from .dispatch import leaf
from .jax import JaxLeaf, JaxVariable


class _OnJax(JaxVariable):
    """A variable on JAX."""

    def _read(self) -> AnyArray:
        return self._variable._value

    def _write(self, array: AnyArray) -> None:
        self._variable.assign(array)


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
