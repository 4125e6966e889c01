"""This machine's ceiling: the best of several loops, compiled for it, that only move the same bytes."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from .harness import WARM, Call, Calls, measure

FLAGS = ["-std=c++20", "-O3", "-funroll-loops", "-march=native", "-fopenmp", "-shared", "-fPIC"]
CHUNKS = (1 << 18, 1 << 19, 1 << 20)  # bytes
DISTANCES = (0, 512, 2048)  # bytes
FINALISTS = 3  # of all loops, for what is measured in turns with the contestants
LEAST = 1_000_000  # elements: below, memory is not what limits a call


@cache
def _library() -> ctypes.CDLL | None:
    """Compile ceiling.cpp for this machine; None where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        print("no ceiling: there is no C++ compiler", file=sys.stderr)
        return None
    folder = tempfile.mkdtemp(prefix="fastema-ceiling-")
    target = Path(folder) / "ceiling.so"
    source = Path(__file__).with_name("ceiling.cpp")
    done = subprocess.run(
        [compiler, *FLAGS, source, "-o", target], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        print(f"no ceiling: {compiler} cannot compile it\n{done.stderr}", file=sys.stderr)
        return None
    library = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return library


def ceilings(kind: str, a: np.ndarray, b: np.ndarray) -> Calls:
    """Return the best loops for two flat arrays; the fastest of them is the ceiling.

    They run over the very memory that the contestants have: how fast it is depends on its pages, and on
    what a virtual machine's host has under them. An update's loops leave all bits as they were.

    Args:
        kind: ``"update"`` (read both, write `a`) or ``"swap"`` (read and write both).
        a: Averages.
        b: Values, as many.

    Returns:
        Calls by name; none for short lists, and where there is no compiler.
    """
    library = _library() if a.size >= LEAST else None
    if library is None:
        return {}
    size = (
        [ctypes.c_size_t(a.size), a.itemsize, b.itemsize] if kind == "update" else [ctypes.c_size_t(a.nbytes)]
    )
    function = getattr(library, f"ceiling_{kind}")

    def loop(chunk: int, distance: int) -> Call:
        def call() -> None:
            pointers = (ctypes.c_void_p(array.ctypes.data) for array in (a, b))  # they live as long as we
            function(*pointers, *size, ctypes.c_size_t(chunk), ctypes.c_size_t(distance))

        return call

    loops = {
        f"{chunk >> 10} KiB at a time, {distance} ahead": loop(chunk, distance)
        for chunk in CHUNKS
        for distance in DISTANCES
    }
    timings = measure(loops, 3, WARM)
    best = sorted(loops, key=lambda name: timings[name].median)[:FINALISTS]
    return {name: loops[name] for name in best}
