"""Arrays in CUDA memory: where each lies, as the core's checks want to see it.

The checks of the core read types, shapes, strides, flags and addresses, and never memory. So an array on
a device is shown to them as a NumPy array with the device's address, which nobody may read.
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .._arrays import is_movable, is_on_cuda
from . import _driver
from ._driver import Stream


class Shown(NamedTuple):
    """An array on a device."""

    face: np.ndarray  # for checks alone: it has the device's address
    device: int | None  # None: it has no elements, and lies nowhere
    owner: str  # whose current stream it is worked on: "torch" or "cupy"
    stream: int | None  # besides, the stream on which it is made ready
    held: Any  # what keeps its memory alive


class _Face:
    """What NumPy asks of an object in order to make an array of it, without reading its memory."""

    def __init__(self, address: int, shape: Any, strides: Any, dtype: np.dtype[Any], read_only: bool) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, read_only),
            "shape": tuple(shape),
            "strides": strides,
            "typestr": f"<V{dtype.itemsize}" if dtype.kind == "V" else dtype.str,
        }
        self.dtype = dtype

    def array(self) -> np.ndarray:
        return np.asarray(self).view(self.dtype)


def shown(array: Any, name: str) -> Shown:
    """Return where an array on a CUDA device lies.

    Args:
        array: A torch tensor, also one that requires grad, or anything with `__cuda_array_interface__` or
            `__dlpack__`.
        name: What errors call it.

    Raises:
        TypeError: It is none, or its memory cannot be viewed.
    """
    try:
        if is_movable(array):
            return _of_torch(array)
        if type(array).__module__.partition(".")[0] in ("jax", "jaxlib"):
            return _of_jax(array)
        return _of_interface(array)
    except (TypeError, ValueError, AttributeError, RuntimeError, BufferError) as reason:
        raise TypeError(
            f"{name} must be an array whose CUDA memory can be viewed, got {type(array).__name__}: {reason}"
        ) from None


def _of_torch(tensor: Any) -> Shown:
    dtype = _dtype(str(tensor.dtype).removeprefix("torch."))
    strides = tuple(step * dtype.itemsize for step in tensor.stride())
    face = _Face(tensor.data_ptr(), tensor.shape, strides, dtype, False)
    return Shown(face.array(), tensor.device.index or 0, "torch", None, tensor)


def _of_jax(array: Any) -> Shown:
    array.block_until_ready()  # its stream is not told
    face = _Face(array.unsafe_buffer_pointer(), array.shape, None, np.dtype(array.dtype), True)
    return Shown(face.array(), int(array.__dlpack_device__()[1]), "cupy", None, array)


def _of_interface(array: Any) -> Shown:
    driver = _driver.load()
    if not hasattr(array, "__cuda_array_interface__"):
        array = driver.imported(array)
    interface = array.__cuda_array_interface__
    address, read_only = interface["data"]
    dtype = _dtype(getattr(array, "dtype", interface["typestr"]))
    face = _Face(address, interface["shape"], interface.get("strides"), dtype, read_only)
    own = type(array).__module__.partition(".")[0] == "cupy"
    device = array.device.id if own else driver.device_of(address) if address else None
    return Shown(face.array(), device, "cupy", None if own else interface.get("stream"), array)


def _dtype(name: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if str(name) == "bfloat16" else name)
    return dtype


class Group:
    """Arrays of one device, and the streams they are worked on.

    Args:
        arguments: Lists of arrays by the names of their arguments; the first array lies on the device.
        single: Whether each is one array, not a list.

    Raises:
        TypeError: An array lies elsewhere, or cannot be viewed.
    """

    def __init__(self, arguments: dict[str, list[Any]], single: bool) -> None:
        where: tuple[str, int] | None = None
        self.faces: list[list[np.ndarray]] = []
        self._owners: dict[str, None] = {}  # in order, each once
        self.producers: list[Stream] = []  # on which arrays of no such owner are made
        self._held = []
        for argument, arrays in arguments.items():
            faces = []
            for i, array in enumerate(arrays):
                name = argument if single else f"{argument}[{i}]"
                if not is_on_cuda(array):
                    beside = f"on cuda:{where[1]}, where {where[0]} lies" if where else "in CUDA memory"
                    raise TypeError(f"{name} must lie {beside}, got {type(array).__name__} elsewhere")
                one = shown(array, name)
                if where is None and one.device is not None:
                    where = name, one.device
                if where is not None and one.device not in (None, where[1]):
                    raise TypeError(
                        f"{name} must lie on cuda:{where[1]}, where {where[0]} lies, "
                        f"got {type(array).__name__} on cuda:{one.device}"
                    )
                faces.append(one.face)
                self._owners[one.owner] = None
                if one.stream is not None and Stream(one.stream) not in self.producers:
                    self.producers.append(Stream(one.stream))
                self._held.append(one.held)
            self.faces.append(faces)
        self.device = 0 if where is None else where[1]

    def kinds(self) -> list[list[tuple[np.dtype[Any], int]]]:
        """Return the types and sizes of all arrays."""
        return [[(face.dtype, face.size) for face in faces] for faces in self.faces]

    def check_unchanged(self, before: "Group") -> None:
        """Refuse another device, type or size.

        Raises:
            ValueError: One differs.
        """
        if (self.device, self.kinds()) != (before.device, before.kinds()):
            raise ValueError(
                "a tensor was given memory of another size, type or device after it was paired; "
                "make the pairs anew"
            )

    def streams(self) -> list[Stream]:
        """Return the current streams of all owners, each once, that of the first array first."""
        driver = _driver.load()
        found = [driver.current_stream(owner, self.device) for owner in self._owners]
        return found if len(found) == 1 else list({stream.handle: stream for stream in found}.values())
