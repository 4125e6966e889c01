"""Keras on TensorFlow, JAX and torch: two files of tests/support on each, in processes of their own."""

import os
import re
import subprocess
import sys

import pytest

from processes import PATIENCE, SUPPORT, output_of, skip_without


# on TensorFlow, which all other tests of Keras run on, it is slow
@pytest.mark.parametrize("backend", [pytest.param("tensorflow", marks=pytest.mark.slow), "jax", "torch"])
@pytest.mark.parametrize(("file", "least"), [("keras_everywhere.py", 25), ("keras_recipes.py", 5)])
def test_what_holds_everywhere_holds_here(backend, file, least):
    skip_without(backend)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", SUPPORT / file],
        cwd=SUPPORT,
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= least


STEPS_ON_TORCH = """
    import keras, numpy as np, torch
    from fastema.keras import ExponentialMovingAverage

    def counted(optimizer):
        variable = keras.Variable(np.zeros(3))
        optimizer = ExponentialMovingAverage(optimizer, average_decay=0.5)
        optimizer.build([variable])
        counter, reads, steps = optimizer.iterations.value, [], []
        asked = torch.Tensor.__int__
        torch.Tensor.__int__ = lambda tensor: (tensor is counter and reads.append(1), asked(tensor))[1]
        update = optimizer._averages.update
        optimizer._averages.update = lambda step, when=None: (steps.append(step), update(step, when))[1]
        for step in range(8):
            if step == 4:
                optimizer.iterations.assign(100)
            optimizer.apply([torch.ones(3)])
        return len(reads), steps

    right = [1, 2, 3, 4, 101, 102, 103, 104]
    reads, steps = counted(keras.optimizers.SGD(0.1))
    assert steps == right, steps
    assert counted(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))[1] == right
    print(reads)
"""


def test_a_step_on_torch_does_not_wait_for_the_device_to_know_its_number():
    """Only the first does, and one after the counter was set."""
    skip_without("torch")
    assert output_of(STEPS_ON_TORCH, KERAS_BACKEND="torch") == "2"
