"""The same weights in host memory and on a device, each with an EMA, which have the same bits."""

import ml_dtypes
import numpy as np

import fastema
from fastema import schedules

bfloat16 = ml_dtypes.bfloat16

WAYS = {
    "plain": {"decay": 0.9},
    "dynamic": {"decay": schedules.dynamic(0.99)},
    "several": {"decay": [0.5, 0.9, 0.99]},
    "every": {"decay": 0.9, "every": 2},
    "late": {"decay": 0.9, "start_step": 3},
    "zeros": {"decay": 0.9, "initial": "zeros"},
    "several from zeros": {"decay": [0.9, 0.99], "initial": "zeros", "start_step": 2},
}


METHODS = {
    "BEMA": {"of": fastema.BEMA, "every": 2},
    "BEMA from a step on": {"of": fastema.BEMA, "every": 1, "start_step": 3},
    "Window": {"of": fastema.Window, "size": 3},
}


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

    def __init__(self, library, rng, *, of=fastema.EMA, weights=None, beside=None, **arguments):
        self.library, self.rng = library, rng
        self.here = weights_of(rng) if weights is None else weights
        self.memory = {name: x.copy(order="K") for name, x in self.here.items()}
        self.there = {name: library.device(x) for name, x in self.memory.items()}
        self.cpu = of(self.here, **arguments)
        self.gpu = of(self.there, **arguments, **(beside or {}))

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
        for k in range(self.cpu._parts.averages.shown.lists):
            assert_equal(self.library, self.gpu.averages_of(k), self.cpu.averages_of(k))
        assert_equal(self.library, self.there, self.here)
        ours, theirs = self.gpu.state_dict(), self.cpu.state_dict()
        for key in ("step", "decay", "products", "swapped"):
            assert ours[key] == theirs[key]
        for key in ("averages", "carries"):
            for one, other in zip(ours[key], theirs[key], strict=True):
                assert_equal(self.library, one, other)
        for key in ("copied", "values"):
            assert_equal(self.library, ours[key], theirs[key])

    def check_steps_and_swaps(self):
        """Compare everything while averages move, are swapped in and are copied out."""
        self.check()
        for _ in range(5):
            self.step()
            self.check()
            for k in {0, self.cpu._parts.averages.shown.lists - 1}:
                with self.gpu.swapped(k), self.cpu.swapped(k):
                    self.check()
            self.check()
        assert_equal(self.library, self.gpu.copy_to(), self.cpu.copy_to())
        self.check()

    def check_steps_and_reset(self):
        """Compare everything while averages move, are swapped in and begin again."""
        self.check()
        for _ in range(6):
            self.step()
            self.check()
        with self.gpu.swapped(), self.cpu.swapped():
            self.check()
        self.check()
        self.cpu.reset()
        self.gpu.reset()
        self.step()
        self.check()

    def check_states_go_to(self, other, *, swapped):
        """Compare everything after others have taken these states, each that of the other place."""
        for _ in range(3):
            self.step()
        if swapped:
            self.cpu.swap(1)
            self.gpu.swap(1)
        ours, theirs = self.gpu.state_dict(), self.cpu.state_dict()
        self.check()
        other.gpu.load_state_dict(theirs)
        other.cpu.load_state_dict(ours)
        if swapped:
            other.gpu.swap()
            other.cpu.swap()
            assert_equal(self.library, other.there, other.here)
        other.step()
        other.check()


def hosted(library, array):
    return array if isinstance(array, np.ndarray) else library.host(array)


def assert_equal(library, ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = hosted(library, ours[name])
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert found.tobytes() == expected.tobytes(), name
