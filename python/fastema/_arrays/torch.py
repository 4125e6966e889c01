"""Torch's tensors and parameters, also those that are sharded; what holds them is in `modules`."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from sys import modules

import numpy as np

from .._types import AnyArray, DType, compute_type
from .base import Carried, Descriptor, Leaf, Library, Location, Place, Storage, dtype_named, is_loaded
from .dispatch import local_array, write
from .modules import FSDP1, RESHARD, groups_of
from .shards import Block, Shards
from .watched import Watched, watched


def tensor_of(array: np.ndarray) -> AnyArray:
    """Return a tensor in host memory of an array's contents, and in its memory where that is writable."""
    import torch  # noqa: PLC0415 - loaded already, here and below: who asks has a tensor

    if not array.flags.writeable:
        array = array.copy(order="K")
    if array.dtype.isbuiltin != 1:  # of which torch knows, and NumPy's buffers do not
        return torch.from_numpy(array.view(_BYTES[array.dtype.itemsize])).view(_kind(array.dtype))
    return torch.from_numpy(array)


_EMPTY = "it has no memory, or its storage is empty"
_PIECE = 64 << 20  # bytes that come from a device at once, where they are written to a file
_BYTES = {1: "|u1", 2: "<i2"}  # for types of which NumPy itself does not know


class _Memory:
    """Memory of a tensor, as NumPy asks for it.

    `tensor.numpy()` and DLPack would do: but the one marks the user's storage as one that never can be
    resized, which offloading and FSDP do, and the other takes three times as long.
    """

    __slots__ = ("__array_interface__", "_tensor")

    def __init__(self, tensor: AnyArray, dtype: DType, address: int) -> None:
        strides = None
        if not tensor.is_contiguous():
            strides = tuple([step * dtype.itemsize for step in tensor.stride()])
        self._tensor = tensor  # as long as NumPy has it
        self.__array_interface__ = {
            "version": 3,
            "typestr": _BYTES[dtype.itemsize] if dtype.isbuiltin != 1 else dtype.str,
            "shape": tensor.shape,
            "strides": strides,
            "data": (address, False),
        }


def array_of(tensor: AnyArray) -> np.ndarray:
    """Return NumPy's view of a tensor in host memory.

    Raises:
        RuntimeError: It has no memory, as sparse ones.
        TypeError: It lies elsewhere, or NumPy has no such type.
        ValueError: Its memory holds other numbers than it shows, or none.
    """
    if tensor.device.type != "cpu":
        cure = ", where there are no numbers: give it memory by to_empty(), and load it"
        raise TypeError(f"it lies on {tensor.device}{cure if tensor.is_meta else ''}")
    dtype = _dtype(tensor.dtype)
    address = tensor.data_ptr()
    if address == 0:
        if tensor.numel() == 0:
            return np.empty(tensor.shape, dtype)
        raise ValueError(_EMPTY)
    _check_numbers(tensor)
    view = np.asarray(_Memory(tensor, dtype, address))
    return view if dtype.isbuiltin == 1 else view.view(dtype)


def _check_numbers(tensor: AnyArray) -> None:
    """Raise ValueError if a tensor's memory holds other numbers than it shows."""
    if tensor.is_neg() or tensor.is_conj():
        raise ValueError(
            "it is negated or conjugated only when it is read: give resolve_conj().resolve_neg()"
        )


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
    """A tensor or parameter on any device, with a gradient or without."""

    def __init__(self, tensor: AnyArray, name: str) -> None:
        self._tensor, self._name = tensor, name
        self.may_move = not is_on_cuda(tensor)  # pairs on devices follow theirs
        self.address = library.address(tensor)
        self._look()

    def _local(self) -> AnyArray:
        """Return the tensor whose memory is worked on."""
        return self._tensor

    def _layout(self) -> tuple[object, ...]:
        tensor = self._tensor
        place = _place_of(tensor) if is_elsewhere(tensor) else tensor.data_ptr()
        return place, tensor.shape, tensor.stride()

    def _look(self) -> None:
        self._viewed_at = self._layout()
        self._array = library.local_array(self._local(), self._name)

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        if value is not None:
            return [local_array(value, self._name)]
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

    def to_state(self, array: AnyArray) -> AnyArray:
        return self.to_library([array])

    def from_state(self, array: AnyArray, name: str) -> AnyArray:
        return plain(array, name)

    def parts(self, array: AnyArray, name: str) -> AnyArray:
        import torch  # noqa: PLC0415

        if not is_elsewhere(array):
            return super().parts(array, name)
        if not array.is_complex():
            raise TypeError(f"{name} must be complex, as it was at first, got {array.dtype}")
        return torch.view_as_real(array.detach())

    def joined(self, parts: AnyArray) -> AnyArray:
        import torch  # noqa: PLC0415

        return torch.view_as_complex(parts.float() if parts.element_size() < 4 else parts)

    def written(self) -> None:
        # or a backward pass through what was there before would be wrong, and say nothing
        _count_version(self._tensor)


class _DTensor(_Tensor):
    """The shard that this process has of a tensor, as `fully_shard` leaves parameters; nothing is gathered.

    FSDP may give a shard other memory.
    """

    def __init__(self, tensor: AnyArray, name: str) -> None:
        super().__init__(tensor, name)
        self.may_move = True
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

    def from_state(self, array: AnyArray, name: str) -> AnyArray:
        first = self._tensor
        if _is_dtensor(array):
            _check_own(array, name)
            if (array.device_mesh, array.placements) == (first.device_mesh, first.placements):
                return array_of(_local_of(array).cpu())
        whole = super().from_state(array, name)
        if self.shards is None:
            return whole
        (block,) = self.shards.blocks
        if tuple(whole.shape) != block.whole:
            raise ValueError(
                f"{name} must be a DTensor, or whole and of shape {block.whole}, as a part may be another "
                f"process', got shape {tuple(whole.shape)}"
            )
        return whole[block.slices()]

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


def written(tensors: Sequence[AnyArray]) -> None:
    """Tell autograd that tensors were changed behind its back."""
    if not tensors:
        return
    import torch  # noqa: PLC0415

    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


def _is_dtensor(value: object) -> bool:
    return is_loaded(value, "torch.distributed.tensor", "DTensor")


def _local_of(tensor: AnyArray) -> AnyArray:
    import torch  # noqa: PLC0415

    with torch.no_grad():  # else the tensor would be one of a graph, which is many times slower
        return tensor.to_local()


def _check_own(tensor: AnyArray, name: str) -> None:
    """Raise if a DTensor that was loaded is another process' part, of which only its mesh still tells.

    Raises:
        ValueError: It is.
    """
    import torch  # noqa: PLC0415

    mesh, rank = tensor.device_mesh, torch.distributed.get_rank()
    place = (mesh.mesh == rank).nonzero().tolist()
    if place and tuple(mesh.get_coordinate() or ()) != tuple(place[0]):
        raise ValueError(
            f"{name} must be the part of process {rank}, got that of another: have each process load its "
            "own, as torch.distributed.checkpoint does"
        )


def plain(array: AnyArray, name: str) -> AnyArray:
    """Return a tensor of a state as NumPy's array, a DTensor as a whole; other arrays as they are."""
    if not library.owns(array):
        return array
    return array_of((_whole_of(array, name) if _is_dtensor(array) else array).cpu())


def _whole_of(tensor: AnyArray, name: str) -> AnyArray:
    """Return all of a DTensor; every process of its mesh has to call this."""
    import torch  # noqa: PLC0415

    _check_own(tensor, name)
    with torch.no_grad():
        return tensor.full_tensor()


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
    """Tensors on devices, worked on by torch itself in its current stream."""

    def describe(self, array: AnyArray) -> Descriptor:
        return _described(array)

    def dtype(self, array: AnyArray) -> DType:
        return _dtype(array.dtype)

    def shape(self, array: AnyArray) -> tuple[int, ...]:
        return tuple(array.shape)

    def device(self, array: AnyArray) -> Place | None:
        return str(array.device) if is_elsewhere(array) else int(array.device.index or 0)

    def empty_like(self, array: AnyArray, dtype: DType) -> AnyArray:
        strides = self.describe(array).dense_strides()
        try:
            return array.detach().new_empty_strided(array.shape, strides, dtype=_kind(dtype))
        except TypeError as reason:
            raise TypeError(
                f"dtype must be a type that device {array.device} has, got {np.dtype(dtype)}: give "
                f"'float32', or keep the values in CPU memory ({reason})"
            ) from None

    def host(self, array: AnyArray) -> np.ndarray:
        found = self.describe(array).empty()
        tensor_of(found).copy_(array.detach())
        return found

    def pieces(self, array: AnyArray) -> Iterator[np.ndarray]:
        if not array.is_contiguous():
            yield from super().pieces(array)
            return
        flat, each = array.detach().view(-1), max(_PIECE // array.element_size(), 1)
        for begin in range(0, array.numel(), each):
            yield self.host(flat[begin : begin + each])

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


def _described(tensor: AnyArray) -> Descriptor:
    dtype, address = _dtype(tensor.dtype), None
    if is_elsewhere(tensor):
        storage, begin = _place_of(tensor)
        address = (storage << 64) + begin * dtype.itemsize
    return _descriptor(tensor, dtype, address)


def _descriptor(tensor: AnyArray, dtype: DType, address: int | None = None) -> Descriptor:
    strides = tuple([step * dtype.itemsize for step in tensor.stride()])  # a generator takes twice as long
    address = tensor.data_ptr() if address is None else address
    return Descriptor(dtype, tuple(tensor.shape), strides, address, True)


# --- devices for which fastema has no kernel: neither the CPU nor CUDA --------------------------------


def is_elsewhere(tensor: AnyArray) -> bool:
    """Tell whether a tensor lies where only torch itself can compute; tests have others lie there, too."""
    return not (tensor.is_cpu or tensor.is_meta or is_on_cuda(tensor))


def is_on_cuda(tensor: AnyArray) -> bool:
    """Tell whether a tensor lies on a device of CUDA; torch says so of ROCm's as well."""
    if not tensor.is_cuda:
        return False
    import torch  # noqa: PLC0415

    return torch.version.hip is None


def _place_of(tensor: AnyArray) -> tuple[int, int]:
    """Return what tells a tensor's memory from others', and where the tensor begins in it.

    Not its address: some devices tell none, and of others (MPS) it is that of something that holds memory.
    """
    try:
        return int(tensor.untyped_storage()._cdata), int(tensor.storage_offset())
    except (NotImplementedError, RuntimeError):  # it has no such thing: then it shares it with nobody
        return id(tensor), 0


def _tells_address(tensor: AnyArray) -> bool:
    """Tell whether a tensor on some device has an address, by which other memory can be told from its."""
    try:
        return bool(tensor.data_ptr() != 0)
    except (NotImplementedError, RuntimeError):
        return False


def descriptors(lists: Sequence[Sequence[AnyArray]]) -> list[list[Descriptor]]:
    """Describe tensors elsewhere, with addresses that are apart unless the tensors share memory."""
    storages: dict[int, int] = {}

    def described(tensor: AnyArray) -> Descriptor:
        storage, begin = _place_of(tensor)
        place = storages.setdefault(storage, len(storages) + 1)
        found = _described(tensor)
        return found._replace(address=(place << 44) + begin * found.itemsize)

    return [[described(tensor) for tensor in tensors] for tensors in lists]


class _Torch(Library):
    storage: Storage = _Storage()

    def owns(self, value: object) -> bool:
        return is_loaded(value, "torch", "Tensor")

    def leaf(self, value: AnyArray, name: str) -> Leaf:
        if hasattr(value, "ds_id"):
            raise TypeError(
                f"{name} must be whole, and is a parameter of DeepSpeed's ZeRO-3, which is empty between its "
                "uses: average with ZeRO stage 2, or with fully_shard"
            )
        if getattr(value, "_fsdp_flattened", False):
            raise TypeError(f"{name} {FSDP1}")
        if not _is_dtensor(value):
            if (odd := _oddity(value)) is None:
                return _Tensor(value, name)
            if value.requires_grad:
                raise TypeError(f"{name} must be a plain tensor, and it is {odd}: leave it out with only=")
            return Carried(value)
        if any(placement.is_partial() for placement in value.placements):
            raise TypeError(
                f"{name} must be whole or sharded, and it is a sum of which each process holds a term"
            )
        return _DTensor(value, name)

    def agreed(self, own: str) -> str | None:
        distributed = modules.get("torch.distributed")
        if distributed is None or not distributed.is_available() or not distributed.is_initialized():
            return None
        with suppress(Exception):  # some stores cannot, and it is no public function
            store = distributed.distributed_c10d._get_default_store()
            return str(store.compare_set("fastema/run", "", own).decode())  # whoever comes first sets it
        return None

    def is_on_cuda(self, array: AnyArray) -> bool:
        return is_on_cuda(array)

    def is_elsewhere(self, array: AnyArray) -> bool:
        return is_elsewhere(array)

    def address(self, array: AnyArray) -> Watched:
        if is_elsewhere(array) and not _tells_address(array):
            return lambda: (_place_of(array), array.shape, array.stride())
        return watched(array)

    def _view(self, array: AnyArray) -> np.ndarray:
        return array_of(array)

    def _locate(self, array: AnyArray) -> Location:
        _check_numbers(array)
        found = _descriptor(array, _dtype(array.dtype))
        if found.address == 0 and found.size:
            raise ValueError(_EMPTY)
        return Location(found, array.device.index or 0, "torch", None, array)

    def _on_device(self, array: AnyArray) -> AnyArray:
        import torch  # noqa: PLC0415

        if array.layout is not torch.strided:
            raise TypeError(f"it is of layout {array.layout}")
        _check_numbers(array)
        _described(array)
        return array

    def are_shown(self, values: Sequence[AnyArray]) -> bool:
        return not _gathered(values)

    def check_exchange(self, values: Sequence[AnyArray]) -> None:
        if _gathered(values):
            raise RuntimeError(f"values must be sharded, and FSDP holds them gathered{RESHARD}")

    def exchanged(self, values: Sequence[AnyArray]) -> None:
        if "torch" not in modules:
            return
        import torch  # noqa: PLC0415

        torch.clear_autocast_cache()  # its 16-bit copies of the weights live as long as its region
        for module in _gathered(values):
            module.reshard()


def _oddity(tensor: AnyArray) -> str | None:
    """Return what makes a tensor more than numbers in memory, if anything does."""
    import torch  # noqa: PLC0415

    kind = type(tensor)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a {kind.__name__}, which has its own way of keeping numbers"
    if tensor.layout is not torch.strided:
        return f"of layout {tensor.layout}"
    if tensor.is_quantized:
        return "quantised"
    return "negated or conjugated when it is read" if tensor.is_conj() or tensor.is_neg() else None


library = _Torch()


def _gathered(values: Sequence[AnyArray]) -> list[AnyArray]:
    """Return the modules whose gathered parameters are copies of some of these DTensors."""
    if "torch.distributed.fsdp" not in modules:
        return []
    sharded = {id(value) for value in values if _is_dtensor(value)}
    if not sharded:
        return []
    from torch.distributed._composable_state import _module_state_mapping  # noqa: PLC0415

    return [
        module
        for module in list(_module_state_mapping)
        if is_loaded(module, "torch.distributed.fsdp", "FSDPModule")
        and any(
            not group.is_sharded and any(id(x.sharded_param) in sharded for x in group.fsdp_params)
            for group in groups_of(module)
        )
    ]
