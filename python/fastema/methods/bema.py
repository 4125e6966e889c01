"""BEMA: an exponential moving average and a correction of its lag (Block and Zhang 2025)."""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from .. import _arrays
from .._ema.count import Count
from .._ema.shown import Kept, Shown
from .._ema.tree import Buffers, Nested, Only
from .._types import AnyArray, as_number, check_count, check_share, float_type, shown
from ..checkpoint._replace import StrPath
from ._method import Method

_EMA, _LAST, _FIRST = range(3)  # the lists: the EMA, the values it took last, those it began with


class _Rule(NamedTuple):
    """When the average moves, how far, and how much of its lag is added; see `BEMA`."""

    every: int
    start_step: int
    ema_power: float
    bias_power: float
    lag: float
    multiplier: float
    min_decay: float
    several: bool = False

    def averages_at(self, step: int, clock: float) -> bool:  # noqa: ARG002 - each step is one of the clock's
        return step <= self.start_step or (step - self.start_step) % self.every == 0

    def decays_after(self, before: Count, clock: float) -> tuple[float, ...]:
        if before.step + 1 <= self.start_step:
            return 0.0, 0.0, 0.0
        weight = max(self._age(clock) ** -self.ema_power, self.min_decay)
        return 1.0 - weight, 0.0, 1.0

    def correction(self, clock: float) -> float:
        """Return what the way since the beginning is multiplied by in an average of this time."""
        return float(self._age(clock) ** -self.bias_power)

    def _age(self, clock: float) -> float:
        return self.lag + self.multiplier * max(clock, 1)


class _Corrected(Shown):
    """The EMA, and a share of the way from the first values to the last."""

    is_sparse = True

    def __init__(self, rule: _Rule) -> None:
        self._rule = rule

    def is_kept(self, k: int, count: Count) -> bool:  # noqa: ARG002 - there is one
        return not count.decays or count.decays[_FIRST] == 0.0  # the last update copied: there is no way yet

    def computed(self, k: int, kept: Kept, count: Count) -> list[AnyArray]:  # noqa: ARG002
        function = _corrected_by(self._rule.correction(count.averaged))
        lists = zip(kept(_EMA), kept(_LAST), kept(_FIRST), strict=True)
        return [_arrays.computed(function, arrays, _arrays.dtype_of(arrays[0])) for arrays in lists]

    def obstacle(self, k: int, count: Count) -> str:  # noqa: ARG002
        return (
            "module() computes with averages as they are kept, and those of fastema.BEMA are corrected when "
            "they are shown: use swapped(), or copy_to() into another model"
        )


def _corrected_by(share: float) -> Callable[[Iterator[np.ndarray]], np.ndarray]:
    def corrected(pieces: Iterator[np.ndarray]) -> np.ndarray:
        ema, last, first = pieces
        ema += share * (last - first)
        return ema

    return corrected


class BEMA(Method):
    """An exponential moving average that is corrected for its lag: BEMA.

    An average of weights follows them late, by as many steps as it looks back. BEMA adds a share of the way
    that they have gone since the beginning, which makes up for that, and still averages the noise away. Every
    `every` updates, at update t::

        ema += beta * (value - ema)                beta = (lag + multiplier * t) ** -ema_power
        average = ema + alpha * (value - first)    alpha = (lag + multiplier * t) ** -bias_power

    A. Block and C. Zhang 2025, "EMA Without the Lag", arXiv 2508.00180, algorithm 1; the averages of TRL's
    ``BEMACallback`` (``update_freq`` is `every`, ``update_after`` is `start_step`, ``min_ema_multiplier`` is
    `min_decay`). It was made for the finetuning of language models. ``python/docs/methods.md`` has more.

    All verbs are those of `EMA`. Three arrays are kept of each value: the EMA, the value that it took last,
    and the first one. The average is made of them when it is shown, in float64, and rounded once; a swap
    keeps the weights aside meanwhile.

    Args:
        values: As for `EMA`.
        every: Average at every so many updates only; between them averages stay as they are. The paper's phi.
        ema_power: From 0; 0 lets averages be the values. The paper's kappa.
        bias_power: From 0; large: no correction, 0: all of the way is added. The paper's eta.
        lag: From 0; how many updates older the training is taken for. The paper's rho.
        multiplier: From 0; how much older it is after each update. The paper's gamma. With `lag` at least 1.
        min_decay: From 0 to 1; the least beta, which the paper's code calls the decay factor.
        start_step: The update whose values are the first ones; up to it, an average is a copy. 0: the values
            as they are now. The paper's tau.
        dtype: Of the arrays: ``"float32"`` or ``"float64"``. None: float32 for 16-bit values, for others
            their own.
        buffers: As for `EMA`.
        device: As for `EMA`: ``"cpu"`` keeps all three in host memory.
        threads: As for `EMA`.
        memory: As for `EMA`: the path of a file to keep all three in.
        only: As for `EMA`.

    Raises:
        ImportError: As for `EMA`.
        TypeError: As for `EMA`.
        ValueError: As for `EMA`.

    Example:
        >>> import fastema, numpy as np
        >>> weights = {"w": np.zeros(2)}
        >>> bema = fastema.BEMA(weights, every=1)
        >>> for _ in range(4):
        ...     weights["w"] += 1.0  # a step of training
        ...     bema.update()
        >>> bema.averages["w"].round(3)  # an EMA of 2.098, and 14 ** -0.2 of the way
        array([4.458, 4.458])
    """

    _method = "BEMA"

    def __init__(
        self,
        values: Nested,
        *,
        every: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: float = 10,
        multiplier: float = 1.0,
        min_decay: float = 0.0,
        start_step: int = 0,
        dtype: DTypeLike | None = None,
        buffers: Buffers = "copy",
        device: Literal["cpu"] | None = None,
        threads: int = 0,
        memory: StrPath | None = None,
        only: Only | None = None,
    ) -> None:
        numbers = {"ema_power": ema_power, "bias_power": bias_power, "lag": lag, "multiplier": multiplier}
        own = {name: _check_number(number, name) for name, number in numbers.items()}
        own["min_decay"] = check_share(min_decay, "min_decay")
        if own["lag"] + own["multiplier"] < 1.0:
            raise ValueError(
                "lag and multiplier must add up to 1 or more, or averages overshoot, got "
                f"{lag!r} and {multiplier!r}"
            )
        kept = None if dtype is None else float_type(dtype)
        if kept is not None and kept.itemsize < 4:
            raise ValueError(f"dtype must be float32 or float64, which averages move in, got {kept}")
        rule = _Rule(
            check_count(every, "every", 1),
            check_count(start_step, "start_step"),
            own["ema_power"],
            own["bias_power"],
            own["lag"],
            own["multiplier"],
            own["min_decay"],
        )
        self._set_up(
            values,
            rule,
            _Corrected(rule),
            Count(0, 0, 0, (0.0,) * 3, (0.0,) * 3),
            own,
            dtype=kept,
            buffers=buffers,
            device=device,
            threads=threads,
            memory=memory,
            only=only,
        )


def _check_number(number: float, name: str) -> float:
    found = as_number(number, f"{name} must be a number from 0")
    if not 0.0 <= found < math.inf:
        raise ValueError(f"{name} must be from 0, and finite, got {shown(number)}")
    return float(found)
