"""The documented members that Keras 3's optimizers do not have: slots, weights as arrays, minimize."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .averages import Averages
from .backends import Backend, dtype_of, name_of, native

# What legacy optimizers called the slots of those in Keras 3.
_LEGACY_SLOTS = {
    "m": ("momentum",),
    "v": ("velocity", "norm"),
    "vhat": ("velocity_hat",),
    "rms": ("velocity",),
    "mg": ("average_gradient",),
    "accum_grad": ("accumulated_grad",),
    "accum_var": ("accumulated_delta_var",),
}


class Added:
    """The variables added by hand, in the order they were, each with a name that it has in a file.

    Values that are loaded before their variables exist wait for them.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._variables: dict[str, Any] = {}
        self._waiting: dict[str, np.ndarray] = {}

    def __iter__(self) -> Iterator[Any]:
        return iter(self._variables.values())

    def __len__(self) -> int:
        return len(self._variables)

    def add(self, kind: str, shape: tuple[int, ...], create: Callable[[], Any]) -> Any:
        """Create a variable and give it the value that waits for it.

        Args:
            kind: Begins the name in a file; the next number of this kind ends it.
            shape: The variable's shape.
            create: Makes the variable.

        Raises:
            ValueError: The value that waits has another shape. Nothing is created then.
        """
        number = sum(name.rpartition("_")[0] == kind for name in self._variables)
        name = f"{kind}_{number}"
        value = self._waiting.get(name)
        if value is not None:
            self._check_shape(name, shape, value)
        variable = self._variables[name] = create()
        if value is not None:
            self._backend.assign(variable, self._waiting.pop(name))
        return variable

    def state(self) -> dict[str, np.ndarray]:
        """Return the values by their names in a file; those that wait are not lost."""
        values = {name: self._backend.numpy(variable) for name, variable in self._variables.items()}
        return {**self._waiting, **values}

    def take(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Remove from what a file holds, and return, what `state` wrote.

        Raises:
            ValueError: A variable's value is missing, or of another shape.
        """
        own = {name: state.pop(name) for name in list(state) if name.startswith(("slot_", "weight_"))}
        for name, variable in self._variables.items():
            if name not in own:
                raise ValueError(f"the file lacks {name}, the value of {name_of(variable)}")
            self._check_shape(name, tuple(variable.shape), own[name])
        return own

    def load(self, own: Mapping[str, np.ndarray]) -> None:
        """Assign what `take` returned; what is left over waits for its variable."""
        self._waiting = dict(own)
        for name, variable in self._variables.items():
            self._backend.assign(variable, self._waiting.pop(name))

    @staticmethod
    def _check_shape(name: str, shape: tuple[int, ...], value: np.ndarray) -> None:
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {value.shape} from the file")


class DocumentedMembers:
    """Members of the documented API, for the optimizer that inherits them."""

    name: str
    built: bool
    _optimizer: Any
    _backend: Backend
    _averages: Averages
    _added: Added
    _slots: dict[tuple[Any, str], tuple[Any, Any]]  # (key, name): (variable, slot)
    _trainable_variables: Sequence[Any]
    _iterations: Any
    add_variable: Callable[..., Any]
    apply_gradients: Callable[..., Any]
    scale_loss: Callable[[Any], Any]
    _refusing_while_swapped: Callable[[str], Any]
    _var_key: Callable[[Any], Any]

    def __dir__(self) -> Iterable[str]:
        # tf.train.Checkpoint looks here for optimizers whose slots are nobody's children, and refuses ours
        return [name for name in super().__dir__() if name != "get_slot_names"]

    # --- slots ------------------------------------------------------------------------------------

    def add_slot(
        self, var: Any, slot_name: str, initializer: Any = "zeros", shape: Sequence[int] | None = None
    ) -> Any:
        """Add a variable that belongs to another one; it is saved and loaded with the optimizer.

        Args:
            var: A variable of the model, Keras' or the backend's own.
            slot_name: The slot's name.
            initializer: A name, an initializer, or a tensor with the first value.
            shape: The slot's shape; None: that of the tensor, or of `var`.

        Returns:
            The slot: a new one, or that which has this name already.
        """
        key = (self._var_key(var), slot_name)
        if key not in self._slots:
            if shape is None and _is_value(initializer):
                shape = _shape(initializer)
            layout = getattr(var, "_layout", None) if shape is None else None
            with self._backend.creation(), self._backend.colocated(var):
                slot = self._add(
                    f"slot_{slot_name}",
                    name=f"{_prefix(var)}{slot_name}",
                    shape=tuple(var.shape if shape is None else shape),
                    dtype=dtype_of(native(var)),
                    initializer=initializer,
                    layout=layout,
                )
            self._slots[key] = (var, slot)
        return self._slots[key][1]

    def get_slot(self, var: Any, slot_name: str) -> Any:
        """Return the variable of this name that belongs to another one.

        Args:
            var: A variable of the model, Keras' or the backend's own.
            slot_name: The name given to `add_slot`, or ``"average"``, or the wrapped optimizer's name
                for it, in Keras 3 (``"momentum"``) or in legacy Keras (``"m"``).

        Raises:
            KeyError: `var` has no such slot.
        """
        key = self._var_key(var)
        if (key, slot_name) in self._slots:
            return self._slots[key, slot_name][1]
        if slot_name == "average" and (average := self._averages.of(var)) is not None:
            return average
        inner = self._inner_slots()
        for name in (slot_name, *_LEGACY_SLOTS.get(slot_name, ())):
            if key in inner.get(name, {}):
                return inner[name][key]
        raise KeyError(
            f"{name_of(var)} has no slot {slot_name!r}; the slots are {', '.join(self.get_slot_names())}"
        )

    def get_slot_names(self) -> list[str]:
        """Return the names that `get_slot` knows: the wrapped optimizer's, ``"average"``, those added."""
        average = ["average"] if len(self._averages) else []
        added = [slot_name for _, slot_name in self._slots]
        return list(dict.fromkeys([*self._inner_slots(), *average, *added]))

    def _inner_slots(self) -> dict[str, dict[Any, Any]]:
        """Return the wrapped optimizer's slots, by name and by variable.

        Keras has no table of them, but names each ``{path of the variable}_{name}``.
        """
        owners: dict[str, list[Any]] = {}  # of one path there may be several variables
        for variable in self._trainable_variables:
            owners.setdefault(_prefix(variable), []).append(self._var_key(variable))
        slots: dict[str, dict[Any, Any]] = {}
        for inner in self._optimizer.variables:
            ends = [i for i, letter in enumerate(inner.name, 1) if letter == "_"]
            end = next((end for end in reversed(ends) if inner.name[:end] in owners), None)
            if end is not None:
                slot = slots.setdefault(inner.name[end:], {})
                free = (key for key in owners[inner.name[:end]] if key not in slot)
                slot.setdefault(next(free, None), inner)
        return slots

    # --- weights ----------------------------------------------------------------------------------

    def add_weight(  # noqa: PLR0917 - the documented signature
        self,
        name: str,
        shape: Sequence[int],
        dtype: Any = None,
        initializer: Any = "zeros",
        trainable: bool | None = None,  # noqa: ARG002 - of the documented API: Keras 3's are never trained
        synchronization: Any = None,
        aggregation: Any = "none",
    ) -> Any:
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
            return self._add(
                f"weight_{name}",
                name=name,
                shape=tuple(shape),
                dtype=dtype or "float32",
                initializer=initializer,
                aggregation=_word(aggregation),
            )

    def _add(self, kind: str, *, shape: tuple[int, ...], initializer: Any, **arguments: Any) -> Any:
        def create() -> Any:
            if not _is_value(initializer):
                return self.add_variable(shape=shape, initializer=initializer, **arguments)
            variable = self.add_variable(shape=shape, **arguments)
            self._backend.assign(variable, initializer)
            return variable

        if _is_value(initializer) and _shape(initializer) != shape:
            raise ValueError(
                f"initializer must be a name, an initializer or a tensor of shape {shape}, "
                f"got a tensor of shape {_shape(initializer)}"
            )
        return self._added.add(kind, shape, create)

    def get_weights(self) -> list[np.ndarray]:
        """Return the optimizer's state as a list of arrays.

        `iterations`, the wrapped optimizer's state, the averages, then what `add_slot` and
        `add_weight` added; the learning rate is not among them. (Where gradients accumulate, the
        first counts them, not the updates.)

        Raises:
            RuntimeError: The weights are swapped: they stand where the averages should.
        """
        with self._refusing_while_swapped("get weights"):
            return [self._backend.numpy(variable) for variable in self._state()]

    def set_weights(self, weights: Sequence[Any]) -> None:
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
        for i, (variable, array) in enumerate(zip(targets, arrays, strict=True)):
            if array.shape != tuple(variable.shape):
                raise ValueError(
                    f"weights[{i}] must have the shape of {name_of(variable)}, {tuple(variable.shape)}, "
                    f"got {array.shape}"
                )
        with self._refusing_while_swapped("set weights"):
            for variable, array in zip(targets, arrays, strict=True):
                self._backend.assign(variable, array)

    def _state(self) -> list[Any]:
        return [*self._inner_state(), *self._averages, *self._added]

    def _inner_state(self) -> list[Any]:
        count = self._iterations  # `iterations` is no variable where gradients accumulate
        return [
            count,
            *(v for v in self._optimizer.variables if v is not count and v.name != "learning_rate"),
        ]

    # --- gradients --------------------------------------------------------------------------------

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


def _prefix(variable: Any) -> str:
    """Return what Keras begins the names of a variable's slots with."""
    path = getattr(variable, "path", None)
    if path is None:
        path = str(variable.name).replace(":", "_")
    return f"{path.replace('/', '_')}_"


def _is_value(initializer: Any) -> bool:
    return not isinstance(initializer, str) and not callable(initializer)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(np.shape(native(value)))


def _word(constant: Any) -> str:
    """Return Keras' word for one of TensorFlow's constants."""
    return str(getattr(constant, "name", constant)).lower()
