"""The averages of a model's variables: which there are, what moves them, what swaps them."""

import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal

import numpy as np

from .. import schedules
from .._types import FLOATS, average_type, check_choice, check_count, check_share, float_type, shown
from .backends import Backend, dtype_of, is_floating, name_of
from .kinds import Carrier, Engine, Key, Model, Operation, Tensor, Variable

Pair = tuple[Variable, Variable]  # a variable and its average


@dataclass(frozen=True)
class Settings:
    """The arguments of the wrapper that concern averaging, checked."""

    trainable_weights_only: bool
    average_decay: float
    start_step: int
    dynamic_decay: bool
    initial_average: Literal["zeros", "weights"]
    average_dtype: str | None
    update_every: int
    engine: Engine

    def __post_init__(self) -> None:
        share = check_share(self.average_decay, "average_decay")
        object.__setattr__(self, "average_decay", share)  # Python's own numbers, which JSON can hold
        for name, least in (("start_step", 0), ("update_every", 1)):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, check_count(value, name, least))
            except (TypeError, ValueError):
                words = f"{name} must be a whole number from {least}, got {shown(value)}"
                raise ValueError(words) from None
        check_choice(self.initial_average, "initial_average", ("zeros", "weights"))
        check_choice(self.engine, "engine", ("auto", "native", "graph"))
        if self.average_dtype is not None and self.average_dtype not in map(str, FLOATS):
            raise ValueError(
                f"average_dtype must be a floating-point type or None, got {self.average_dtype!r}"
            )

    @property
    def biased(self) -> bool:
        """Whether the averages stay close to their initial zeros for long."""
        return self.initial_average == "zeros" and not self.dynamic_decay and self.start_step < 2

    def decay(self, step: Tensor, arrays: ModuleType) -> Tensor:
        """Return the decay of a step, over all the steps that it takes at once.

        Args:
            step: A float64 scalar.
            arrays: What computes with it: numpy, tensorflow or jax.numpy.
        """
        kind = schedules.dynamic if self.dynamic_decay else schedules.constant
        schedule = kind(self.average_decay, self.start_step)
        return schedule.at_once(step, self.update_every, arrays)

    def dtype(self, variable: Variable) -> str:
        """Return the type of a variable's average."""
        return self.average_dtype or str(average_type(float_type(dtype_of(variable))))


class Averages:
    """The averages that an optimizer keeps: one of each variable, made when it is first needed.

    Those of `pairs` move. Averages of variables that are not trained any longer stay.

    Args:
        settings: How they move.
        backend: Whose variables they are.
        create: ``create(variable, dtype)`` makes the variable that holds an average, at its initial value.
        key: ``key(variable)`` identifies a variable.
    """

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        create: Callable[[Variable, str], Variable],
        key: Callable[[Variable], Key],
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.engine: Carrier | None = None
        self.pairs: list[Pair] = []  # those that move
        self._create = create
        self._key = key
        self._averages: dict[Key, Pair] = {}  # of every variable that was ever paired, as they were created
        self._ordered: list[Variable] | None = None  # these averages in their one order; None: not known yet
        self._trained: list[Variable] = []  # the variables that the optimizer trains
        self._places: dict[Key, int] = {}  # and the place of each among them
        self._shadowed: Callable[[], Iterable[Variable] | None] = lambda: None  # those that `shadow` named
        self._named_by_file = False  # whether these are what a file says
        # models that are known, and the averaged variables that each of them had
        self._models: weakref.WeakKeyDictionary[Model, set[Key]] = weakref.WeakKeyDictionary()
        self._unstarted: list[Pair] = []  # pairs that had no value to start at
        self._saved_weights: dict[Key, Tensor] = {}  # while swapped, of those whose averages have other types
        self._loaded: dict[str, np.ndarray] = {}  # values that came before their averages

    def __iter__(self) -> Iterator[Variable]:
        """Yield the averages in an order that does not depend on what was called first.

        Those of the variables that the optimizer trains, as it trains them; then the others by their paths.
        """
        if self._ordered is None:
            ordered = sorted(self._averages.items(), key=lambda item: self._rank(item[0], item[1][0]))
            self._ordered = [average for _, (_, average) in ordered]
        return iter(self._ordered)

    def _rank(self, key: Key, variable: Variable) -> tuple[int, list[tuple[str, int]]]:
        if not self._places:  # the optimizer is not built: as they were named
            return 0, []
        place = self._places.get(key)
        return (len(self._places), _path_in_parts(variable)) if place is None else (place, [])

    def __len__(self) -> int:
        return len(self._averages)

    def of(self, variable: Variable) -> Variable | None:
        """Return the average of a variable; None where it has none."""
        return self._averages.get(self._key(variable), (None, None))[1]

    # --- which ------------------------------------------------------------------------------------

    def shadow(self, model: Model | Sequence[Variable]) -> None:
        """Average the weights of a model (held weakly, it may be built later) or a list of variables."""
        self._named_by_file = False
        if isinstance(model, list | tuple):
            listed = list(model)
            self._shadowed = lambda: listed
        else:
            reference: Callable[[], Model] = weakref.ref(model)

            def weights() -> Iterable[Variable] | None:
                held = reference()
                if held is None:
                    return None
                only = self.settings.trainable_weights_only
                try:
                    weights: Iterable[Variable] = held.trainable_variables if only else held.variables
                except ValueError:  # tf_keras: the model is not built yet
                    return None
                return weights

            self._shadowed = weights
        self._pair()
        if not isinstance(model, list | tuple):
            self._models.pop(model, None)  # named anew, it is as it should be
            self.know(model)

    @property
    def lacks_a_model(self) -> bool:
        """Whether they are to be of more than the optimizer trains, and it is not known of what."""
        unknown = self._shadowed() is None or (self._named_by_file and self.waits_for_a_model)
        return not self.settings.trainable_weights_only and unknown

    def train(self, variables: Sequence[Variable]) -> None:
        """Average the variables that the optimizer trains, unless `shadow` named others."""
        self._trained = list(variables)
        self._places = {self._key(variable): i for i, variable in enumerate(variables)}
        self._ordered = None
        self._name_loaded()
        self._pair()

    def _pair(self) -> None:
        named = self._shadowed()
        averaged = list(filter(is_floating, self._trained if named is None else named))
        # those that will be trained first: checkpoints of TensorFlow have them as they were created
        for variable in sorted(averaged, key=lambda x: not getattr(x, "trainable", True)):
            self.find_or_create(variable)
        self.pairs = [(variable, self.find_or_create(variable)) for variable in averaged]
        self._assign_loaded()

    def know(self, model: Model) -> None:
        """Keep in mind (weakly) whose variables these are; raises as `check_models`.

        Raises:
            ValueError: It has none of the variables that are averaged.
        """
        had = self._models.setdefault(model, set())
        self.check_models()
        if self.pairs and not had and model.built:
            self._models.pop(model)
            raise ValueError(
                f"model must have variables that its optimizer averages, got {model.name!r}, which has none "
                f"of those {len(self.pairs)} (as {name_of(self.pairs[0][0])}): compile each model with an "
                "optimizer of its own"
            )

    def check_models(self) -> None:
        """Raise if a model that is known computes with other variables than those averaged.

        Raises:
            RuntimeError: It does.
        """
        for model, had in self._models.items():
            try:
                present = {self._key(variable): variable for variable in model.variables}
            except ValueError:  # tf_keras: the model is not built yet
                continue
            gone = [variable for variable, _ in self.pairs if self._key(variable) not in present]
            if gone:
                paths = set(map(name_of, present.values()))
                trained = filter(is_floating, model.trainable_variables)
                if any(self._key(variable) not in self._averages for variable in trained):
                    paths.update(name_of(variable) for variable in gone if self._key(variable) in had)
                _check_not_replaced([name for name in map(name_of, gone) if name in paths])
            had.update(present.keys() & self._averages.keys())

    def find_or_create(self, variable: Variable) -> Variable:
        """Return the average of a variable, made now if there is none."""
        key = self._key(variable)
        if key not in self._averages:
            self._averages[key] = variable, self._create(variable, self.settings.dtype(variable))
            self._ordered = None
        return self._averages[key][1]

    # --- moving -----------------------------------------------------------------------------------

    def start_later(self, variable: Variable, average: Variable) -> None:
        """Have `start` assign an average its variable, which has no value yet."""
        self._unstarted.append((variable, average))

    def start(self) -> None:
        """Start at the weights where these had no value when their averages were created.

        To be called before each step: variables that a first trace creates get their values after it.
        """
        if self._unstarted:
            self.backend.once(lambda: [self.backend.assign(a, v) for v, a in self._unstarted])

    def update(self, step: Tensor, when: Tensor = None) -> None:
        """Average once, if this step is one that averages.

        Args:
            step: What `Backend.count` returned.
            when: A further condition; None: there is none.
        """
        if self.pairs:
            self.engine = self.backend.update(
                [average for _, average in self.pairs],
                [variable for variable, _ in self.pairs],
                self._decay_of(step),
                self._due(step, when),
                self.settings.engine,
            )

    def _decay_of(self, step: Tensor) -> Callable[[], Tensor]:
        """Return what computes the decay where it is first needed, and only there."""
        return cache(lambda: self.settings.decay(*self.backend.number(step)))

    def _due(self, step: Tensor, when: Tensor) -> Tensor:
        """Return the condition under which a step averages."""
        if self.settings.update_every == 1:
            return when
        due = step % self.settings.update_every == 0
        return due if when is None else when & due

    def moved(
        self,
        values: Sequence[Tensor],
        variables: Sequence[Variable],
        weights: Sequence[Tensor],
        step: Tensor,
        when: Tensor,
    ) -> list[Tensor]:
        """Return what values the averages have after `update`; nothing is assigned.

        Args:
            values: The present values of all averages, in the order of iteration.
            variables: Those whose averages move.
            weights: Their values.
            step: As for `update`.
            when: As for `update`.
        """
        if self.settings.engine == "native":
            raise RuntimeError("engine='native' cannot run here: values are given, not variables")
        self.engine = "graph"
        after = dict(zip(map(id, self), values, strict=True))
        paired = {self._key(variable): id(average) for variable, average in self.pairs}
        decay, due = self._decay_of(step), self._due(step, when)
        for variable, weight in zip(variables, weights, strict=True):
            average = paired.get(self._key(variable))
            if average is not None:
                after[average] = self.backend.blend(after[average], weight, decay, due)
        return list(after.values())

    def assign_to(self, variables: Iterable[Variable]) -> list[Operation]:
        """Assign variables their averages; return the operations, in a graph."""
        assigned = []
        for variable in variables:
            average = self.of(variable)
            if average is None:
                warnings.warn(f"{name_of(variable)} has no average and keeps its value", stacklevel=3)
                continue
            assigned.append(self.backend.assign(variable, average))
        return assigned

    # --- changing places --------------------------------------------------------------------------

    def swap(self, back: bool) -> None:
        """Exchange variables and averages; `back` says that they are exchanged now."""
        same = [(v, a) for v, a in self.pairs if dtype_of(v) == dtype_of(a)]
        other = [(v, a) for v, a in self.pairs if dtype_of(v) != dtype_of(a)]
        self.backend.check_swap(same_types=not other)
        self.backend.swap([v for v, _ in same], [a for _, a in same])
        for variable, average in other:
            if back:
                self.backend.assign(variable, self._saved_weights.pop(self._key(variable)))
            else:
                self._saved_weights[self._key(variable)] = self.backend.hold(variable)
                self.backend.assign(variable, average)

    # --- saving -----------------------------------------------------------------------------------

    def _file_names(self) -> Iterator[tuple[str, Variable, Variable]]:
        """Name averages by their variables' places: names of variables change when a model is loaded.

        Averages that stand still are among them where the optimizer trains their variables.
        """
        for place, variable in enumerate(self._trained):
            average = self.of(variable)
            if average is not None:
                yield f"trained_{place}", variable, average
        others = (pair for pair in self.pairs if self._key(pair[0]) not in self._places)
        for i, (variable, average) in enumerate(others):
            yield f"other_{i}", variable, average

    def state(self) -> dict[str, np.ndarray]:
        """Return the averages, and the weights kept aside, by their names in a file.

        Those that wait for their variables are not lost.
        """
        state = dict(self._loaded)
        if state and not self._places:  # all of them wait
            return state
        for slot, variable, average in self._file_names():
            state[f"average_{slot}"] = self.backend.numpy(average)
            if (raw := self._saved_weights.get(self._key(variable))) is not None:
                state[f"raw_{slot}"] = self.backend.numpy(raw)
        moving = [place for v, _ in self.pairs if (place := self._places.get(self._key(v))) is not None]
        if len(moving) < sum(map(is_floating, self._trained)):
            state["named"] = np.array(moving, np.int64)
        return state

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Assign what `state` returned; values whose averages do not exist yet wait for them.

        Raises:
            ValueError: An average is missing, or of another shape, or of a variable that is not trained
                here. Nothing is changed then.
        """
        state = self._of_trained(state)
        count = sum(bool(re.fullmatch(r"average_trained_\d+", name)) for name in state)
        if self._places and count > len(self._places):
            raise ValueError(
                f"the file must hold averages of the {len(self._places)} variables that the optimizer "
                f"trains, got {count}: layers were frozen or quantized since it was built; load the model "
                "with compile=False and compile it anew"
            )
        named = state.get("named")
        for slot, variable, average in self._file_names():
            value = state.get(f"average_{slot}")
            if value is None and named is not None and slot.startswith("trained_"):
                continue  # nobody named it
            if value is None:
                raise ValueError(f"the file lacks the average of {name_of(variable)} (average_{slot})")
            if value.shape != tuple(average.shape):
                raise ValueError(
                    f"the average of {name_of(variable)} must have shape {tuple(average.shape)}, "
                    f"got {value.shape} from the file"
                )
        self._loaded = dict(state)
        self._name_loaded()
        self._assign_loaded()

    def _of_trained(self, state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Return what a file holds; what was saved before the optimizer was built, by its places now."""
        places = [place for place, variable in enumerate(self._trained) if is_floating(variable)]
        slots = {name.partition("_")[2] for name in state}
        if slots - {""} != {f"other_{i}" for i in range(len(places))}:
            return state
        slots_now = {f"other_{i}": f"trained_{place}" for i, place in enumerate(places)}
        parts = ((name.partition("_"), value) for name, value in state.items())
        return {f"{kind}_{slots_now[slot]}": value for (kind, _, slot), value in parts}

    def _name_loaded(self) -> None:
        """Average what the file says that was named, if it says so and nobody named anything here."""
        if not self._places or "named" not in self._loaded:
            return
        places = self._loaded.pop("named")
        if self._shadowed() is None:
            listed = [self._trained[place] for place in places]
            self._shadowed = lambda: listed
            self._named_by_file = True
            for place, variable in enumerate(self._trained):
                if f"average_trained_{place}" not in self._loaded:
                    self._averages.pop(self._key(variable), None)
            self._ordered = None
            self._pair()

    @property
    def waits_for_a_model(self) -> bool:
        """Whether averages of weights were loaded that no optimizer trains, and that nobody named yet."""
        return bool(self._loaded) and not self.settings.trainable_weights_only

    def _assign_loaded(self) -> None:
        if not self._loaded or not self._places:  # they are known once the optimizer is built
            return
        for slot, variable, average in self._file_names():
            value = self._loaded.pop(f"average_{slot}", None)
            if value is not None:
                self.backend.assign(average, value)
            raw = self._loaded.pop(f"raw_{slot}", None)
            if raw is not None:
                self._saved_weights[self._key(variable)] = raw.astype(
                    float_type(dtype_of(variable)), copy=False
                )


def _check_not_replaced(names: Sequence[str]) -> None:
    if names:
        raise RuntimeError(
            f"the model must compute with {names[0]}, which is averaged, and has another variable in its "
            f"place ({len(names)} such in all), as after quantize() or with another layer: compile it with a "
            "new optimizer; to quantize averages, call assign_average_vars() first"
        )


def _path_in_parts(variable: Variable) -> list[tuple[str, int]]:
    """Return a path to sort by: the numbers that Keras ends names with count as numbers."""
    parts = (re.fullmatch(r"(.*?)(?:_(\d{1,18}))?", part, re.DOTALL) for part in name_of(variable).split("/"))
    return [(part[1], int(part[2] or 0)) for part in parts if part is not None]
