"""Gradients computed by the optimizer: `minimize` and what graphs of TensorFlow 1 had besides."""

from collections.abc import Callable, Iterable
from typing import Any

from .backends import Backend


class GradientMembers:
    """The documented members about gradients, for the optimizer that inherits them."""

    _backend: Backend
    apply_gradients: Callable[..., Any]
    scale_loss: Callable[[Any], Any]

    def minimize(
        self, loss: Any, var_list: Any, grad_loss: Any = None, name: str | None = None, tape: Any = None
    ) -> Any:
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

    def get_gradients(self, loss: Any, params: Iterable[Any]) -> list[Any]:
        """Return the gradients of a loss, in TensorFlow's graph mode: `minimize` works everywhere.

        Args:
            loss: A tensor of the graph.
            params: Variables.

        Raises:
            ValueError: A variable has no gradient.
            RuntimeError: This is not graph mode.
        """
        return self._backend.graph_gradients(loss, list(params))

    def get_updates(self, loss: Any, params: Iterable[Any]) -> list[Any]:
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
