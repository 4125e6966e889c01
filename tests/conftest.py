"""What all tests share."""

import contextlib

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import fastema
from other_devices import cpu_is_elsewhere
from processes import end_when_told

settings.register_profile(
    "fastema", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("fastema")


def pytest_configure():
    end_when_told()


@pytest.fixture(params=fastema.instruction_sets())
def every_instruction_set(request):
    """Run a test once on each instruction set of this machine."""
    before = fastema.build_config()["instruction_set"]
    fastema.use_instruction_set(request.param)
    yield request.param
    fastema.use_instruction_set(before)


@pytest.fixture(params=["native", "torch"])
def every_torch_engine(request):
    """Run a test once as it is, and once with torch's own operations averaging tensors."""
    pytest.importorskip("torch", reason="torch is not installed")
    with cpu_is_elsewhere() if request.param == "torch" else contextlib.nullcontext():
        yield request.param


@pytest.fixture
def rng():
    """Return a generator with a fixed seed."""
    return np.random.default_rng(20_240_229)


@pytest.fixture
def tf():
    """Return TensorFlow."""
    return pytest.importorskip("tensorflow", reason="TensorFlow is not installed")


@pytest.fixture
def torch():
    """Return torch."""
    return pytest.importorskip("torch", reason="torch is not installed")
