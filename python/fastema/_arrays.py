"""Foreign arrays as NumPy views of the same memory: never a copy, or an error that says why."""

from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

KINDS = "a NumPy array, a torch tensor, a JAX array or anything else with __dlpack__"


def is_array(x: Any) -> bool:
    """Tell an array from a sequence of arrays."""
    return isinstance(x, np.ndarray) or hasattr(x, "__dlpack__")


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
    if device is None:
        raise TypeError(f"{name} must be {KINDS}, got {type(array).__name__}")
    try:
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


_CPU = 1  # DLPack's kDLCPU


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


def is_movable(array: Any) -> bool:
    """Tell whether an array can be given other memory, so that a view of the old goes unnoticed.

    A torch tensor can (``tensor.data = ...``); its ``data_ptr()`` tells. NumPy arrays are looked after by
    the core.
    """
    return not isinstance(array, np.ndarray) and hasattr(array, "data_ptr")
