"""Does the C++ compile for every platform that wheels are made for, and run where this machine can?

    python -m pip install ziglang cmake ninja
    python tests/support/platforms.py                       # all targets
    python tests/support/platforms.py x86-linux-musl        # these, also i686

By zig's compiler, which has the headers of all of them: the core and TensorFlow's op, warnings being errors.
The core's test is run where this machine can, and must find the instruction sets that the processor has. A
processor whose bytes are the other way round must be refused. Exits with 1 where something failed.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SYSTEMS = {"linux": "Linux", "macos": "Darwin", "windows": "Windows"}
TARGETS = [
    "x86_64-linux-gnu.2.17",
    "x86_64-linux-musl",
    "aarch64-linux-gnu",
    "aarch64-macos",
    "x86_64-macos",
    "x86_64-windows-gnu",
]
I686 = "x86-linux-musl"  # of which no wheels are made: only if it is named
RUN = {"x86_64-linux-musl", I686} if sys.platform == "linux" else set()
REFUSED = "s390x-linux-musl"
FLAGS = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "f16c"},
    "avx2": {"avx2", "f16c"},
    "baseline": set(),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("targets", nargs="*", default=[*TARGETS, REFUSED], metavar="TARGET")
    asked = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for target in asked.targets:
            begun = time.monotonic()
            result = refused(Path(scratch)) if target == REFUSED else built(target, Path(scratch))
            print(f"{target:24}{result:24}{time.monotonic() - begun:6.1f} s", flush=True)
            failed |= result.startswith("FAILED")
    sys.exit(failed)


def zig():
    return Path(importlib.util.find_spec("ziglang").origin).with_name("zig")


def script(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
    path.chmod(0o755)
    return path


def configured(target, folder):
    """Run CMake for a target; return the finished process."""
    processor, system = target.split("-")[:2]
    settings = {
        "CMAKE_SYSTEM_NAME": SYSTEMS[system],
        "CMAKE_SYSTEM_PROCESSOR": processor,
        # to link what CMake looks at would have zig compile the C++ library of each target
        "CMAKE_CXX_COMPILER": script(
            folder.with_name(f"{target}-c++"),
            'case "$*" in *CMakeCXXCompilerId.cpp*) set -- -c "$@";; esac',
            f'exec "{zig()}" c++ -target {target} "$@"',
        ),
        "CMAKE_AR": script(folder.with_name("ar"), f'exec "{zig()}" ar "$@"'),
        "CMAKE_RANLIB": shutil.which("true"),  # zig's archives have their index
        "CMAKE_NM": shutil.which("nm"),
        "CMAKE_TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",
        "CMAKE_BUILD_TYPE": "Release" if target in RUN else "Debug",
        "FASTEMA_OPENMP": "OFF",
        "FASTEMA_PYTHON": "OFF",
        "FASTEMA_TESTS": "ON",
        "FASTEMA_WERROR": "ON",
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    return run("cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *options)


def refused(scratch):
    done = configured(REFUSED, scratch / REFUSED)
    right = done.returncode != 0 and "needs a little-endian processor" in done.stderr
    return "refused" if right else report(done)


def built(target, scratch):
    folder = scratch / target
    runs = target in RUN
    done = configured(target, folder)
    if done.returncode == 0:
        parts = ["core_test"] if runs else ["fastema_core", "fastema_ops"]
        done = run("cmake", "--build", folder, "--target", *parts)
    if done.returncode == 0 and runs:
        done = run(folder / "core_test")
        found = done.stdout.split(":")[-1].split()
        if done.returncode == 0 and found != expected(target):
            return f"FAILED: runs {found}"
    if done.returncode:
        return report(done)
    return f"runs: {' '.join(found)}" if runs else "compiles"


def expected(target):
    """Return the instruction sets that a target's test must find on this machine."""
    if not target.startswith("x86_64"):
        return ["baseline"]
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    return [name for name, needed in FLAGS.items() if needed <= flags]


def report(done):
    print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
    return "FAILED"


def run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


if __name__ == "__main__":
    main()
