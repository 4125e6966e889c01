"""TensorFlow's variables, and how many of them are read at once."""

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from .._types import AnyArray
from .base import Leaf, Library, is_loaded, unmasked
from .dispatch import cast
from .keras import unwrapped


def _outside_of_graphs() -> AnyArray:
    import tensorflow as tf  # noqa: PLC0415 - loaded already: a value is one of its variables

    if not tf.executing_eagerly():
        raise RuntimeError("values of tf.Variables can be read only outside of tf.function")
    return tf


class VariableLeaf(Leaf):
    """A tf.Variable. Its buffer may be shared, so nothing is written into it; and it moves."""

    stable = False

    def __init__(self, variable: AnyArray) -> None:
        self.variable = variable

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        tf = _outside_of_graphs()
        value = unmasked(value, "values") if isinstance(value, np.ndarray) else value
        tensor = tf.convert_to_tensor(self.variable if value is None else value)
        if tensor.dtype == tf.bfloat16:
            return [np.from_dlpack(tf.bitcast(tensor, tf.uint16)).view(ml_dtypes.bfloat16)]
        return [np.from_dlpack(tensor)]

    def assign(self, arrays: Sequence[AnyArray]) -> AnyArray:
        # a copy: TensorFlow may keep the memory it is given
        self.variable.assign(cast(arrays[0], np.dtype(self.variable.dtype.as_numpy_dtype)))
        return self.variable

    def to_library(self, arrays: Sequence[AnyArray]) -> AnyArray:
        import tensorflow as tf  # noqa: PLC0415

        return tf.convert_to_tensor(arrays[0].copy())


class _TensorFlow(Library):
    def owns(self, value: object) -> bool:
        return is_loaded(value, "tensorflow", "Variable")

    def leaf(self, value: AnyArray, name: str) -> Leaf:
        if not (value.dtype.is_floating or value.dtype.is_integer or value.dtype.is_bool):
            raise TypeError(f"{name} must be of numbers, got {value.dtype.name}")  # DLPack of texts aborts
        return VariableLeaf(value)


library = _TensorFlow()


class Reader:
    """Reads many values at once, TensorFlow's variables by a function of their own: by one each takes 40 us.

    Args:
        leaves: Whose values.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._leaves = leaves
        self._variables = {i: x.variable for i, x in enumerate(leaves) if isinstance(x, VariableLeaf)}
        self._function: Callable[[], list[AnyArray]] | None = None

    def local_arrays(self, values: Sequence[AnyArray]) -> list[list[AnyArray]]:
        """Return what `Leaf.local_arrays` does, of each leaf and value; None: of the leaf's own."""
        values = unwrapped(values)
        tensors = {}
        if len(self._variables) > 1 and all(values[i] is None for i in self._variables):
            tensors = dict(zip(self._variables, self._read_variables(), strict=True))
        return [leaf.local_arrays(tensors.get(i, values[i])) for i, leaf in enumerate(self._leaves)]

    def _read_variables(self) -> list[AnyArray]:
        tf = _outside_of_graphs()

        def read() -> list[AnyArray]:
            return [tf.convert_to_tensor(variable) for variable in self._variables.values()]

        if self._function is None:
            self._function = tf.function(read, autograph=False).get_concrete_function()
        return list(self._function())
