"""What the package is before it does anything: its version, its build, the choice of instructions."""

import platform
from importlib import metadata
from pathlib import Path

import pytest

import fastema
from processes import output_of, python

CPUINFO = Path("/proc/cpuinfo")


def test_one_version_everywhere():
    assert fastema.__version__ == metadata.version("fastema") == fastema.build_config()["version"]


def test_build_config_says_what_this_is():
    config = fastema.build_config()
    assert config["instruction_set"] in config["instruction_sets"]
    assert config["instruction_sets"] == fastema.instruction_sets()
    assert config["threads"] >= 1
    assert set(config) >= {"compiler", "openmp", "cupy", "tensorflow", "tensorflow_op"}


IN_USE = "import fastema; print(fastema.build_config()['instruction_set'])"


def test_the_best_instruction_set_is_chosen_and_baseline_is_always_there():
    names = fastema.instruction_sets()
    assert names[-1] == "baseline"
    assert output_of(IN_USE, FASTEMA_ISA="") == names[0]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPUINFO.exists(), reason="reads x86-64's flags in /proc/cpuinfo"
)
def test_instruction_sets_are_what_the_processor_has():
    lines = CPUINFO.read_text(encoding="ascii").splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    needed = {"avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "avx2": {"avx2", "f16c"}}
    expected = [name for name, needs in needed.items() if needs <= set(flags)]
    assert fastema.instruction_sets() == [*expected, "baseline"]


def test_the_environment_chooses_at_import():
    assert output_of(IN_USE, FASTEMA_ISA="baseline") == "baseline"


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"name must be one of \[.*\] on this machine, got 'mmx'"):
        fastema.use_instruction_set("mmx")
    done = python("import fastema", FASTEMA_ISA="mmx")
    assert "FASTEMA_ISA cannot be followed: name must be one of" in done.stderr


def test_parts_that_need_a_framework_are_loaded_when_they_are_named():
    names = "'cuda' in dir(fastema), 'fastema.cuda' in sys.modules, fastema.cuda.Schedule"
    assert output_of(f"import sys, fastema; print({names})").startswith("True False <class")
    missing = "import sys; sys.modules['tensorflow'] = None; import fastema; fastema.tensorflow"
    assert (
        "ImportError: fastema.tensorflow needs tensorflow, which is not installed" in python(missing).stderr
    )
    with pytest.raises(AttributeError, match="module 'fastema' has no attribute 'keras_'"):
        fastema.keras_  # noqa: B018
