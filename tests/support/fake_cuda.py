"""A CUDA device on the host, for machines without one: streams, events, memory and our kernels.

Its kernels are kernels.cu itself, compiled by a C++ compiler (cuda_kernels.cpp). Its streams are queues:
what is asked of a `lazy` one happens when somebody waits for it and not before, so a missing wait shows.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
import tempfile
import threading
from collections import deque
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from fastema.cuda import _driver, _source
from fastema.cuda._driver import Stream


@cache
def kernels():
    """Return the library of kernels; skip the test where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        import pytest  # which the benchmark of GPUs can do without

        pytest.skip("there is no C++ compiler for the kernels of the fake device")
    here = Path(__file__).parent
    folders = here, _source.FOLDER
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", *(f"-I{x}" for x in folders)]
    flags.append(f"-DMIXES={_source.bits_of(_source.MIXES.values())}")
    with tempfile.TemporaryDirectory(prefix="fastema-fake-") as folder:
        target = Path(folder) / "kernels.so"
        subprocess.run([compiler, *flags, here / "cuda_kernels.cpp", "-o", target], check=True)
        library = ctypes.CDLL(str(target))
    library.run.restype = ctypes.c_bool
    return library


class Array:
    """An array in the memory of a fake device; `host` is that memory."""

    places = {}  # noqa: RUF012 - where arrays begin, and on which device

    def __init__(self, host, device=0, stream=None):
        self.host, self.stream = np.asarray(host), stream
        self.places[self.host.ctypes.data] = device

    @property
    def dtype(self):
        return self.host.dtype

    @property
    def __cuda_array_interface__(self):
        host = self.host
        return {
            "version": 3,
            "shape": host.shape,
            "strides": None if host.flags.c_contiguous else host.strides,
            "typestr": host.dtype.str,
            "data": (host.ctypes.data, not host.flags.writeable),
            "stream": self.stream,
        }


def on_device(arrays):
    """Return what was given, with its NumPy arrays on the fake device."""
    if isinstance(arrays, list):
        return [on_device(x) for x in arrays]
    return Array(arrays) if isinstance(arrays, np.ndarray) else arrays


class Exporter:
    """An array on a fake device that only speaks DLPack."""

    def __init__(self, host, device=0):
        self.host, self.array = host, Array(host, device)
        if not host.flags.writeable:  # CuPy drops that
            writable = np.lib.array_utils.byte_bounds(host)[0]
            memory = (ctypes.c_char * host.nbytes).from_address(writable)
            self.array = Array(np.frombuffer(memory, host.dtype).reshape(host.shape), device)

    def __dlpack__(self, **arguments):
        return self.host.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return 2, 0


def tensor(values, device=0):
    """Return a torch tensor that says it lies on a CUDA device, as do those that are made from it."""
    import torch

    return torch.as_tensor(values).as_subclass(_tensors(device))


@cache
def _tensors(device):
    import torch

    class OnCuda(torch.Tensor):
        is_cuda = True

    OnCuda.device = torch.device("cuda", device)
    return OnCuda


class Event:
    """Something that will have happened on a stream."""

    def __init__(self, handle, captured):
        self.handle, self.captured, self.done = handle, captured, False


class Driver(_driver.Driver):
    """What `_driver.Driver` does with CuPy, on the host.

    Args:
        multiprocessors: How many the device has.
        log: What was asked of it, in order.
        lazy: The handles of streams that do nothing before they must; new streams count from 100.
        current: The streams of the libraries.
        broken: A word of the log at which the device fails.
        destroyed: The handles of streams that are no more.
        captured: By the handles of streams, the graph that what they are asked for becomes.
    """

    def __init__(self):
        self.log, self.lazy, self.broken = [], set(), None
        self.destroyed = set()
        self.captured, self._in_graphs = {}, {}
        self.sms = 4
        self.current = {"torch": Stream(1), "cupy": Stream(2)}
        self.entered, self.freed, self.launches = [], [], []
        self._queues, self._lock, self._memory = {}, threading.RLock(), {}
        self._handles = itertools.count(100)

    def empty(self, shape, strides, dtype):
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.full(size, 0xFF, np.uint8)
        host = np.ndarray(shape, dtype, memory, 0, strides if size else None)
        return Array(host, self.entered[-1])

    # --- arrays, devices, streams -----------------------------------------------------------------

    def imported(self, array):
        return array.array

    def device_of(self, address):
        return Array.places[address]

    @contextmanager
    def on(self, device):
        self.entered.append(device)
        yield

    def multiprocessors(self, device):  # noqa: ARG002
        return self.sms

    def current_stream(self, owner, device):  # noqa: ARG002
        return self.current[owner]

    def new_stream(self):
        return Stream(next(self._handles))

    def enqueue(self, stream, name, action, *details):
        """Ask a stream to do something."""
        with self._lock:
            if stream.handle in self.destroyed:
                raise RuntimeError("cudaErrorInvalidResourceHandle")
            if name == self.broken:
                raise RuntimeError("the device is on fire")
            self.log.append((name, stream.handle, *details))
            if stream.handle in self.captured:
                self.captured[stream.handle].append(action)
                return
            queue = self._queues.setdefault(stream.handle, deque())
            queue.append(action)
            if stream.handle not in self.lazy:
                self._drain(stream.handle, lambda: not queue)

    @contextmanager
    def held(self):
        """Keep other threads from asking for anything."""
        with self._lock:
            yield

    def _drain(self, handle, enough):
        queue = self._queues.setdefault(handle, deque())
        while not enough():
            queue.popleft()()

    def synchronize(self):
        """Do everything that was asked for."""
        with self._lock:
            for handle in list(self._queues):
                self._drain(handle, lambda handle=handle: not self._queues[handle])

    def is_capturing(self, stream):
        return stream.handle in self.captured

    @contextmanager
    def capture(self, stream):
        """Have a stream do nothing but become a graph, which is a list of calls."""
        graph = self.captured[stream.handle] = []
        try:
            yield graph
        finally:
            self.captured = {handle: x for handle, x in self.captured.items() if x is not graph}

    def record(self, stream):
        event = Event(stream.handle, stream.handle in self.captured)
        self.enqueue(stream, "record", lambda: setattr(event, "done", True))
        return event

    def wait(self, stream, event):
        if event.captured and stream.handle not in self.captured:  # it becomes part of the graph
            self.captured[stream.handle] = self.captured[event.handle]
        elif stream.handle in self.captured and not event.captured:
            raise RuntimeError("cudaErrorStreamCaptureIsolation")
        self.enqueue(stream, "wait", lambda: self._drain(event.handle, lambda: event.done), event.handle)

    def finish(self, event):
        with self._lock:
            self.log.append(("finish", event.handle))
            self._drain(event.handle, lambda: event.done)

    # --- memory -----------------------------------------------------------------------------------

    def allocate(self, size, stream):
        memory = np.zeros(size, np.uint8)
        address = memory.ctypes.data
        self._memory[address] = memory
        return _driver.Allocation(address, self._free, stream)

    def _free(self, address, stream):
        self.freed.append(stream.handle)
        memory = self._memory.pop(address)
        self.enqueue(stream, "free", lambda: memory.fill(0xFF))

    def put(self, address, contents, stream):
        staged = ctypes.string_at(contents.ctypes.data, contents.nbytes)
        self.enqueue(stream, "write", lambda: ctypes.memmove(address, staged, len(staged)), len(staged))

    def read(self, target, address, stream):
        self.enqueue(
            stream,
            "read",
            lambda: ctypes.memmove(target.ctypes.data, address, target.nbytes),
            target.nbytes,
        )

    def copy(self, target, source, size, stream):
        self.enqueue(stream, "copy", lambda: ctypes.memmove(target, source, size), size)

    def clear(self, address, size, stream):
        self.enqueue(stream, "clear", lambda: ctypes.memset(address, 0, size), size)

    def pinned(self, size):
        self.log.append(("pinned", None, size))
        return np.zeros(size, np.uint8)

    # --- kernels ----------------------------------------------------------------------------------

    def kernel(self, expression, arguments, device):  # noqa: ARG002
        name = expression.removeprefix("fastema::")
        name = f"update {name[-2]}" if name.startswith("update") else name
        library, offsets = kernels(), [offset for _, offset, *_ in arguments.dtype.fields.values()]

        def launch(blocks, stream):
            taken = arguments.copy()  # as a launch takes them

            def run():
                begins = [taken.ctypes.data + offset for offset in offsets]
                assert library.run(name.encode(), blocks, (ctypes.c_void_p * len(begins))(*begins))

            self.enqueue(stream, expression, run, blocks)

        return launch


@contextmanager
def installed():
    """Put the fake in the place of CuPy."""
    load, fake = _driver.load, Driver()
    _driver.load = lambda: fake
    try:
        yield fake
    finally:
        _driver.load = load
