"""Trees of JAX, leaf by leaf: what becomes of each, and whether it is as at first."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .._types import FLOATS, MIXES

Params: TypeAlias = Any
"""A tree of arrays that JAX knows: dictionaries, lists, states of NNX, modules of equinox."""


def flattened(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Return the leaves of a tree with their paths, and its structure."""
    leaves, structure = jax.tree.flatten_with_path(tree)
    return leaves, structure


def kind_of(x: Any) -> Literal["averaged", "complex", "copied", "carried"]:
    """Return what becomes of a leaf."""
    if not isinstance(x, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        return "carried"
    dtype = jnp.result_type(x)
    if not isinstance(dtype, np.dtype):  # keys of random numbers
        return "carried"
    return "averaged" if dtype in FLOATS else "complex" if dtype.kind == "c" else "copied"


def copied(x: Any) -> Any:
    return jnp.copy(x) if isinstance(x, jax.Array) else x


def applied(parameter: Any, change: Any) -> Any:
    """Return a parameter after a step, as `optax.apply_updates` does."""
    return jnp.asarray(parameter + change).astype(jnp.asarray(parameter).dtype)


def check_fits(average: Any, value: Any, name: str) -> None:
    """Raise as `ema.update` does unless a parameter goes with its average."""
    kind = kind_of(average)
    if kind == "carried" and kind_of(value) == "carried":
        return
    if kind != kind_of(value):
        raise TypeError(f"params{name} must be {kind}, as it was at first, got {type(value).__name__}")
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != average.shape:
        raise ValueError(f"params{name} must have shape {average.shape}, got {shape}")
    pair = (average.dtype.name, dtype.name)
    if pair not in MIXES if kind == "averaged" else average.dtype != dtype:
        raise TypeError(
            f"params{name} must be of a type that goes with its average's {pair[0]}, got {pair[1]}"
        )


def name_of(path: tuple[Any, ...]) -> str:
    return str(jax.tree_util.keystr(path))


def difference(kept: list[Any], values: list[Any], structure: Any, given: Any) -> str:
    """Say how two trees differ."""
    ours, theirs = ([name_of(path) for path, _ in leaves] for leaves in (kept, values))
    missing, unknown = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if missing or unknown:
        return f"missing: {missing[:20]}, unknown: {unknown[:20]}"
    return f"it was {structure}, got {given}"
