"""What is asked of CuPy, by a model of CUDA's rules, and of CuPy itself as far as that goes without a GPU."""

import os
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fake_cuda
import fake_cupy
import fastema
import nvrtc
from fastema.cuda import _driver
from fastema.cuda._driver import Stream
from processes import SUPPORT, output_of


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


def test_tests_of_a_gpu_fail_where_one_must_be_and_is_not():
    """Skipped, they would pass unseen on the very machine that is to run them."""
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "-k", "subnormals"]
    for needed, ending, code in (("0", "2 skipped", 0), ("1", "2 errors", 1)):
        done = subprocess.run(
            [*command, Path(__file__).with_name("test_gpu.py")],
            env={**os.environ, "FASTEMA_GPU": needed, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ending in done.stdout, done.stdout
        assert done.returncode == code


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
    monkeypatch.setattr(os, "getpid", lambda: -1)
    cupy.log.clear()
    del memory
    assert cupy.log == []


# --- the host's time of a call ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_cuda_getCurrentRawStream", None])
def test_the_current_stream_of_torch_is_known_by_its_handle(driver, torch, monkeypatch, name):
    if name is None:
        monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream", raising=False)
        stream = types.SimpleNamespace(cuda_stream=8)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream if device == 1 else None)
    else:
        monkeypatch.setattr(torch._C, name, lambda device: 7 + device, raising=False)
    assert driver.current_stream("torch", 1) == Stream(8, None, "torch")
    assert driver.current_stream("torch", 1) is driver.current_stream("torch", 1)


def test_a_call_costs_the_host_the_same_few_calls_for_any_list(cupy, driver, torch, monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)  # noqa: ARG005
    monkeypatch.setattr(_driver, "load", lambda: driver)
    monkeypatch.setattr(
        _driver, "_from_torch", lambda *_: _driver.Allocation(4096, lambda *_: None, Stream(7))
    )
    monkeypatch.setattr(driver, "_function", lambda *_: types.SimpleNamespace(ptr=1))
    monkeypatch.setattr(driver, "multiprocessors", lambda _: 132)
    counts = []
    for count in (1, 500):
        averages, values = ([fake_cuda.tensor(torch.zeros(16)) for _ in range(count)] for _ in "ab")
        pairs, calls = fastema.Pairs(averages, values), []
        pairs.update(0.5, check=False)
        sys.setprofile(lambda *seen, calls=calls: calls.append(seen[1]))
        pairs.update(0.5, check=False)
        sys.setprofile(None)
        counts.append(sum(event in ("call", "c_call") for event in calls))
    assert counts[0] == counts[1] <= 30  # those of what stands in for CUDA among them
    assert sum(name == "launch" for name, *_ in cupy.log) == 4


# --- graphs -------------------------------------------------------------------------------------------


def test_only_a_stream_that_may_be_captured_is_asked(cupy, driver):
    """CUDA takes it for an error to ask of the default stream while others are captured."""
    cupy.capturing = {9}
    assert driver.is_capturing(Stream(9))
    assert not driver.is_capturing(Stream(8))
    assert not any(driver.is_capturing(Stream(handle)) for handle in (0, 1))


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


# --- kernels ------------------------------------------------------------------------------------------

COMPILED = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import nvrtc
    nvrtc.library()  # loaded, it is found by CuPy wherever it is
    from types import SimpleNamespace
    import cupy
    from cupy.cuda import compiler
    from fastema.cuda import _driver, _source

    compiled, loaded = [], []

    class Module:  # what CuPy gives cubins to, which needs a device
        mapping = {}

        def load(self, cubin):
            loaded.append(bytes(cubin))

        def _set_mapping(self, mapping):
            self.mapping = mapping or {}

        def get_function(self, name):
            assert self.mapping.get(name, name).encode() in loaded[-1]
            return SimpleNamespace(kernel=None)

    compiles = compiler._NVRTCProgram.compile

    def compile(self, *arguments):
        if "fastema" in self.src:
            compiled.append(self.src)
        return compiles(self, *arguments)

    def raw_module(code, options, name_expressions=None):  # as CuPy's does, but for asking for the device
        return compiler._compile_module_with_cache(
            code, options, name_expressions=name_expressions
        )

    compiler._NVRTCProgram.compile = compile
    compiler.function.Module = Module
    compiler._get_arch = lambda: "90"
    compiler._get_arch_for_options_for_nvrtc = lambda arch=None: ("-arch=sm_90", "cubin")
    driver = _driver.Driver(SimpleNamespace(RawModule=raw_module, cuda=cupy.cuda))
    for entry in (_source.update_name([10], 0), _source.SWAP, _source.ADVANCE):
        driver._function(entry, 0)
    print(len(compiled), len(loaded))
"""


def test_what_one_process_compiled_another_reads_from_the_disk(tmp_path):
    """CuPy before 14.2 compiled anew what it was asked for by an expression of C++."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    nvrtc.library()
    assert output_of(COMPILED, SUPPORT, CUPY_CACHE_DIR=str(tmp_path)) == "3 3"
    assert output_of(COMPILED, SUPPORT, CUPY_CACHE_DIR=str(tmp_path)) == "0 3"
