"""What CuPy compiles, and how: the kernels' text, options, entry points and tables."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .. import _core

_TYPES = "float16", "bfloat16", "float32", "float64"  # by their numbers, as in rows.cuh
# What a tensor's `mix` says of its average and value.
MIXES = {(a, v): _TYPES.index(a) * len(_TYPES) + _TYPES.index(v) for a, v in _core.mixes()}
ROUNDINGS = {"nearest": 0, "stochastic": 1, "compensated": 2}
THREADS = 256  # of a block
LISTS = 8  # the most lists of averages that one launch updates

# 177: not every list needs every function. CuPy adds --device-as-default-execution-space, which formula.hpp
# needs and NVRTC 12.0 takes only once.
OPTIONS = ("-std=c++17", "-fmad=false", "-diag-suppress=177")

# The tables in device memory, and the arguments that are structures.
TENSOR = np.dtype([("average", "<u8"), ("value", "<u8"), ("size", "<u8"), ("mix", "<u4"), ("id", "<u4")])
CHUNK = np.dtype([("group", "<u4"), ("index", "<u4")])
STATE = np.dtype([("step", "<u8"), ("decay", "<f8", LISTS)])
DECAYS = np.dtype([("device", "<u8"), ("value", "<f8", LISTS)])
SCHEDULE = np.dtype(
    [
        ("kind", "<u4"),
        ("every", "<u4"),
        ("start_step", "<i8"),
        ("decay", "<f8"),
        ("scale", "<f8"),
        ("power", "<f8"),
        ("least", "<f8"),
    ]
)
SCHEDULES = {  # the kinds
    name: kind
    for kind, name in enumerate(
        ("constant", "dynamic", "warmup", "power", "equal_weights", "ramp", "cosine", "linear", "growing")
    )
}


# Entry points, as C++ names what they call.
SWAP = "fastema::swap"
ADVANCE = "fastema::advance"


def update_name(mixes: Iterable[int], rounding: int) -> str:
    """Return the entry point that updates a list of these mixes."""
    return f"fastema::update<{bits_of(mixes)}u, {rounding}>"


def unit(entry: str) -> tuple[str, str]:
    """Return the text that has this entry point and no other, and its name there."""
    name, _, arguments = entry.removeprefix("fastema::").partition("<")
    call = f"FASTEMA_{name.upper()}" + (f"({arguments.rstrip('>')})" if arguments else "")
    return f"{SOURCE}{call}\n", f"fastema_{name}"


def bits_of(mixes: Iterable[int]) -> int:
    """Return a number whose bits tell which mixes there are."""
    return sum(1 << mix for mix in set(mixes))


# Beside the extension module, which an editable install keeps elsewhere than the Python files.
FOLDER = Path(_core.__file__).parent / "cuda"


def _resolved(name: str, included: set[str]) -> str:
    """Return a file and all that it includes as one text, which is what NVRTC takes."""

    def contents(include: re.Match[str]) -> str:
        if include[1] in included:
            return ""
        included.add(include[1])
        return _resolved(include[1], included)

    text = (FOLDER / name).read_text(encoding="utf-8")
    text = text.replace("#pragma once\n", "").replace("#include <stdint.h>\n", "")
    return re.sub(r'#include "(.*)"\n', contents, text)


SOURCE = _resolved("kernels.cu", set())
