"""How the arrays of each library are read, written and shown: one class for each kind.

A value can lie in several local arrays (a sharded one will); those here lie in one each. Everything that
depends on a library is in these classes, and none of it is imported before the user has.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from . import _memory
from ._arrays import as_view, is_array


def _cast(array: Any, dtype: Any) -> np.ndarray:
    """Return a copy in host memory, of another type."""
    copy = np.empty_like(_memory.face(array), dtype)
    _memory.write(array, copy)
    return copy


class Leaf(ABC):
    """One of the user's values.

    Attributes:
        fixed: Whether its parts stay the same memory from update to update, so that they are paired once.
        immutable: Whether it never changes: then new values are passed to each update.
    """

    fixed = True
    immutable = False

    @abstractmethod
    def parts(self, value: Any = None) -> list[Any]:
        """Return the local arrays to read, as what `Pairs` takes; nothing is copied.

        Args:
            value: Another value of this kind. None: this one.
        """

    def in_place(self) -> bool:
        """Tell whether what is written into the parts is the value's."""
        return False

    def obstacle(self) -> str | None:
        """Return what keeps the value from being changed, if anything does."""
        return None

    @abstractmethod
    def assign(self, arrays: Sequence[Any]) -> Any:
        """Write arrays, one for each part, cast to the value's type; they are not kept.

        Returns:
            What holds them now: the value, or a new one of an immutable kind.
        """

    @abstractmethod
    def shown(self, arrays: Sequence[Any]) -> Any:
        """Return an average as the library has it; live where the library's arrays can change."""

    def written(self) -> None:  # noqa: B027 - most libraries need not know
        """Take notice that the parts were written behind the library's back."""


class _NumPy(Leaf):
    """NumPy arrays, and views of what exports memory by DLPack."""

    def __init__(self, given: Any, array: np.ndarray) -> None:
        self._given, self._array = given, array

    def parts(self, value: Any = None) -> list[Any]:
        return [self._array if value is None else value]

    def obstacle(self) -> str | None:
        return None if self._array.flags.writeable else "is read-only"

    def in_place(self) -> bool:
        return True

    def assign(self, arrays: Sequence[Any]) -> Any:
        _memory.write(arrays[0], self._array)
        return self._given

    def shown(self, arrays: Sequence[Any]) -> Any:
        return arrays[0]


class _OnCuda(Leaf):
    """Arrays on a CUDA device that are not torch's: CuPy's, and others with `__cuda_array_interface__`."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def parts(self, value: Any = None) -> list[Any]:
        return [self._array if value is None else value]

    def obstacle(self) -> str | None:
        return None if _memory.face(self._array).flags.writeable else "is read-only"

    def in_place(self) -> bool:
        return True

    def assign(self, arrays: Sequence[Any]) -> Any:
        _memory.write(arrays[0], self._array)
        return self._array

    def shown(self, arrays: Sequence[Any]) -> Any:
        return arrays[0]


class _Torch(Leaf):
    """Tensors and parameters in CPU memory or on a CUDA device, with a gradient or without."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def parts(self, value: Any = None) -> list[Any]:
        return [self._tensor if value is None else _behind(value)]

    def in_place(self) -> bool:
        return True

    def assign(self, arrays: Sequence[Any]) -> Any:
        _memory.write(arrays[0], _memory.view(self._tensor, "values"))
        self.written()
        return self._tensor

    def shown(self, arrays: Sequence[Any]) -> Any:
        import torch  # noqa: PLC0415 - loaded already: the value is one of its tensors

        if not isinstance(arrays[0], np.ndarray):
            return arrays[0].detach()
        if arrays[0].dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(arrays[0].view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(arrays[0])

    def written(self) -> None:
        # or a backward pass through what was there before would be wrong, and say nothing
        import torch  # noqa: PLC0415

        if not self._tensor.is_inference():
            torch.autograd.graph.increment_version(self._tensor)


class _Jax(Leaf):
    """JAX arrays in CPU memory. Of the first only the type and the place are kept, not the memory."""

    fixed = False
    immutable = True

    def __init__(self, array: Any) -> None:
        as_view(array, "values")  # says why, where its memory cannot be viewed
        self._dtype, self._sharding = array.dtype, array.sharding

    def parts(self, value: Any = None) -> list[Any]:
        if value is None:
            raise ValueError("values must be given: JAX arrays do not change")
        try:
            return [np.asarray(value)]
        except TypeError:  # of JAX's tracers
            raise RuntimeError("values of JAX arrays can be read only outside of jax.jit") from None
        except RuntimeError as error:
            raise RuntimeError(
                f"values must outlive their averaging, and one was donated to a step before: {error}"
            ) from None

    def obstacle(self) -> str | None:
        return "is a JAX array, which never changes"

    def assign(self, arrays: Sequence[Any]) -> Any:
        return self.shown([_cast(arrays[0], self._dtype)])

    def shown(self, arrays: Sequence[Any]) -> Any:
        import jax  # noqa: PLC0415 - loaded already: the value is one of its arrays

        return jax.device_put(arrays[0].copy(), self._sharding)  # which may keep the memory it is given


def _tensorflow_outside_of_graphs() -> Any:
    import tensorflow as tf  # noqa: PLC0415 - loaded already: a value is one of its variables

    if not tf.executing_eagerly():
        raise RuntimeError("values of tf.Variables can be read only outside of tf.function")
    return tf


class _TensorFlow(Leaf):
    """tf.Variables. Their buffers may be shared, so nothing is written into one; and they move."""

    fixed = False

    def __init__(self, variable: Any) -> None:
        self.variable = variable

    def parts(self, value: Any = None) -> list[Any]:
        tf = _tensorflow_outside_of_graphs()
        tensor = tf.convert_to_tensor(self.variable if value is None else value)
        if tensor.dtype == tf.bfloat16:
            return [np.from_dlpack(tf.bitcast(tensor, tf.uint16)).view(ml_dtypes.bfloat16)]
        return [np.from_dlpack(tensor)]

    def assign(self, arrays: Sequence[Any]) -> Any:
        # a copy: TensorFlow may keep the memory it is given
        self.variable.assign(_cast(arrays[0], self.variable.dtype.as_numpy_dtype))
        return self.variable

    def shown(self, arrays: Sequence[Any]) -> Any:
        import tensorflow as tf  # noqa: PLC0415

        return tf.convert_to_tensor(arrays[0].copy())


class Reader:
    """Reads many values at once, TensorFlow's variables by a function of their own: by one each takes 40 us.

    Args:
        leaves: Whose values.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._leaves = leaves
        self._variables = {i: leaf.variable for i, leaf in enumerate(leaves) if isinstance(leaf, _TensorFlow)}
        self._function: Any = None

    def parts(self, values: Sequence[Any]) -> list[list[Any]]:
        """Return what `Leaf.parts` does, of each leaf and value; None: of the leaf's own."""
        tensors = {}
        if len(self._variables) > 1 and all(values[i] is None for i in self._variables):
            tensors = dict(zip(self._variables, self._read_variables(), strict=True))
        return [leaf.parts(tensors.get(i, values[i])) for i, leaf in enumerate(self._leaves)]

    def _read_variables(self) -> list[Any]:
        tf = _tensorflow_outside_of_graphs()

        def read() -> list[Any]:
            return [tf.convert_to_tensor(variable) for variable in self._variables.values()]

        if self._function is None:
            self._function = tf.function(read, autograph=False).get_concrete_function()
        return list(self._function())


class _KerasOnJax(_Jax):
    """keras.Variables on JAX: each assignment puts another array behind them."""

    immutable = False

    def __init__(self, variable: Any) -> None:
        super().__init__(variable._value)
        self._variable = variable

    def parts(self, value: Any = None) -> list[Any]:
        return super().parts(_behind(self._variable if value is None else value))

    def assign(self, arrays: Sequence[Any]) -> Any:
        self._variable.assign(super().assign(arrays))
        return self._variable

    def obstacle(self) -> str | None:
        return None


def _behind(value: Any) -> Any:
    """Return what a framework keeps behind a keras.Variable, or the value itself."""
    return value._value if _is_keras(value) else value


def _loaded(value: Any, module: str, name: str) -> bool:
    """Tell whether a value is of a class of a module that the user has imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)


def _is_keras(value: Any) -> bool:
    return _loaded(value, "keras", "Variable")


def _is_tensorflow(value: Any) -> bool:
    return _loaded(value, "tensorflow", "Variable")


def is_leaf(value: Any) -> bool:
    """Tell one of the user's arrays or variables from what holds them."""
    return is_array(value) or _is_keras(value) or _is_tensorflow(value)


def leaf(value: Any, name: str) -> Leaf:
    """Return a value with what its kind can do.

    Args:
        value: What `is_leaf` says yes to.
        name: What errors call it.

    Raises:
        TypeError: Its memory cannot be viewed.
    """
    if _is_keras(value) and value._value is None:
        raise ValueError(f"{name} must have a value, and its model is not built")
    if isinstance(value, np.ndarray):
        return _NumPy(value, value)
    native = _behind(value)
    if _loaded(native, "torch", "Tensor"):
        _memory.view(native, name)
        return _Torch(native)
    if _is_tensorflow(native):
        if not (native.dtype.is_floating or native.dtype.is_integer or native.dtype.is_bool):
            raise TypeError(f"{name} must be of numbers, got {native.dtype.name}")  # DLPack of texts aborts
        return _TensorFlow(native)
    if _loaded(native, "jax", "Array"):
        as_view(native, name)
        return _KerasOnJax(value) if native is not value else _Jax(value)
    view = _memory.view(value, name)
    return _NumPy(value, view) if isinstance(view, np.ndarray) else _OnCuda(view)
