"""Runs tests on the Python module as CMake's preset asan has built it, with what pytest is to be told."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "asan"
PACKAGE = BUILD / "package"

# an editable installation would be imported first
PYTEST = """
import sys
sys.meta_path[:] = [x for x in sys.meta_path if "ScikitBuild" not in type(x).__name__]
import fastema, pytest
assert fastema.__file__.startswith(sys.argv[1]), fastema.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""

# of which only the sanitizer can know
FREED = """
import ctypes
import sys
sys.meta_path[:] = [x for x in sys.meta_path if "ScikitBuild" not in type(x).__name__]
import fastema, numpy as np
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
memory = libc.malloc(800)
pairs = fastema.Pairs(np.zeros(100), np.frombuffer((ctypes.c_double * 100).from_address(memory)))
libc.free(memory)
pairs.update(0.5)
"""


def environment():
    """Return what has the sanitizers loaded before Python, which was built without them."""
    [compiler] = re.findall(
        r"^CMAKE_CXX_COMPILER:\w+=(.*)$", (BUILD / "CMakeCache.txt").read_text(), re.MULTILINE
    )
    libraries = [  # the C++ library, too, so that its exceptions are seen
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(PACKAGE),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are many
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def main(arguments):
    """Put the package together, see that the sanitizer is awake, and run the tests."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    subprocess.run(["cmake", "--install", BUILD, "--prefix", PACKAGE], check=True, stdout=subprocess.DEVNULL)
    shutil.copytree(ROOT / "python" / "fastema", PACKAGE / "fastema", dirs_exist_ok=True)
    found = subprocess.run(
        [sys.executable, "-c", FREED], env=environment(), capture_output=True, text=True, check=False
    )
    assert "heap-use-after-free" in found.stderr, found
    # one process: its workers would import what is installed
    tests = [sys.executable, "-c", PYTEST, str(PACKAGE), "-n0", *arguments]
    return subprocess.run(tests, env=environment(), cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
