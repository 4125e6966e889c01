"""What this build is, and what it finds on this machine."""

import mmap
import os
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from . import _core, _system


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


if (_tuning := os.environ.get("FASTEMA_TUNE", "1")) == "0":
    _core.tune(_core.USUAL_AHEAD)
elif _tuning != "1":
    raise ImportError(f"the environment variable FASTEMA_TUNE must be 0 or 1, got {_tuning!r}")


def _found() -> list[str]:
    """Name the loops that were tuned, and how far ahead of its use they ask for memory."""
    return [
        f"{loop['average']} <- {loop['value']}, {loop['rounding']}, "
        f"{'several threads' if loop['together'] else 'one thread'}: {loop['ahead']} bytes ahead"
        for loop in _core.tuned()
    ]


def _installed(*distributions: str) -> str | None:
    """Name the first of these distributions that is installed, and its version, without importing it."""
    for name in distributions:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None


# beside the extension module, which an editable install keeps elsewhere than the Python files
OP_LIBRARY = Path(_core.__file__).parent / "lib" / f"fastema_tensorflow{_system.LIBRARY_SUFFIX}"


@cache
def _tensorflow_op() -> str | None:
    """Name the tier of our op by what the installed TensorFlow exports, without importing it."""
    spec = util.find_spec("tensorflow")
    if spec is None or not spec.submodule_search_locations or not OP_LIBRARY.exists():
        return None
    for framework in Path(spec.submodule_search_locations[0]).glob("libtensorflow_framework.*"):
        with framework.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as symbols:
            return "locked" if symbols.find(b"TF_GetInputTensorFromVariable") >= 0 else "functional"
    return None


def build_config() -> dict[str, Any]:
    """Tell what this build is and what it finds on this machine.

    Returns:
        A dictionary with ``version``, ``compiler``, ``instruction_set`` (in use),
        ``instruction_sets`` (to choose from, best first), ``openmp`` (the path of the OpenMP library that
        says how many threads there are, torch's where several are loaded; None: there is none),
        ``threads`` (what ``threads=0`` means here and now), ``tuning`` (how far
        ahead of its use updates of large lists ask for memory, as this process' calls have found it to be
        fastest so far; no bit depends on it, and ``FASTEMA_TUNE=0`` in the environment turns it off at
        import), ``cupy`` and ``tensorflow`` (name and version, or None where not installed) and
        ``tensorflow_op`` (the tier of our op: ``"locked"`` averages in place under TensorFlow's locks,
        ``"functional"`` makes new averages beside the old, where TensorFlow does not export what the other
        needs; None: no op, or no TensorFlow).

    Example:
        >>> import fastema
        >>> fastema.build_config()["version"] == fastema.__version__
        True
    """
    return {
        **_core.build_config(),
        "tuning": _found(),
        "cupy": _installed("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "tensorflow": _installed("tensorflow", "tensorflow-cpu", "tf-nightly"),
        "tensorflow_op": _tensorflow_op(),
    }
