"""JAX: arrays that never change; a variable holds another one after each step."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import keras
import numpy as np

from ... import _formula
from ..._formula_jax import blend
from ..kinds import Carrier, Engine, Gradient, Model, Operation, Tensor, Variable, VariableList
from .base import Backend

Scalar = jax.Array | float | bool
State = tuple[list[Tensor], ...]  # what a step of Keras' trainer is given, and returns


@jax.jit
def _blended(
    averages: list[jax.Array], values: list[jax.Array], weight: Scalar, copies: Scalar
) -> list[jax.Array]:
    return [_blend(average, value, weight, copies) for average, value in zip(averages, values, strict=True)]


def _blend(average: jax.Array, value: jax.Array, weight: Scalar, copies: Scalar) -> jax.Array:
    return blend(average, value, weight, copies).astype(average.dtype)


def _array(x: Variable | Tensor) -> Tensor:
    """Return a variable's array; in a stateless scope, that scope's."""
    return x.value if isinstance(x, keras.Variable) else x


class Jax(Backend):
    """JAX arrays, which variables exchange for others; see `Backend`."""

    def numpy(self, variable: Variable) -> np.ndarray:
        return np.array(_array(variable))

    def hold(self, variable: Variable) -> Tensor:
        return _array(variable)  # never changes

    def assign(self, variable: Variable, value: Tensor) -> Operation:
        variable.assign(jnp.array(_array(value), variable.dtype))  # a copy: Keras donates both

    def gradients(
        self,
        loss: Tensor,
        var_list: VariableList,
        output: Tensor,
        tape: object,
        scale: Callable[[Tensor], Tensor],
    ) -> list[Gradient]:
        raise NotImplementedError(
            "minimize cannot work with JAX, where gradients are those of a function: compute them with "
            "jax.grad and pass them to apply or stateless_apply"
        )

    def count(self, iterations: Variable) -> Tensor:
        return _array(iterations)

    def number(self, step: Tensor) -> tuple[Tensor, ModuleType]:
        if isinstance(step, jax.core.Tracer):
            return step.astype(jnp.float64), jnp  # `blend` enables 64 bits
        return super().number(step)

    def update(
        self,
        averages: Sequence[Variable],
        variables: Sequence[Variable],
        decay: Callable[[], Tensor],
        when: Tensor,
        engine: Engine,
    ) -> Carrier:
        if engine == "native":
            raise RuntimeError("engine='native' cannot run here: JAX computes its own arrays")
        old, new = list(map(_array, averages)), list(map(_array, variables))
        if isinstance(old[0], jax.core.Tracer):
            moved = [self.blend(a, v, decay, when) for a, v in zip(old, new, strict=True)]
        elif when is None or when:
            moved = _blended(old, new, *_formula.weigh(decay()))
        else:
            return "graph"
        for average, value in zip(averages, moved, strict=True):
            average.assign(value)
        return "graph"

    def blend(self, average: Tensor, value: Tensor, decay: Callable[[], Tensor], when: Tensor) -> Tensor:
        self.traced = self.traced or isinstance(average, jax.core.Tracer)
        with jax.enable_x64(True):  # the weight is formed in float64, wherever the arrays are narrower
            blended = _blend(average, value, *_formula.weigh(decay()))
            return blended if when is None else jnp.where(when, blended, average)

    def swap(self, a: Iterable[Variable], b: Iterable[Variable]) -> None:
        for x, y in zip(a, b, strict=True):
            x_value, y_value = _array(x), _array(y)
            x.assign(y_value)
            y.assign(x_value)

    def watch(self, model: Model, average: Callable[..., list[Tensor]]) -> None:
        reference: Callable[[], Model] = weakref.ref(model)
        train_step = model.train_step

        def train_and_average(state: State, data: object) -> tuple[object, State]:
            logs, (trained, others, optimizer, metrics) = train_step(state, data)
            moved = average(reference().optimizer.variables, state[2], optimizer, others)
            return logs, (trained, others, moved, metrics)

        model.train_step = train_and_average
        if model.train_function is not None:  # it was traced before
            model.make_train_function(force=True)
