"""Foreign arrays as NumPy views of the same memory: never a copy, or an error that says why."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

KINDS = "a NumPy array, a torch tensor, a JAX array or anything else with __dlpack__"


def is_array(x: Any) -> bool:
    """Tell an array from a sequence of arrays."""
    return isinstance(x, np.ndarray) or hasattr(x, "__dlpack__") or hasattr(x, "__cuda_array_interface__")


def is_on_cuda(x: Any) -> bool:
    """Tell whether something is an array in the memory of a CUDA device."""
    if isinstance(x, np.ndarray):
        return False
    if is_movable(x):
        return bool(getattr(x, "is_cuda", False))
    if hasattr(x, "__dlpack_device__"):
        return int(x.__dlpack_device__()[0]) in _CUDA
    return hasattr(x, "__cuda_array_interface__")


def as_list(arrays: Any, argument: str) -> tuple[list[Any], bool]:
    """Return the arrays as a list, and whether a single one was given.

    Raises:
        TypeError: `arrays` is neither an array nor a sequence.
    """
    if is_array(arrays):
        return [arrays], True
    if isinstance(arrays, Iterable) and not isinstance(arrays, str | bytes | Mapping):
        return list(arrays), False
    raise TypeError(f"{argument} must be {KINDS}, or a sequence of them, got {type(arrays).__name__}")


def interleaved(lists: Sequence[Any], argument: str, length: int) -> list[Any]:
    """Put several lists into one, in which those that share a value follow each other."""
    if len(lists) == 1:
        return as_list(lists[0], argument)[0]
    arrays = [as_list(x, f"{argument}[{k}]")[0] for k, x in enumerate(lists)]
    for k, x in enumerate(arrays):
        if len(x) != length:
            raise ValueError(f"{argument}[{k}] and values must have one length, got {len(x)} and {length}")
    return [x[i] for i in range(length) for x in arrays]


def as_view(array: Any, name: str) -> np.ndarray:
    """Return a NumPy view of a foreign array's memory.

    Args:
        array: A torch tensor in CPU memory (also one that requires grad), a JAX array in CPU memory
            (read-only), or anything that exports CPU memory by DLPack.
        name: What errors call it.

    Raises:
        TypeError: It is no array, or its memory cannot be viewed.
    """
    module = type(array).__module__.partition(".")[0]
    device = getattr(array, "__dlpack_device__", None)
    if device is None and not is_on_cuda(array):
        raise TypeError(f"{name} must be {KINDS}, got {type(array).__name__}")
    try:
        if device is None:
            raise TypeError("it lies on a CUDA device")
        if module == "torch" or is_movable(array):
            return _view_of_torch(array)
        if int(device()[0]) != _CPU:
            raise TypeError(f"it lies on device {device()}")
        if module in ("jax", "jaxlib"):
            return np.asarray(array)  # DLPack would do, but not for bfloat16
        return np.from_dlpack(array)
    except (TypeError, ValueError, RuntimeError, BufferError) as reason:
        raise TypeError(
            f"{name} must be an array whose CPU memory can be viewed, got {type(array).__name__}: {reason}"
        ) from None


def views(arrays: list[Any], argument: str, single: bool) -> list[Any]:
    """Return arrays as NumPy views; see `as_view`."""
    return [
        x if isinstance(x, np.ndarray) else as_view(x, argument if single else f"{argument}[{i}]")
        for i, x in enumerate(arrays)
    ]


_CPU = 1  # DLPack's kDLCPU
_CUDA = 2, 13  # kDLCUDA and kDLCUDAManaged


def _view_of_torch(tensor: Any) -> np.ndarray:
    if tensor.device.type != "cpu":
        raise TypeError(f"it lies on {tensor.device}")
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":  # of which neither buffers nor DLPack tell NumPy
        import torch  # noqa: PLC0415 - loaded already: this is one of its tensors

        view: np.ndarray = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
        view = tensor.numpy()
    return view


_LINE = 64  # bytes: of a cache line, and of the widest vector


def packed_copies(arrays: Sequence[np.ndarray], dtypes: Sequence[Any]) -> list[np.ndarray]:
    """Copy arrays, cast to other types, into memory as of `packed`."""
    copies = packed(arrays, dtypes)
    for copy, array in zip(copies, arrays, strict=True):
        with np.errstate(all="ignore"):  # NumPy calls a signalling NaN invalid when it is widened
            np.copyto(copy, array, casting="same_kind")
    return copies


def packed(
    faces: Sequence[np.ndarray], dtypes: Sequence[Any], file: str | PathLike[str] | None = None
) -> list[np.ndarray]:
    """Return new arrays end to end in one piece of memory, each from a cache line on.

    Small arrays that follow each other are read faster than scattered ones, and NumPy asks the system
    for huge pages where a piece of memory is large.

    Args:
        faces: Arrays of the same shapes and order in memory; they are not read.
        dtypes: Of the new arrays.
        file: The path of a file to make and to map, instead of memory.
    """
    sizes = [face.size * np.dtype(dtype).itemsize for face, dtype in zip(faces, dtypes, strict=True)]
    begins = np.cumsum([0, *(-(-size // _LINE) * _LINE for size in sizes)])
    length = int(begins[-1]) + _LINE
    if file is None:
        memory = np.empty(length, np.uint8)
    else:
        Path(file).unlink(missing_ok=True)  # whoever has it mapped keeps the old one
        memory = np.asarray(np.memmap(file, np.uint8, "w+", shape=length))
    memory = memory[-memory.ctypes.data % _LINE :]
    return [
        laid_out(memory[begin : begin + size].view(dtype), face)
        for face, dtype, begin, size in zip(faces, dtypes, begins[:-1], sizes, strict=True)
    ]


def laid_out(flat: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Return a view of a flat array with the shape of another array, and its order in memory."""
    axes = sorted(range(face.ndim), key=lambda axis: -abs(face.strides[axis]))
    dense = flat.reshape([face.shape[axis] for axis in axes])
    return dense.transpose(np.argsort(axes)) if axes else dense


def is_movable(array: Any) -> bool:
    """Tell whether an array can be given other memory, so that a view of the old goes unnoticed.

    A torch tensor can (``tensor.data = ...``); its ``data_ptr()`` tells. NumPy arrays are looked after by
    the core.
    """
    return not isinstance(array, np.ndarray) and hasattr(array, "data_ptr")
