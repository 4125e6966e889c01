"""The face of a backend, with what eager code without devices of its own does."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np

Engine = Literal["auto", "native", "graph"]
Carrier = Literal["native", "graph", "cuda"]  # what carries averaging out


def native(variable: Any) -> Any:
    """Return what the backend keeps behind a keras.Variable, never an autocast view of it."""
    return getattr(variable, "_value", variable)


def dtype_of(variable: Any) -> str:
    """Return a variable's type as Keras writes it."""
    dtype = variable.dtype
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def is_floating(variable: Any) -> bool:
    """Tell whether a variable can be averaged; counters and random seeds cannot."""
    return dtype_of(variable) in ("float16", "bfloat16", "float32", "float64")


def name_of(variable: Any) -> str:
    """Return what an error calls a variable."""
    return str(getattr(variable, "path", getattr(variable, "name", variable)))


class Backend:
    """Variables here are keras.Variables or the backend's own."""

    # --- variables --------------------------------------------------------------------------------

    def creation(self) -> AbstractContextManager[Any]:
        """Create variables that outlive what is being traced."""
        return nullcontext()

    def colocated(self, variable: Any) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Create variables where this one lies."""
        return nullcontext()

    def numpy(self, variable: Any) -> np.ndarray:
        """Return a copy of a variable's value, in the type of the variable."""
        raise NotImplementedError

    def hold(self, variable: Any) -> Any:
        """Return a variable's value, to be assigned again later; nothing is lost on the way."""
        raise NotImplementedError

    def assign(self, variable: Any, value: Any) -> Any:
        """Assign a held value, a NumPy array or another variable's value, cast to the variable's type.

        Returns:
            The operation, in a graph.
        """
        raise NotImplementedError

    # --- steps ------------------------------------------------------------------------------------

    def check_apply(self, aggregate: bool) -> None:
        """Refuse to apply gradients where that is not possible."""

    def count(self, iterations: Any) -> Any:
        """Return what the counter says now, whatever is assigned to it later."""
        raise NotImplementedError

    def number(self, step: Any) -> tuple[Any, Any]:
        """Return a counted step as a float64, and the array library that computes with it."""
        return float(step), np

    def refusing(self, condition: Callable[[], bool], variable: Any, message: str) -> Any:  # noqa: ARG002
        """Return a context whose operations raise if the condition holds.

        Args:
            condition: Asked in eager code.
            variable: Zero where the condition does not hold; asked in a graph.
            message: Of the RuntimeError.
        """
        if condition():
            raise RuntimeError(message)
        return nullcontext()

    # --- averages ---------------------------------------------------------------------------------

    def update(
        self,
        averages: Sequence[Any],
        variables: Sequence[Any],
        decay: Callable[[], Any],
        when: Any,
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

    def blend(self, average: Any, value: Any, decay: Callable[[], Any], when: Any) -> Any:
        """Return the value of an average after `update`; nothing is assigned."""
        raise NotImplementedError

    def watch(self, model: Any, average: Callable[..., Any]) -> None:
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

    def swap(self, a: Iterable[Any], b: Iterable[Any]) -> None:
        """Exchange the contents of variables of the same types, bit for bit."""
        raise NotImplementedError

    def group(self, operations: list[Any]) -> Any:  # noqa: ARG002
        """Return one operation for several, in a graph; None in eager code."""
        return None
