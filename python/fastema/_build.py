"""What this build is, and what it finds on this machine."""

import os
from importlib import metadata
from pathlib import Path
from typing import Any

from . import _core


def instruction_sets() -> list[str]:
    """Name the instruction sets that this build holds and this machine runs, best first.

    Example:
        >>> import fastema
        >>> fastema.instruction_sets()[-1]
        'baseline'
    """
    return _core.instruction_sets()


def use_instruction_set(name: str) -> None:
    """Choose the instruction set of every later call, in all threads.

    The bits do not depend on it: this is for tests and comparisons. The environment variable
    ``FASTEMA_ISA`` does the same at import.

    Args:
        name: One of `instruction_sets()`.

    Raises:
        ValueError: This machine or this build has no such instruction set.

    Example:
        >>> import fastema
        >>> fastema.use_instruction_set("baseline")
        >>> fastema.build_config()["instruction_set"]
        'baseline'
        >>> fastema.use_instruction_set(fastema.instruction_sets()[0])
    """
    _core.use_instruction_set(name)


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


# beside the extension module, which an editable install keeps elsewhere than the Python files
OP_LIBRARY = Path(_core.__file__).parent / "lib" / "fastema_tensorflow.so"


def build_config() -> dict[str, Any]:
    """Tell what this build is and what it finds on this machine.

    Returns:
        A dictionary with ``version``, ``compiler``, ``instruction_set`` (in use),
        ``instruction_sets`` (to choose from, best first), ``openmp`` (its specification's date as
        yyyymm; 0: built without), ``threads`` (what ``threads=0`` means here and now), ``cupy`` and
        ``tensorflow`` (name and version, or None where not installed) and ``tensorflow_op`` (the
        tier of our op: ``"functional"`` makes new averages beside the old; None: no op, or no
        TensorFlow).

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
        "tensorflow_op": "functional" if tensorflow and OP_LIBRARY.exists() else None,
    }
