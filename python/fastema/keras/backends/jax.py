"""JAX: arrays that never change; a variable holds another one after each step."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from ... import _formula
from .base import Backend, Carrier, Engine


@jax.jit
def _blended(averages: list[Any], values: list[Any], weight: Any, copies: Any) -> list[Any]:
    return [_blend(average, value, weight, copies) for average, value in zip(averages, values, strict=True)]


def _blend(average: Any, value: Any, weight: Any, copies: Any) -> Any:
    compute = jnp.float64 if average.dtype == jnp.float64 else jnp.float32
    if value.dtype != compute:
        # XLA leaves out the rounding of a weight that was just computed: average the weight that stays
        kind: Any = jnp.finfo(value.dtype)  # type: ignore[no-untyped-call]
        value = jax.lax.reduce_precision(value.astype(compute), kind.nexp, kind.nmant)
    return _formula.blend(average, value, weight, copies, compute=compute, cast=_cast, where=jnp.where)


def _cast(x: Any, dtype: Any) -> Any:
    return jnp.asarray(x).astype(dtype)


def _array(x: Any) -> Any:
    """Return a variable's array; in a stateless scope, that scope's."""
    return x.value if isinstance(x, keras.Variable) else x


class Jax(Backend):
    """See `Backend`."""

    def numpy(self, variable: Any) -> np.ndarray:
        return np.array(_array(variable))

    def hold(self, variable: Any) -> Any:
        return _array(variable)  # never changes

    def assign(self, variable: Any, value: Any) -> Any:
        variable.assign(jnp.array(_array(value), variable.dtype))  # a copy: Keras donates both

    def gradients(
        self, loss: Any, var_list: Any, output: Any, tape: Any, scale: Callable[[Any], Any]
    ) -> list[tuple[Any, Any]]:
        raise NotImplementedError(
            "minimize cannot work with JAX, where gradients are those of a function: compute them with "
            "jax.grad and pass them to apply or stateless_apply"
        )

    def count(self, iterations: Any) -> Any:
        return _array(iterations)

    def number(self, step: Any) -> tuple[Any, Any]:
        if isinstance(step, jax.core.Tracer):
            return step.astype(jnp.float64), jnp  # `blend` enables 64 bits
        return super().number(step)

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
        old, new = list(map(_array, averages)), list(map(_array, variables))
        if isinstance(old[0], jax.core.Tracer):
            moved = [self.blend(a, v, decay, when) for a, v in zip(old, new, strict=True)]
        elif when is None or when:
            at = decay()
            moved = _blended(old, new, 1.0 - at, at == 0.0)
        else:
            return "graph"
        for average, value in zip(averages, moved, strict=True):
            average.assign(value)
        return "graph"

    def blend(self, average: Any, value: Any, decay: Callable[[], Any], when: Any) -> Any:
        self.traced = self.traced or isinstance(average, jax.core.Tracer)
        with jax.enable_x64(True):  # the weight is formed in float64, wherever the arrays are narrower
            at = decay()
            blended = _blend(average, value, 1.0 - at, at == 0.0)
            return blended if when is None else jnp.where(when, blended, average)

    def swap(self, a: Iterable[Any], b: Iterable[Any]) -> None:
        for x, y in zip(a, b, strict=True):
            x_value, y_value = _array(x), _array(y)
            x.assign(y_value)
            y.assign(x_value)

    def watch(self, model: Any, average: Callable[..., Any]) -> None:
        reference: Callable[[], Any] = weakref.ref(model)
        train_step = model.train_step

        def train_and_average(state: Any, data: Any) -> Any:
            logs, (trained, others, optimizer, metrics) = train_step(state, data)
            moved = average(reference().optimizer.variables, state[2], optimizer, others)
            return logs, (trained, others, moved, metrics)

        model.train_step = train_and_average
        if model.train_function is not None:  # it was traced before
            model.make_train_function(force=True)
