"""Wrapping an optimizer changes nothing about how it trains: Keras' own tests of optimizers, all wrapped.

The optimizers that Keras' tests make are wrapped by the plugin keras_wrapped. All tests pass but those listed
with the reason why they cannot; a listed test that passes is an error, too.
"""

import fnmatch
import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from processes import SUPPORT

KERAS = Path(importlib.util.find_spec("keras").origin).parent / "src"

OPTIMIZERS = [
    "optimizers",
    "callbacks/lambda_callback_test.py",
    "callbacks/learning_rate_scheduler_test.py",
    "callbacks/reduce_lr_on_plateau_test.py",
]
HOLDERS = ["optimizers/loss_scale_optimizer_test.py", "optimizers/multi_optimizer_test.py"]
DISTRIBUTED = ["backend/tensorflow/optimizer_distribute_test.py"]

COUNTED = "counts the variables: the averages are among them"
MOCKED = "mocks assign of the optimizer, which is the wrapper's, but the wrapped optimizer assigns"
NAMED = "the wrapper has a name of its own"
TYPED = "compares types"
CANNOT_PASS = {
    "optimizers/loss_scale_optimizer_test.py::*::test_serialization": "counts the arguments in the config",
    "optimizers/multi_optimizer_test.py::*::test_multi_optimizer_blocks_nested_optimizers": TYPED,
    "optimizers/multi_optimizer_test.py::*::test_serialization": TYPED,
    "optimizers/multi_optimizer_test.py::*::test_tensorboard_logging_with_multi_optimizer": NAMED,
    "optimizers/optimizer_sparse_test.py::*::test_sparse_gradients_[!s]*": MOCKED,
    "optimizers/optimizer_sparse_test.py::*::test_sparse_gradients_sgd*": MOCKED,
    "optimizers/optimizer_test.py::*::test_optimizer_auto_naming": NAMED,
    "optimizers/sgd_test.py::*::test_single_step": COUNTED,
}
# The same where only what holds other optimizers is wrapped: the rest of the table concerns the others.
CANNOT_PASS_HOLDERS = {
    test: CANNOT_PASS[test]
    for test in (
        "optimizers/loss_scale_optimizer_test.py::*::test_serialization",
        "optimizers/multi_optimizer_test.py::*::test_multi_optimizer_blocks_nested_optimizers",
    )
}


def run_tests_of_keras(tmp_path, backend, wrapped, files, arguments=()):
    """Run them in a process of its own; return the outcome of each test."""
    if not all((KERAS / file).exists() for file in files) or not any(KERAS.glob("optimizers/*_test.py")):
        pytest.skip("this distribution of Keras left its tests out")
    settings, report = tmp_path / "pytest.ini", tmp_path / "report.xml"
    settings.write_text("[pytest]\n")  # none of ours, nor of where Keras lies
    environment = {
        "KERAS_BACKEND": backend,
        "FASTEMA_WRAP": wrapped,
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, sys.path)]),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    # -P: in Keras' folder lie modules that are named like those of Python
    options = "-P -B -m pytest -q --tb=short -Wignore -p no:cacheprovider -p keras_wrapped"
    command = [sys.executable, *options.split()]
    done = subprocess.run(
        [*command, f"-c={settings}", f"--rootdir={KERAS}", f"--junitxml={report}", *arguments, *files],
        cwd=KERAS,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout[-5000:] + done.stderr[-5000:]
    assert done.returncode in (0, 1), output  # 1: tests failed
    assert report.exists(), output
    outcomes = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        module, _, name = case.get("classname").rpartition(".")
        outcome = next((e.tag for e in case if e.tag in ("failure", "error", "skipped")), "passed")
        outcomes[f"{module.replace('.', '/')}.py::{name}::{case.get('name')}"] = outcome
    return outcomes, done.stdout


def assert_all_pass_but(outcomes, output, cannot_pass, at_least):
    wrong = {}
    for test, outcome in outcomes.items():
        reason = next((why for pattern, why in cannot_pass.items() if fnmatch.fnmatch(test, pattern)), None)
        if outcome == "passed" and reason is not None:
            wrong[test] = f"passes, but is listed: {reason}"
        elif outcome in ("failure", "error") and reason is None:
            wrong[test] = outcome
    assert not wrong, f"{wrong}\n{output[-20_000:]}"
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    assert passed >= at_least, f"only {passed} tests passed"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_optimizers_pass_their_tests_when_wrapped(tmp_path, backend):
    """Each of them, also within those that scale the loss or hold several, which are wrapped as well."""
    pytest.importorskip(backend)
    outcomes, output = run_tests_of_keras(tmp_path, backend, "all", OPTIMIZERS)
    assert_all_pass_but(outcomes, output, CANNOT_PASS, at_least=150)


@pytest.mark.slow
def test_optimizers_that_hold_others_pass_their_tests_when_wrapped(tmp_path):
    outcomes, output = run_tests_of_keras(tmp_path, "tensorflow", "holders", HOLDERS)
    assert_all_pass_but(outcomes, output, CANNOT_PASS_HOLDERS, at_least=30)


@pytest.mark.slow
def test_distributed_optimizers_pass_their_tests_when_wrapped(tmp_path):
    outcomes, output = run_tests_of_keras(tmp_path, "tensorflow", "plain", DISTRIBUTED)
    assert_all_pass_but(outcomes, output, CANNOT_PASS, at_least=5)
