"""What is asked of CuPy, by a model of CUDA's rules, and of CuPy itself as far as that goes without a GPU."""

import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fake_cuda
import fake_cupy
from fastema.cuda import _driver
from fastema.cuda._driver import Stream


@pytest.fixture
def cupy():
    return fake_cupy.CuPy()


@pytest.fixture
def driver(cupy):
    return _driver.Driver(cupy)


# --- devices ------------------------------------------------------------------------------------------


def test_no_device_but_that_of_the_arrays_gets_a_context(cupy, driver):
    with driver.on(1):
        assert cupy.getDevice() == 1
        memory = driver.upload(np.zeros(4), Stream(7))
    del memory
    with ThreadPoolExecutor(1) as other:
        other.submit(lambda: driver.on(1).__enter__()).result()
    assert cupy.contexts == {1}


def test_a_thread_has_the_device_and_the_context_again_that_it_had(cupy, driver):
    states = []

    def work():
        for _ in range(2):  # the first time the context is made
            with driver.on(1):
                states.append((cupy.getDevice(), cupy.cuda.driver.ctxGetCurrent()))
            states.append((cupy.getDevice(), cupy.cuda.driver.ctxGetCurrent()))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert states == [(1, 101), (0, 0)] * 2
    cupy.setDevice(0)
    with driver.on(1), driver.on(1):
        assert cupy.getDevice() == 1
    assert (cupy.getDevice(), cupy.cuda.driver.ctxGetCurrent()) == (0, 100)


def test_a_thread_that_never_asked_for_anything_can_launch(cupy, driver):
    """The driver's launch needs a current context, which the runtime makes by the way, and the driver not."""
    with driver.on(0):
        pass

    def work():
        with driver.on(0):
            cupy.cuda.driver.launchKernel()

    with ThreadPoolExecutor(1) as other:
        other.submit(work).result()
    assert cupy.log == [("launch", 0)]


# --- is there any? ------------------------------------------------------------------------------------


def cupy_that(monkeypatch, **broken):
    """Have a CuPy imported some of whose functions fail."""
    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.0"
    runtime = types.SimpleNamespace(is_hip=False, getDeviceCount=lambda: 1)
    cupy.cuda = types.SimpleNamespace(
        runtime=runtime, nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)), driver=None
    )
    for name, value in broken.items():
        place = cupy.cuda.nvrtc if name == "getVersion" else runtime
        setattr(place, name, value)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    _driver.load.cache_clear()
    monkeypatch.setattr(_driver, "_succeeds", _driver._succeeds.__wrapped__)


def raising(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (
            {"getDeviceCount": raising(RuntimeError("cudaErrorInsufficientDriver"))},
            "cudaErrorInsufficientDriver",
        ),
        ({"getVersion": raising(ImportError("libnvrtc.so.13"))}, r"libnvrtc\.so\.13"),
        ({"is_hip": True}, "it was built for ROCm"),
    ],
)
def test_a_cupy_that_cannot_run_is_as_good_as_none(monkeypatch, torch, broken, reason):
    cupy_that(monkeypatch, **broken)
    with pytest.raises(
        ImportError, match=f"needs a CuPy that runs, and 14.0 does not: {reason}; pip install 'fastema"
    ):
        _driver.load()
    pytest.importorskip("keras", reason="keras is not installed")
    from fastema.keras.backends import torch as backend

    average, value = fake_cuda.tensor(torch.zeros(3)), fake_cuda.tensor(torch.ones(3))
    with torch.no_grad():
        assert backend.Torch().update([average], [value], lambda: 0.5, None, "auto") == "graph"
    assert (average == 0.5).all()


def test_a_cupy_that_runs_is_loaded(monkeypatch):
    cupy_that(monkeypatch)
    assert isinstance(_driver.load(), _driver.Driver)
    assert _driver.runs()
    _driver.load.cache_clear()


# --- memory -------------------------------------------------------------------------------------------


class OfTorch:
    """A tensor of torch's pool that says it lies on a device, and what was asked of it."""

    def __init__(self, torch, monkeypatch):
        self.used, self.made, self._empty = [], [], torch.empty
        self.device = torch.device("cuda", 1)
        monkeypatch.setattr(torch, "empty", self._make)
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (handle, device))
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: (0, device))

    def _make(self, size, dtype, device):
        assert device == self.device
        self._tensor = self._empty(size, dtype=dtype)
        self.made.append(size)
        return self

    def data_ptr(self):
        return self._tensor.data_ptr()

    def record_stream(self, stream):
        self.used.append(stream)


@pytest.mark.parametrize("last", [5, 0])
def test_tables_of_torchs_arrays_lie_in_torchs_pool_which_may_hold_all_memory(
    cupy, driver, torch, monkeypatch, last
):
    pool, cupy.free = OfTorch(torch, monkeypatch), 0
    with driver.on(1):
        memory = driver.upload(np.zeros(4), Stream(7, None, "torch"))
        assert pool.made == [32]
        memory.stream = Stream(last, None, "torch")
        del memory
        assert pool.used == [(last, pool.device)]
        driver.upload(np.zeros(4), Stream(7, None, "torch"))
    assert len(pool.used) == 1, "its own stream needs no word"


def test_cupys_pool_gives_back_what_it_does_not_use(cupy, driver):
    cupy.free, cupy.pooled = 0, 4096
    with driver.on(0):
        driver.upload(np.zeros(4), Stream(7))
        assert cupy.pooled == 0
        with pytest.raises(fake_cupy.CudaError, match="out of memory"):
            driver.upload(np.zeros(1 << 20), Stream(7))


def test_a_forked_child_gives_no_memory_back(cupy, driver, monkeypatch):
    """CUDA would raise there, and a destructor print it."""
    with driver.on(0):
        memory = driver.upload(np.zeros(4), Stream(7))
    monkeypatch.setattr(_driver.os, "getpid", lambda: -1)
    cupy.log.clear()
    del memory
    assert cupy.log == []


# --- graphs -------------------------------------------------------------------------------------------


def test_only_a_stream_that_may_be_captured_is_asked(cupy, driver):
    """CUDA takes it for an error to ask of the default stream while others are captured."""
    cupy.capturing = {9}
    assert driver.is_capturing(Stream(9))
    assert not driver.is_capturing(Stream(8))
    assert not driver.is_capturing(Stream(0))


def test_nothing_is_copied_from_host_memory_in_a_capture(cupy, driver):
    cupy.capturing = {9}
    with driver.on(0):
        for call in (
            lambda: driver.upload(np.zeros(4), Stream(9)),
            lambda: driver.write(4096, np.zeros(4), Stream(9)),
        ):
            with pytest.raises(RuntimeError, match="copied from host memory that is gone by then"):
                call()
    assert cupy.log == []
