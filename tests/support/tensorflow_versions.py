"""Does one wheel serve every TensorFlow? Runs the tests of fastema.tensorflow with several of them.

    python tests/support/tensorflow_versions.py                     # the default versions
    python tests/support/tensorflow_versions.py 2.18.1 2.21.0       # these
    python tests/support/tensorflow_versions.py --environments ~/tf # keeps them, or takes those there

The wheel is built once and unpacked beside the environments, so that all of them load the same files and none
is asked for what fastema's `keras` extra wants. An environment FOLDER/tf2.18.1 holds that TensorFlow,
fastema's own requirements, pytest with xdist and Hypothesis; a new one is made with the Python that runs
this, for which all versions must have wheels (3.11 and 3.12 do). Exits with 1 where a test failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
TOOLS = ["pytest", "pytest-xdist", "hypothesis"]
VERSIONS = ["2.18.1", "2.20.0", "2.21.0"]
TIER = """
import fastema, fastema.tensorflow, tensorflow as tf
average = tf.Variable([0.0])
assert fastema.tensorflow.update([average], [tf.ones(1)], 0.5) == "native" and average.numpy() == 0.5
print(fastema.build_config()["tensorflow_op"], fastema.__file__)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help=f"default: {' '.join(VERSIONS)}")
    parser.add_argument("--environments", type=Path, metavar="FOLDER", help="default: a temporary one")
    parser.add_argument("--wheel", type=Path, help="to test; default: built from this working tree")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        package = unpacked(asked.wheel or wheel(Path(scratch)), Path(scratch))
        environments = asked.environments or Path(scratch)
        rows = [(v, *tested(environment(environments, v), package)) for v in asked.versions]
    print(f"\n{'TensorFlow':12}{'tier':12}{'passed':>8}{'skipped':>8}{'failed':>8}")
    for version, tier, passed, skipped, failed in rows:
        print(f"{version:12}{tier:12}{passed:8}{skipped:8}{failed:8}")
    sys.exit(any(failed or not passed for *_, passed, _, failed in rows))


def wheel(scratch):
    pip("wheel", "--no-deps", "--wheel-dir", scratch, ROOT)
    return next(scratch.glob("fastema-*.whl"))


def unpacked(file, scratch):
    folder = scratch / "package"
    pip("install", "--no-deps", "--target", folder, file)
    return folder


def environment(folder, version):
    """Return the Python of an environment with this TensorFlow; make it where there is none."""
    python = folder / f"tf{version}" / "bin" / "python"
    if not python.exists():
        venv.create(python.parents[1], with_pip=True)
        needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        pip("install", f"tensorflow=={version}", *needed, *TOOLS, python=python)
    return python


def tested(python, package):
    """Run the tests; return the tier, and how many passed, were skipped and failed."""
    # no other fastema, and no tests' rewritten files from another version
    clean = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    print(f"\n== {python}", flush=True)
    said = subprocess.run([python, "-c", TIER], env=clean, stdout=subprocess.PIPE, text=True, check=False)
    tier, _, file = said.stdout.strip().partition(" ")
    if said.returncode != 0 or not Path(file).is_relative_to(package):
        return "none", 0, 0, 1
    report = package / "report.xml"
    files = sorted((ROOT / "tests" / "tensorflow").glob("test_*.py"))
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([python, "-m", "pytest", *options, *files], cwd=ROOT, env=clean, check=False)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    total, failures, errors, skipped = (
        int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")
    )
    return tier, total - failures - errors - skipped, skipped, failures + errors


def pip(*arguments, python=sys.executable):
    subprocess.run([python, "-m", "pip", "--quiet", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
