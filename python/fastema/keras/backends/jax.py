"""JAX: arrays that never change; a variable holds another one after each step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .base import Backend, Carrier, Engine, native


def blend(average: jax.Array, value: jax.Array, decay: Callable[[], Any], when: Any) -> jax.Array:
    """Return the average moved towards the value; pure, for jitted steps."""
    with jax.enable_x64(True):  # the weight is formed in float64, wherever the arrays are narrower
        d = decay()
        weight, copies = 1.0 - d, d == 0.0
        compute = jnp.float64 if average.dtype == jnp.float64 else jnp.float32
        weight = jnp.asarray(weight).astype(compute)
        old, new = average.astype(compute), value.astype(compute)
        blended = jnp.where(copies, new, old + weight * (new - old)).astype(average.dtype)
        return blended if when is None else jnp.where(when, blended, average)


class Jax(Backend):
    """See `Backend`."""

    arrays = jnp

    def numpy(self, variable: Any) -> np.ndarray:
        return np.array(native(variable))

    def hold(self, variable: Any) -> Any:
        return native(variable)  # never changes

    def assign(self, variable: Any, value: Any) -> Any:
        variable.assign(jnp.asarray(native(value)).astype(native(variable).dtype))

    def count(self, iterations: Any) -> Any:
        return iterations.value  # in a stateless scope, that scope's

    def to_float64(self, step: Any) -> Any:
        return jnp.asarray(step).astype(jnp.float64)  # called where 64 bits are enabled

    def update(
        self,
        averages: Sequence[Any],
        variables: Sequence[Any],
        decay: Callable[[], Any],
        when: Any,
        engine: Engine,
    ) -> Carrier:
        if engine == "native":
            raise RuntimeError("engine='native' cannot run here: JAX computes its own arrays")
        for average, variable in zip(averages, variables, strict=True):
            average.assign(blend(average.value, variable.value, decay, when))
        return "graph"

    def swap(self, a: Iterable[Any], b: Iterable[Any]) -> None:
        for x, y in zip(a, b, strict=True):
            x_value, y_value = native(x), native(y)
            x.assign(y_value)
            y.assign(x_value)
