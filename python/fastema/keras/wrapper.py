"""The optimizer wrapper, as far as it is the same for every Keras: arguments, keywords, swaps, state.

A wrapper is an optimizer of the Keras that its wrapped optimizer is of. `fastema.keras.optimizer` makes one
of Keras 3, `fastema.keras.tf_keras` two of tf_keras; nothing here knows either.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from . import backends
from .averages import Averages, Settings
from .kinds import Carrier, Context, Engine, Gradient, Key, Model, Operation, Optimizer, Tensor, Variable

Self = TypeVar("Self", bound="Wrapper")

_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")
_KEYWORDS = (*_CLIPPING, "lr", "decay")


class Variables(list[Variable]):
    """A list that can also be called: Keras has a property here, the documented API a method."""

    def __call__(self) -> "Variables":
        """Return itself."""
        return self


@dataclass(frozen=True)
class Library:
    """What a wrapper uses of its Keras.

    Attributes:
        backend: Returns the name of the backend.
        scaler: The optimizer around another one that scales the loss.
        inverse_time_decay: The schedule of learning rates that the keyword ``decay`` stands for.
        serialize: Turns an optimizer into plain values.
        deserialize: Turns these into an optimizer.
    """

    backend: Callable[[], str]
    scaler: type[Any]
    inverse_time_decay: Callable[..., Any]
    serialize: Callable[[Optimizer], Any]
    deserialize: Callable[..., Optimizer]

    def innermost(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer that does the work, below those that scale the loss."""
        while isinstance(optimizer, self.scaler):
            optimizer = optimizer.inner_optimizer
        return optimizer


def delegated(name: str) -> property:
    """Make an attribute that is the one of the optimizer that does the work."""

    def get(self: "Wrapper") -> Any:  # Keras' constructors assign, and read, before there is one
        return getattr(self._innermost(), name) if "_optimizer" in self.__dict__ else None

    def put(self: "Wrapper", value: object) -> None:
        if "_optimizer" in self.__dict__:
            setattr(self._innermost(), name, value)

    return property(get, put, doc=f"``{name}`` of the wrapped optimizer.")


class Wrapper:
    """An optimizer around another one, which trains, and the averages of what that one trains.

    A class of a Keras inherits from this first, then from that Keras' optimizer.
    """

    name: str
    _keras: ClassVar[Library]
    _averages: Averages
    _backend: backends.Backend
    _optimizer: Optimizer
    _swapped: Variable  # 1 while the model holds the averages, else 0

    clipnorm = delegated("clipnorm")
    clipvalue = delegated("clipvalue")
    global_clipnorm = delegated("global_clipnorm")

    def __init__(  # noqa: PLR0917 - the documented signature
        self,
        optimizer: Optimizer,
        trainable_weights_only: bool = True,
        average_decay: float = 0.99,
        start_step: int = 0,
        dynamic_decay: bool = True,
        name: str | None = "moving_average",
        *,
        initial_average: Literal["zeros", "weights"] = "zeros",
        average_dtype: str | None = None,
        update_every: int = 1,
        engine: Engine = "auto",
        **kwargs: Any,
    ) -> None:
        backend = backends.load(self._keras.backend())
        optimizer = self._checked(optimizer)
        settings = Settings(
            trainable_weights_only=trainable_weights_only,
            average_decay=average_decay,
            start_step=start_step,
            dynamic_decay=dynamic_decay,
            initial_average=initial_average,
            average_dtype=average_dtype,
            update_every=update_every,
            engine=engine,
        )
        optimizer = self._with_keywords(optimizer, kwargs)
        self._initialize(name)
        self._optimizer = optimizer
        # plain attributes, or Keras would track what is in them as the optimizer's own
        object.__setattr__(self, "_backend", backend)
        averages = Averages(settings, backend, self._create_average, self._key_of)
        object.__setattr__(self, "_averages", averages)
        self._set_up()
        self._swapped = self._create_swapped()
        _warn(settings, optimizer)

    # --- what each Keras does for itself ----------------------------------------------------------

    def _checked(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer that the first argument of the constructor means."""
        return optimizer

    def _initialize(self, name: str | None) -> None:
        """Call the constructor of the Keras' optimizer."""
        raise NotImplementedError

    def _set_up(self) -> None:
        """Set the attributes that only this Keras' wrapper has."""

    def _key_of(self, variable: Variable) -> Key:
        """Return what identifies a variable."""
        raise NotImplementedError

    def _create_swapped(self) -> Variable:
        """Make the variable that says whether weights and averages are swapped."""
        raise NotImplementedError

    def _create_average(self, variable: Variable, dtype: str) -> Variable:
        """Make the variable that holds an average of another one."""
        raise NotImplementedError

    def _shadow(self, model: Model | Sequence[Variable]) -> None:
        """Do what `shadow_copy` does."""
        with self._backend.creation():
            self._averages.shadow(model)

    # --- the wrapped optimizer --------------------------------------------------------------------

    def _innermost(self) -> Optimizer:
        """The optimizer that does the work, below those that scale the loss."""
        return self._keras.innermost(self._optimizer)

    def _with_keywords(self, optimizer: Optimizer, keywords: dict[str, Any]) -> Optimizer:
        """Set the documented keywords on the optimizer that does the work, or on a new one like it."""
        inner = self._keras.innermost(optimizer)
        given = _check_keywords(inner, keywords)
        if "decay" in given and not self._can_decay(optimizer):
            raise ValueError("decay can only be set on an optimizer that is not built, nor wrapped itself")
        for name in _CLIPPING:
            if name in given:
                setattr(inner, name, float(given[name]))
        if "lr" in given:
            optimizer.learning_rate = given["lr"]
        return self._with_decay(optimizer, given["decay"]) if "decay" in given else optimizer

    def _can_decay(self, optimizer: Optimizer) -> bool:
        """Whether `_with_decay` works for this optimizer."""
        built = getattr(optimizer, "built", False) or getattr(optimizer, "_built", False)
        return not built and not isinstance(optimizer, self._keras.scaler)

    def _with_decay(self, optimizer: Optimizer, decay: float) -> Optimizer:
        """Return an optimizer whose learning rate decays with time, and which is otherwise the same."""
        # A new optimizer: one that is given a schedule later keeps a variable for its old rate.
        config = optimizer.get_config()
        config["learning_rate"] = self._keras.inverse_time_decay(
            config["learning_rate"], decay_steps=1, decay_rate=decay
        )
        return type(optimizer).from_config(config)

    @property
    def learning_rate(self) -> Tensor:
        """The wrapped optimizer's learning rate."""
        return self._optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Tensor) -> None:
        self._optimizer.learning_rate = value

    lr = learning_rate

    @property
    def iterations(self) -> Variable:
        """The number of steps so far: those of the wrapped optimizer."""
        return self._optimizer.iterations

    # --- averages and weights ---------------------------------------------------------------------

    def shadow_copy(self, model: Model | Sequence[Variable]) -> None:
        """Create an average of every weight of a model, and average these from now on.

        Not needed where the optimizer trains what it averages: averages are then created with its
        other state. A model that is not built yet is remembered (weakly) and finished when the
        optimizer is built.

        Args:
            model: A model, or a list of variables. Of a model, the trainable weights, or all
                floating-point weights with ``trainable_weights_only=False``.
        """
        self._shadow(model)

    def update_average(self, strategy: object = None) -> None:  # noqa: ARG002 - of the original: not needed
        """Average once, with the decay of the current `iterations`.

        Each step does it by itself; this is for weights that are trained elsewhere.

        Args:
            strategy: Ignored: the variables know theirs.
        """
        with self._refusing_while_swapped("average"):
            self._averages.update(self._backend.count(self.iterations))

    @property
    def engine(self) -> Carrier | None:
        """What carried the last traced or eager averaging out; None before the first."""
        return self._averages.engine

    @property
    def has_shadow_copy(self) -> bool:
        """Whether averages exist."""
        return len(self._averages) > 0

    def swap_weights(self) -> None:
        """Exchange weights and averages: the model then holds the averages. Twice is nothing.

        Bit for bit, without arithmetic. Where an average is of another type than its weight, the
        weight is kept aside and comes back exactly.

        Raises:
            RuntimeError: There are no averages, or loaded ones whose weights are not known yet, or the call
                is made in a replica context. Or the model has other variables in the place of those averaged,
                as after ``quantize``; on the way back, they are exchanged first. The model is known where
                `shadow_copy` named it, or a callback of `fastema.keras` met it; else nothing tells so.
        """
        if not self._averages.pairs:
            raise RuntimeError("there are no averages to swap: train a step, or call shadow_copy(model)")
        if self._averages.waits_for_a_model:
            raise RuntimeError("averages of non-trainable weights were loaded: call shadow_copy(model) first")
        back = self.is_swapped
        if not back:
            self._averages.check_models()
        self._averages.swap(back)
        self._swapped.assign(1 - self._swapped)
        if back:
            self._averages.check_models()

    @property
    def is_swapped(self) -> bool:
        """Whether the model holds the averages now, and the optimizer the weights."""
        with self._backend.creation():
            return bool(self._backend.numpy(self._swapped))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Give the model its averaged weights within a ``with`` block.

        The weights come back exactly on every way out, an exception included.

        Raises:
            RuntimeError: The weights are swapped already, or there are no averages.

        Example:
            ``with optimizer.averaged_weights(): model.evaluate(x, y)``
        """
        if self.is_swapped:
            raise RuntimeError("the weights are swapped already: averaged_weights does not nest")
        self.swap_weights()
        try:
            yield
        finally:
            if self.is_swapped:
                self.swap_weights()

    def assign_average_vars(self, var_list: Iterable[Variable]) -> Operation:
        """Assign every listed variable its average; the weights are lost.

        Args:
            var_list: Variables of the model. One without an average is left alone, with a warning.

        Returns:
            In a graph, the operation that assigns; else None.

        Raises:
            RuntimeError: The weights are swapped: the averages stand in them already.
        """
        with self._refusing_while_swapped("assign averages"):
            assigned = self._averages.assign_to(var_list)
        return self._backend.group(assigned)

    def _refusing_while_swapped(self, what: str, changing: Sequence[Variable] = ()) -> Context:
        return self._backend.refusing(
            lambda: self.is_swapped,
            self._swapped,
            f"cannot {what} while the weights are swapped: call swap_weights() first",
            changing,
        )

    # --- saving -----------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor as plain values."""
        return {
            "optimizer": self._keras.serialize(self._optimizer),
            "name": self._own_name(),
            **asdict(self._averages.settings),
        }

    def _own_name(self) -> str:
        return self.name

    @classmethod
    def from_config(
        cls: type[Self], config: Mapping[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        """Make an optimizer from what `get_config` returned, which is left as it is."""
        arguments = dict(config)
        if isinstance(arguments["optimizer"], dict):
            arguments["optimizer"] = cls._keras.deserialize(
                copy.deepcopy(arguments["optimizer"]), custom_objects=custom_objects
            )
        return cls(**arguments)

    def _state_of_averages(self) -> dict[str, np.ndarray]:
        return {"swapped": self._backend.numpy(self._swapped), **self._averages.state()}

    def _load_averages(self, state: dict[str, np.ndarray]) -> None:
        swapped = state.pop("swapped", None)
        if swapped is None:
            raise ValueError(
                f"{self.name}: the file holds no averages; it was not saved with an ExponentialMovingAverage"
            )
        if state:  # else it was saved before there were any
            self._averages.load(state)
            self._swapped.assign(swapped)


def as_pairs(grads_and_vars: Iterable[Gradient]) -> list[Gradient]:
    """Return the (gradient, variable) pairs that a user gave as a list.

    Raises:
        TypeError: They are none.
    """
    try:
        return [(gradient, variable) for gradient, variable in grads_and_vars]
    except (TypeError, ValueError):
        raise TypeError(
            f"grads_and_vars must be (gradient, variable) pairs, got {grads_and_vars!r}"
        ) from None


def _check_keywords(inner: Optimizer, keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the documented keywords that are given; refuse others, and two kinds of clipping."""
    unknown = set(keywords) - set(_KEYWORDS)
    if unknown:
        raise TypeError(f"keywords must be among {', '.join(_KEYWORDS)}, got {', '.join(sorted(unknown))}")
    given = {name: value for name, value in keywords.items() if value is not None}
    clipping = {
        name: value
        for name in _CLIPPING
        if (value := given.get(name, getattr(inner, name, None))) is not None
    }
    if len(clipping) > 1 and not given.keys().isdisjoint(_CLIPPING):
        raise ValueError(f"only one of {', '.join(_CLIPPING)} can be set, got {clipping}")
    if "lr" in given or "decay" in given:
        warnings.warn(
            "lr and decay are old names of the learning rate and its decay: set learning_rate of the wrapped "
            "optimizer, to a rate or a schedule; the decay of averages is average_decay",
            FutureWarning,
            stacklevel=4,
        )
    return given


def _warn(settings: Settings, optimizer: Optimizer) -> None:
    """Warn of arguments that average less than they seem to."""
    if settings.biased:
        warnings.warn(
            f"with dynamic_decay=False, start_step={settings.start_step} and averages that start at zero, "
            "the averages stay close to zero for about 1 / (1 - average_decay) steps; use "
            "initial_average='weights' or start_step=2",
            stacklevel=3,
        )
    if getattr(optimizer, "use_ema", False):
        warnings.warn(
            "the wrapped optimizer has use_ema=True: at the end of fit it overwrites the weights with "
            "its own average",
            stacklevel=3,
        )
