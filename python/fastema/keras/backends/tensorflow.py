"""tf.Variables: eager, in tf.function, under XLA and tf.distribute."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from ... import tensorflow as engines
from ..kinds import Carrier, Context, Engine, Gradient, Operation, Optimizer, Tensor, Variable, VariableList
from .base import Backend, name_of, native, natives_of, variables_in


def _local_values(variable: Variable) -> list[tf.Variable]:
    """Return a variable or a held value as each replica of this process has it."""
    if isinstance(variable, list):
        return variable
    variable = native(variable)
    return list(variable.values) if isinstance(variable, tf.distribute.DistributedValues) else [variable]


_replica = threading.local()  # replicas are traced in threads, by turns


@contextmanager
def _summed_already(optimizer: Optimizer) -> Iterator[None]:
    """Have an optimizer of Keras take the gradients of this replica as the sums of all."""
    if "_all_reduce_sum_gradients" not in vars(optimizer):
        summed = optimizer._all_reduce_sum_gradients

        def all_reduce(pairs: list[Gradient]) -> list[Gradient]:
            return pairs if getattr(_replica, "summed_already", False) else summed(pairs)

        # past Keras' tracking of attributes
        object.__setattr__(optimizer, "_all_reduce_sum_gradients", all_reduce)
    _replica.summed_already = True
    try:
        yield
    finally:
        _replica.summed_already = False


class TensorFlow(Backend):
    """tf.Variables, also in graphs and of several replicas; see `Backend`."""

    def __init__(self) -> None:
        self._done: tf.Variable | None = None

    def creation(self) -> Context:
        context: Context = tf.init_scope()
        return context

    def colocated(self, variable: Variable) -> Context:
        context: Context = tf.distribute.get_strategy().extended.colocate_vars_with(native(variable))
        return context

    def numpy(self, variable: Variable) -> np.ndarray:
        return np.array(_local_values(variable)[0].numpy())

    def has_value(self, variable: Variable) -> bool:
        with tf.init_scope():
            return not tf.executing_eagerly() or bool(native(variable).is_initialized())

    def hold(self, variable: Variable) -> Tensor:
        return [part.read_value() for part in _local_values(variable)]

    def assign(self, variable: Variable, value: Tensor) -> Operation:
        if isinstance(value, list):
            for part, held in zip(_local_values(variable), value, strict=True):
                part.assign(held)
            return None
        target = native(variable)
        return target.assign(tf.cast(native(value), target.dtype), read_value=False)

    def gradients(
        self,
        loss: Tensor,
        var_list: VariableList,
        output: Tensor,
        tape: tf.GradientTape | None,
        scale: Callable[[Tensor], Tensor],
    ) -> list[Gradient]:
        if tape is None and not callable(loss):
            raise ValueError("tape must be the tf.GradientTape that recorded the loss, or loss a callable")
        if not callable(var_list):
            natives_of(variables_in(var_list), tf.Variable)  # refuses before the loss is computed
        tape = tf.GradientTape() if tape is None else tape
        if callable(loss):
            with tape:
                loss = loss()
        with tape:
            scaled = scale(loss)
        variables = variables_in(var_list)
        found = tape.gradient(scaled, natives_of(variables, tf.Variable), output_gradients=output)
        return list(zip(found, variables, strict=True))

    def graph_gradients(self, loss: Tensor, variables: Variable | Iterable[Variable]) -> list[Tensor]:
        if tf.executing_eagerly():
            return super().graph_gradients(loss, variables)
        variables = tf.nest.flatten(variables)
        found = tf.compat.v1.gradients(loss, natives_of(variables, tf.Variable))
        for gradient, variable in zip(found, variables, strict=True):
            if gradient is None:
                raise ValueError(f"the loss has no gradient with respect to {name_of(variable)}")
        return list(found)

    def once(self, action: Callable[[], object]) -> None:
        with tf.init_scope():
            done = self._done = tf.Variable(False) if self._done is None else self._done

        def act() -> None:
            action()
            done.assign(True, read_value=False)

        tf.cond(done, lambda: None, act)

    def check_apply(self) -> None:
        if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
            raise RuntimeError(
                "apply_gradients must be called in a replica context: use strategy.run, got the "
                "cross-replica context"
            )

    def summed_already(self, optimizer: Optimizer) -> Context:
        if tf.distribute.get_strategy().num_replicas_in_sync == 1:
            return nullcontext()
        if type(optimizer).apply is not keras.optimizers.Optimizer.apply:
            raise NotImplementedError(
                "experimental_aggregate_gradients=False with several replicas needs a wrapped optimizer that "
                f"sums the gradients itself; {type(optimizer).__name__} hands them on to another one"
            )
        return _summed_already(optimizer)

    def count(self, iterations: Variable) -> Tensor:
        return tf.identity(native(iterations))

    def number(self, step: Tensor) -> tuple[Tensor, ModuleType]:
        return tf.cast(step, tf.float64), tf

    def refusing(
        self,
        condition: Callable[[], bool],
        variable: Variable,
        message: str,
        changing: Sequence[Variable] = (),
    ) -> Context:
        if tf.executing_eagerly():
            return super().refusing(condition, variable, message)

        # XLA leaves this operation out
        def check() -> Operation:
            return tf.raw_ops.Assert(condition=tf.equal(native(variable), 0), data=[message])

        if not changing or tf.distribute.has_strategy():
            checked: Context = tf.control_dependencies([check()])
            return checked

        # A control dependency of every operation keeps TensorFlow from folding the constants of a rate:
        # training would differ by a rounding. A branch that seems to assign the variables comes before
        # what uses them, and before nothing else.
        def refuse() -> None:
            with tf.control_dependencies([check()]):
                for changed in map(native, changing):
                    changed.assign(changed, read_value=False)

        if not GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            tf.cond(tf.equal(native(variable), 0), lambda: None, refuse)
        return nullcontext()

    def update(
        self,
        averages: Sequence[Variable],
        variables: Sequence[Variable],
        decay: Callable[[], Tensor],
        when: Tensor,
        engine: Engine,
    ) -> Carrier:
        self.traced = self.traced or not tf.executing_eagerly()
        return engines.update(
            [native(average) for average in averages],
            [native(variable) for variable in variables],
            decay(),
            when=when,
            engine=engine,
        )

    def check_swap(self, same_types: bool) -> None:
        if not same_types and not tf.executing_eagerly():
            raise RuntimeError(
                "swap_weights must be called outside of tf.function where averages and weights differ in type"
            )

    def swap(self, a: Iterable[Variable], b: Iterable[Variable]) -> None:
        engines.swap([native(x) for x in a], [native(x) for x in b])

    def group(self, operations: list[Operation]) -> Operation:
        return None if tf.executing_eagerly() else tf.group(operations)
