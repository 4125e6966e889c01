"""How the arrays of each library are read, written and shown: one class for each kind.

A value can lie in several local arrays, as one that is sharded over devices does, and these need not be all
of it. Everything that depends on a library is in these classes, and none of it is imported before the user
has.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from . import _memory
from ._arrays import as_view, is_array
from ._arrays.shards import Block, Shards


def _cast(array: Any, dtype: Any) -> np.ndarray:
    """Return a copy in host memory, of another type."""
    copy = np.empty_like(_memory.face(array), dtype)
    _memory.write(array, copy)
    return copy


class Leaf(ABC):
    """One of the user's values.

    Attributes:
        fixed: Whether its parts stay the same memory from update to update, so that they are paired once.
        followed: Whether they may be other memory after all, as `place` tells, and are then paired anew.
        immutable: Whether it never changes: then new values are passed to each update.
        shards: How it is spread over processes or devices; None: its one part is all of it.
    """

    fixed = True
    followed = False
    immutable = False
    shards: Shards | None = None

    @abstractmethod
    def parts(self, value: Any = None) -> list[Any]:
        """Return the local arrays to read, as what `Pairs` takes; nothing is copied.

        Args:
            value: Another value of this kind. None: this one.
        """

    def place(self) -> Any:
        """Return what tells the memory of the parts from other memory, while that is kept."""
        return None

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


class _DTensor(_Torch):
    """The shard that this process has of a tensor, as `fully_shard` leaves parameters; nothing is gathered.

    FSDP may give a shard other memory.
    """

    followed = True

    def __init__(self, tensor: Any) -> None:
        super().__init__(tensor)
        if not all(placement.is_replicate() for placement in tensor.placements):
            self.shards = _shards_of(tensor)

    def parts(self, value: Any = None) -> list[Any]:
        if value is None:
            return [_local_of(self._tensor)]
        first = self._tensor
        if not _is_dtensor(value) or (value.device_mesh, value.placements) != (
            first.device_mesh,
            first.placements,
        ):
            got = value.placements if _is_dtensor(value) else type(value).__name__
            raise ValueError(
                f"values must be sharded as at first, by {first.placements} on one mesh, got {got}"
            )
        return [_local_of(value)]

    def place(self) -> Any:
        local = self._tensor._local_tensor  # `to_local` would make a tensor of each parameter
        return local.data_ptr(), local.shape

    def assign(self, arrays: Sequence[np.ndarray]) -> Any:
        _memory.write(arrays[0], _memory.view(_local_of(self._tensor), "values"))
        self.written()
        return self._tensor

    def shown(self, arrays: Sequence[np.ndarray]) -> Any:
        from torch.distributed.tensor import DTensor  # noqa: PLC0415 - loaded already

        tensor = self._tensor
        return DTensor.from_local(
            super().shown(arrays),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,  # which would gather
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def written(self) -> None:
        super().written()
        if not self._tensor.is_inference():
            import torch  # noqa: PLC0415

            torch.autograd.graph.increment_version(self._tensor._local_tensor)  # it has its own


def _local_of(tensor: Any) -> Any:
    import torch  # noqa: PLC0415 - loaded already

    with torch.no_grad():  # else the tensor would be one of a graph, which is many times slower
        return tensor.to_local()


def _shards_of(tensor: Any) -> Shards:
    """Return where this process' part of a DTensor lies."""
    mesh = tensor.device_mesh
    (chunk,) = tensor.__create_chunk_list__()
    coordinates = mesh.get_coordinate()
    # of replicas the first one is saved
    writes = coordinates is not None and not any(
        at for at, placement in zip(coordinates, tensor.placements, strict=True) if placement.is_replicate()
    )
    rank = mesh.get_rank()
    return Shards(
        (Block(tuple(tensor.shape), tuple(chunk.offsets), tuple(chunk.sizes)),),
        (rank if writes else None,),
        frozenset(mesh.mesh.flatten().tolist()),
        frozenset([rank]),
    )


class _Jax(Leaf):
    """JAX arrays in CPU memory, on one device or sharded over several.

    Of the first only the type and the place are kept, not the memory. Each distinct shard in this process is
    a part, however many devices have it.
    """

    fixed = False
    immutable = True

    def __init__(self, array: Any) -> None:
        self._dtype, self._shape, self._sharding = array.dtype, array.shape, array.sharding
        self._firsts = [0]  # of each part, the first of this process' devices that have it
        self._copies: list[tuple[int, Any]] = []  # of each of these devices, its part, and the device
        if len(self._sharding.device_set) == 1:
            return
        shards = array.addressable_shards
        blocks = [_block_of(shard, array.shape) for shard in shards]
        distinct = list(dict.fromkeys(blocks))
        self._firsts = [blocks.index(block) for block in distinct]
        for shard, block in zip(shards, blocks, strict=True):
            self._copies.append((distinct.index(block), shard.data.sharding))
        if not self._sharding.is_fully_replicated:
            writers = {
                block: shard.device.id
                for shard, block in zip(shards, blocks, strict=True)
                if shard.replica_id == 0
            }
            self.shards = Shards(
                tuple(distinct),
                tuple(writers.get(block) for block in distinct),
                frozenset(device.id for device in self._sharding.device_set),
                frozenset(shard.device.id for shard in shards),
            )

    def parts(self, value: Any = None) -> list[Any]:
        if value is None:
            raise ValueError("values must be given: JAX arrays do not change")
        try:
            if not self._copies and getattr(value, "is_fully_replicated", True):
                return [np.asarray(value)]
            sharding = getattr(value, "sharding", None)
            # NumPy would gather what is sharded otherwise
            if sharding is None or not sharding.is_equivalent_to(self._sharding, len(self._shape)):
                raise ValueError(f"values must be sharded as at first, by {self._sharding}, got {sharding}")
            return [np.asarray(value.addressable_data(first)) for first in self._firsts]
        except TypeError:  # of JAX's tracers
            raise RuntimeError("values of JAX arrays can be read only outside of jax.jit") from None
        except RuntimeError as error:
            raise RuntimeError(
                f"values must outlive their averaging, and one was donated to a step before: {error}"
            ) from None

    def obstacle(self) -> str | None:
        return "is a JAX array, which never changes"

    def assign(self, arrays: Sequence[Any]) -> Any:
        return self.shown([_cast(array, self._dtype) for array in arrays])

    def shown(self, arrays: Sequence[Any]) -> Any:
        import jax  # noqa: PLC0415 - loaded already: the value is one of its arrays

        # copies: JAX may keep the memory it is given
        if not self._copies:
            return jax.device_put(arrays[0].copy(), self._sharding)
        shards = [jax.device_put(arrays[part].copy(), device) for part, device in self._copies]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)


def _block_of(shard: Any, shape: tuple[int, ...]) -> Block:
    """Return where a shard of a JAX array lies."""
    begin = (index.indices(size)[0] for index, size in zip(shard.index, shape, strict=True))
    return Block(shape, tuple(begin), shard.data.shape)


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


def _is_dtensor(value: Any) -> bool:
    return _loaded(value, "torch.distributed.tensor", "DTensor")


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
    if _is_dtensor(native):
        if any(placement.is_partial() for placement in native.placements):
            raise TypeError(
                f"{name} must be whole or sharded, and it is a sum of which each process holds a term"
            )
        _memory.view(_local_of(native), name)
        return _DTensor(native)
    if _loaded(native, "torch", "Tensor"):
        _memory.view(native, name)
        return _Torch(native)
    if _is_tensorflow(native):
        if not (native.dtype.is_floating or native.dtype.is_integer or native.dtype.is_bool):
            raise TypeError(f"{name} must be of numbers, got {native.dtype.name}")  # DLPack of texts aborts
        return _TensorFlow(native)
    if _loaded(native, "jax", "Array"):
        as_view(native.addressable_data(0), name)
        return _KerasOnJax(value) if native is not value else _Jax(value)
    view = _memory.view(value, name)
    return _NumPy(value, view) if isinstance(view, np.ndarray) else _OnCuda(view)


def check_sharded(module: Any) -> None:
    """Raise where FSDP shows gathered parameters of a module, which are copies that it throws away."""
    for name, part in module.named_modules() if hasattr(module, "named_modules") else ():
        if not _loaded(part, "torch.distributed.fsdp", "FSDPModule"):
            continue
        state = part._get_fsdp_state()
        several = hasattr(state, "_fsdp_param_groups")  # as in torch 2.13
        groups = state._fsdp_param_groups if several else [state._fsdp_param_group]
        if not all(group is None or group.is_sharded for group in groups):
            raise RuntimeError(
                f"the parameters of module {name!r} must be sharded, and FSDP holds them gathered, as "
                "those of the outermost module after a forward pass: call its reshard() first"
            )
