"""What a backend of Keras has to do for averages; the methods of eager code, where others need no more."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from types import ModuleType

import numpy as np

from ..._types import FLOATS
from ..kinds import (
    Carrier,
    Context,
    Engine,
    Gradient,
    Model,
    Operation,
    Optimizer,
    Tensor,
    Variable,
    VariableList,
)

_NO_GRAPH = (
    "get_gradients and get_updates need TensorFlow's graph mode, in a tf.function or a tf.Graph: "
    "call minimize instead"
)


def native(variable: Variable | Tensor) -> Tensor:
    """Return what the backend keeps behind a keras.Variable, never an autocast view of it."""
    return getattr(variable, "_value", variable)


def dtype_of(variable: Variable) -> str:
    """Return a variable's type as Keras writes it."""
    dtype = variable.dtype
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def is_floating(variable: Variable) -> bool:
    """Tell whether a variable can be averaged; counters and random seeds cannot."""
    return dtype_of(variable) in map(str, FLOATS)


def name_of(variable: Variable) -> str:
    """Return what an error calls a variable."""
    return str(getattr(variable, "path", getattr(variable, "name", variable)))


def variables_in(var_list: VariableList) -> list[Variable]:
    """Return the variables of a list, or of what returns it.

    Raises:
        ValueError: It is no list.
    """
    if callable(var_list):
        var_list = var_list()
    if not isinstance(var_list, list | tuple):
        raise ValueError(f"var_list must be a list of variables, got {type(var_list).__name__}")
    return list(var_list)


def natives_of(variables: list[Variable], kind: type) -> list[Tensor]:
    """Return what lies behind variables.

    Raises:
        ValueError: One of them is no variable.
    """
    for i, variable in enumerate(variables):
        if not isinstance(native(variable), kind):
            raise ValueError(f"var_list[{i}] must be a variable, got {type(variable).__name__}")
    return [native(variable) for variable in variables]


class Backend:
    """What averages need of the array library below Keras; one instance serves one optimizer."""

    traced = False  # whether an update was traced, so that it goes on with the pairs it was given

    # --- variables --------------------------------------------------------------------------------

    def creation(self) -> Context:
        """Create variables that outlive what is being traced."""
        return nullcontext()

    def colocated(self, variable: Variable) -> Context:  # noqa: ARG002
        """Create variables where this one lies."""
        return nullcontext()

    def numpy(self, variable: Variable) -> np.ndarray:
        """Return a copy of a variable's value, in the type of the variable."""
        raise NotImplementedError

    def has_value(self, variable: Variable) -> bool:  # noqa: ARG002
        """Tell whether a variable can be read: not in the trace that creates it."""
        return True

    def hold(self, variable: Variable) -> Tensor:
        """Return a variable's value, to be assigned again later; nothing is lost on the way."""
        raise NotImplementedError

    def assign(self, variable: Variable, value: Tensor) -> Operation:
        """Assign a held value, a NumPy array or another variable's value, cast to the variable's type.

        Returns:
            The operation, in a graph.
        """
        raise NotImplementedError

    # --- gradients --------------------------------------------------------------------------------

    def gradients(
        self,
        loss: Tensor,
        var_list: VariableList,
        output: Tensor,
        tape: object,
        scale: Callable[[Tensor], Tensor],
    ) -> list[Gradient]:
        """Return (gradient, variable) pairs of a loss.

        Args:
            loss: The loss, or what returns it.
            var_list: The variables, or what returns them once the loss was computed.
            output: The gradient of the loss; None: one.
            tape: What recorded the loss, or None.
            scale: Scales the loss.
        """
        raise NotImplementedError

    def unrecorded(self) -> Context:
        """Assign to variables without recording it for gradients."""
        return nullcontext()

    def graph_gradients(
        self,
        loss: Tensor,  # noqa: ARG002
        variables: Variable | Iterable[Variable],  # noqa: ARG002
    ) -> list[Tensor]:
        """Return the gradients of a tensor of TensorFlow's graph, of one variable or nested ones."""
        raise RuntimeError(_NO_GRAPH)

    # --- steps ------------------------------------------------------------------------------------

    def once(self, action: Callable[[], object]) -> None:
        """Act at the first of all steps, also where every step runs one trace."""
        raise NotImplementedError

    def check_apply(self) -> None:
        """Refuse to apply gradients where that is not possible."""

    def summed_already(self, optimizer: Optimizer) -> Context:  # noqa: ARG002
        """Have an optimizer take each gradient as the sum of all replicas' in the context."""
        return nullcontext()

    def count(self, iterations: Variable) -> Tensor:
        """Return what the counter says now, whatever is assigned to it later."""
        raise NotImplementedError

    def count_after_step(self, iterations: Variable) -> Tensor:
        """Return what `count` does, after a step that has counted one and assigned the counter once."""
        return self.count(iterations)

    def number(self, step: Tensor) -> tuple[Tensor, ModuleType]:
        """Return a counted step as a float64, and the array library that computes with it."""
        return float(step), np

    def refusing(
        self,
        condition: Callable[[], bool],
        variable: Variable,  # noqa: ARG002
        message: str,
        changing: Sequence[Variable] = (),  # noqa: ARG002
    ) -> Context:
        """Return a context whose operations raise if the condition holds.

        Args:
            condition: Asked in eager code.
            variable: Zero where the condition does not hold; asked in a graph.
            message: Of the RuntimeError.
            changing: The variables that the operations change, if these are known.
        """
        if condition():
            raise RuntimeError(message)
        return nullcontext()

    # --- averages ---------------------------------------------------------------------------------

    def update(
        self,
        averages: Sequence[Variable],
        variables: Sequence[Variable],
        decay: Callable[[], Tensor],
        when: Tensor,
        engine: Engine,
    ) -> Carrier:
        """Average, if `when` is None or true.

        Args:
            averages: Assigned.
            variables: Read.
            decay: Returns the decay of this step; called where it is needed.
            when: None, or a condition made of what `count` returned.
            engine: What the user asked for.
        """
        raise NotImplementedError

    def blend(self, average: Tensor, value: Tensor, decay: Callable[[], Tensor], when: Tensor) -> Tensor:
        """Return the value of an average after `update`; nothing is assigned."""
        raise NotImplementedError

    def watch(self, model: Model, average: Callable[..., list[Tensor]]) -> None:
        """See to it that the weights of a model that no optimizer trains are averaged after its steps.

        Not needed where they can be read in `update`.

        Args:
            model: A Keras model.
            average: ``average(variables, before, after, values)`` returns the values `after` of an
                optimizer's variables with moved averages; `before` are those at the start of the step
                and `values` those of the model's non-trainable variables at its end.
        """

    def check_swap(self, same_types: bool) -> None:
        """Refuse to swap where that is not possible."""

    def swap(self, a: Iterable[Variable], b: Iterable[Variable]) -> None:
        """Exchange the contents of variables of the same types, bit for bit."""
        raise NotImplementedError

    def group(self, operations: list[Operation]) -> Operation:  # noqa: ARG002
        """Return one operation for several, in a graph; None in eager code."""
        return None
