"""From a keras.Variable to what its backend keeps behind it."""

from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf


def native(variable: Any) -> Any:
    """Return the backend's own variable, never an autocast view of it."""
    return getattr(variable, "_value", variable)


def colocated(variable: Any) -> AbstractContextManager[Any]:
    """Create variables where this one lies."""
    context: AbstractContextManager[Any] = tf.distribute.get_strategy().extended.colocate_vars_with(
        native(variable)
    )
    return context


def is_floating(variable: Any) -> bool:
    """Tell whether a variable can be averaged; counters and random seeds cannot."""
    return bool(tf.as_dtype(variable.dtype).is_floating)


def name_of(variable: Any) -> str:
    """Return what an error calls a variable."""
    return str(getattr(variable, "path", variable.name))
