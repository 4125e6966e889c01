"""Programs in processes of their own."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent
PATIENCE = 1800  # seconds that only what hangs takes, on however busy a machine
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def end_when_told():
    """Have SIGTERM end this process, as `timeout` means it.

    Lightning would only end the training of the moment: the test that trains fails, and the run goes on. But
    it calls a handler that was there before.
    """

    def end(number, frame):
        del frame
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    signal.signal(signal.SIGTERM, end)


def skip_without(package):
    """Skip a test whose program needs a package; it is not imported here."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def environment_of_programs(**environment):
    """Return this process' environment with these variables; the modules of this folder can be imported."""
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **environment}


def python(code, *arguments, **environment):
    """Run a program; return the finished process with its output as text."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment_of_programs(**environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def output_of(code, *arguments, **environment):
    """Run a program that must succeed; return what it printed."""
    done = python(code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ranks(count, code, *arguments, **environment):
    """Run a program in so many processes at once, which must all succeed.

    Each finds its number as RANK and theirs as WORLD_SIZE. All are ended at last: a collective that one of
    them never enters keeps the others waiting.
    """
    shared = environment_of_programs(WORLD_SIZE=str(count), **environment)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    end = time.monotonic() + PATIENCE
    try:
        errors = [each.communicate(timeout=max(1, end - time.monotonic()))[1] for each in started]
    finally:
        for each in started:
            each.kill()
            each.wait()
    failed = [text for each, text in zip(started, errors, strict=True) if each.returncode]
    assert not failed, "\n".join(failed)


def free_ports(count):
    """Return ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("localhost", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
