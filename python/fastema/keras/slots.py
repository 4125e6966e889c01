"""Variables that belong to others: what `add_slot` and `get_slot` are on Keras 3, which has none."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .backends import Backend, dtype_of, name_of, native
from .kinds import Initializer, Key, Tensor, Variable
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
    """The variables that a user added to an optimizer, in their order, each with the name it has in a file.

    Values that are loaded before their variables exist wait for them.

    Args:
        backend: Whose variables they are.
        create: Makes a variable, as ``Optimizer.add_variable`` of Keras.
    """

    def __init__(self, backend: Backend, create: Callable[..., Variable]) -> None:
        self._backend = backend
        self._create = create
        self._variables: dict[str, Variable] = {}
        self._waiting: dict[str, np.ndarray] = {}

    def __iter__(self) -> Iterator[Variable]:
        return iter(self._variables.values())

    def __len__(self) -> int:
        return len(self._variables)

    def add(
        self, kind: str, *, shape: tuple[int, ...], initializer: Initializer, **arguments: Any
    ) -> Variable:
        """Create a variable and give it the value that waits for it.

        Args:
            kind: Begins the name in a file; the next number of this kind ends it.
            shape: The variable's shape.
            initializer: A name, an initializer, or a tensor with the first value.
            **arguments: The other arguments of ``Optimizer.add_variable``.

        Raises:
            ValueError: The tensor, or the value that waits, has another shape. Nothing is created then.
        """
        if _is_value(initializer) and _shape(initializer) != shape:
            raise ValueError(
                f"initializer must be a name, an initializer or a tensor of shape {shape}, "
                f"got a tensor of shape {_shape(initializer)}"
            )
        number = sum(name.rpartition("_")[0] == kind for name in self._variables)
        name = f"{kind}_{number}"
        value = self._waiting.get(name)
        if value is not None:
            self._check_shape(name, shape, value)
        if _is_value(initializer):
            variable = self._create(shape=shape, **arguments)
            self._backend.assign(variable, initializer)
        else:
            variable = self._create(shape=shape, initializer=initializer, **arguments)
        self._variables[name] = variable
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
    _slots: dict[tuple[Key, str], tuple[Variable, Variable]]  # (key, name): (variable, slot)
    _trainable_variables: Sequence[Variable]

    def __dir__(self) -> Iterable[str]:
        # tf.train.Checkpoint looks here for optimizers whose slots are nobody's children, and refuses ours
        return [name for name in super().__dir__() if name != "get_slot_names"]

    def add_slot(
        self,
        var: Variable,
        slot_name: str,
        initializer: Initializer = "zeros",
        shape: Sequence[int] | None = None,
    ) -> Variable:
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
                slot = self._added.add(
                    f"slot_{slot_name}",
                    name=f"{_prefix(var)}{slot_name}",
                    shape=tuple(var.shape if shape is None else shape),
                    dtype=dtype_of(native(var)),
                    initializer=initializer,
                    layout=layout,
                )
            self._slots[key] = (var, slot)
        return self._slots[key][1]

    def get_slot(self, var: Variable, slot_name: str) -> Variable:
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

    def _inner_slots(self) -> dict[str, dict[Key | None, Variable]]:
        """Return the wrapped optimizer's slots, by name and by variable.

        Keras has no table of them, but names each ``{path of the variable}_{name}``.
        """
        owners: dict[str, list[Key]] = {}  # of one path there may be several variables
        for variable in self._trainable_variables:
            owners.setdefault(_prefix(variable), []).append(self._key_of(variable))
        slots: dict[str, dict[Key | None, Variable]] = {}
        for inner in self._optimizer.variables:
            ends = [i for i, letter in enumerate(inner.name, 1) if letter == "_"]
            end = next((end for end in reversed(ends) if inner.name[:end] in owners), None)
            if end is not None:
                slot = slots.setdefault(inner.name[end:], {})
                free = (key for key in owners[inner.name[:end]] if key not in slot)
                slot.setdefault(next(free, None), inner)
        return slots


def _prefix(variable: Variable) -> str:
    """Return what Keras begins the names of a variable's slots with."""
    path = getattr(variable, "path", None)
    if path is None:
        path = str(variable.name).replace(":", "_")
    return f"{path.replace('/', '_')}_"


def _is_value(initializer: Initializer) -> bool:
    return not isinstance(initializer, str) and not callable(initializer)


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(np.shape(native(value)))
