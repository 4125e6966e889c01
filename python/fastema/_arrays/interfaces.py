"""Arrays that only their interfaces tell of: CuPy's and others on CUDA devices, and DLPack's in host memory.

Those on a device are copied byte by byte in CuPy's current stream, and what needs arithmetic goes through
host memory: CuPy flushes subnormals to zero, and before version 14 it has no bfloat16.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from .._types import AnyArray, DType
from .base import CPU, CUDA, Descriptor, Leaf, Library, Location, Storage, dtype_named
from .dispatch import write
from .numpy import HostLeaf
from .numpy import library as numpy
from .watched import Watched

if TYPE_CHECKING:
    from ..cuda._driver import Driver, Stream


def _driver() -> "Driver":
    from ..cuda import _driver  # noqa: PLC0415 - no CPU needs it

    return _driver.load()


def c_strides(shape: Sequence[int], dtype: DType) -> tuple[int, ...]:
    """Return the strides of an array in C's order, in bytes."""
    strides, step = [], dtype.itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class _Managed(ctypes.Structure):
    """The head of DLPack's DLManagedTensorVersioned."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


_CAPSULE, _READ_ONLY = b"dltensor_versioned", 1


def is_read_only(array: AnyArray) -> bool:
    """Tell whether something is exported by DLPack as read-only, which CuPy does not look at."""
    try:
        capsule = array.__dlpack__(max_version=(1, 0))
    except TypeError:  # it speaks a version that knows no such thing
        return False
    is_valid, pointer = ctypes.pythonapi.PyCapsule_IsValid, ctypes.pythonapi.PyCapsule_GetPointer
    is_valid.argtypes = pointer.argtypes = ctypes.py_object, ctypes.c_char_p
    pointer.restype = ctypes.POINTER(_Managed)
    return bool(is_valid(capsule, _CAPSULE) and pointer(capsule, _CAPSULE).contents.flags & _READ_ONLY)


class _Writable:
    """A view that may be written, where NumPy (before 2.2) forbids it of all that tell no flags."""

    def __init__(self, view: np.ndarray) -> None:
        self._view = view
        self.__array_interface__ = {**view.__array_interface__, "data": (view.ctypes.data, False)}


class _OnDevice(Leaf):
    """An array on a CUDA device."""

    def __init__(self, array: AnyArray) -> None:
        self._array = array

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        return [self._array if value is None else value]

    def obstacle(self) -> str | None:
        return None if library.storage.describe(self._array).writable else "is read-only"

    def in_place(self) -> bool:
        return True

    def assign(self, arrays: Sequence[AnyArray]) -> AnyArray:
        write(arrays[0], self._array)
        return self._array

    def to_library(self, arrays: Sequence[AnyArray]) -> AnyArray:
        return arrays[0]


class _Exporter(HostLeaf):
    """Something that exports memory of the host by DLPack, and may export other memory the next time."""

    may_move = True

    def __init__(self, given: AnyArray, array: np.ndarray, name: str) -> None:
        super().__init__(given, array, name)
        self.address = library.address(given)

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        if value is None:
            self._array = library.view(self._given, "values")
        return [self._array if value is None else library.view(value, "values")]


class _Storage(Storage):
    """Arrays with `__cuda_array_interface__`; new ones are CuPy's."""

    def describe(self, array: AnyArray) -> Descriptor:
        return library.locate(array, "values").descriptor

    def device(self, array: AnyArray) -> int | None:
        return library.locate(array, "values").device or 0

    def empty_like(self, array: AnyArray, dtype: DType) -> AnyArray:
        place, dtype, driver = library.locate(array, "values"), np.dtype(dtype), _driver()
        strides = tuple(step * dtype.itemsize for step in place.descriptor.dense_strides())
        with driver.on(place.device or 0):
            return driver.empty(place.descriptor.shape, strides, dtype)

    def host(self, array: AnyArray) -> np.ndarray:
        with _at_work(array) as (driver, place, stream):
            found = _dense(place.descriptor).empty()
            if found.size:
                driver.read(found, place.descriptor.address, stream)
                driver.finish(driver.record(stream))
        return found

    def write(self, array: AnyArray, target: AnyArray) -> None:
        with _at_work(target) as (driver, place, stream):
            there = _dense(place.descriptor)
            if not there.size:
                return
            if not isinstance(array, np.ndarray):
                source = library.locate(array, "values")
                here = source.descriptor
                if source.device == place.device and (here.dtype, here.strides) == (
                    there.dtype,
                    there.strides,
                ):
                    driver.copy(there.address, here.address, there.nbytes, stream)
                    return
                array = self.host(array)
            contents = there.empty()
            numpy.storage.write(array, contents)
            driver.write(there.address, contents, stream)
            driver.finish(driver.record(stream))

    def clear(self, array: AnyArray) -> None:
        with _at_work(array) as (driver, place, stream):
            if place.descriptor.size:
                driver.clear(_dense(place.descriptor).address, place.descriptor.nbytes, stream)

    def quotient(self, average: AnyArray, divisor: float) -> AnyArray:
        host = self.host(average)
        made = self.empty_like(average, host.dtype)
        self.write(numpy.storage.quotient(host, divisor), made)
        return made


@contextmanager
def _at_work(array: AnyArray) -> Iterator[tuple["Driver", Location, "Stream"]]:
    """Make an array's device the current one, and its library's stream wait for what makes the array."""
    driver, place = _driver(), library.locate(array, "values")
    device = place.device or 0
    with driver.on(device):
        stream = driver.current_stream(place.owner, device)
        if place.stream is not None and (made := place.stream()) is not None:
            driver.wait(stream, driver.record(type(stream)(made)))
        yield driver, place, stream


def _dense(descriptor: Descriptor) -> Descriptor:
    """Return the descriptor of an array that is as long in memory as it has elements.

    Raises:
        ValueError: It has holes.
    """
    if not descriptor.is_dense():
        raise ValueError(f"values on a CUDA device must be dense, got strides {descriptor.strides}")
    return descriptor


class _Interfaces(Library):
    storage: Storage = _Storage()
    owns_classes = False
    rebinds = True

    def owns(self, value: object) -> bool:
        return hasattr(value, "__dlpack_device__") or hasattr(value, "__cuda_array_interface__")

    def leaf(self, value: AnyArray, name: str) -> Leaf:
        array = self.local_array(value, name)
        return _Exporter(value, array, name) if isinstance(array, np.ndarray) else _OnDevice(array)

    def is_on_cuda(self, array: AnyArray) -> bool:
        return not hasattr(array, "__dlpack_device__") or int(array.__dlpack_device__()[0]) in CUDA

    def address(self, array: AnyArray) -> Watched:
        if self.is_on_cuda(array):
            return None
        return lambda: np.from_dlpack(array).ctypes.data

    def _view(self, array: AnyArray) -> np.ndarray:
        if not hasattr(array, "__dlpack_device__"):
            raise TypeError("it lies on a CUDA device")
        if int(array.__dlpack_device__()[0]) != CPU:
            raise TypeError(f"it lies on device {array.__dlpack_device__()}")
        found = np.from_dlpack(array)
        return found if found.flags.writeable or is_read_only(array) else np.asarray(_Writable(found))

    def _locate(self, array: AnyArray) -> Location:
        driver = _driver()
        unaware = not hasattr(array, "__cuda_array_interface__")
        sealed = unaware and is_read_only(array)
        if unaware:
            array = driver.imported(array)
        interface = array.__cuda_array_interface__
        address, read_only = interface["data"]
        dtype = dtype_named(getattr(array, "dtype", interface["typestr"]))
        shape = tuple(interface["shape"])
        strides = interface.get("strides") or c_strides(shape, dtype)
        descriptor = Descriptor(dtype, shape, tuple(strides), address, not (read_only or sealed))
        own = type(array).__module__.partition(".")[0] == "cupy"
        device = array.device.id if own else driver.device_of(address) if address else None

        def stream() -> int | None:  # each time anew: the one of now may be gone by the next update
            named: int | None = array.__cuda_array_interface__.get("stream")
            return named

        return Location(descriptor, device, "cupy", None if own else stream, array, unaware)


library = _Interfaces()
