"""What fastema asks of CUDA devices: the only file that knows CuPy.

Everything else in this package goes through the object that `load` returns. Tests put another in its place,
which does the same on host memory (tests/support/fake_cuda.py).
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from ._source import OPTIONS, THREADS, unit


class Stream(NamedTuple):
    """A CUDA stream, what keeps it from being destroyed, and whose it is."""

    handle: int
    holder: object = None
    owner: Literal["torch", "cupy"] = "cupy"


class Handle(Protocol):
    """An object of CuPy's that destroys what it stands for: an event, or a kernel's function."""

    @property
    def ptr(self) -> int:
        """What CUDA knows it by."""
        ...


class Allocation:
    """A piece of device memory, given back in the order of the stream that used it last.

    CuPy's pool would hand it out again at once, while a kernel on another stream still reads it.

    Attributes:
        contents: What it was made from, as long as a device that reads host memory by itself may need it.
    """

    contents: np.ndarray | None = None

    def __init__(self, address: int, free: Callable[[int, Stream], None], stream: Stream) -> None:
        self.address = address
        self.stream = stream
        self._free = free
        self._process = os.getpid()

    def __del__(self) -> None:
        # a process that was forked cannot ask CUDA for anything, nor is the memory its own
        if not sys.is_finalizing() and os.getpid() == self._process:
            self._free(self.address, self.stream)


Launch = Callable[[int, Stream], None]  # takes the number of blocks


def not_in_graph(what: str) -> RuntimeError:
    """Return the error of a call that cannot be part of a CUDA graph.

    Args:
        what: What each replay would do again.
    """
    return RuntimeError(
        f"a CUDA graph is being captured, and its replays would see {what}: before the capture make "
        "fastema.Pairs and update them once by a fastema.cuda.Schedule; capture update(schedule, check=False)"
    )


def _raw_stream_of_torch() -> Callable[[int], int]:
    """Return what tells the handle of torch's current stream on a device; a call of ours takes less time."""
    import torch  # noqa: PLC0415 - loaded already: it owns the arrays

    raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw or (lambda device: int(torch.cuda.current_stream(device).cuda_stream))


def _from_torch(size: int, stream: Stream, device: int) -> Allocation:
    """Return memory of torch's pool, which may hold all there is on the device."""
    import torch  # noqa: PLC0415 - loaded already: it owns the arrays

    tensor = torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device))

    def free(_: int, last: Stream) -> None:
        if last.handle != stream.handle:
            cuda: Any = torch.cuda
            place = tensor.device
            default = last.handle == 0  # which ExternalStream would take for a new one
            used = cuda.default_stream(place) if default else cuda.ExternalStream(last.handle, device=place)
            tensor.record_stream(used)  # the pool waits for it

    return Allocation(tensor.data_ptr(), free, stream)


class _Current:
    """Makes a context the thread's current one for a while; a class, as each call of ours enters one.

    `cudaSetDevice` would make a context, half a gigabyte of it, on the device that a thread has by default.
    """

    __slots__ = ("_before", "_context", "_cuda")

    def __init__(self, cuda: Any, context: int) -> None:
        self._cuda, self._context = cuda, context

    def __enter__(self) -> None:
        self._before = self._cuda.ctxGetCurrent()
        if self._before != self._context:
            self._cuda.ctxSetCurrent(self._context)

    def __exit__(self, *_raised: object) -> None:
        if self._before != self._context:
            self._cuda.ctxSetCurrent(self._before)


class Driver:
    """CUDA through CuPy."""

    def __init__(self, cupy: ModuleType) -> None:
        self._cupy = cupy
        self._runtime = cupy.cuda.runtime
        self._cuda = cupy.cuda.driver
        self._contexts: dict[int, int] = {}
        self._functions: dict[tuple[str, int], Handle] = {}
        self._in_graphs: dict[int, Allocation] = {}
        self._raw_stream: Callable[[int], int] | None = None
        self._streams: dict[int, Stream] = {}  # torch's, by their handles

    # --- arrays -----------------------------------------------------------------------------------

    def imported(self, array: Any) -> Any:
        """Return an array that has `__dlpack__` as one that has `__cuda_array_interface__`."""
        return self._cupy.from_dlpack(array)

    def device_of(self, address: int) -> int:
        """Tell on which device an address lies."""
        return int(self._runtime.pointerGetAttributes(address).device)

    def empty(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype) -> Any:
        """Return an array without holes in new memory of the current device."""
        size = math.prod(shape)
        memory = self._cupy.cuda.alloc(max(size * dtype.itemsize, 1))
        return self._cupy.ndarray(shape, dtype, memory, strides if size else None)

    # --- devices and streams ----------------------------------------------------------------------

    def on(self, device: int) -> AbstractContextManager[None]:
        """Make a device the current one, in a thread that has no context yet as well."""
        context = self._contexts.get(device)
        return _Current(self._cuda, self._context(device) if context is None else context)

    def _context(self, device: int) -> int:
        """Return the context that all libraries share on a device, made where there is none."""

        def found() -> int:
            self._runtime.setDevice(device)
            return int(self._cuda.ctxGetCurrent())

        with ThreadPoolExecutor(1) as thread:  # whose current device nobody has to get back
            self._contexts[device] = thread.submit(found).result()
        return self._contexts[device]

    def multiprocessors(self, device: int) -> int:
        """Tell how many multiprocessors a device has."""
        attribute = self._runtime.cudaDevAttrMultiProcessorCount
        return int(self._runtime.deviceGetAttribute(attribute, device))

    def current_stream(self, owner: str, device: int) -> Stream:
        """Return the stream on which ``"torch"`` or ``"cupy"`` works on a device now."""
        if owner == "torch":
            if self._raw_stream is None:
                self._raw_stream = _raw_stream_of_torch()
            handle = self._raw_stream(device)
            return self._streams.get(handle) or self._streams.setdefault(
                handle, Stream(handle, None, "torch")
            )
        stream = self._cupy.cuda.get_current_stream(device)
        return Stream(stream.ptr, stream)

    def new_stream(self) -> Stream:
        """Return a stream that waits for no other."""
        stream = self._cupy.cuda.Stream(non_blocking=True)
        return Stream(stream.ptr, stream)

    def is_capturing(self, stream: Stream) -> bool:
        """Tell whether what a stream is asked for is not done, but becomes a CUDA graph."""
        # the default stream, by both its names, never is; asked of while others are, it is an error
        return stream.handle > 1 and bool(self._runtime.streamIsCapturing(stream.handle))

    def record(self, stream: Stream) -> Handle:
        """Return an event: all that was asked of a stream so far is done."""
        event: Handle = self._cupy.cuda.Event(block=True, disable_timing=True)  # a waiting host thread sleeps
        self._runtime.eventRecord(event.ptr, stream.handle)
        return event

    def wait(self, stream: Stream, event: Handle) -> None:
        """Have a stream wait for an event, on the device."""
        self._runtime.streamWaitEvent(stream.handle, event.ptr)

    def finish(self, event: Handle) -> None:
        """Wait for an event, on the host and without the interpreter's lock."""
        self._runtime.eventSynchronize(event.ptr)

    def synchronize(self) -> None:
        """Wait until the current device has done all that it was asked for."""
        self._runtime.deviceSynchronize()

    # --- memory -----------------------------------------------------------------------------------

    def upload(self, contents: np.ndarray, stream: Stream) -> Allocation:
        """Copy to new device memory.

        Raises:
            RuntimeError: As `write` does.
        """
        self._check_host_memory(stream)
        memory = self.allocate(max(contents.nbytes, 1), stream)
        memory.contents = contents
        self.put(memory.address, contents, stream)
        return memory

    def write(self, address: int, contents: np.ndarray, stream: Stream) -> None:
        """Copy to device memory; `contents` may be changed afterwards.

        Raises:
            RuntimeError: A graph is captured, which would read host memory at each replay.
        """
        self._check_host_memory(stream)
        self.put(address, contents, stream)

    def _check_host_memory(self, stream: Stream) -> None:
        if self.is_capturing(stream):
            raise not_in_graph("what is paired or moved now, copied from host memory that is gone by then")

    def allocate(self, size: int, stream: Stream) -> Allocation:
        """Return new device memory, for what a stream does from now on: of the pool of the stream's owner.

        Raises:
            RuntimeError: There is none.
        """
        device = int(self._runtime.getDevice())
        if stream.owner == "torch":
            return _from_torch(size, stream, device)

        def free(address: int, stream: Stream) -> None:
            with self.on(device):  # the default stream is the current device's
                if not self.is_capturing(stream):  # it would be freed by each replay
                    self._runtime.freeAsync(address, stream.handle)

        try:
            address = self._runtime.mallocAsync(size, stream.handle)
        except RuntimeError:  # CuPy's pool may hold what is free
            self._cupy.get_default_memory_pool().free_all_blocks()
            address = self._runtime.mallocAsync(size, stream.handle)
        return Allocation(address, free, stream)

    def use(self, memory: Allocation, stream: Stream) -> None:
        """Order what a stream is asked to do with memory after what others were.

        What a graph works with is never given back: nobody tells when it is replayed for the last time.
        """
        if self.is_capturing(stream):
            self._in_graphs[memory.address] = memory
        elif stream.handle != memory.stream.handle:
            self.wait(stream, self.record(memory.stream))
            memory.stream = stream

    def put(self, address: int, contents: np.ndarray, stream: Stream) -> None:
        """Copy as `write` does, in no capture."""
        if contents.nbytes:
            to_device = self._runtime.memcpyHostToDevice
            # of pageable memory, which is staged before the call returns
            self._runtime.memcpyAsync(
                address, contents.ctypes.data, contents.nbytes, to_device, stream.handle
            )

    def read(self, target: np.ndarray, address: int, stream: Stream) -> None:
        """Copy from device memory, in the order of a stream; at once where `target` is `pinned`."""
        to_host = self._runtime.memcpyDeviceToHost
        self._runtime.memcpyAsync(target.ctypes.data, address, target.nbytes, to_host, stream.handle)

    def copy(self, target: int, source: int, size: int, stream: Stream) -> None:
        """Copy so many bytes within the memory of devices."""
        self._runtime.memcpyAsync(target, source, size, self._runtime.memcpyDeviceToDevice, stream.handle)

    def clear(self, address: int, size: int, stream: Stream) -> None:
        """Set so many bytes to zero."""
        self._runtime.memsetAsync(address, 0, size, stream.handle)

    def pinned(self, size: int) -> np.ndarray:
        """Return host memory that the device copies to while the host goes on."""
        memory = self._cupy.cuda.alloc_pinned_memory(size)
        return np.frombuffer(memory, np.uint8, size)

    # --- kernels ----------------------------------------------------------------------------------

    def kernel(self, expression: str, arguments: np.ndarray, device: int) -> Launch:
        """Return a call that launches a kernel with what its arguments hold then.

        Args:
            expression: The kernel as C++ names it, template arguments included.
            arguments: A structured scalar, in an array; a field for each parameter.
            device: The current one.
        """
        fields = (arguments.dtype.fields or {}).values()
        begins = [arguments.ctypes.data + int(offset) for _, offset, *_ in fields]
        parameters = (ctypes.c_void_p * len(begins))(*begins)
        function, address = self._function(expression, device), ctypes.addressof(parameters)
        launch_kernel = self._cuda.launchKernel

        # the default argument keeps them alive
        def launch(blocks: int, stream: Stream, _kept: object = (arguments, parameters)) -> None:
            launch_kernel(function.ptr, blocks, 1, 1, THREADS, 1, 1, 0, stream.handle, address, 0)

        return launch

    def _function(self, expression: str, device: int) -> Handle:
        key = expression, device
        if key not in self._functions:
            code, name = unit(expression)
            module = self._cupy.RawModule(code=code, options=OPTIONS)
            self._functions[key] = module.get_function(name).kernel
        return self._functions[key]


@cache
def load() -> Driver:
    """Return the driver.

    Raises:
        ImportError: CuPy is not installed, or cannot run here.
    """
    try:
        import cupy  # noqa: PLC0415 - only where arrays lie on a device
    except ImportError as missing:
        raise ImportError(f"averaging arrays in CUDA memory needs CuPy: {_INSTALL} ({missing})") from None
    try:
        if cupy.cuda.runtime.is_hip:
            raise RuntimeError("it was built for ROCm")
        cupy.cuda.runtime.getDeviceCount()  # makes no context
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as broken:
        raise ImportError(
            f"averaging arrays in CUDA memory needs a CuPy that runs, and {cupy.__version__} does not: "
            f"{broken}; {_INSTALL}"
        ) from None
    return Driver(cupy)


_INSTALL = "pip install 'fastema[cuda13]', or 'fastema[cuda12]' for a driver of CUDA 12"


def runs() -> bool:
    """Tell whether arrays in CUDA memory can be averaged by our kernels here."""
    return _succeeds(load)


@cache
def _succeeds(load: Callable[[], Driver]) -> bool:
    try:
        load()
    except ImportError:
        return False
    return True
