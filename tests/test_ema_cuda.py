"""fastema.EMA of weights on a CUDA device: what it does in host memory, to the bit. On a fake device.

Tensors of torch that say they lie on a device, and arrays as CuPy has them. What torch and CuPy do on a real
one is left to test_gpu.py.
"""

import ml_dtypes
import numpy as np
import pytest

import fake_cuda
import fastema
import oracle
from fake_cuda import Array
from fastema import _memory, schedules
from fastema.cuda import _offload

bfloat16 = ml_dtypes.bfloat16
CUPY, TORCH = 2, 1  # the handles of their streams


@pytest.fixture(autouse=True)
def fake():
    fake_cuda.kernels()
    with fake_cuda.installed() as driver:
        yield driver


class OfCuPy:
    """Arrays as CuPy has them."""

    stream = CUPY

    def device(self, host, device=0):
        return Array(host, device)

    def host(self, array):
        return array.host if isinstance(array, Array) else np.asarray(array)


class OfTorch:
    """Tensors of torch."""

    stream = TORCH

    def __init__(self):
        self.torch = pytest.importorskip("torch", reason="torch is not installed")

    def device(self, host, device=0):
        if host.dtype == bfloat16:
            return fake_cuda.tensor(
                self.torch.from_numpy(host.view(np.int16)).view(self.torch.bfloat16), device
            )
        return fake_cuda.tensor(self.torch.from_numpy(host), device)

    def host(self, array):
        array = array.detach().as_subclass(self.torch.Tensor)
        if array.dtype == self.torch.bfloat16:
            return array.view(self.torch.int16).numpy().view(bfloat16)
        return array.numpy()


@pytest.fixture(params=[OfCuPy, OfTorch], ids=["CuPy", "torch"])
def library(request):
    return request.param()


def weights_of(rng):
    return {
        "kernel": rng.standard_normal((40, 3)).astype(np.float32),
        "fortran": np.asfortranarray(rng.standard_normal((3, 4, 5))),
        "half": rng.standard_normal(1000).astype(np.float16),
        "brain": rng.standard_normal((7, 11)).astype(bfloat16),
        "scalar": np.array(rng.standard_normal(), np.float32),
        "none": np.zeros((0, 4), np.float32),
        "count": np.array(3),
        "mask": rng.integers(0, 2, 5).astype(bool),
    }


class Twins:
    """The same weights in host memory and on the device, each with its averages."""

    def __init__(self, library, rng, *, beside=None, **arguments):
        self.library, self.rng = library, rng
        self.here = weights_of(rng)
        self.memory = {name: x.copy(order="K") for name, x in self.here.items()}
        self.there = {name: library.device(x) for name, x in self.memory.items()}
        self.cpu = fastema.EMA(self.here, **arguments)
        self.gpu = fastema.EMA(self.there, **arguments, **(beside or {}))

    def step(self):
        """Do a step of training, and average."""
        for name, weight in self.here.items():
            change = self.rng.standard_normal(weight.shape)
            with np.errstate(all="ignore"):
                weight[...] = (weight + change).astype(weight.dtype)
            self.memory[name][...] = weight
        self.cpu.update()
        self.gpu.update()

    def check(self):
        """Compare everything, to the bit."""
        for k in range(len(self.cpu._decays)):
            assert_equal(self.library, self.gpu.averages_of(k), self.cpu.averages_of(k))
        assert_equal(self.library, self.there, self.here)
        ours, theirs = self.gpu.state_dict(), self.cpu.state_dict()
        for key in ("step", "decay", "products", "swapped"):
            assert ours[key] == theirs[key]
        for key in ("averages", "carries"):
            for one, other in zip(ours[key], theirs[key], strict=True):
                assert_equal(None, one, other)
        for key in ("copied", "values"):
            assert_equal(None, ours[key], theirs[key])


def assert_equal(library, ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = library.host(ours[name]) if library else ours[name]
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert found.tobytes() == expected.tobytes(), name


WAYS = {
    "plain": {"decay": 0.9},
    "dynamic": {"decay": schedules.dynamic(0.99)},
    "several": {"decay": [0.5, 0.9, 0.99]},
    "every": {"decay": 0.9, "every": 2},
    "late": {"decay": 0.9, "start_step": 3},
    "zeros": {"decay": 0.9, "initial": "zeros"},
    "several from zeros": {"decay": [0.9, 0.99], "initial": "zeros", "start_step": 2},
    "float64": {"decay": 0.9, "dtype": np.float32},
    "compensated": {"decay": 0.999, "rounding": "compensated"},
}
OFFLOADED = {"device": "cpu"}


def arguments_of(way, weights):
    """Leave out what an argument cannot be had with."""
    if way == "float64":
        del weights["fortran"]


@pytest.fixture(params=[None, OFFLOADED], ids=["device", "host"])
def beside(request):
    return request.param


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("float64", "compensated")])
def test_averages_and_swaps_have_the_bits_of_the_cpu(library, rng, way, beside):
    twins = Twins(library, rng, **WAYS[way], beside=beside)
    twins.check()
    last = len(twins.cpu._decays) - 1
    for _ in range(5):
        twins.step()
        twins.check()
        for k in {0, last}:
            with twins.gpu.swapped(k), twins.cpu.swapped(k):
                twins.check()
        twins.check()
    assert_equal(library, twins.gpu.copy_to(), twins.cpu.copy_to())
    twins.check()
