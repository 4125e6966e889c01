"""JAX's arrays, on one device or sharded over several, which never change; and what JAX knows as a tree."""

import sys
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from .._types import AnyArray
from .base import CPU, CUDA, Carried, Descriptor, Leaf, Library, Location, is_loaded, unmasked
from .dispatch import cast
from .interfaces import c_strides
from .numpy import HostStorage
from .shards import Block, Shards


class JaxLeaf(Leaf):
    """An array in CPU memory, of which only the type and the place are kept, not the memory.

    Each distinct shard in this process is a local array, however many devices have it.
    """

    stable = False
    immutable = True

    def __init__(self, array: AnyArray) -> None:
        self._dtype, self._shape, self._sharding = array.dtype, array.shape, array.sharding
        self._firsts = [0]  # of each local array, the first of this process' devices that have it
        self._copies: list[
            tuple[int, AnyArray]
        ] = []  # of each of these devices, its local array, and the device
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

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        if value is None:
            raise ValueError("values must be given: JAX arrays do not change")
        try:
            is_whole = getattr(value, "is_fully_replicated", None)
            if is_whole is None and isinstance(value, np.ndarray):
                value = unmasked(value, "values")
            if not self._copies and is_whole is not False:
                return [np.asarray(value)]
            sharding = getattr(value, "sharding", None)
            # NumPy would gather what is sharded otherwise
            if sharding is None or not sharding.is_equivalent_to(self._sharding, len(self._shape)):
                raise ValueError(f"values must be sharded as at first, by {self._sharding}, got {sharding}")
            return [np.asarray(value.addressable_data(first)) for first in self._firsts]
        except TypeError:
            if isinstance(value, np.ndarray):  # it has a mask
                raise
            # JAX's tracers have no contents
            raise RuntimeError("values of JAX arrays can be read only outside of jax.jit") from None
        except RuntimeError as error:
            raise RuntimeError(
                f"values must outlive their averaging, and one was donated to a step before: {error}"
            ) from None

    def obstacle(self) -> str | None:
        return "is a JAX array, which never changes"

    def assign(self, arrays: Sequence[AnyArray]) -> AnyArray:
        return self.to_library([cast(array, self._dtype) for array in arrays])

    def to_library(self, arrays: Sequence[AnyArray]) -> AnyArray:
        import jax  # noqa: PLC0415 - loaded already: the value is one of its arrays

        # copies: JAX may keep the memory it is given
        if not self._copies:
            return jax.device_put(arrays[0].copy(), self._sharding)
        shards = [jax.device_put(arrays[local].copy(), device) for local, device in self._copies]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)


class JaxVariable(JaxLeaf):
    """A variable that keeps its value in an array of JAX: each assignment puts another one behind it."""

    immutable = False

    def __init__(self, variable: AnyArray) -> None:
        self._variable = variable
        super().__init__(self._read())

    @abstractmethod
    def _read(self) -> AnyArray:
        """Return the array of now."""

    @abstractmethod
    def _write(self, array: AnyArray) -> None:
        """Put another array behind the variable."""

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        return super().local_arrays(self._read() if value is None else value)

    def assign(self, arrays: Sequence[AnyArray]) -> AnyArray:
        self._write(super().to_library([cast(array, self._dtype) for array in arrays]))
        return self._variable

    def obstacle(self) -> str | None:
        return None


def _block_of(shard: AnyArray, shape: tuple[int, ...]) -> Block:
    """Return where a shard lies."""
    begin = (index.indices(size)[0] for index, size in zip(shard.index, shape, strict=True))
    return Block(shape, tuple(begin), shard.data.shape)


class _Storage(HostStorage):
    """Arrays in CPU memory that averages of another library's are given: they are only read."""

    def describe(self, array: AnyArray) -> Descriptor:
        return super().describe(np.asarray(array))


class _Jax(Library):
    storage = _Storage()

    def owns(self, value: object) -> bool:
        return is_loaded(value, "jax", "Array")

    def leaf(self, value: AnyArray, name: str) -> Leaf:
        if not isinstance(value.dtype, np.dtype):  # of keys of random numbers
            return Carried(value)
        self.view(value.addressable_data(0), name)
        return JaxLeaf(value)

    def agreed(self, own: str) -> str | None:
        client = getattr(
            getattr(sys.modules.get("jax._src.distributed"), "global_state", None), "client", None
        )
        if client is None:
            return None
        with suppress(Exception):  # another process was first
            client.key_value_set("fastema/run", own)
        with suppress(Exception):  # it is no public function
            return str(client.blocking_key_value_get("fastema/run", 10_000))
        return None

    def is_on_cuda(self, array: AnyArray) -> bool:
        return int(array.__dlpack_device__()[0]) in CUDA

    def _view(self, array: AnyArray) -> np.ndarray:
        if int(array.__dlpack_device__()[0]) != CPU:
            raise TypeError(f"it lies on device {array.__dlpack_device__()}")
        return np.asarray(array)  # DLPack would do, but not for bfloat16

    def _locate(self, array: AnyArray) -> Location:
        array.block_until_ready()  # its stream is not told
        dtype = np.dtype(array.dtype)
        strides = c_strides(array.shape, dtype)
        descriptor = Descriptor(dtype, array.shape, strides, array.unsafe_buffer_pointer(), False)
        return Location(descriptor, int(array.__dlpack_device__()[1]), "cupy", None, array, unaware=True)


library = _Jax()


class Registered(NamedTuple):
    """What is a tree to JAX, taken apart by one level.

    Attributes:
        keys: The names of its children.
        children: What it holds.
        structure: JAX's own description of it.
    """

    keys: tuple[str, ...]
    children: Sequence[Any]
    structure: Any

    def build(self, children: Sequence[Any]) -> Any:
        """Put other children together as these were."""
        return self.structure.unflatten(children)


def registered(value: object) -> Registered | None:
    """Take apart by one level what JAX knows as a tree: dataclasses, modules; None: it does not."""
    jax = sys.modules.get("jax")
    if jax is None or not hasattr(jax, "tree_util"):
        return None
    found, structure = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda x: x is not value)
    if jax.tree_util.treedef_is_leaf(structure) and structure.num_leaves == 1:
        return None
    return Registered(tuple(_name_of(path[0]) for path, _ in found), [child for _, child in found], structure)


def _name_of(key: Any) -> str:
    """Return what an entry of a path in JAX's trees is called."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
