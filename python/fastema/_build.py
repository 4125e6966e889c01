"""What this build is, and what it finds on this machine."""

import os
from importlib import metadata
from typing import Any

from . import _core

if _wanted := os.environ.get("FASTEMA_ISA"):
    try:
        _core.use_instruction_set(_wanted)
    except ValueError as error:
        raise ImportError(f"the environment variable FASTEMA_ISA cannot be followed: {error}") from None


def _installed(*distributions: str) -> str | None:
    """Name the first of these distributions that is installed, and its version, without importing it."""
    for name in distributions:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def build_config() -> dict[str, Any]:
    """Tell what this build is and what it finds on this machine.

    Returns:
        A dictionary with ``version``, ``compiler``, ``instruction_set`` (in use),
        ``instruction_sets`` (to choose from, best first), ``openmp`` (its specification's date as
        yyyymm; 0: built without, one thread), ``threads`` (what ``threads=0`` means here and now),
        ``cupy`` and ``tensorflow`` (name and version, or None where not installed) and
        ``tensorflow_op`` (how averages get into TensorFlow's variables).

    Example:
        >>> import fastema
        >>> fastema.build_config()["version"] == fastema.__version__
        True
    """
    tensorflow = _installed("tensorflow", "tensorflow-cpu", "tf-nightly")
    return {
        **_core.build_config(),
        "cupy": _installed("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "tensorflow": tensorflow,
        "tensorflow_op": "numpy_function" if tensorflow else None,
    }
