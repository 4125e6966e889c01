"""The wrappers for optimizers of tf_keras, which is Keras 2: legacy ones, and those that follow Keras 3's.

Imported only where such an optimizer is wrapped, or a file that names one is loaded.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow.python.eager.context import eager_mode
from tensorflow.python.trackable.base import Trackable
from tf_keras import optimizers
from tf_keras.mixed_precision import LossScaleOptimizer
from tf_keras.src.optimizers.legacy.optimizer_v2 import _var_key  # what identifies slots of a variable

from . import backends
from .gradients import GraphGradientMembers
from .kinds import Context, Gradient, Initializer, Key, Operation, Optimizer, Store, Tensor, VariableList
from .waiting import arrays_in
from .weights import check_shapes
from .wrapper import Library, Variables, as_pairs, delegated

Gradients = Any  # a list of (gradient, variable) pairs, which optimizers without types return


def wrap(optimizer: Optimizer, *args: Any, **kwargs: Any) -> "TfKerasWrapper":
    """Return the wrapper that is an optimizer of the same kind as the one within."""
    legacy = isinstance(optimizer, optimizers.legacy.Optimizer)
    kind = LegacyExponentialMovingAverage if legacy else ExponentialMovingAverage
    return kind(optimizer, *args, **kwargs)


class TfKerasWrapper(GraphGradientMembers):
    """What the wrappers of both kinds share."""

    _keras = Library(
        backend=tf_keras.backend.backend,
        scaler=LossScaleOptimizer,
        inverse_time_decay=optimizers.schedules.InverseTimeDecay,
        serialize=optimizers.serialize,
        deserialize=optimizers.deserialize,
    )

    def _key_of(self, variable: tf.Variable) -> Key:
        return _var_key(variable)

    def _create_swapped(self) -> tf.Variable:
        with tf.init_scope():
            return tf.Variable(0, trainable=False, name="swapped")

    # --- building ---------------------------------------------------------------------------------

    def _scope(self) -> Context:
        return nullcontext()

    def _create_average(self, variable: tf.Variable, dtype: str) -> tf.Variable:
        """Make the variable that holds an average."""
        start = variable if self._averages.settings.initial_average == "weights" else tf.zeros(variable.shape)
        with self._scope(), self._backend.colocated(variable):
            average = tf.Variable(
                tf.cast(start, dtype), trainable=False, name=f"{variable._shared_name}/average"
            )
        self._own(variable, "average", average)
        return average

    def _own(self, variable: tf.Variable, slot_name: str, slot: tf.Variable) -> None:
        """Keep a variable that belongs to one of the model, restored where a checkpoint has it."""
        raise NotImplementedError

    # --- training ---------------------------------------------------------------------------------

    def _scaler(self) -> Optimizer | None:
        """The wrapped optimizer where it scales the loss and nothing outside does; else None.

        ``compile`` wraps whatever does not scale the loss itself; it would be scaled twice then.
        """
        outer = getattr(self, "_is_wrapped_by_loss_scale_optimizer", False)
        return self._optimizer if isinstance(self._optimizer, LossScaleOptimizer) and not outer else None

    def _working(self) -> Optimizer:
        """The optimizer that applies the gradients."""
        return self._scaler() or self._innermost()

    def apply_gradients(
        self,
        grads_and_vars: Iterable[Gradient],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
        skip_gradients_aggregation: bool = False,
    ) -> Operation:
        """Apply gradients with the wrapped optimizer, then average.

        Args:
            grads_and_vars: (gradient, variable) pairs. None of them: nothing happens.
            name: Passed on to the wrapped optimizer.
            experimental_aggregate_gradients: Whether to sum the gradients of all replicas.
            skip_gradients_aggregation: The same, the other way round, as newer optimizers have it.

        Returns:
            What the wrapped optimizer returns; in a graph of TensorFlow 1, an operation.

        Raises:
            TypeError: `grads_and_vars` is malformed.
            ValueError: No variable has a gradient.
            RuntimeError: Called in the cross-replica context of a strategy.
        """
        self._backend.check_apply()
        pairs = as_pairs(grads_and_vars)
        if not pairs:
            return tf.no_op()
        if all(gradient is None for gradient, _ in pairs):
            names = [backends.name_of(variable) for _, variable in pairs]
            raise ValueError(f"No gradients provided for any variable: {names}")
        with tf.init_scope():
            self._build_for([variable for _, variable in pairs])
        summed = not experimental_aggregate_gradients or skip_gradients_aggregation

        def step() -> Operation:
            with self._refusing_while_swapped("train"):
                when = _applied(self._scaler())
                applied = self._working().apply_gradients(pairs, **self._arguments(name, summed))
            self._averages.update(self._backend.count(self.iterations), when())
            return applied

        if tf.executing_eagerly() or tf.compat.v1.get_default_graph().building_function:
            return step()

        # a graph of TensorFlow 1: one operation has to stand for all
        @tf.function  # type: ignore[untyped-decorator]
        def whole_step() -> tf.Tensor:
            step()
            return self._backend.count(self.iterations)

        return whole_step().op

    def _build_for(self, variables: Sequence[tf.Variable]) -> None:
        """Create the state for these variables, where there is none yet."""
        raise NotImplementedError

    def _arguments(self, name: str | None, summed: bool) -> dict[str, Any]:
        """Return the arguments of the wrapped `apply_gradients`; optimizers of others may know few."""
        raise NotImplementedError

    # --- what tf_keras asks of an optimizer -------------------------------------------------------

    @property
    def iterations(self) -> tf.Variable:
        """The number of steps so far: those of the wrapped optimizer."""
        return self._optimizer.iterations

    @iterations.setter
    def iterations(self, variable: tf.Variable) -> None:
        self._optimizer.iterations = self._iterations = variable

    @property
    def variables(self) -> Variables:
        """`iterations`, the wrapped optimizer's state, the averages, then slots and weights added."""
        if "_optimizer" not in self.__dict__:
            return Variables()
        inner = self._optimizer.variables
        inner = list(inner() if callable(inner) else inner)
        own = self._own_variables()
        if inner or own:  # a restored legacy optimizer may have made its counter later, or not yet
            counter = self.iterations
            inner = [counter, *(variable for variable in inner if variable is not counter)]
        return Variables([*inner, *own])

    weights = variables

    def _own_variables(self) -> list[tf.Variable]:
        """Return the averages, in their order, then slots and weights that were added."""
        averages = list(self._averages)
        known = set(map(id, averages))
        return [*averages, *(variable for variable in self._created() if id(variable) not in known)]

    def _created(self) -> list[tf.Variable]:
        """Return this optimizer's own variables, as they were created."""
        raise NotImplementedError

    def get_weights(self) -> list[np.ndarray]:
        """Return the values of `variables`: the first is that of `iterations`."""
        values: list[np.ndarray] = tf_keras.backend.batch_get_value(self.variables)
        return values

    def set_weights(self, weights: Sequence[np.ndarray]) -> None:
        """Set what `get_weights` returned, or only the part that is the wrapped optimizer's.

        Raises:
            ValueError: The number of values or a shape does not fit. Nothing is changed then.
        """
        variables = list(self.variables)
        inner = len(variables) - len(self._own_variables())
        if len(weights) not in (len(variables), inner):
            raise ValueError(
                f"weights must hold {len(variables)} values, or {inner} without the averages, "
                f"got {len(weights)}"
            )
        check_shapes(variables[: len(weights)], weights)
        tf_keras.backend.batch_set_value(list(zip(variables, weights, strict=False)))


def _forwarded(name: str) -> Callable[..., Any]:
    """Make a method that is the one of the optimizer that applies the gradients."""

    def call(self: TfKerasWrapper, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._working(), name)(*args, **kwargs)

    return call


@tf_keras.saving.register_keras_serializable(package="fastema")
class LegacyExponentialMovingAverage(TfKerasWrapper, optimizers.legacy.Optimizer):  # type: ignore[misc]
    """The wrapper of a ``tf_keras.optimizers.legacy`` optimizer, which is one itself.

    Averages are slots named ``average``, and the wrapped optimizer is tracked as ``base_optimizer``: this
    is the layout of checkpoints of TensorFlow Model Garden's original, which can be restored here.
    """

    _HAS_AGGREGATE_GRAD = True

    def _initialize(self, name: str | None) -> None:
        optimizers.legacy.Optimizer.__init__(self, name)

    def _set_up(self) -> None:
        super()._track_trackable(self._optimizer, "base_optimizer")
        self._trained: dict[Key, tf.Variable] = {}

    def _can_decay(self, optimizer: Optimizer) -> bool:  # noqa: ARG002
        return True

    def _with_decay(self, optimizer: Optimizer, decay: float) -> Optimizer:
        inner = self._keras.innermost(optimizer)
        inner._initial_decay = decay
        inner._set_hyper("decay", decay)
        return optimizer

    def _own_name(self) -> str:
        return str(self._name)

    def _track_trackable(self, trackable: Trackable, name: str, overwrite: bool = False) -> Trackable:
        if name == "base_optimizer":  # of a LossScaleOptimizer around, for checkpoints of TensorFlow 2.2
            return trackable
        return super()._track_trackable(trackable, name, overwrite)

    def _scope(self) -> Context:
        scope: Context = self._distribution_strategy_scope()
        return scope

    def _build_for(self, variables: Sequence[tf.Variable]) -> None:
        self._create_all_weights(variables)

    def _create_all_weights(self, var_list: Sequence[tf.Variable]) -> None:
        self._optimizer._create_all_weights(var_list)
        known = len(self._trained)
        for variable in var_list:  # each call may bring others
            self._trained.setdefault(_var_key(variable), variable)
        if len(self._trained) > known:
            self._averages.train(list(self._trained.values()))

    def _own(self, variable: tf.Variable, slot_name: str, slot: tf.Variable) -> None:
        if slot_name not in self._slot_names:
            self._slot_names.append(slot_name)
        self._slots.setdefault(_var_key(variable), {})[slot_name] = slot
        self._restore_slot_variable(slot_name, variable, slot)
        self._weights.append(slot)

    def _created(self) -> list[tf.Variable]:
        return list(self._weights)

    def _arguments(self, name: str | None, summed: bool) -> dict[str, Any]:
        return {"name": name, **({"experimental_aggregate_gradients": False} if summed else {})}

    def add_slot(
        self,
        var: tf.Variable,
        slot_name: str,
        initializer: Initializer = "zeros",
        shape: tf.TensorShape | Sequence[int] | None = None,
    ) -> tf.Variable:
        """Return the variable of this name that belongs to a model's, made now if there is none.

        Slots named ``average`` are averages: these start as this optimizer was told.
        """
        if slot_name == "average":
            return self._averages.find_or_create(var)
        return super().add_slot(var, slot_name, initializer, shape)

    def get_slot(self, var: tf.Variable, slot_name: str) -> tf.Variable:
        """Return the variable of this name that belongs to a model's: an average, or the wrapped optimizer's.

        Raises:
            KeyError: There is none.
        """
        if slot_name in self._slots.get(_var_key(var), {}):
            return super().get_slot(var, slot_name)
        return self._optimizer.get_slot(var, slot_name)

    def get_slot_names(self) -> list[str]:
        """Return the names of this optimizer's own slots: checkpoints keep those of the wrapped one apart."""
        names: list[str] = super().get_slot_names()
        return names

    # Whether the weights are swapped is a value of this optimizer, not a variable that it tracks: then
    # checkpoints of the original lack no object.

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        if not self._is_exported():
            return {"swapped": self._swapped.read_value()}
        with eager_mode():
            return {"swapped": self._swapped.numpy()}

    def _restore_from_tensors(self, restored_tensors: dict[str, tf.Tensor]) -> Operation:
        return tf.no_op() if self._is_exported() else self._swapped.assign(restored_tensors["swapped"])

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Trackable]:
        children: dict[str, Trackable] = super()._trackable_children(save_type, **kwargs)
        return children | ({"swapped": self._swapped} if save_type == "savedmodel" else {})

    def _is_exported(self) -> bool:
        """Tell whether a SavedModel is written now, in a graph of its own that knows no variables of here."""
        with tf.init_scope():
            return not tf.executing_eagerly() and not self._swapped._in_graph_mode

    # for wrappers around, and for minimize

    def _compute_gradients(self, *args: Any, **kwargs: Any) -> Gradients:
        scaler = self._scaler()
        compute = scaler._compute_gradients if scaler else super()._compute_gradients
        return compute(*args, **kwargs)

    def _create_hypers(self) -> None:
        self._optimizer._create_hypers()

    def _create_slots(self, var_list: Sequence[tf.Variable]) -> None:
        self._optimizer._create_slots(var_list)

    _aggregate_gradients = _forwarded("_aggregate_gradients")
    _prepare = _forwarded("_prepare")
    _resource_apply_dense = _forwarded("_resource_apply_dense")
    _resource_apply_sparse = _forwarded("_resource_apply_sparse")
    _resource_apply_sparse_duplicate_indices = _forwarded("_resource_apply_sparse_duplicate_indices")
    _transform_unaggregated_gradients = _forwarded("_transform_unaggregated_gradients")


@tf_keras.saving.register_keras_serializable(package="fastema")
class ExponentialMovingAverage(TfKerasWrapper, optimizers.Optimizer):  # type: ignore[misc]
    """The wrapper of a ``tf_keras.optimizers`` optimizer, which is one itself."""

    weight_decay = delegated("weight_decay")
    use_ema = delegated("use_ema")
    ema_momentum = delegated("ema_momentum")
    ema_overwrite_frequency = delegated("ema_overwrite_frequency")
    jit_compile = delegated("jit_compile")

    def save_own_variables(self, store: Store) -> None:
        """Write the averages and whether the weights are swapped."""
        for key, value in self._state_of_averages().items():
            store[key] = value

    def load_own_variables(self, store: Store) -> None:
        """Read what `save_own_variables` wrote."""
        self._load_averages(arrays_in(store))

    def _initialize(self, name: str | None) -> None:
        optimizers.Optimizer.__init__(self, name)

    def _set_up(self) -> None:
        self._iterations = self._optimizer.iterations  # SavedModel expects it by this name
        # not tracked by this name: they are in _variables
        self._slots: dict[tuple[Key, str], tf.Variable] = self._no_dependency({})

    def __dir__(self) -> list[str]:
        # By this name a checkpoint tells optimizers whose slots it has to save apart.
        return [name for name in super().__dir__() if name != "get_slot_names"]

    def _create_iteration_variable(self) -> None:
        """Create none: `iterations` are the wrapped optimizer's."""

    def _build_for(self, variables: Sequence[tf.Variable]) -> None:
        self.build(variables)

    def build(self, var_list: Sequence[tf.Variable]) -> None:
        """Create the state for these variables: the wrapped optimizer's, then an average each."""
        if getattr(self, "_built", False):
            return
        self._optimizer.build(var_list)
        self._built = True
        self._averages.train(var_list)

    def _own(self, variable: tf.Variable, slot_name: str, slot: tf.Variable) -> None:
        self._slots[_var_key(variable), slot_name] = slot
        self._variables.append(slot)

    def _created(self) -> list[tf.Variable]:
        return list(self._variables)

    def _arguments(self, name: str | None, summed: bool) -> dict[str, Any]:
        # a LossScaleOptimizer takes no name
        named = {} if name is None else {"name": name}
        return {**named, **({"skip_gradients_aggregation": True} if summed else {})}

    def minimize(
        self,
        loss: Tensor | Callable[[], Tensor],
        var_list: VariableList,
        grad_loss: tf.Tensor | None = None,
        name: str | None = None,
        tape: tf.GradientTape | None = None,
    ) -> Operation:
        """Compute the gradients of a loss and apply them.

        Args:
            loss: A function that returns it, or a tensor.
            var_list: The variables, or a function that returns them.
            grad_loss: The gradient of the loss.
            name: Passed on to `apply_gradients`.
            tape: The ``tf.GradientTape`` that recorded the loss, if it is a tensor.

        Returns:
            What `apply_gradients` returns.

        Raises:
            ValueError: `loss` is a tensor and there is no `tape`.
        """
        if grad_loss is not None:
            # the gradients of this sum are those of the loss, times grad_loss
            tape = tape or tf.GradientTape()
            if callable(loss):
                compute, loss = loss, lambda: tf.reduce_sum(compute() * grad_loss)
            else:
                with tape:
                    loss = tf.reduce_sum(loss * grad_loss)
        return self.apply_gradients(self.compute_gradients(loss, var_list, tape), name=name)

    def compute_gradients(
        self, loss: Tensor | Callable[[], Tensor], var_list: VariableList, tape: tf.GradientTape | None = None
    ) -> Gradients:
        """Return (gradient, variable) pairs, as `apply_gradients` takes them."""
        return self._working().compute_gradients(loss, var_list, tape)

    def aggregate_gradients(self, grads_and_vars: list[Gradient]) -> Gradients:
        """Sum the gradients of all replicas, as the wrapped optimizer does."""
        return self._working().aggregate_gradients(grads_and_vars)

    def exclude_from_weight_decay(
        self, var_list: Sequence[tf.Variable] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Exclude variables from the wrapped optimizer's weight decay."""
        self._innermost().exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list: Sequence[tf.Variable]) -> None:
        """Do what the wrapped optimizer does at the end of training; the averages stay aside."""
        self._optimizer.finalize_variable_values(var_list)

    def add_weight(  # noqa: PLR0917 - the documented signature
        self,
        name: str,
        shape: tf.TensorShape | Sequence[int] | None,
        dtype: tf.DType | str | None = None,
        initializer: Initializer = "zeros",
        trainable: bool | None = None,
        synchronization: tf.VariableSynchronization = tf.VariableSynchronization.AUTO,
        aggregation: tf.VariableAggregation = tf.VariableAggregation.NONE,
    ) -> tf.Variable:
        """Return a new variable of this optimizer."""
        with tf.init_scope():
            weight = tf.Variable(
                _initial(initializer, shape, dtype or tf.float32),
                trainable=trainable,
                name=name,
                synchronization=synchronization,
                aggregation=aggregation,
            )
        self._variables.append(weight)
        return weight

    def add_slot(
        self,
        var: tf.Variable,
        slot_name: str,
        initializer: Initializer = "zeros",
        shape: tf.TensorShape | Sequence[int] | None = None,
    ) -> tf.Variable:
        """Return the variable of this name that belongs to a model's, made now if there is none.

        Slots named ``average`` are averages: these start as this optimizer was told.
        """
        if slot_name == "average":
            return self._averages.find_or_create(var)
        if (_var_key(var), slot_name) not in self._slots:
            with tf.init_scope(), self._backend.colocated(var):
                slot = tf.Variable(
                    _initial(initializer, var.shape if shape is None else shape, var.dtype),
                    trainable=False,
                    name=f"{var._shared_name}/{slot_name}",
                )
            self._own(var, slot_name, slot)
        return self._slots[_var_key(var), slot_name]

    def get_slot(self, var: tf.Variable, slot_name: str) -> tf.Variable:
        """Return the variable of this name that belongs to a model's: an average, or the wrapped optimizer's.

        Raises:
            KeyError: There is none.
        """
        own = self._slots.get((_var_key(var), slot_name))
        if own is not None:
            return own
        for variable in self._optimizer.variables:
            if variable.name.partition(":")[0] == f"{slot_name}/{var._shared_name}":
                return variable
        raise KeyError(slot_name)

    def get_slot_names(self) -> list[str]:
        """Return the names that `get_slot` knows."""
        names = dict.fromkeys(name for _, name in self._slots)
        trained = getattr(self._innermost(), "_index_dict", {})
        if trained:
            names |= dict.fromkeys(
                v.name.partition("/")[0] for v in self._optimizer.variables if "/" in v.name
            )
        return list(names)


def _initial(
    initializer: Initializer, shape: tf.TensorShape | Sequence[int] | None, dtype: tf.DType
) -> tf.Tensor:
    if isinstance(initializer, str) or callable(initializer):
        return tf_keras.initializers.get(initializer)(shape, dtype)
    return tf.cast(initializer, dtype)


def _applied(scaler: Optimizer | None) -> Callable[[], Tensor]:
    """Return what tells, after a step, whether it was skipped: None where none is, or a condition.

    A LossScaleOptimizer counts its skipped steps. What tells them is that it also halves its scale and
    starts counting good steps from zero; after a good step it counts on, or doubles the scale.
    """
    if scaler is None or not scaler.dynamic:
        return lambda: None
    before = tf.identity(scaler.loss_scale)
    return lambda: (tf.identity(scaler.dynamic_counter) > 0) | (scaler.loss_scale > before)
