"""NVIDIA's runtime compiler, which needs no GPU and no driver."""

import ctypes
import ctypes.util
import importlib.util
import os
import re
from functools import cache
from pathlib import Path

import pytest

from fastema.cuda import _source

ADDED_BY_CUPY = ["-ftz=true", "--device-as-default-execution-space"]


@cache
def _library():
    if chosen := os.environ.get("FASTEMA_NVRTC"):  # the path of another version
        return ctypes.CDLL(chosen)
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else ())]
    found = [file for folder in folders for file in sorted(folder.glob("*/lib/libnvrtc.so.*[0-9]"))]
    name = found[-1] if found else ctypes.util.find_library("nvrtc")
    return ctypes.CDLL(str(name)) if name else None


def library():
    """Return the compiler; skip a test where there is none."""
    if _library() is None:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    return _library()


@cache
def compiled(architecture, entry):
    """Compile an entry point for an architecture as CuPy does; return the PTX, the cubin and the log."""
    nvrtc, program = library(), ctypes.c_void_p()
    source, _ = _source.unit(entry)
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    options = [*_source.OPTIONS, f"-arch=sm_{architecture}", "--ptxas-options=-v", *ADDED_BY_CUPY]
    as_bytes = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), as_bytes)

    def output(what):
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, text)
        return text.raw

    log = output("ProgramLog").rstrip(b"\0").decode()
    assert not failed, log
    return output("PTX").rstrip(b"\0").decode(), output("CUBIN"), log


def architectures():
    """Return the architectures that this compiler knows."""
    count = ctypes.c_int()
    library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    library().nvrtcGetSupportedArchs(known)
    return list(known)


def entries(ptx):
    """Return the name and the instructions of each entry point."""
    return re.findall(r"\.entry fastema_(\w+)\(.*?\n\{\n(.*?)\n\}", ptx, re.DOTALL)
