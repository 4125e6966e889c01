"""The optimizer wrapper: another optimizer's training, plus an average of every weight."""

import warnings
import weakref
from abc import ABCMeta
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

import keras

from . import backends
from .gradients import GradientMembers
from .kinds import Gradient, Key, Model, Optimizer, Store, Tensor, Variable
from .slots import Added, SlotMembers
from .waiting import Waiting, arrays_in
from .weights import WeightMembers
from .wrapper import Library, Variables, Wrapper, as_pairs, delegated


@keras.saving.register_keras_serializable(package="fastema")
class ExponentialMovingAverage(
    SlotMembers,
    WeightMembers,
    GradientMembers,
    keras.optimizers.Optimizer,  # type: ignore[misc]  # Keras is untyped
    metaclass=ABCMeta,  # wrappers of tf_keras' optimizers are instances
):
    """Wraps a Keras optimizer and keeps an exponential moving average of the weights it trains.

    After every step ``average += (1 - decay) * (weight - average)``. Averaged weights generalise
    better than the last ones, which carry the noise of the last batches; evaluate, save or export
    them with `averaged_weights` or `swap_weights`. The API is that of TensorFlow Model Garden's
    ``tfm.optimization.ExponentialMovingAverage``, with its decay schedule:

    ========================= ===================================================
    step ``t < start_step``   0: the average copies the weight
    ``dynamic_decay=True``    ``min(average_decay, (1 + k) / (10 + k))``, ``k = t - start_step``
    ``dynamic_decay=False``   ``average_decay``
    ========================= ===================================================

    where ``t`` is ``iterations`` after the step (1 at the first).

    On the CPU, outside of XLA, the averages are computed by the native core. They have NumPy's bits in
    all modes, other than the native core but for subnormal numbers ("Bits, not tolerances" in
    python/docs/averages.md).

    Args:
        optimizer: The optimizer that trains: an instance, a name or a config. One of tf_keras, legacy or
            not, gives a wrapper that is an optimizer of tf_keras.
        trainable_weights_only: False also averages a model's non-trainable floating-point weights
            (the statistics of batch normalisation); call `shadow_copy` with the model then.
        average_decay: From 0 to 1; towards 1 averages over more steps (about ``1 / (1 - decay)``).
        start_step: The first step that averages; before it the average copies the weight.
        dynamic_decay: Whether the decay rises with the number of updates, as above.
        name: The optimizer's name.
        initial_average: ``"zeros"``, as documented, or ``"weights"``.
        average_dtype: The type of the averages; None: float32 for 16-bit weights, else the weight's.
        update_every: Average after every so many steps, with the product of their decays, so that the
            averaging window stays the same.
        engine: ``"native"`` (an error where native code cannot run), ``"graph"`` (TensorFlow's
            operations) or ``"auto"`` (native where it can run).
        **kwargs: ``clipnorm``, ``clipvalue`` or ``global_clipnorm`` (at most one, counting the
            wrapped optimizer's), ``lr`` (its learning rate; use ``learning_rate`` of the wrapped
            optimizer) and ``decay`` (its inverse time decay), all set on the wrapped optimizer.

    Raises:
        TypeError: `optimizer` is not an optimizer, or a keyword is unknown.
        ValueError: An argument is outside of its range.

    Example:
        >>> import keras, numpy as np
        >>> from fastema.keras import ExponentialMovingAverage
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> optimizer = ExponentialMovingAverage(keras.optimizers.SGD(0.1), average_decay=0.9)
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(np.ones((8, 2)), np.ones((8, 1)), epochs=2, verbose=0)
        >>> with optimizer.averaged_weights():
        ...     loss = model.evaluate(np.ones((8, 2)), np.ones((8, 1)), verbose=0)
    """

    _keras = Library(
        backend=lambda: str(keras.backend.backend()),
        scaler=keras.optimizers.LossScaleOptimizer,
        inverse_time_decay=keras.optimizers.schedules.InverseTimeDecay,
        serialize=keras.saving.serialize_keras_object,
        deserialize=keras.saving.deserialize_keras_object,
    )
    _waiting: Waiting
    _scaled_above = False  # whether something above takes care of the loss scale
    _iterations = delegated("_iterations")
    weight_decay = delegated("weight_decay")
    loss_scale_factor = delegated("loss_scale_factor")
    gradient_accumulation_steps = delegated("gradient_accumulation_steps")
    use_ema = delegated("use_ema")
    ema_momentum = delegated("ema_momentum")
    ema_overwrite_frequency = delegated("ema_overwrite_frequency")

    @wraps(Wrapper.__init__, assigned=())  # type: ignore[misc]  # so that the documented signature shows
    def __new__(cls, optimizer: Optimizer = None, *args: Any, **kwargs: Any) -> Any:
        """Make the wrapper that is of the same Keras as the optimizer within."""
        of_tf_keras = any(kind.__module__.split(".")[0] == "tf_keras" for kind in type(optimizer).__mro__)
        if cls is ExponentialMovingAverage and of_tf_keras:
            from . import tf_keras  # noqa: PLC0415 - tf_keras is not needed otherwise

            return tf_keras.wrap(optimizer, *args, **kwargs)
        return super().__new__(cls)

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        """Take wrappers of tf_keras' optimizers, too, for instances of the public class."""
        return issubclass(kind, Wrapper) if cls is ExponentialMovingAverage else NotImplemented

    def _checked(self, optimizer: Optimizer) -> Optimizer:
        if not isinstance(optimizer, keras.optimizers.Optimizer | str | dict):
            raise TypeError(
                "optimizer must be a Keras 3 optimizer, its name or config, "
                f"got {type(optimizer).__module__}.{type(optimizer).__name__}"
            )
        return keras.optimizers.get(optimizer)

    def _initialize(self, name: str | None) -> None:
        keras.optimizers.Optimizer.__init__(self, learning_rate=0.0, name=name)

    def _set_up(self) -> None:
        object.__setattr__(self, "_added", Added(self._backend, self.add_variable))
        object.__setattr__(self, "_slots", {})
        object.__setattr__(self, "_waiting", Waiting())

    def _key_of(self, variable: Variable) -> Key:
        return self._var_key(variable)

    def _create_swapped(self) -> Variable:
        return keras.Variable(0, dtype="int32", trainable=False, name="swapped")

    # --- the attributes of the wrapped optimizer ----------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Find in the wrapped optimizer what is not of the wrapper: ``momentum``, ``optimizers``, ..."""
        missing = "_optimizer" not in self.__dict__ or name.startswith(("__", "_self_"))
        if missing or hasattr(type(self), name):  # a property that raised raises again
            return super().__getattribute__(name)
        return getattr(self._optimizer, name)

    def __setattr__(self, name: str, value: object) -> None:
        """Set in the wrapped optimizer what is not of the wrapper."""
        if "_optimizer" not in self.__dict__:
            super().__setattr__(name, value)
        elif name == "loss_scale_factor":
            # Keras' wrappers set it to say that they scale the loss, and a scale within would divide the
            # gradients again. Noticed here: Keras leaves out the property where the value is the same.
            object.__setattr__(self, "_scaled_above", value is None)
            setattr(self._innermost(), name, value)
        elif (
            name.startswith("_")
            or name in self.__dict__
            or hasattr(type(self), name)
            or not hasattr(self._optimizer, name)
        ):
            super().__setattr__(name, value)
        else:
            setattr(self._optimizer, name, value)

    def _training(self) -> Optimizer:
        """Return what takes the gradients: below its scaling of the loss, where that is done above."""
        return self._innermost() if self._scaled_above else self._optimizer

    # --- building -------------------------------------------------------------------------------

    def build(self, variables: Sequence[Variable]) -> None:
        """Create the state for these variables: the wrapped optimizer's, then an average each."""
        if self.built:
            return
        # Variables that come to be in this very trace have no values yet, which the wrapped optimizer may
        # want to read.
        known = all(map(self._backend.has_value, variables))
        with self._backend.creation() if known else nullcontext(), keras.name_scope(self.name, caller=self):
            self._optimizer.build(list(variables))
        with self._backend.creation(), keras.name_scope(self.name, caller=self):
            # plain lists, or Keras would track the model's variables as the optimizer's own
            object.__setattr__(self, "_trainable_variables", list(variables))
            for i, variable in enumerate(variables):
                self._trainable_variables_indices[self._key_of(variable)] = i
            self._averages.train(variables)
            self._waiting.load()
            self.built = True

    def _shadow(self, model: Model | Sequence[Variable]) -> None:
        before = [id(variable) for variable, _ in self._averages.pairs]
        with self._backend.creation(), keras.name_scope(self.name, caller=self):
            self._averages.shadow(model)
        if isinstance(model, keras.Model) and not self._averages.settings.trainable_weights_only:
            reference: Callable[[], Model] = weakref.ref(model)
            self._backend.watch(
                model,
                lambda own, before, after, values: self._moved(
                    own, before, after, reference().non_trainable_variables, values
                ),
            )
        if self._backend.traced and before != [id(variable) for variable, _ in self._averages.pairs]:
            _trace_again(model)

    def _create_average(self, variable: Variable, dtype: str) -> Variable:
        name = backends.name_of(variable).replace("/", "_").replace(":", "_")
        at_weight = self._averages.settings.initial_average == "weights"
        known = at_weight and self._backend.has_value(variable)

        def weight(shape: Sequence[int], dtype: str | None = None) -> Tensor:  # noqa: ARG001 - of an initializer
            return keras.ops.copy(keras.ops.cast(backends.native(variable), dtype))

        with self._backend.colocated(variable):
            average = self.add_variable(
                shape=variable.shape,
                dtype=dtype,
                # not assigned later: a checkpoint read before restores what is made here
                initializer=weight if known else "zeros",
                name=f"{name}_average",
                layout=getattr(variable, "_layout", None),  # in JAX: its parts on the same devices
            )
        if at_weight and not known:
            self._averages.start_later(variable, average)
        return average

    # --- training -------------------------------------------------------------------------------

    def apply_gradients(
        self,
        grads_and_vars: Iterable[Gradient],
        name: str | None = None,  # noqa: ARG002 - of the documented API: TensorFlow 2 names no operations
        experimental_aggregate_gradients: bool = True,
    ) -> Variable:
        """Apply gradients with the wrapped optimizer, then average.

        Args:
            grads_and_vars: (gradient, variable) pairs. None of them: nothing happens.
            name: Ignored.
            experimental_aggregate_gradients: Whether to sum the gradients of all replicas; False:
                they are summed already.

        Returns:
            `iterations`.

        Raises:
            TypeError: `grads_and_vars` is malformed.
            ValueError: No variable has a gradient.
            RuntimeError: Called in the cross-replica context of a strategy.
        """
        self._backend.check_apply()
        pairs = as_pairs(grads_and_vars)
        if pairs:
            gradients, variables = zip(*pairs, strict=True)
            summed = not experimental_aggregate_gradients
            with self._backend.summed_already(self._optimizer) if summed else nullcontext():
                self.apply(gradients, variables)
        return self.iterations

    def apply(self, grads: Iterable[Tensor], trainable_variables: Iterable[Variable] | None = None) -> None:
        """Apply gradients with the wrapped optimizer, then average."""
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                self.build(trainable_variables)
        with self._refusing_while_swapped("train", [*self._trainable_variables, *self._optimizer.variables]):
            self._averages.start()
            before = None if self._always_advances() else self._backend.count(self.iterations)
            self._training().apply(grads, trainable_variables)
        if before is None:
            self._averages.update(self._backend.count_after_step(self.iterations))
            return
        step = self._backend.count(self.iterations)
        self._averages.update(step, step > before)

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Tensor],
        grads: Sequence[Tensor],
        trainable_variables: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return what `apply` would make of these values, without assigning anything.

        Args:
            optimizer_variables: The values of `variables`.
            grads: The gradients, one for each trainable variable.
            trainable_variables: The values of the variables that the optimizer was built with.

        Returns:
            The new values of the trainable variables and of `variables`.

        Raises:
            ValueError: The optimizer is not built, or a list has the wrong length.
        """
        if not self.built:
            raise ValueError("the optimizer must be built first: call optimizer.build(trainable_variables)")
        if len(optimizer_variables) != len(self.variables):
            raise ValueError(
                f"optimizer_variables must have {len(self.variables)} values, got {len(optimizer_variables)}"
            )
        # a LossScaleOptimizer passes variables
        before = [v.value if isinstance(v, keras.Variable) else v for v in optimizer_variables]
        places = {id(variable): i for i, variable in enumerate(self.variables)}
        training = self._training()
        inner = [places[id(variable)] for variable in training.variables]
        with self._refusing_while_swapped("train"):
            weights, state = training.stateless_apply(
                [before[place] for place in inner], grads, trainable_variables
            )
        after = list(before)
        for place, value in zip(inner, state, strict=True):
            after[place] = value
        moved = self._moved(self.variables, before, after, self._trainable_variables, weights)
        return list(weights), moved

    def _moved(
        self,
        own: Sequence[Variable],
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        variables: Sequence[Variable],
        weights: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return the values `after` of variables of this optimizer (or one around it), averages moved."""
        places = {id(variable): i for i, variable in enumerate(own)}
        iterations = self._iterations  # as it counts accumulated gradients, too
        if not all(id(variable) in places for variable in (iterations, *self._averages)):
            return list(after)  # it belongs to another optimizer by now
        counter, each = places[id(iterations)], self.gradient_accumulation_steps or 1
        step, last = after[counter] // each, before[counter] // each
        averages = [places[id(average)] for average in self._averages]
        moved = self._averages.moved(
            [after[place] for place in averages],
            variables,
            weights,
            step,
            None if self._always_advances() else step > last,
        )
        after = list(after)
        for place, value in zip(averages, moved, strict=True):
            after[place] = value
        return after

    def _always_advances(self) -> bool:
        """Whether each call is a step: not where gradients accumulate, or steps may be skipped."""
        return not self.gradient_accumulation_steps and not isinstance(
            self._training(), keras.optimizers.LossScaleOptimizer
        )

    # --- what Keras asks of an optimizer ----------------------------------------------------------

    @property
    def variables(self) -> Variables:
        """The wrapped optimizer's variables, the averages, then those added.

        Averages of the variables that the optimizer trains come first, as it trains them, then the others
        by their paths: one order, whatever was called first.
        """
        if "_optimizer" not in self.__dict__:
            return Variables()
        return Variables([*self._optimizer.variables, *self._averages, *self._added])

    weights = variables

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Scale a loss as the wrapped optimizer wants it."""
        return self._training().scale_loss(loss)

    def update_step(self, gradient: Tensor, variable: Variable, learning_rate: Tensor) -> None:
        """Update a variable as the wrapped optimizer does."""
        self._optimizer.update_step(gradient, variable, learning_rate)

    def _apply_weight_decay(self, variables: Sequence[Variable]) -> None:
        self._optimizer._apply_weight_decay(variables)

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        """Do what the wrapped optimizer does at the end of training; the averages stay aside.

        Raises:
            RuntimeError: The optimizer was built for the variables of another model. Keras on JAX trains
                this one with their state, where other backends refuse it before the first step.
        """
        trained = self._trainable_variables_indices
        if var_list and self.built and not any(self._key_of(variable) in trained for variable in var_list):
            raise RuntimeError(
                f"{self.name} was built for the variables of another model, whose averages are spoilt now: "
                "compile each model with an optimizer of its own"
            )
        self._optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(
        self, var_list: Sequence[Variable] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Exclude variables from the wrapped optimizer's weight decay."""
        self._innermost().exclude_from_weight_decay(var_list, var_names)

    # --- saving -----------------------------------------------------------------------------------

    def save_own_variables(self, store: Store) -> None:
        """Write the averages and whether the weights are swapped; the wrapped optimizer writes itself."""
        for key, value in {**self._state_of_averages(), **self._added.state()}.items():
            store[key] = value

    def load_own_variables(self, store: Store) -> None:
        """Read what `save_own_variables` wrote; what comes before its variable waits for it.

        Raises:
            ValueError: The file holds no averages, or they do not fit. Nothing is changed then.
        """
        state = arrays_in(store)
        added = self._added.take(state)
        self._load_averages(state)
        self._added.load(added)
        if not self.built:
            self._waiting.cover(self._optimizer)


def _trace_again(model: Model) -> None:
    """Let what was traced before average what is paired now."""
    if getattr(model, "train_function", None) is not None:
        model.make_train_function(force=True)
    else:
        warnings.warn(
            "functions that were traced before this shadow_copy go on averaging what they did: make them "
            "again, or call it before",
            stacklevel=4,
        )
