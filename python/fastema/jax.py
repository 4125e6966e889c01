"""Averages as pure functions of JAX: inside of jit, beside the step or as part of an optimizer of optax.

`ema` has the clock, schedules, types and bits of `fastema.EMA`. The averages are a tree that a jitted step
takes and returns, so that they are donated, sharded and saved with the rest of the state; nothing is copied
to the host.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from . import _formula, schedules
from ._ema.count import Pace
from ._formula_jax import blend, number_of, rounded_at_random, widened, words_of
from ._types import (
    FLOATS,
    MIXES,
    Rounding,
    average_type,
    check_choice,
    check_count,
    compute_type,
    float_type,
)
from .ema import EMA

__all__ = ["State", "Transformation", "ema"]

Params: TypeAlias = Any
"""A tree of arrays that JAX knows: dictionaries, lists, states of NNX, modules of equinox."""


class State(NamedTuple):
    """How far averaging has come, and the averages: a tree of JAX, to be passed through jit and saved.

    Attributes:
        step: How many updates were seen: an unsigned integer of 32 bits.
        averages: The averages as they are kept, shaped as the parameters. Read them by `ema.averages`.
        product: With ``initial="zeros"`` the product of all decays used, as the two words of a float64, which
            JAX would not hold unless 64 bits are enabled. Else None.
    """

    step: jax.Array
    averages: Params
    product: jax.Array | None


class Transformation(NamedTuple):
    """What optax takes as a GradientTransformation.

    Attributes:
        init: ``init(params)`` returns the state.
        update: ``update(updates, state, params)`` returns the updates as they are, and the next state.
    """

    init: Callable[[Params], State]
    update: Callable[..., tuple[Params, State]]


@dataclass(frozen=True)
class ema:  # noqa: N801 - used as a function
    """Exponential moving averages as pure functions: `init`, `update` and `averages`, also inside of jit.

    ``average += (1 - decay) * (value - average)``, with the bits of `fastema.EMA` and of NumPy: XLA alone
    would fuse the product and the sum. Only subnormal numbers (below 1.2e-38 in float32) may differ, which
    XLA takes for zero on CPUs.

    Floating arrays are averaged, complex ones by their parts; other arrays (counters, masks) are copied at
    each update that averages, and keys of random numbers and what is no array are carried along. Two with the
    same arguments are equal and have one hash: they can be static arguments of jit.

    Args:
        decay: From 0 to 1, towards 1 is slower; or one of `fastema.schedules`, or your own subclass of
            `schedules.Schedule`, whose `at` is computed in the step. A decay of it that is outside of 0 to 1
            leaves the averages as they are.
        every: As for `fastema.EMA`. On the other steps parameters are not read.
        start_step: As for `fastema.EMA`.
        initial: As for `fastema.EMA`: ``"values"`` or ``"zeros"``.
        dtype: As for `fastema.EMA`. float64 needs JAX's 64 bits enabled.
        rounding: ``"nearest"`` or ``"stochastic"``, as for `fastema.EMA`. The random bits go by the place of
            an array in ``jax.tree.leaves(params)``, which has dictionaries sorted, and of an element in the
            whole array, however it is sharded. `fastema.EMA` has the same bits where it was given
            dictionaries that are sorted, no array twice, and nothing sharded.
        seed: Of stochastic rounding.

    Raises:
        TypeError: A number is none, or `decay` is a function, which cannot be asked inside of jit.
        ValueError: An argument is outside of its range.

    Example:
        >>> import fastema.jax, jax, jax.numpy as jnp
        >>> average = fastema.jax.ema(0.75)
        >>> params = {"w": jnp.zeros(2)}
        >>> state = average.init(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     params = {"w": params["w"] + 1.0}  # a step of training
        ...     return params, average.update(state, params)
        >>> for _ in range(2):
        ...     params, state = step(params, state)
        >>> average.averages(state)
        {'w': Array([0.6875, 0.6875], dtype=float32)}
    """

    decay: float | schedules.Schedule
    _: KW_ONLY
    every: int = 1
    start_step: int = 0
    initial: Literal["values", "zeros"] = "values"
    dtype: DTypeLike | None = None
    rounding: Rounding = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.initial, "initial", ("values", "zeros"))
        check_choice(self.rounding, "rounding", ("nearest", "stochastic"))
        if callable(self.decay) and not isinstance(self.decay, schedules.Schedule):
            raise TypeError(
                "decay must be a number or a schedule of fastema.schedules, or a subclass of "
                f"schedules.Schedule, whose method at can be traced; got {self.decay!r}"
            )
        pace = Pace.of(self.decay, self.every, self.start_step)
        if pace.several:
            raise TypeError(f"decay must be one decay, got {self.decay!r}: make an ema for each")
        dtype = None if self.dtype is None else float_type(self.dtype).name
        if dtype == "float64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
            raise ValueError("dtype must not be float64 unless JAX has 64 bits enabled (jax_enable_x64)")
        if isinstance(self.decay, schedules.Schedule):
            _check_can_be_traced(self.decay, pace.every)
        checked = {
            "decay": pace.decays[0],
            "every": pace.every,
            "start_step": pace.start_step,
            "dtype": dtype,
            "seed": check_count(self.seed, "seed"),
        }
        for name, value in checked.items():  # as Python's own, which are equal where they are the same
            object.__setattr__(self, name, value)

    # --- the three functions ----------------------------------------------------------------------

    def init(self, params: Params) -> State:
        """Return the state before the first update: averages that start at the parameters, in new arrays.

        Args:
            params: A tree of arrays.

        Raises:
            TypeError: An array is of a type that is not offered.
            ValueError: There is no array that could be averaged or copied.
        """
        leaves, structure = _flattened(params)
        if not any(_kind(x) != "carried" for _, x in leaves):
            raise ValueError(f"params must hold an array or more, got none in {type(params).__name__}")
        averages = structure.unflatten([self._started(x, _name(path)) for path, x in leaves])
        product = jnp.asarray(np.ones(1).view(np.uint32)) if self.initial == "zeros" else None
        return State(jnp.zeros((), np.uint32), averages, product)

    def update(self, state: State, params: Params) -> State:
        """Count a step of training, and return the state with the averages moved towards the parameters.

        Args:
            state: What `init` or `update` returned. It may be donated.
            params: The parameters after the step, shaped as those of `init`.

        Raises:
            TypeError: A parameter has another type than at first.
            ValueError: The tree or a parameter has another shape than at first.
        """
        kept, structure = _flattened(state.averages)
        values, given = _flattened(params)
        if structure != given:
            raise ValueError(
                f"params must be a tree as at first: {_difference(kept, values, structure, given)}"
            )
        for (path, average), (_, value) in zip(kept, values, strict=True):
            _check_fits(average, value, _name(path))
        leaves = [value for _, value in values]
        places = [i for i, value in enumerate(leaves) if _kind(value) != "carried"]
        step, product, moved = _moved(
            self,
            state.step,
            state.product,
            [kept[i][1] for i in places],
            [jnp.asarray(leaves[i]) for i in places],
        )
        for place, average in zip(places, moved, strict=True):
            leaves[place] = average
        return State(step, structure.unflatten(leaves), product)

    def averages(self, state: Any, like: Params | None = None) -> Params:
        """Return the averages, shaped as the parameters, in arrays of their own.

        Before the first update that averages (the k-th with ``every=k``) they are what they started at.

        Args:
            state: What `update` returned, or whatever holds it, as the state of an optimizer.
            like: A tree whose types they are to have, as the parameters. None: as they are kept.

        Raises:
            ValueError: There is no state of averages within `state`, or there are several.
        """
        found = [x for x in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(x)]
        if len(found) != 1:
            raise ValueError(f"state must hold one state of averages, got {len(found)}")
        averages = found[0].averages
        if (product := found[0].product) is not None:
            named, structure = _flattened(averages)
            leaves = [x for _, x in named]
            arrays = iter(_divided([x for x in leaves if _kind(x) != "carried"], product))
            averages = structure.unflatten([x if _kind(x) == "carried" else next(arrays) for x in leaves])
        if like is None:
            return jax.tree.map(_copied, averages)
        return jax.tree.map(
            lambda x, y: _copied(x) if _kind(x) == "carried" else jnp.array(x, y.dtype), averages, like
        )

    def as_optax(self) -> Transformation:
        """Return this as a transformation of optax that averages the new parameters and changes no update.

        It must be the last of an `optax.chain`. Its state is in that of the chain, where `averages` finds it.
        Steps that `optax.apply_if_finite` or `optax.MultiSteps` around the chain leave out are not counted.

        Example:
            The step of an optimizer averages what it makes::

                average = fastema.jax.ema(0.999)
                optimizer = optax.chain(optax.adam(1e-3), average.as_optax())
                state = optimizer.init(params)
                updates, state = optimizer.update(gradients, state, params)
                params = optax.apply_updates(params, updates)
                averages = average.averages(state)
        """

        def update(updates: Params, state: State, params: Params | None = None) -> tuple[Params, State]:
            if params is None:
                raise ValueError("params must be given to the optimizer's update: they are what is averaged")
            return updates, self.update(state, jax.tree.map(_applied, params, updates))

        return Transformation(self.init, update)

    # --- from and to fastema.EMA ------------------------------------------------------------------

    def state_dict(self, state: State) -> dict[str, Any]:
        """Return what `EMA.load_state_dict` of the same parameters takes, to go on there; outside of jit.

        Example:
            >>> import fastema, fastema.jax, jax.numpy as jnp
            >>> average, params = fastema.jax.ema(0.5), {"w": jnp.ones(2)}
            >>> state = average.update(average.init(params), {"w": jnp.zeros(2)})
            >>> other = fastema.EMA(params, 0.5)
            >>> other.load_state_dict(average.state_dict(state))
            >>> other.averages, other.step
            ({'w': Array([0.5, 0.5], dtype=float32)}, 1)
        """
        step = int(state.step)
        product = 0.0 if state.product is None else float(np.asarray(state.product).view(np.float64)[0])
        averaged, decay = self._last(step)
        return {
            **self._ema(state.averages).state_dict(),
            "step": step,
            "decay": None if decay is None else [decay],
            "products": [product],
            "clock": step,
            "averaged": averaged,
        }

    def load_state_dict(self, state: Mapping[str, Any], params: Params) -> State:
        """Return the state that goes on where an EMA of the same parameters was; outside of jit.

        Args:
            state: What `EMA.state_dict` returned.
            params: As for `init`.

        Raises:
            KeyError: As for `EMA.load_state_dict`.
            TypeError: As for `EMA.load_state_dict`.
            ValueError: As for `EMA.load_state_dict`; or the clock did not go by one at each step, or averages
                were left out where values were not finite, or started otherwise.
        """
        first = self.init(params)
        ema = self._ema(first.averages)
        ema.load_state_dict({**state, "products": [0.0 for _ in state["products"]], "decay": [1.0]})
        averaged, _ = self._last(ema.step)
        if ema.clock != ema.step or state.get("averaged", ema.step - ema.step % self.every) != averaged:
            raise ValueError(
                "state must have counted each update as one, with the same every and start_step, and have "
                f"averaged last at step {averaged}; its clock is {ema.clock} at step {ema.step}"
            )
        (product,) = state["products"]
        if (product != 0.0) and first.product is None:
            raise ValueError("initial must be 'zeros' for averages that started so")
        words = None if first.product is None else jnp.asarray(np.array([product]).view(np.uint32))
        return State(jnp.asarray(ema.step, np.uint32), ema.averages, words)

    def _ema(self, averages: Params) -> EMA:
        """Return an EMA that keeps such averages."""
        return EMA(
            averages,
            self.decay,
            every=self.every,
            start_step=self.start_step,
            dtype=self.dtype,
            rounding=self.rounding,
            seed=self.seed,
        )

    # --- counting ---------------------------------------------------------------------------------

    def _last(self, step: int) -> tuple[int, float | None]:
        """Return the last step that averaged until this one, and its decay; 0 and None: none has."""
        pace = Pace.of(self.decay, self.every, self.start_step)
        averaged = self._due_until(step)
        if averaged == 0:
            return 0, None
        return averaged, pace.decays_over(self._due_until(averaged - 1), averaged)[0]

    def _due_until(self, step: int) -> int:
        """Return the last step until this one that averages: before `start_step` each does."""
        return max(step - step % self.every, min(step, self.start_step - 1))

    @cached_property
    def _first(self) -> tuple[int, float]:
        """The first step from `start_step` on that averages, and its decay, of all since then."""
        step = max(-(-self.start_step // self.every), 1) * self.every
        decays = Pace.of(self.decay, self.every, self.start_step).decays_over(self._due_until(step - 1), step)
        return step, decays[0]

    def _decay_at(self, step: jax.Array) -> jax.Array:
        """Return the decay of a step that averages, in double precision; with 64 bits enabled."""
        first, decay = self._first
        later = self._decay_over(step.astype(np.float64))
        return jnp.where(step < self.start_step, 0.0, jnp.where(step == np.uint32(first), decay, later))

    def _decay_over(self, step: jax.Array) -> jax.Array:
        """Return the decay of this step and those before it that it takes at once; see `Schedule.over`."""
        schedule, every = self.decay, self.every
        if not isinstance(schedule, schedules.Schedule):
            return jnp.asarray(schedules.compound(schedule, every), np.float64)
        if every == 1 or isinstance(schedule, _CLOSED):
            found = schedule.at_once(step, every, jnp)
        else:
            begin = step - (every - 1)

            def times(i: jax.Array, product: jax.Array) -> Any:
                return product * schedule.at(begin + i, jnp)  # one by one, as `over` does

            found = jax.lax.fori_loop(0, every, times, jnp.ones((), np.float64))
            if schedule._limit is not None:
                at_limit = schedule.at(begin, jnp) == schedule._limit
                found = jnp.where(at_limit, schedules.compound(schedule._limit, every), found)
        decay: jax.Array = jnp.where((found >= 0.0) & (found <= 1.0), found, 1.0)
        return decay

    # --- arrays -----------------------------------------------------------------------------------

    def _started(self, value: Any, name: str) -> Any:
        """Return what is kept of a leaf at first."""
        kind = _kind(value)
        if kind == "carried":
            return _copied(value)
        value = jnp.asarray(value)
        if kind == "complex" and self.dtype is not None:
            raise TypeError(f"dtype must be None where values are complex, as params{name}, got {self.dtype}")
        if kind != "averaged":
            return jnp.array(value, value.dtype)
        own = np.dtype(value.dtype)
        dtype = average_type(own) if self.dtype is None else float_type(self.dtype)
        if (dtype.name, own.name) not in MIXES:
            raise TypeError(f"dtype must go with params{name}, which is {own}, got {dtype}")
        return jnp.array(value, dtype)

    def _next(self, average: jax.Array, value: jax.Array, move: "_Move", pair: int) -> jax.Array:
        """Return what is kept of a leaf after an update that averages."""
        kind = _kind(value)
        if kind == "copied":
            return jnp.copy(value)
        if kind == "complex":
            parts = (self._blend(part(average), part(value), move, pair) for part in (jnp.real, jnp.imag))
            return jax.lax.complex(*parts)
        return self._blend(average, value, move, pair)

    def _blend(self, average: jax.Array, value: jax.Array, move: "_Move", pair: int) -> jax.Array:
        dtype = average.dtype
        if move.clears is not None:
            average = jnp.where(move.clears, jnp.zeros((), dtype), average)
        blended = blend(average, value, move.weight, move.copies)
        if self.rounding == "stochastic" and dtype.itemsize == 2:
            return rounded_at_random(blended, dtype, (self.seed, move.step, pair))
        return blended.astype(dtype)


class _Move(NamedTuple):
    """What an update does to every average.

    Attributes:
        step: Its number.
        weight: One minus the decay, in double precision.
        copies: Whether the decay is 0.
        clears: Whether averages leave zero by it; None: they started at the values.
    """

    step: jax.Array
    weight: jax.Array
    copies: jax.Array
    clears: jax.Array | None


@partial(jax.jit, static_argnums=0, inline=True)
def _moved(
    config: ema, step: jax.Array, product: jax.Array | None, kept: list[jax.Array], values: list[jax.Array]
) -> tuple[jax.Array, jax.Array | None, list[jax.Array]]:
    """Return the state after one more update, as its parts."""
    step = step + np.uint32(1)

    def move(product: jax.Array | None, kept: list[jax.Array]) -> tuple[jax.Array | None, list[jax.Array]]:
        decay, clears = config._decay_at(step), None
        if product is not None:
            # XLA would multiply the decays of two updates first
            before = jax.lax.optimization_barrier(number_of(product))  # type: ignore[no-untyped-call]
            after = before * decay
            clears, product = (before == 1.0) & (after < 1.0), words_of(after)
        how = _Move(step, *_formula.weigh(decay), clears)
        pairs = _pairs_of(values)
        moved = [config._next(a, v, how, pair) for a, v, pair in zip(kept, values, pairs, strict=True)]
        return product, moved

    def skip(product: jax.Array | None, kept: list[jax.Array]) -> tuple[jax.Array | None, list[jax.Array]]:
        if config.start_step > 1:  # the first step has averaged
            return product, kept
        blank = step < config.every  # until something is averaged, copies follow
        return product, [
            jnp.where(blank, v, a) if _kind(v) == "copied" else a for a, v in zip(kept, values, strict=True)
        ]

    with jax.enable_x64(True):  # the weight is formed in float64
        if config.every == 1:
            return step, *move(product, kept)
        due = (step % np.uint32(config.every) == 0) | (step < config.start_step)
        return step, *jax.lax.cond(due, move, skip, product, kept)


@jax.jit
def _divided(averages: list[jax.Array], product: jax.Array) -> list[jax.Array]:
    """Return averages that started at zeros as they are shown."""
    with jax.enable_x64(True):
        number = number_of(product)
        divisor = jnp.where(number == 1.0, 1.0, 1.0 - number)

        def quotient(x: jax.Array) -> jax.Array:
            if _kind(x) == "complex":
                return jax.lax.complex(quotient(x.real), quotient(x.imag))
            wide = widened(x, np.dtype(compute_type(np.dtype(x.dtype))))
            # by one number XLA would not divide, but multiply by its inverse
            divisors = jnp.where(wide == wide, divisor.astype(wide.dtype), wide)  # noqa: PLR0124
            return (wide / divisors).astype(x.dtype)

        return [x if _kind(x) == "copied" else quotient(x) for x in averages]


# --- trees ----------------------------------------------------------------------------------------


def _flattened(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Return the leaves of a tree with their paths, and its structure."""
    leaves, structure = jax.tree.flatten_with_path(tree)
    return leaves, structure


def _kind(x: Any) -> Literal["averaged", "complex", "copied", "carried"]:
    """Return what becomes of a leaf."""
    if not isinstance(x, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        return "carried"
    dtype = jnp.result_type(x)
    if not isinstance(dtype, np.dtype):  # keys of random numbers
        return "carried"
    return "averaged" if dtype in FLOATS else "complex" if dtype.kind == "c" else "copied"


def _pairs_of(values: list[jax.Array]) -> list[int]:
    """Return of each array its place among those that are averaged."""
    averaged = [_kind(value) != "copied" for value in values]
    return [sum(averaged[:i]) for i in range(len(values))]


def _copied(x: Any) -> Any:
    return jnp.copy(x) if isinstance(x, jax.Array) else x


def _applied(parameter: Any, change: Any) -> Any:
    """Return a parameter after a step, as `optax.apply_updates` does."""
    return jnp.asarray(parameter + change).astype(jnp.asarray(parameter).dtype)


def _is_state(x: object) -> bool:
    return isinstance(x, State)


def _check_fits(average: Any, value: Any, name: str) -> None:
    """Raise as `ema.update` does unless a parameter goes with its average."""
    kind = _kind(average)
    if kind == "carried" and _kind(value) == "carried":
        return
    if kind != _kind(value):
        raise TypeError(f"params{name} must be {kind}, as it was at first, got {type(value).__name__}")
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != average.shape:
        raise ValueError(f"params{name} must have shape {average.shape}, got {shape}")
    pair = (average.dtype.name, dtype.name)
    if pair not in MIXES if kind == "averaged" else average.dtype != dtype:
        raise TypeError(
            f"params{name} must be of a type that goes with its average's {pair[0]}, got {pair[1]}"
        )


def _check_can_be_traced(schedule: schedules.Schedule, every: int) -> None:
    """Raise unless a schedule can be computed in a step.

    Raises:
        TypeError: It cannot.
        ValueError: It takes too many steps at once.
    """
    try:
        hash(schedule)
        with jax.enable_x64(True):
            jax.eval_shape(lambda step: schedule.at(step, jnp), np.ones((), np.float64))
    except Exception as error:
        raise TypeError(
            "decay must be a schedule that can be hashed, and whose method at takes tensors, got "
            f"{schedule!r}: {error}"
        ) from error
    if every > schedules.BLOCK and not isinstance(schedule, _CLOSED):
        raise ValueError(f"every must be at most {schedules.BLOCK} with {schedule!r}, got {every}")


_CLOSED = (schedules.constant, schedules.equal_weights, schedules.power)  # their products have a formula


def _name(path: tuple[Any, ...]) -> str:
    return str(jax.tree_util.keystr(path))


def _difference(kept: list[Any], values: list[Any], structure: Any, given: Any) -> str:
    """Say how two trees differ."""
    ours, theirs = ([_name(path) for path, _ in leaves] for leaves in (kept, values))
    missing, unknown = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if missing or unknown:
        return f"missing: {missing[:20]}, unknown: {unknown[:20]}"
    return f"it was {structure}, got {given}"
