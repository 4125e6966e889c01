"""All that fastema knows of torch: tensors and parameters, those that are sharded, and modules of FSDP."""

from collections.abc import Callable, Sequence
from functools import cache
from sys import modules

import ml_dtypes
import numpy as np

from .._types import AnyArray, DType, compute_type
from .base import Descriptor, Leaf, Library, Location, Storage, dtype_named, is_loaded
from .dispatch import write
from .shards import Block, Shards

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def tensor_of(array: np.ndarray) -> AnyArray:
    """Return a tensor in host memory of an array's contents, and in its memory where that is writable."""
    import torch  # noqa: PLC0415 - loaded already, here and below: who asks has a tensor

    if not array.flags.writeable:
        array = array.copy(order="K")
    if array.dtype == ml_dtypes.bfloat16:  # of which neither buffers nor DLPack tell NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_of(tensor: AnyArray) -> np.ndarray:
    """Return NumPy's view of a tensor in host memory.

    Raises:
        TypeError: It lies elsewhere.
    """
    if tensor.device.type != "cpu":
        raise TypeError(f"it lies on {tensor.device}")
    tensor = tensor.detach()
    if _dtype(tensor.dtype) is not _BFLOAT16:  # to compare types takes as long as the view
        view: np.ndarray = tensor.numpy()
        return view
    import torch  # noqa: PLC0415

    halves: np.ndarray = tensor.view(torch.int16).numpy()
    return halves.view(ml_dtypes.bfloat16)


@cache
def _dtype(kind: object) -> DType:
    """Return NumPy's type of torch's.

    Raises:
        TypeError: NumPy has none.
    """
    return dtype_named(str(kind).removeprefix("torch."))


def _kind(dtype: DType) -> AnyArray:
    """Return torch's type of NumPy's."""
    import torch  # noqa: PLC0415

    return getattr(torch, np.dtype(dtype).name)


class _Tensor(Leaf):
    """A tensor or parameter in CPU memory or on a CUDA device, with a gradient or without."""

    def __init__(self, tensor: AnyArray, name: str) -> None:
        self._tensor, self._name = tensor, name
        self.address = tensor.data_ptr
        self._look()

    def _local(self) -> AnyArray:
        """Return the tensor whose memory is worked on."""
        return self._tensor

    def _layout(self) -> tuple[object, ...]:
        return self._tensor.data_ptr(), self._tensor.shape, self._tensor.stride()

    def _look(self) -> None:
        self._viewed_at = self._layout()
        self._array = library.local_array(self._local(), self._name)

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        if value is not None:
            return [library.local_array(value, self._name)]
        if self._layout() != self._viewed_at:
            self._look()
        return [self._array]

    def in_place(self) -> bool:
        return True

    def assign(self, arrays: Sequence[AnyArray]) -> AnyArray:
        write(arrays[0], self.local_arrays()[0])
        self.written()
        return self._tensor

    def to_library(self, arrays: Sequence[AnyArray]) -> AnyArray:
        return tensor_of(arrays[0]) if isinstance(arrays[0], np.ndarray) else arrays[0].detach()

    def written(self) -> None:
        # or a backward pass through what was there before would be wrong, and say nothing
        _count_version(self._tensor)


class _DTensor(_Tensor):
    """The shard that this process has of a tensor, as `fully_shard` leaves parameters; nothing is gathered.

    FSDP may give a shard other memory.
    """

    may_move = True

    def __init__(self, tensor: AnyArray, name: str) -> None:
        super().__init__(tensor, name)
        self.address = self._layout
        if not all(placement.is_replicate() for placement in tensor.placements):
            self.shards = _shards_of(tensor)

    def _local(self) -> AnyArray:
        return _local_of(self._tensor)

    def _layout(self) -> tuple[object, ...]:
        local = self._tensor._local_tensor  # `to_local` would make a tensor of each parameter
        return local.data_ptr(), local.shape

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        if value is None:
            return super().local_arrays()
        first, given = self._tensor, _is_dtensor(value)
        if not given or (value.device_mesh, value.placements) != (first.device_mesh, first.placements):
            got = value.placements if given else type(value).__name__
            raise ValueError(
                f"values must be sharded as at first, by {first.placements} on one mesh, got {got}"
            )
        return super().local_arrays(_local_of(value))

    def to_library(self, arrays: Sequence[AnyArray]) -> AnyArray:
        from torch.distributed.tensor import DTensor  # noqa: PLC0415

        tensor = self._tensor
        return DTensor.from_local(
            super().to_library(arrays),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,  # which would gather
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def written(self) -> None:
        super().written()
        if not self._tensor.is_inference():
            _count_version(self._tensor._local_tensor)  # it has its own


def _count_version(tensor: AnyArray) -> None:
    """Tell autograd that a tensor was changed, as operations of torch do."""
    import torch  # noqa: PLC0415

    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _is_dtensor(value: object) -> bool:
    return is_loaded(value, "torch.distributed.tensor", "DTensor")


def _local_of(tensor: AnyArray) -> AnyArray:
    import torch  # noqa: PLC0415

    with torch.no_grad():  # else the tensor would be one of a graph, which is many times slower
        return tensor.to_local()


def _shards_of(tensor: AnyArray) -> Shards:
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


class _Storage(Storage):
    """Tensors on CUDA devices, worked on by torch itself in its current stream."""

    def describe(self, array: AnyArray) -> Descriptor:
        return _located(array).descriptor

    def device(self, array: AnyArray) -> int | None:
        return int(array.device.index or 0)

    def empty_like(self, array: AnyArray, dtype: DType) -> AnyArray:
        strides = self.describe(array).dense_strides()
        return array.detach().new_empty_strided(array.shape, strides, dtype=_kind(dtype))

    def host(self, array: AnyArray) -> np.ndarray:
        found = self.describe(array).empty()
        tensor_of(found).copy_(array.detach())
        return found

    def write(self, array: AnyArray, target: AnyArray) -> None:
        source = tensor_of(array) if isinstance(array, np.ndarray) else array.detach()
        target.detach().copy_(source)

    def clear(self, array: AnyArray) -> None:
        array.detach().zero_()

    def quotient(self, average: AnyArray, divisor: float) -> AnyArray:
        compute = _kind(compute_type(_dtype(average.dtype)))
        # on the device: of a number of the host torch takes the inverse, and multiplies
        by = average.new_full((), divisor, dtype=compute)
        return average.to(compute).div(by).to(average.dtype)


def _located(tensor: AnyArray) -> Location:
    dtype = _dtype(tensor.dtype)
    strides = tuple(step * dtype.itemsize for step in tensor.stride())
    descriptor = Descriptor(dtype, tuple(tensor.shape), strides, tensor.data_ptr(), True)
    return Location(descriptor, tensor.device.index or 0, "torch", None, tensor)


class _Torch(Library):
    storage: Storage = _Storage()

    def owns(self, value: object) -> bool:
        return is_loaded(value, "torch", "Tensor")

    def leaf(self, value: AnyArray, name: str) -> Leaf:
        if not _is_dtensor(value):
            return _Tensor(value, name)
        if any(placement.is_partial() for placement in value.placements):
            raise TypeError(
                f"{name} must be whole or sharded, and it is a sum of which each process holds a term"
            )
        return _DTensor(value, name)

    def is_on_cuda(self, array: AnyArray) -> bool:
        return bool(array.is_cuda)

    def address(self, array: AnyArray) -> Callable[[], object] | None:
        ask: Callable[[], object] = array.data_ptr
        return ask

    def _view(self, array: AnyArray) -> np.ndarray:
        return array_of(array)

    def _locate(self, array: AnyArray) -> Location:
        return _located(array)


library = _Torch()


def check_sharded(module: AnyArray) -> None:
    """Raise where FSDP shows gathered parameters of a module, which are copies that it throws away.

    Raises:
        RuntimeError: It does.
    """
    if "torch.distributed.fsdp" not in modules or not hasattr(module, "named_modules"):
        return
    for name, part in module.named_modules():
        if not is_loaded(part, "torch.distributed.fsdp", "FSDPModule"):
            continue
        state = part._get_fsdp_state()
        several = hasattr(state, "_fsdp_param_groups")  # as in torch 2.13
        groups = state._fsdp_param_groups if several else [state._fsdp_param_group]
        if not all(group is None or group.is_sharded for group in groups):
            raise RuntimeError(
                f"the parameters of module {name!r} must be sharded, and FSDP holds them gathered, as "
                "those of the outermost module after a forward pass: call its reshard() first"
            )
