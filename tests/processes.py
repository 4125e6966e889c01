"""Programs in processes of their own."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest

LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def skip_without(package):
    """Skip a test whose program needs a package; it is not imported here."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def python(code, *arguments, **environment):
    """Run a program; return the finished process with its output as text."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def output_of(code, *arguments, **environment):
    """Run a program that must succeed; return what it printed."""
    done = python(code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
