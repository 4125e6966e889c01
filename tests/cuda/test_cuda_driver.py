"""What is asked of CuPy, by a model of CUDA's rules, and of CuPy itself as far as that goes without a GPU."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

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
