"""Gradients computed by the optimizer: `minimize`, and what there is for graphs of TensorFlow 1."""

from collections.abc import Callable, Iterable

from .kinds import Operation, Tensor, Variable, VariableList
from .wrapper import Wrapper


class GraphGradientMembers(Wrapper):
    """The documented members that compute gradients in TensorFlow's graph mode."""

    apply_gradients: Callable[..., Operation]

    def get_gradients(self, loss: Tensor, params: Variable | Iterable[Variable]) -> list[Tensor]:
        """Return the gradients of a loss, in TensorFlow's graph mode: `minimize` works everywhere.

        Args:
            loss: A tensor of the graph.
            params: A variable, or variables, also nested.

        Raises:
            ValueError: A variable has no gradient.
            RuntimeError: This is not graph mode.
        """
        return self._backend.graph_gradients(loss, params)

    def get_updates(self, loss: Tensor, params: Iterable[Variable]) -> list[Operation]:
        """Apply the gradients of a loss, in TensorFlow's graph mode: `minimize` works everywhere.

        Args:
            loss: A tensor of the graph.
            params: Variables.

        Returns:
            A list of what `apply_gradients` returns.

        Raises:
            ValueError: A variable has no gradient.
            RuntimeError: This is not graph mode.
        """
        params = list(params)
        return [self.apply_gradients(zip(self.get_gradients(loss, params), params, strict=True))]


class GradientMembers(GraphGradientMembers):
    """These, and the one that works in eager code."""

    scale_loss: Callable[[Tensor], Tensor]

    def minimize(
        self,
        loss: Tensor | Callable[[], Tensor],
        var_list: VariableList,
        grad_loss: Tensor = None,
        name: str | None = None,
        tape: Tensor = None,
    ) -> Operation:
        """Compute the gradients of a loss and apply them.

        With TensorFlow and torch; with JAX, whose gradients are those of a function, compute them with
        ``jax.grad`` and call `apply` or `stateless_apply`.

        Args:
            loss: A callable without arguments that returns the loss; or the loss. The wrapped
                optimizer scales it, where it does.
            var_list: A list of variables, or a callable that returns it after `loss` was called.
            grad_loss: The gradient of the loss; None: one.
            name: Ignored.
            tape: With TensorFlow, the ``tf.GradientTape`` that recorded the loss, where that is none
                to call.

        Returns:
            `iterations`.

        Raises:
            ValueError: Among `var_list` is what is no variable, or `tape` is missing.
            NotImplementedError: The backend is JAX.
        """
        pairs = self._backend.gradients(loss, var_list, grad_loss, tape, self.scale_loss)
        with self._backend.unrecorded():
            return self.apply_gradients(pairs, name=name)
