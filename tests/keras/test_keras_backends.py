"""Keras on TensorFlow, JAX and torch: two files of tests/support on each, in a process of its own."""

import os
import re
import subprocess
import sys

import pytest

from processes import PATIENCE, SUPPORT, skip_without


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_what_holds_everywhere_holds_here(backend):
    skip_without(backend)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n0",
            "-p",
            "no:cacheprovider",
            *(str(SUPPORT / name) for name in ("keras_everywhere.py", "keras_recipes.py")),
        ],
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
    assert int(passed[1]) > 25
