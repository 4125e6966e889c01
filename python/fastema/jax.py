"""Averages as pure functions of JAX: inside of jit, beside the step or as part of an optimizer of optax.

`ema` has the clock, schedules, types and bits of `fastema.EMA`. The averages are a tree that a jitted step
takes and returns, so that they are donated, sharded and saved with the rest of the state; nothing is copied
to the host.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from . import schedules
from ._ema.count import Pace
from ._jax.decays import Decays, check_can_be_traced
from ._jax.moving import Rule, divided, moved
from ._jax.trees import Params, applied, check_fits, copied, difference, flattened, kind_of, name_of
from ._types import MIXES, Rounding, average_type, check_choice, check_count, float_type
from .ema import EMA

__all__ = ["State", "Transformation", "ema"]


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
            check_can_be_traced(self.decay, pace.every)
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
        leaves, structure = flattened(params)
        if not any(kind_of(x) != "carried" for _, x in leaves):
            raise ValueError(f"params must hold an array or more, got none in {type(params).__name__}")
        averages = structure.unflatten([self._started(x, name_of(path)) for path, x in leaves])
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
        kept, structure = flattened(state.averages)
        values, given = flattened(params)
        if structure != given:
            raise ValueError(
                f"params must be a tree as at first: {difference(kept, values, structure, given)}"
            )
        for (path, average), (_, value) in zip(kept, values, strict=True):
            check_fits(average, value, name_of(path))
        leaves = [value for _, value in values]
        places = [i for i, value in enumerate(leaves) if kind_of(value) != "carried"]
        step, product, after = moved(
            self._rule,
            state.step,
            state.product,
            [kept[i][1] for i in places],
            [jnp.asarray(leaves[i]) for i in places],
        )
        for place, average in zip(places, after, strict=True):
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
            named, structure = flattened(averages)
            leaves = [x for _, x in named]
            arrays = iter(divided([x for x in leaves if kind_of(x) != "carried"], product))
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
            return updates, self.update(state, jax.tree.map(applied, params, updates))

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
        averaged, decay = self._rule.decays.last(step)
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
        averaged, _ = self._rule.decays.last(ema.step)
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

    @cached_property
    def _rule(self) -> Rule:
        return Rule(Decays(self.decay, self.every, self.start_step), self.rounding, self.seed)

    def _started(self, value: Any, name: str) -> Any:
        """Return what is kept of a leaf at first."""
        kind = kind_of(value)
        if kind == "carried":
            return copied(value)
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


def _is_state(x: object) -> bool:
    return isinstance(x, State)
