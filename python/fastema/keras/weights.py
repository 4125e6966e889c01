"""An optimizer's state as a list of arrays, as legacy optimizers give and take it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .backends import name_of
from .kinds import Initializer, Variable
from .slots import Added
from .wrapper import Wrapper

Constant = object  # one of TensorFlow's enumerations, or Keras' word for it


class WeightMembers(Wrapper):
    """The documented members about weights."""

    built: bool
    _added: Added
    _iterations: Variable

    def add_weight(  # noqa: PLR0917 - the documented signature
        self,
        name: str,
        shape: Sequence[int],
        dtype: str | None = None,
        initializer: Initializer = "zeros",
        trainable: bool | None = None,  # noqa: ARG002 - of the documented API: Keras 3's are never trained
        synchronization: Constant = None,
        aggregation: Constant = "none",
    ) -> Variable:
        """Add a variable to the optimizer; it is saved and loaded with it.

        Args:
            name: The variable's name.
            shape: Its shape.
            dtype: Its type; None: float32.
            initializer: A name, an initializer, or a tensor with the first value.
            trainable: Ignored: an optimizer's variables are not trained.
            synchronization: Not ``tf.VariableSynchronization.ON_READ``, which Keras 3 does not offer.
            aggregation: ``"none"``, ``"mean"``, ``"sum"`` or ``"only_first_replica"``, or
                TensorFlow's constant of that name.

        Raises:
            ValueError: An argument is not among these.
        """
        if _word(synchronization) == "on_read":
            raise ValueError("synchronization must not be ON_READ: Keras 3 offers no such variables")
        with self._backend.creation():
            return self._added.add(
                f"weight_{name}",
                name=name,
                shape=tuple(shape),
                dtype=dtype or "float32",
                initializer=initializer,
                aggregation=_word(aggregation),
            )

    def get_weights(self) -> list[np.ndarray]:
        """Return the optimizer's state as a list of arrays.

        `iterations`, the wrapped optimizer's state, the averages, then what `add_slot` and
        `add_weight` added; the learning rate is not among them. Averages of the variables that the
        optimizer trains come first, as it trains them, then the others by their paths. (Where gradients
        accumulate, the first number counts them, not the updates.)

        Raises:
            RuntimeError: The weights are swapped: they stand where the averages should.
        """
        with self._refusing_while_swapped("get weights"):
            return [self._backend.numpy(variable) for variable in self._state()]

    def set_weights(self, weights: Sequence[ArrayLike]) -> None:
        """Set the optimizer's state.

        Args:
            weights: What `get_weights` returned. Or the values of `variables`, as Keras has them, with
                the learning rate. Or the list without the averages, as the original has it: the
                averages then stay as they are, and if they start at zero they need about
                ``1 / (1 - average_decay)`` steps; give such an optimizer ``initial_average="weights"``.

        Raises:
            ValueError: The list has another length, or one of its arrays another shape. Nothing is
                changed then.
            RuntimeError: The weights are swapped: they stand where the averages should.
        """
        state = self._state()
        everything = [*self._optimizer.variables, *self._averages, *self._added]
        cold = [*self._inner_state(), *self._added]
        targets = next((x for x in (state, everything, cold) if len(x) == len(weights)), None)
        if targets is None and not self.built:
            raise ValueError(
                "You are calling set_weights() on an optimizer that is not built: call build(variables) first"
            )
        if targets is None:
            raise ValueError(
                f"weights must have {len(state)} arrays as from get_weights(), {len(everything)} with the "
                f"learning rate or {len(cold)} without the averages, got {len(weights)}"
            )
        arrays = [np.asarray(weight) for weight in weights]
        check_shapes(targets, arrays)
        with self._refusing_while_swapped("set weights"):
            for variable, array in zip(targets, arrays, strict=True):
                self._backend.assign(variable, array)

    def _state(self) -> list[Variable]:
        return [*self._inner_state(), *self._averages, *self._added]

    def _inner_state(self) -> list[Variable]:
        count = self._iterations  # `iterations` is no variable where gradients accumulate
        return [
            count,
            *(v for v in self._optimizer.variables if v is not count and v.name != "learning_rate"),
        ]


def check_shapes(variables: Sequence[Variable], weights: Sequence[np.ndarray]) -> None:
    """Refuse arrays that cannot be assigned to these variables.

    Raises:
        ValueError: An array has another shape than its variable.
    """
    for i, (variable, weight) in enumerate(zip(variables, weights, strict=True)):
        if tuple(weight.shape) != tuple(variable.shape):
            raise ValueError(
                f"weights[{i}] must have the shape of {name_of(variable)}, {tuple(variable.shape)}, "
                f"got {tuple(weight.shape)}"
            )


def _word(constant: Constant) -> str:
    """Return Keras' word for a constant."""
    return str(getattr(constant, "name", constant)).lower()
