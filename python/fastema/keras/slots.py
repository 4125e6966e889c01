"""Variables that belong to others: what `add_slot` and `get_slot` are on Keras 3, which has none."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .backends import Backend, dtype_of, name_of, native
from .wrapper import Wrapper

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


class SlotMembers(Wrapper):
    """The documented members about slots."""

    _added: Added
    _slots: dict[tuple[Any, str], tuple[Any, Any]]  # (key, name): (variable, slot)
    _trainable_variables: Sequence[Any]
    add_variable: Callable[..., Any]

    def __dir__(self) -> Iterable[str]:
        # tf.train.Checkpoint looks here for optimizers whose slots are nobody's children, and refuses ours
        return [name for name in super().__dir__() if name != "get_slot_names"]

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
        key = (self._key_of(var), slot_name)
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
        key = self._key_of(var)
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
            owners.setdefault(_prefix(variable), []).append(self._key_of(variable))
        slots: dict[str, dict[Any, Any]] = {}
        for inner in self._optimizer.variables:
            ends = [i for i, letter in enumerate(inner.name, 1) if letter == "_"]
            end = next((end for end in reversed(ends) if inner.name[:end] in owners), None)
            if end is not None:
                slot = slots.setdefault(inner.name[end:], {})
                free = (key for key in owners[inner.name[:end]] if key not in slot)
                slot.setdefault(next(free, None), inner)
        return slots

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
