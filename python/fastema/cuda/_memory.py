"""What is done to averages on CUDA devices besides averaging; see fastema/_memory.py.

Tensors of torch by torch itself, in its current stream. All other arrays are CuPy's or like them: those are
copied byte by byte in CuPy's current stream, and what needs arithmetic goes through host memory: CuPy flushes
subnormals to zero, and before version 14 it has no bfloat16.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from .. import _memory
from . import _driver
from ._arrays import Shown, shown
from ._driver import Driver, Stream


class OfTorch(_memory.Memory):
    """Tensors of torch."""

    def face(self, array: Any) -> np.ndarray:
        return shown(array, "values").face

    def device(self, array: Any) -> int | None:
        return int(array.device.index or 0)

    def empty_like(self, array: Any, dtype: Any) -> Any:
        import torch  # noqa: PLC0415 - loaded already: the array is one of its tensors

        kind = getattr(torch, np.dtype(dtype).name)
        return array.detach().new_empty_strided(array.shape, _dense_strides(array), dtype=kind)

    def bits(self, array: Any) -> Any:
        import torch  # noqa: PLC0415

        kinds = {2: torch.float16, 4: torch.float32, 8: torch.float64}
        return array.detach().view(kinds[array.element_size()])

    def host(self, array: Any) -> np.ndarray:
        found = np.empty_like(self.face(array))
        of_host(found).copy_(array.detach())
        return found

    def write(self, array: Any, target: Any) -> None:
        if type(_memory.of(array)) is not OfTorch:
            array = of_host(_memory.host(array))
        target.detach().copy_(array.detach())

    def clear(self, array: Any) -> None:
        array.detach().zero_()

    def quotient(self, average: Any, divisor: float) -> Any:
        import torch  # noqa: PLC0415

        compute = torch.float64 if average.dtype == torch.float64 else torch.float32
        # on the device: of a number of the host torch takes the inverse, and multiplies
        by = average.new_full((), divisor, dtype=compute)
        return average.to(compute).div(by).to(average.dtype)


def of_host(array: np.ndarray) -> Any:
    """Return a tensor in host memory of the same contents, and the same memory where that is writable."""
    import torch  # noqa: PLC0415 - loaded already: it is for one of its tensors

    if not array.flags.writeable:
        array = array.copy(order="K")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _dense_strides(tensor: Any) -> tuple[int, ...]:
    """Return strides in elements, in the order that a tensor has in memory."""
    strides = np.empty_like(shown(tensor, "values").face, np.uint8).strides
    return tuple(int(stride) for stride in strides)


class OfCuPy(_memory.Memory):
    """Arrays with `__cuda_array_interface__`; new ones are CuPy's."""

    def face(self, array: Any) -> np.ndarray:
        return shown(array, "values").face

    def device(self, array: Any) -> int | None:
        return shown(array, "values").device or 0

    def empty_like(self, array: Any, dtype: Any) -> Any:
        like, dtype = np.empty_like(self.face(array), dtype), np.dtype(dtype)
        driver = _driver.load()
        with driver.on(shown(array, "values").device or 0):
            return driver.empty(like.shape, like.strides, dtype)

    def bits(self, array: Any) -> Any:
        return _Bits(array, self.face(array))

    def host(self, array: Any) -> np.ndarray:
        with _at_work(array) as (driver, seen, stream):
            found = np.empty_like(_dense(seen.face))
            if found.size:
                driver.read(found, seen.face.ctypes.data, stream)
                driver.finish(driver.record(stream))
        return found

    def write(self, array: Any, target: Any) -> None:
        source = _memory.face(array)
        with _at_work(target) as (driver, seen, stream):
            face = _dense(seen.face)
            if not face.size:
                return
            here = type(_memory.of(array)) is OfCuPy and shown(array, "values").device == seen.device
            if here and (source.dtype, source.strides) == (face.dtype, face.strides):
                driver.copy(face.ctypes.data, source.ctypes.data, face.nbytes, stream)
                return
            contents = np.empty_like(face)
            _memory.write(_memory.host(array), contents)
            driver.write(face.ctypes.data, contents, stream)
            driver.finish(driver.record(stream))

    def clear(self, array: Any) -> None:
        with _at_work(array) as (driver, seen, stream):
            if seen.face.size:
                driver.clear(_dense(seen.face).ctypes.data, seen.face.nbytes, stream)

    def quotient(self, average: Any, divisor: float) -> Any:
        host = self.host(average)
        made = self.empty_like(average, host.dtype)
        self.write(_memory.of(host).quotient(host, divisor), made)
        return made


class _Bits:
    """An array of floating numbers with the bits of another."""

    def __init__(self, array: Any, face: np.ndarray) -> None:
        self.dtype = np.dtype(f"f{face.dtype.itemsize}")
        seen = shown(array, "values")
        self._held = array
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": face.shape,
            "strides": face.strides,
            "typestr": self.dtype.str,
            "data": (face.ctypes.data, not face.flags.writeable),
            "stream": seen.stream,
        }


@contextmanager
def _at_work(array: Any) -> Iterator[tuple[Driver, Shown, Stream]]:
    """Make an array's device the current one, and its library's stream wait for what makes the array."""
    driver, seen = _driver.load(), shown(array, "values")
    device = seen.device or 0
    with driver.on(device):
        stream = driver.current_stream(seen.owner, device)
        if seen.stream is not None:
            driver.wait(stream, driver.record(Stream(seen.stream)))
        yield driver, seen, stream


def _dense(face: np.ndarray) -> np.ndarray:
    """Return an array that is as long in memory as it has elements.

    Raises:
        ValueError: It has holes.
    """
    dense = np.empty_like(face).strides
    if face.size and any(n > 1 and x != y for n, x, y in zip(face.shape, face.strides, dense, strict=True)):
        raise ValueError(f"values on a CUDA device must be dense, got strides {face.strides}")
    return face
