"""Averages as pure functions of JAX: inside of jit, beside the step or as part of an optimizer of optax.

`ema` has the clock, schedules, types and bits of `fastema.EMA`. The averages are a tree that a jitted step
takes and returns, so that they are donated, sharded and saved with the rest of the state; nothing is copied
to the host.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from . import schedules
from ._ema.count import Count, Pace, check_span
from ._formula_jax import words_of
from ._jax.converting import of_state_dict, to_state_dict
from ._jax.decays import Decay, Decays, check_can_be_traced
from ._jax.moving import Arrays, Rounding, Rule, divided, moved
from ._jax.trees import Params, applied, check_fits, copied, difference, flattened, kind_of, name_of
from ._types import MIXES, average_type, check_choice, check_count, float_type
from .ema import EMA

__all__ = ["State", "Transformation", "ema"]


class State(NamedTuple):
    """How far averaging has come, and the averages: a tree of JAX, to be passed through jit and saved.

    What JAX would not hold unless 64 bits are enabled is kept as the two words of a float64.

    Attributes:
        step: How many updates were seen: an unsigned integer of 32 bits.
        averages: The averages as they are kept, shaped as the parameters. With a sequence of decays, a tuple
            of such trees. Read them by `ema.averages`.
        products: With ``initial="zeros"``, the product of all decays used of each average. Else None.
        times: With ``clock=True``, the clock, the time until which values were averaged, and the decays last
            used (NaN: none so far). Else None.
        carries: With ``rounding="compensated"``, what rounding lost of the averages, shaped as these, with
            None in the place of what is not averaged. Else None.
    """

    step: jax.Array
    averages: Params
    products: jax.Array | None
    times: jax.Array | None
    carries: Params | None

    @property
    def clock(self) -> float:
        """How much time has passed: the sum of all spans; outside of jit."""
        return int(self.step) if self.times is None else _numbers(self.times)[0]


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
    would fuse the product and the sum. (But for subnormal numbers: "Bits, not tolerances" in
    python/docs/averages.md.)

    Floating arrays are averaged, complex ones by their parts; other arrays (counters, masks) are copied at
    each update that averages, and keys of random numbers and what is no array are carried along. Two with the
    same arguments are equal and have one hash: they can be static arguments of jit.

    Args:
        decay: From 0 to 1, towards 1 is slower; or one of `fastema.schedules`, or your own subclass of
            `schedules.Schedule`, whose `at` is computed in the step. A decay of it that is outside of 0 to 1
            leaves the averages as they are. A sequence of either: as many averages (`averages_of`).
        every: As for `fastema.EMA`. On the other steps parameters are not read.
        start_step: As for `fastema.EMA`.
        initial: As for `fastema.EMA`: ``"values"`` or ``"zeros"``.
        dtype: As for `fastema.EMA`. float64 needs JAX's 64 bits enabled.
        rounding: As for `fastema.EMA`; with ``"compensated"``, averages are float32 or bfloat16. The random
            bits of ``"stochastic"`` go by the place of an array in ``jax.tree.leaves(params)``, which has
            dictionaries sorted, and of an element in the whole array, however it is sharded. `fastema.EMA`
            has the same bits where it was given dictionaries that are sorted, no array twice, and nothing
            sharded.
        seed: Of stochastic rounding.
        clock: Whether there is a clock, which goes by the spans that updates are given. Schedules of rising
            decays then multiply those of all steps of a span one by one.

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

    decay: Decay | Sequence[Decay]
    _: KW_ONLY
    every: int = 1
    start_step: int = 0
    initial: Literal["values", "zeros"] = "values"
    dtype: DTypeLike | None = None
    rounding: Rounding = "nearest"
    seed: int = 0
    clock: bool = False

    def __post_init__(self) -> None:
        check_choice(self.initial, "initial", ("values", "zeros"))
        check_choice(self.rounding, "rounding", ("nearest", "stochastic", "compensated"))
        check_choice(self.clock, "clock", (False, True))
        pace = Pace.of(self.decay, self.every, self.start_step)
        for decay in pace.decays:
            if isinstance(decay, schedules.Schedule):
                check_can_be_traced(decay, pace.every)
            elif callable(decay):
                raise TypeError(
                    "decay must be a number or a schedule of fastema.schedules, or a subclass of "
                    f"schedules.Schedule, whose method at can be traced; got {decay!r}"
                )
        dtype = None if self.dtype is None else float_type(self.dtype).name
        if dtype == "float64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
            raise ValueError("dtype must not be float64 unless JAX has 64 bits enabled (jax_enable_x64)")
        checked = {
            "decay": pace.decays if pace.several else pace.decays[0],
            "every": pace.every,
            "start_step": pace.start_step,
            "dtype": dtype,
            "seed": check_count(self.seed, "seed"),
            "clock": bool(self.clock),
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
        leaves, structure = flattened(params)
        if not any(kind_of(x) != "carried" for _, x in leaves):
            raise ValueError(f"params must hold an array or more, got none in {type(params).__name__}")
        averages = [
            structure.unflatten([self._started(x, name_of(path)) for path, x in leaves]) for _ in self._decays
        ]
        carries = [jax.tree.map(self._carry, tree) for tree in averages if self.rounding == "compensated"]
        decays = len(self._decays)
        products = _words([1.0] * decays) if self.initial == "zeros" else None
        times = _words([0.0, 0.0, *[np.nan] * decays]) if self.clock else None
        return self._state(jnp.zeros((), np.uint32), averages, products, times, carries)

    def update(self, state: State, params: Params, *, span: float | jax.Array = 1) -> State:
        """Count a step of training, and return the state with the averages moved towards the parameters.

        Args:
            state: What `init` or `update` returned. It may be donated.
            params: The parameters after the step, shaped as those of `init`.
            span: As for `EMA.update`, where there is a clock: how much time passes. A number, or a scalar
                that is computed in the step; where such a one is not above 0 and finite, no time passes and
                averages stay as they are.

        Raises:
            TypeError: A parameter has another type than at first; or `span` is no number.
            ValueError: The tree or a parameter has another shape than at first; the state is another `ema`'s;
                or `span` is not above 0, or is given where there is no clock.

        Example:
            >>> import fastema.jax, jax.numpy as jnp
            >>> average = fastema.jax.ema(fastema.schedules.half_life(64), clock=True)  # in samples
            >>> state = average.init({"w": jnp.zeros(2)})
            >>> state = average.update(state, {"w": jnp.ones(2)}, span=128)
            >>> average.averages(state), state.clock
            ({'w': Array([0.75, 0.75], dtype=float32)}, 128)
        """
        trees, carries = self._trees(state)
        time = self._time(span)
        kept, structure = flattened(trees[0])
        values, given = flattened(params)
        if structure != given:
            raise ValueError(
                f"params must be a tree as at first: {difference(kept, values, structure, given)}"
            )
        for (path, average), (_, value) in zip(kept, values, strict=True):
            check_fits(average, value, name_of(path))
        places = [i for i, (_, value) in enumerate(values) if kind_of(value) != "carried"]

        def arrays(trees: Sequence[Params]) -> list[list[Any]]:
            return [[leaves[i] for i in places] for leaves in map(structure.flatten_up_to, trees)]

        def filled(arrays: list[Any], others: list[Any]) -> Params:
            leaves = list(others)
            for place, array in zip(places, arrays, strict=True):
                leaves[place] = array
            return structure.unflatten(leaves)

        before = Arrays(state.step, state.products, state.times, arrays(trees), arrays(carries))
        after = moved(self._rule, before, [jnp.asarray(values[i][1]) for i in places], time)
        others = [
            [copied(value) if i not in places else None for i, (_, value) in enumerate(values)] for _ in trees
        ]
        averages = [filled(new, kept) for new, kept in zip(after.averages, others, strict=True)]
        nothing = [None] * len(values)
        carries = [filled(new, nothing) for new in after.carries]
        return self._state(after.step, averages, after.products, after.times, carries)

    def averages(self, state: Any, like: Params | None = None) -> Params:
        """Return the averages, shaped as the parameters, in arrays of their own; the first of several.

        Before the first update that averages (the k-th with ``every=k``) they are what they started at.

        Args:
            state: What `update` returned, or whatever holds it, as the state of an optimizer.
            like: A tree whose types they are to have, as the parameters. None: as they are kept.

        Raises:
            ValueError: There is no state of averages within `state`, or there are several.
        """
        return self.averages_of(state, 0, like)

    def averages_of(self, state: Any, k: int, like: Params | None = None) -> Params:
        """Return the averages of the k-th decay, as `averages`.

        Raises:
            IndexError: There is no such decay.
            ValueError: As for `averages`.
        """
        found = [x for x in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(x)]
        if len(found) != 1:
            raise ValueError(f"state must hold one state of averages, got {len(found)}")
        if not 0 <= k < len(self._decays):
            raise IndexError(f"k must be from 0 to {len(self._decays) - 1}, got {k}")
        averages, products = self._trees(found[0])[0][k], found[0].products
        if products is not None:
            named, structure = flattened(averages)
            leaves = [x for _, x in named]
            arrays = iter(divided([x for x in leaves if kind_of(x) != "carried"], products, k))
            averages = structure.unflatten([x if kind_of(x) == "carried" else next(arrays) for x in leaves])
        if like is None:
            return jax.tree.map(copied, averages)
        return jax.tree.map(
            lambda x, y: copied(x) if kind_of(x) == "carried" else jnp.array(x, y.dtype), averages, like
        )

    def as_optax(self) -> Transformation:
        """Return this as a transformation of optax that averages the new parameters and changes no update.

        It must be the last of an `optax.chain`. Its state is in that of the chain, where `averages` finds it.
        Steps that `optax.apply_if_finite` or `optax.MultiSteps` around the chain leave out are not counted.
        Where there is a clock, ``optax.GradientTransformationExtraArgs(*average.as_optax())`` in the chain
        takes the `span` that ``optimizer.update(gradients, state, params, span=n)`` is given.

        Example:
            The step of an optimizer averages what it makes::

                average = fastema.jax.ema(0.999)
                optimizer = optax.chain(optax.adam(1e-3), average.as_optax())
                state = optimizer.init(params)
                updates, state = optimizer.update(gradients, state, params)
                params = optax.apply_updates(params, updates)
                averages = average.averages(state)
        """

        def update(
            updates: Params,
            state: State,
            params: Params | None = None,
            *,
            span: float | jax.Array = 1,
            **_: Any,  # what is for others in the chain
        ) -> tuple[Params, State]:
            if params is None:
                raise ValueError("params must be given to the optimizer's update: they are what is averaged")
            return updates, self.update(state, jax.tree.map(applied, params, updates), span=span)

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
        trees, carries = self._trees(state)
        step, zeros = int(state.step), [0.0] * len(trees)
        products = tuple(zeros if state.products is None else _numbers(state.products))
        if state.times is None:
            count = Count(step, step, *self._rule.decays.last(step), products)
        else:
            clock, averaged, *last = _numbers(state.times)
            count = Count(step, clock, averaged, () if np.isnan(last).any() else tuple(last), products)
        return to_state_dict(self._ema(trees[0]), trees, carries, count, cast(str | None, self.dtype))

    def load_state_dict(self, state: Mapping[str, Any], params: Params) -> State:
        """Return the state that goes on where an EMA of the same parameters was; outside of jit.

        Args:
            state: What `EMA.state_dict` returned.
            params: As for `init`.

        Raises:
            KeyError: As for `EMA.load_state_dict`.
            TypeError: As for `EMA.load_state_dict`.
            ValueError: As for `EMA.load_state_dict`; or averages started otherwise; or, without a clock, the
                EMA's did not go by one at each step, or averages were left out where values were not finite.
        """
        first = self.init(params)
        trees, carries = self._trees(first)
        trees, carries, count = of_state_dict(self._ema(trees[0]), carries, state)
        averaged, _ = self._rule.decays.last(count.step)
        if count.step >= 2**32:
            raise ValueError(f"state must be of fewer than 2**32 steps, got {count.step}")
        if not self.clock and (count.clock != count.step or count.averaged != averaged):
            raise ValueError(
                "state must have counted each update as one, with the same every and start_step, and have "
                f"averaged last at step {averaged}, unless there is a clock (clock=True); its clock is "
                f"{count.clock} at step {count.step}"
            )
        if any(count.products) and first.products is None:
            raise ValueError("initial must be 'zeros' for averages that started so")
        products = None if first.products is None else _words(count.products)
        last = count.decays or [np.nan] * len(trees)
        times = _words([count.clock, count.averaged, *last]) if self.clock else None
        return self._state(jnp.asarray(count.step, np.uint32), trees, products, times, carries)

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

    # --- the parts of a state ---------------------------------------------------------------------

    @property
    def _decays(self) -> tuple[Decay, ...]:
        return self.decay if isinstance(self.decay, tuple) else (cast(Decay, self.decay),)

    @cached_property
    def _rule(self) -> Rule:
        return Rule(Decays(self._decays, self.every, self.start_step), self.rounding, self.seed)

    def _state(
        self,
        step: jax.Array,
        averages: list[Params],
        products: jax.Array | None,
        times: jax.Array | None,
        carries: list[Params],
    ) -> State:
        if isinstance(self.decay, tuple):
            return State(step, tuple(averages), products, times, tuple(carries) or None)
        return State(step, averages[0], products, times, carries[0] if carries else None)

    def _trees(self, state: State) -> tuple[Sequence[Params], Sequence[Params]]:
        """Return the trees of averages, and of carries if there are any, of each decay.

        Raises:
            ValueError: The state is one of an `ema` with other arguments.
        """
        several = isinstance(self.decay, tuple)
        averages = state.averages if several else (state.averages,)
        parts = {
            "products": (state.products is not None, self.initial == "zeros"),
            "times": (state.times is not None, self.clock),
            "carries": (state.carries is not None, self.rounding == "compensated"),
        }
        wrong = [name for name, (has, needs) in parts.items() if has != needs]
        if wrong or (several and (not isinstance(averages, tuple) or len(averages) != len(self._decays))):
            raise ValueError(
                f"state must be one of {self!r}, which has {len(self._decays)} averages of each parameter; "
                f"it has other {', '.join(wrong) or 'averages'}"
            )
        carries = () if state.carries is None else state.carries if several else (state.carries,)
        return averages, carries

    def _time(self, span: Any) -> jax.Array | None:
        """Return a span as the words of a float64; None where there is no clock. Raises as `update`."""
        traced = isinstance(span, jax.core.Tracer)
        if not self.clock:
            if traced or span != 1:
                raise ValueError(
                    f"span must be 1 unless there is a clock: ema(..., clock=True); got {span!r}"
                )
            return None
        if not traced:
            return _words([check_span(span)])
        if span.shape != () or not jnp.issubdtype(span.dtype, jnp.number) or jnp.iscomplexobj(span):
            raise TypeError(f"span must be a real number, got {span.dtype} of shape {span.shape}")
        with jax.enable_x64(True):
            return words_of(span.astype(np.float64))

    def _carry(self, average: Any) -> jax.Array | None:
        """Return what rounding has lost of an average at first; None of what is not averaged."""
        if kind_of(average) not in ("averaged", "complex"):
            return None
        return jnp.zeros(average.shape, np.int16 if average.dtype == jnp.bfloat16 else average.dtype)

    def _started(self, value: Any, name: str) -> Any:
        """Return what is kept of a leaf at first."""
        kind = kind_of(value)
        if kind == "carried":
            return copied(value)
        value = jnp.asarray(value)
        if kind == "complex" and self.dtype is not None:
            raise TypeError(f"dtype must be None where values are complex, as params{name}, got {self.dtype}")
        if kind == "copied":
            return jnp.array(value, value.dtype)
        own = np.dtype(value.dtype)
        dtype = (
            own if kind == "complex" else average_type(own) if self.dtype is None else float_type(self.dtype)
        )
        if kind != "complex" and (dtype.name, own.name) not in MIXES:
            raise TypeError(f"dtype must go with params{name}, which is {own}, got {dtype}")
        if self.rounding == "compensated" and dtype.name not in ("float32", "bfloat16", "complex64"):
            raise TypeError(
                f"rounding must not be 'compensated' where averages are {dtype}, as that of params{name}: "
                "only float32 and bfloat16 ones can be"
            )
        return jnp.array(value, dtype)


def _words(numbers: Sequence[float]) -> jax.Array:
    """Return float64s as two words each, which JAX holds also without 64 bits."""
    return jnp.asarray(np.array(numbers, np.float64).view(np.uint32))


def _numbers(words: jax.Array) -> list[float]:
    """Return what `_words` was given; an int where it is whole."""
    numbers = np.asarray(words).view(np.float64).tolist()
    return [int(x) if np.isfinite(x) and x % 1 == 0 else x for x in numbers]


def _is_state(x: object) -> bool:
    return isinstance(x, State)
