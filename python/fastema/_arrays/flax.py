"""Variables of flax' NNX: each assignment puts another array of JAX behind one."""

import sys
from collections.abc import Sequence

import numpy as np

from .._types import AnyArray
from .base import Carried, Leaf, Library, is_loaded
from .dispatch import leaf
from .jax import JaxLeaf, JaxVariable
from .jax import library as jax
from .watched import Watched


class _Variable(JaxVariable):
    """A variable of a module or of a state."""

    def _read(self) -> AnyArray:
        return self._variable.get_raw_value()

    def _write(self, array: AnyArray) -> None:
        self._variable.set_raw_value(array)

    def to_library(self, arrays: Sequence[AnyArray]) -> AnyArray:
        return self._variable.replace(super().to_library(arrays))


class _CarriedVariable(Carried):
    """A variable of what is carried along, as keys of random numbers; shown as another one, as it is now."""

    value: AnyArray

    def to_library(self, arrays: Sequence[AnyArray]) -> AnyArray:  # noqa: ARG002
        return self.value.replace(self.value.get_raw_value())


class _Flax(Library):
    rebinds = True

    def owns(self, value: object) -> bool:
        return is_loaded(value, "flax.nnx", "Variable")

    def leaf(self, value: AnyArray, name: str) -> Leaf:
        native = leaf(value.get_raw_value(), name)
        if isinstance(native, Carried):
            return _CarriedVariable(value)
        return _Variable(value) if isinstance(native, JaxLeaf) else native

    def address(self, array: AnyArray) -> Watched:
        return lambda: self._view(array).ctypes.data

    def _view(self, array: AnyArray) -> np.ndarray:
        return jax.view(array.get_raw_value(), "values")


library = _Flax()


def state_of(values: object) -> object:
    """Return the state of one of NNX' modules, which holds its variables; of anything else, itself."""
    if "flax.nnx" not in sys.modules or not is_loaded(values, "flax.nnx", "Module"):
        return values
    from flax import nnx  # noqa: PLC0415 - loaded already

    return nnx.state(values)
