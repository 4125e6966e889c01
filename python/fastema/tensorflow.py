"""Averaging and swapping lists of tf.Variables, in eager code and in graphs.

A variable's buffer may be shared: with a tensor read earlier, with a constant, with another
variable. So nothing here writes into a buffer that somebody else holds. Of our two ops
(cpp/tensorflow/ops.cpp) one averages in place, under TensorFlow's locks, in buffers that it has made the
variables' own. Where TensorFlow does not export what that needs (2.20, 2.21), XLA averages large variables
in place, under the same locks; the other op makes new small ones beside the old, which are then assigned.
Whoever holds the old ones keeps them unchanged.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from . import _formula
from ._arrays import unmasked
from ._build import OP_LIBRARY
from ._types import MIXES, check_choice, check_share

__all__ = ["swap", "update"]

Engine = Literal["auto", "native", "graph"]
Value: TypeAlias = tf.Variable | tf.Tensor


def update(
    averages: Sequence[tf.Variable],
    values: Sequence[tf.Variable | tf.Tensor],
    decay: float | tf.Tensor,
    *,
    when: tf.Tensor | None = None,
    engine: Engine = "auto",
    bucket_bytes: int = 1 << 30,
) -> Literal["native", "graph"]:
    """Move averages towards values: ``average += (1 - decay) * (value - average)``.

    Works in eager code, in ``tf.function`` and under a ``tf.distribute`` strategy, in and
    outside of replica contexts. Variables that differ between replicas, such as the statistics of
    batch normalisation, enter as the mean of all replicas, so that their averages agree. A decay of
    0 copies exactly.

    Args:
        averages: tf.Variables of any floating type and shape. Assigned.
        values: tf.Variables or tensors of floating types and the same shapes. Read.
        decay: From 0 to 1; a float or a scalar floating-point tensor, better of float64. A tensor in a graph
            is checked when the graph runs. XLA leaves that out: there a decay outside counts as 1, and
            the averages stay.
        when: A boolean tensor: where it is false, nothing changes. None: always.
        engine: ``"native"``: the C++ core; ``"graph"``: TensorFlow's operations; ``"auto"``: native where
            it can run; with TensorFlow 2.20 and 2.21, where it cannot run in place, averages from 1 MiB on
            by XLA (in a ``tf.function`` and, towards variables, in eager code). All have NumPy's bits,
            TensorFlow's operations and XLA but for subnormal numbers ("Bits, not tolerances" in
            python/docs/averages.md). A ``tf.function`` keeps what it was traced with: traced outside of XLA
            first and called within a jit-compiled function then, it needs ``"graph"``.
        bucket_bytes: Where new averages are made beside the old, so many bytes of them at a time, or the
            largest average where that is more: this bounds the further memory. Buckets of some tens
            of megabytes cost a few percent.

    Returns:
        What did it, ``"native"`` or ``"graph"``, which XLA's part of a list makes it; in a ``tf.function``,
        what will.

    Raises:
        TypeError: An average is no tf.Variable, an average, a value or the decay of another than a
            floating type. Nothing has changed then.
        ValueError: The lists differ in length, two shapes differ, an average is listed twice or
            also as a value, or an argument is outside of its range. Nothing has changed then.
        tf.errors.InvalidArgumentError: A graph finds that when it runs. Nothing has changed then.
        RuntimeError: `engine` is ``"native"`` and native code cannot run here; the message says why.

    Example:
        >>> import tensorflow as tf
        >>> import fastema.tensorflow
        >>> weight = tf.Variable([1.0, 2.0])
        >>> average = tf.Variable(tf.zeros(2))
        >>> fastema.tensorflow.update([average], [weight], 0.5)
        'native'
        >>> average.numpy()
        array([0.5, 1. ], dtype=float32)
    """
    averages, values = list(averages), list(values)
    check_choice(engine, "engine", ("auto", "native", "graph"))
    key = (engine, bucket_bytes, *map(id, averages), *map(id, values))
    again = _again(key)
    if again is not None:
        return again(_checked_decay(decay), when)
    _check_variables(averages, "averages", "fastema.update")
    for name, arrays in (("averages", averages), ("values", values)):
        for i, array in enumerate(arrays):
            _check_type(array, f"{name}[{i}]")
    _check_pairs(averages, values, ("averages", "values"))
    _check_distinct(averages, "averages")
    places = {id(average): i for i, average in enumerate(averages)}
    for i, value in enumerate(values):
        if id(value) in places:
            raise ValueError(f"values[{i}] must be no average, got averages[{places[id(value)]}]")
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes!r}")
    decay = _checked_decay(decay)
    obstacle = "engine='graph' was asked for" if engine == "graph" else _obstacle(averages, values)
    if obstacle and engine == "native":
        raise RuntimeError(f"engine='native' cannot run here: {obstacle}")
    if obstacle:
        # a graph that was asked for may be compiled later; the bits' three passes double its time
        compiled = _under_xla() or (engine == "graph" and not tf.executing_eagerly())
        _update_by_framework(averages, values, _asserted(decay), when, tf.bitcast if compiled else None)
        return "graph"
    again = _remember(key, averages, values, engine, bucket_bytes)
    if again is not None:
        return again(decay, when)
    if not averages:
        return "native"
    large = _better_compiled(averages, values) if engine == "auto" and not tf.executing_eagerly() else []
    _do(lambda: _update_in_parts(averages, values, decay, large, bucket_bytes), when)
    return "graph" if large else "native"


def _do(action: Callable[[], None], when: tf.Tensor | None) -> None:
    if when is None:
        action()
    else:
        tf.cond(when, action, lambda: None)


def swap(a: Sequence[tf.Variable], b: Sequence[tf.Variable]) -> None:
    """Exchange the contents of variables, bit for bit, by exchanging their buffers.

    Costs nothing that grows with the size. Works in eager code, in ``tf.function`` and across the
    replicas of a ``tf.distribute`` strategy.

    Args:
        a: tf.Variables.
        b: tf.Variables of the same types and shapes.

    Raises:
        TypeError: One is no tf.Variable.
        ValueError: The lists differ in length, two shapes or types differ, or a variable is listed twice.
        RuntimeError: Called in a replica context.

    Example:
        >>> import tensorflow as tf
        >>> import fastema.tensorflow
        >>> a, b = tf.Variable([1.0]), tf.Variable([2.0])
        >>> fastema.tensorflow.swap([a], [b])
        >>> a.numpy(), b.numpy()
        (array([2.], dtype=float32), array([1.], dtype=float32))
    """
    a, b = list(a), list(b)
    _check_variables(a, "a", "fastema.swap")
    _check_variables(b, "b", "fastema.swap")
    _check_pairs(a, b, ("a", "b"))
    _check_distinct(a + b, "a and b together")
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if x.dtype != y.dtype:
            raise ValueError(f"a[{i}] and b[{i}] must have one type, got {x.dtype.name} and {y.dtype.name}")
    if tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context():
        raise RuntimeError("swap must be called outside of a replica context (not in strategy.run)")
    for x, y in zip(a, b, strict=True):
        strategy_of(x).extended.update(x, _exchange, args=(y,), group=False)


def strategy_of(variable: tf.Variable) -> tf.distribute.Strategy:
    """Return the strategy that distributes this variable; the default one where none does."""
    return getattr(variable, "distribute_strategy", None) or tf.distribute.get_strategy()


def _exchange(x: tf.Variable, y: tf.Variable) -> None:
    x_value, y_value = _read(x, _bytes(x)), _read(y, _bytes(y))
    _assign(x, y_value)
    _assign(y, x_value)


_LARGE = 1 << 20  # bytes, from which on a copy costs more than an operation


def _read(value: Value, size: int) -> tf.Tensor:
    """Return a tensor that shares a variable's buffer; other values as tensors.

    By the operation itself, which costs a fifth of a variable's own method in eager code.

    Args:
        value: A tf.Variable, a tensor, or what can become one.
        size: In bytes.
    """
    if not isinstance(value, tf.Variable):
        return tf.convert_to_tensor(value)
    if size >= _LARGE and not _under_xla():
        # after an embedding lookup a variable is copied whenever it is read, until this is taken back
        tf.raw_ops.DisableCopyOnRead(resource=value.handle)
    return tf.raw_ops.ReadVariableOp(resource=value.handle, dtype=value.dtype)


def _assign(variable: tf.Variable, value: tf.Tensor) -> tf.Operation | None:
    return tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)


def _bytes(variable: Value) -> int:
    return int((variable.shape.num_elements() or 0) * variable.dtype.size)


def _under_xla() -> bool:
    return not tf.executing_eagerly() and bool(GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def _check_variables(arrays: list[tf.Variable], name: str, for_others: str) -> None:
    for i, array in enumerate(arrays):
        if not isinstance(array, tf.Variable):
            kind = type(array).__name__
            raise TypeError(f"{name}[{i}] must be a tf.Variable, got {kind}; {for_others} takes other arrays")


def _check_type(array: Value, name: str) -> None:
    if not hasattr(array, "dtype"):
        raise TypeError(f"{name} must be a tf.Variable or a tensor, got {type(array).__name__}")
    if isinstance(array, np.ndarray):
        unmasked(array, name)
    dtype = tf.as_dtype(array.dtype)
    if not dtype.is_floating:
        raise TypeError(f"{name} must be of a floating-point type, got {dtype.name}")


def _checked_decay(decay: float | tf.Tensor) -> tf.Tensor:
    """Return a decay as a float64 scalar; checked, if its value is known already."""
    known: Any = decay
    if tf.is_tensor(decay):
        _check_type(decay, "decay")
        shape = tf.TensorShape(known.shape)
        if shape.num_elements() not in (None, 1):
            raise ValueError(f"decay must be a scalar, got shape {shape}")
        decay = tf.cast(decay if shape.rank == 0 else tf.reshape(decay, []), tf.float64)
        known = tf.get_static_value(decay)
    return decay if known is None else tf.constant(check_share(known, "decay"), tf.float64)


def _asserted(decay: tf.Tensor) -> tf.Tensor:
    """Return a decay, once a graph has found it to be from 0 to 1; as 1 otherwise, where XLA drops that."""
    if tf.get_static_value(decay) is not None:
        return decay
    fine = (decay >= 0.0) & (decay <= 1.0)
    refusal = tf.raw_ops.Assert(condition=fine, data=["decay must be from 0 to 1"])
    with tf.control_dependencies([refusal]):
        return tf.where(fine, decay, tf.ones([], tf.float64))


def _check_pairs(a: list[Value], b: list[Value], names: tuple[str, str]) -> None:
    if len(a) != len(b):
        raise ValueError(f"{names[0]} and {names[1]} must have one length, got {len(a)} and {len(b)}")
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if not x.shape.is_compatible_with(y.shape):
            raise ValueError(
                f"{names[0]}[{i}] and {names[1]}[{i}] must have one shape, got {x.shape} and {y.shape}"
            )


def _check_distinct(variables: list[tf.Variable], names: str) -> None:
    first: dict[int, int] = {}
    for i, variable in enumerate(variables):
        if first.setdefault(id(variable), i) != i:
            raise ValueError(
                f"{names} must be different variables, got one at {first[id(variable)]} and at {i}"
            )


def _obstacle(averages: list[tf.Variable], values: list[Value]) -> str | None:
    """Say what keeps native code from running here; None where nothing does."""
    if _under_xla():
        return "this is compiled by XLA (jit_compile=True)"
    if tf.distribute.has_strategy() or any(hasattr(average, "distribute_strategy") for average in averages):
        return "a tf.distribute strategy updates its variables itself"
    for i, (average, value) in enumerate(zip(averages, values, strict=True)):
        if (average.dtype.name, value.dtype.name) not in MIXES:
            return f"averages[{i}] is {average.dtype.name}, values[{i}] {value.dtype.name}"
        if average.device and ("CPU" not in average.device or "/job:ps/" in average.device):
            return f"averages[{i}] lies on {average.device}"
    operations = _operations()
    if isinstance(operations, str):
        _warn_once(operations)
        return operations
    return None


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"TensorFlow's own operations compute the averages: {reason}", stacklevel=2)


@cache
def _operations() -> ModuleType | str:
    """Load the library of our op; return its Python module, or the reason why there is none."""
    try:
        library: ModuleType = tf.load_op_library(str(OP_LIBRARY))
    except (tf.errors.OpError, OSError) as error:
        return f"{OP_LIBRARY.name} cannot be loaded: {error}"
    if not hasattr(library, "fastema_update"):
        return f"{OP_LIBRARY.name} does not find all it needs in TensorFlow {tf.__version__}"
    tf.no_gradient("FastemaUpdate")  # a tape or accumulator that watches an average asks
    return library


def _better_compiled(averages: list[tf.Variable], values: list[Value]) -> list[int]:
    """Return the places of averages that XLA moves in place, where native code makes new ones beside them.

    Each takes some 10 ms to compile; in eager code, at each call. Beside other devices XLA could choose one.
    """
    if _averages_in_place() or len(tf.config.list_logical_devices()) > 1:
        return []
    pairs = enumerate(zip(averages, values, strict=True))
    known = [i for i, (a, v) in pairs if a.shape.is_fully_defined() and v.shape.is_fully_defined()]
    return [i for i in known if _bytes(averages[i]) >= _LARGE]


@dataclass(frozen=True)
class _Again:
    """An eager update of one list of variables, as a function of the decay."""

    function: Callable[[tf.Tensor], None]
    carrier: Literal["native", "graph"]
    variables: list["weakref.ref[tf.Variable]"]  # when one is gone, so is this

    def __call__(self, decay: tf.Tensor, when: tf.Tensor | None) -> Literal["native", "graph"]:
        _do(lambda: self.function(decay), when)
        return self.carrier


_lists: dict[tuple[object, ...], _Again] = {}
_MOST = 16  # lists that are functions: to trace one anew at each step would be worse than none
_MANY = 16  # variables, from which on eager calls cost more than the averaging


def _again(key: tuple[object, ...]) -> _Again | None:
    """Return the function by which eager code updates a list, which has been checked then."""
    fit = (
        tf.executing_eagerly() and not tf.config.functions_run_eagerly() and not tf.distribute.has_strategy()
    )
    return _lists.get(key) if fit else None


def _remember(
    key: tuple[object, ...],
    averages: list[tf.Variable],
    values: list[Value],
    engine: Engine,
    bucket_bytes: int,
) -> _Again | None:
    """Make a function of an eager update that gains by one; return it if even its first call does.

    That is where XLA takes a part. Where variables are many, each takes 10 us in a function, and 50 one by
    one, but a millisecond to trace.
    """
    if not tf.executing_eagerly() or tf.config.functions_run_eagerly() or _averages_in_place():
        return None
    if len(_lists) >= _MOST or not all(isinstance(value, tf.Variable) for value in values):
        return None
    count = len(averages)
    compiled = engine == "auto" and bool(_better_compiled(averages, values))
    if not compiled and count < _MANY:
        return None

    def forget(_: object) -> None:
        _lists.pop(key, None)  # with one of its variables goes what holds the memory of the others

    variables = [weakref.ref(variable, forget) for variable in [*averages, *values]]

    def update_again(decay: tf.Tensor) -> None:
        there: list[Any] = [variable() for variable in variables]
        update(there[:count], there[count:], decay, engine=engine, bucket_bytes=bucket_bytes)

    carrier: Literal["native", "graph"] = "graph" if compiled else "native"
    again = _lists[key] = _Again(tf.function(update_again, autograph=False), carrier, variables)
    return again if compiled else None


def _averages_in_place() -> bool:
    return hasattr(_operations(), "fastema_update_in_place")


def _update_in_parts(
    averages: list[tf.Variable], values: list[Value], decay: tf.Tensor, large: list[int], bucket_bytes: int
) -> None:
    """Have XLA update those in the places `large`, in a graph, and our op the others."""
    others = [i for i in range(len(averages)) if i not in set(large)]

    def update_large() -> list[tf.Tensor]:
        checked = _asserted(decay)  # XLA does not

        def update() -> tf.Tensor:
            those = [averages[i] for i in large], [values[i] for i in large]
            _update_by_framework(*those, checked, None, tf.bitcast)
            return checked  # something that others can wait for

        return [tf.function(update, autograph=False, jit_compile=True)()] if large else []

    if others:
        _update_natively(
            [averages[i] for i in others], [values[i] for i in others], decay, bucket_bytes, update_large
        )
    else:
        update_large()


def _update_natively(
    averages: list[tf.Variable],
    values: list[Value],
    decay: tf.Tensor,
    bucket_bytes: int,
    between: Callable[[], list[tf.Tensor]],
) -> None:
    """Have our op update a list.

    Args:
        averages: At least one.
        values: As many.
        decay: A scalar.
        bucket_bytes: See `update`.
        between: Is done when a first bucket has been computed, and before anything is assigned: so where
            one of the two fails, nothing has changed, and none takes the other's processors.
    """
    sizes = list(map(_bytes, averages))
    operations = _operations()
    assert not isinstance(operations, str)  # `_obstacle` was asked before
    if _averages_in_place():
        operations.fastema_update_in_place(
            decay=decay,
            averages=[average.handle for average in averages],
            values=list(map(_read, values, sizes)),
        )
        return
    done: list[Any] = []  # what the next step waits for
    for bucket in _buckets(sizes, bucket_bytes):
        with tf.control_dependencies(done):
            updated = operations.fastema_update(
                decay=decay,
                averages=list(map(_read, averages[bucket], sizes[bucket])),
                values=list(map(_read, values[bucket], sizes[bucket])),
            )
        if bucket.start == 0:
            with tf.control_dependencies(updated):
                done = between()
        with tf.control_dependencies(done):
            done = list(map(_assign, averages[bucket], updated))


def _buckets(sizes: list[int], limit: int) -> list[slice]:
    """Cut a list into runs of at most so many bytes, or of one element."""
    ends, total = [0], 0
    for i, size in enumerate(sizes):
        if total > 0 and total + size > limit:
            ends.append(i)
            total = 0
        total += size
    return [slice(*bounds) for bounds in pairwise([*ends, len(sizes)])]


def _update_by_framework(
    averages: list[tf.Variable],
    values: list[Value],
    decay: tf.Tensor,
    when: tf.Tensor | None,
    bitcast: Callable[[tf.Tensor, str], tf.Tensor] | None,
) -> None:
    weight, copies = _formula.weigh(decay, tf.equal)

    def update_one(average: tf.Variable, value: Value, weight: tf.Tensor, copies: tf.Tensor) -> None:
        average.assign(
            _formula.blend(
                average,
                value,
                weight,
                copies,
                compute=_compute_type(average.dtype),
                cast=tf.cast,
                where=tf.where,
                bitcast=bitcast,
            )
        )

    def update_all(strategy: tf.distribute.Strategy, values: list[Value], when: tf.Tensor | None) -> None:
        def update() -> None:
            with _rounding_each(bitcast):
                for average, value in zip(averages, values, strict=True):
                    strategy.extended.update(average, update_one, args=(value, weight, copies), group=False)

        # the condition is asked here: in a replica context no branch of one may wait for other replicas
        _do(update, None if when is None else strategy.experimental_local_results(when)[0])

    def update_in_replica() -> None:
        strategy = tf.distribute.get_strategy()
        tf.__internal__.distribute.interim.maybe_merge_call(update_all, strategy, _agreed(values), when)

    strategy = strategy_of(averages[0]) if averages else tf.distribute.get_strategy()
    if strategy is tf.distribute.get_strategy() and not tf.distribute.in_cross_replica_context():
        update_in_replica()
    else:
        strategy.run(update_in_replica)


def _rounding_each(bitcast: Callable[[tf.Tensor, str], tf.Tensor] | None) -> AbstractContextManager[None]:
    """Return a context whose operations round for themselves where no bits hide the product from XLA.

    So they are left out of the clusters that XLA compiles where a program lets it (``--tf_xla_auto_jit``).
    """
    if bitcast is not None or tf.executing_eagerly():
        return nullcontext()
    context: AbstractContextManager[None] = tf.xla.experimental.jit_scope(compile_ops=False)
    return context


def _compute_type(dtype: tf.DType) -> tf.DType:
    return tf.float64 if dtype == tf.float64 else tf.float32


def _agreed(values: list[Value]) -> list[Value]:
    """Replace variables that differ between replicas by their means; called in a replica context."""
    context = tf.distribute.get_replica_context()
    differing = [i for i, value in enumerate(values) if _differs(value)]
    if not differing or context.num_replicas_in_sync == 1:
        return values
    # on the device of the replica: what is read lies on none in a graph, and is then not reduced
    parts = [tf.identity(tf.cast(values[i], _compute_type(values[i].dtype))) for i in differing]
    means = dict(zip(differing, context.all_reduce(tf.distribute.ReduceOp.MEAN, parts), strict=True))
    return [means.get(i, value) for i, value in enumerate(values)]


def _differs(value: Value) -> bool:
    """Tell whether replicas may hold different values: those that they assign each for itself."""
    return (
        isinstance(value, tf.distribute.DistributedValues)
        and isinstance(value, tf.Variable)
        and not value.trainable
        and (
            value.aggregation == tf.VariableAggregation.NONE
            or value.synchronization == tf.VariableSynchronization.ON_READ
        )
    )
