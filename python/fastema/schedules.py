"""Decay schedules: callables from a step to the decay of that step.

A step counts the updates seen, the present one included: the first update is step 1. Schedules are plain,
picklable values: two with the same arguments are equal. A decay of 0 copies the value. Each is written once,
for plain numbers and for the tensors of every array library.

What one update takes at once may be more than a step: every tenth step, the samples of a batch, a weight. Its
decay is then the product of the decays of all steps in that span, which `Schedule.over` knows.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ._types import Decay, as_number, check_share, shown

__all__ = [
    "Schedule",
    "compound",
    "constant",
    "cosine",
    "dynamic",
    "equal_weights",
    "growing",
    "half_life",
    "linear",
    "over",
    "power",
    "ramp",
    "warmup",
]


_Scalar = Any  # a number, or a tensor of the array library that computes


class _Library(Protocol):
    """What a schedule takes from an array library: numpy, tensorflow and jax.numpy have it."""

    def cos(self, x: _Scalar, /) -> _Scalar: ...
    def exp(self, x: _Scalar, /) -> _Scalar: ...
    def maximum(self, x: _Scalar, y: _Scalar, /) -> _Scalar: ...
    def minimum(self, x: _Scalar, y: _Scalar, /) -> _Scalar: ...
    def where(self, condition: _Scalar, x: _Scalar, y: _Scalar, /) -> _Scalar: ...


class _Numbers:
    """The library of plain numbers: NumPy's functions take microseconds for one."""

    cos = staticmethod(np.cos)
    exp = staticmethod(np.exp)  # other bits than those of math
    maximum = staticmethod(max)
    minimum = staticmethod(min)

    @staticmethod
    def where(condition: bool, x: float, y: float) -> float:
        return x if condition else y


class Schedule(ABC):
    """A decay that depends on nothing but the step."""

    _limit: float | None = None  # what the decay stays at, once it is there

    def __call__(self, step: int) -> float:
        """Return the decay of this step."""
        return float(self.at(step, _Numbers))

    def over(self, t0: float, t1: float) -> float:
        """Return the decay of one update that takes the whole span from `t0` to `t1` at once.

        It is the product of the decays of all steps in between: of 3, 4 and 5 for ``over(2, 5)``. So spans
        add up, ``over(a, b) * over(b, c) == over(a, c)``, and one update over a span in which the value
        stands still does what an update at each of its steps would do. `constant`, `equal_weights` and
        `power` know the product between any two numbers; for others, only whole steps count.

        Args:
            t0: Where the update before ended; 0 or more, in steps.
            t1: Where this one ends.

        Returns:
            From 0, where the span contains a step that copies, to 1, where it contains none.

        Raises:
            ValueError: The span is not from 0 or more upwards, or not finite.

        Example:
            >>> from fastema import schedules
            >>> schedule = schedules.dynamic(0.99)
            >>> round(schedule.over(2, 5), 6), round(schedule(3) * schedule(4) * schedule(5), 6)
            (0.043956, 0.043956)
            >>> schedules.equal_weights().over(30, 40)  # ten of forty values are new
            0.75
        """
        if not 0 <= t0 <= t1 < math.inf:
            raise ValueError(f"t0 and t1 must be finite and 0 <= t0 <= t1, got {t0!r} and {t1!r}")
        if t0 == t1:
            return 1.0
        return self(int(t1)) if t1 == t0 + 1 == int(t1) else float(self._over(t0, t1))

    def _over(self, t0: float, t1: float) -> float:
        product, end = 1.0, math.floor(t1) + 1
        for begin in range(math.floor(t0) + 1, end, BLOCK):
            if product == 0.0:
                break
            if self(begin) == self._limit:
                return product * float(compound(self._limit, end - begin))
            decays = self.at(np.arange(begin, min(begin + BLOCK, end), dtype=float), np)
            product = math.prod(decays.tolist(), start=product)  # one by one, as on a CUDA device
        return product

    def at_once(self, step: _Scalar, steps: int, xp: _Library) -> _Scalar:
        """Return the decay of one update that takes this step and those before it at once; see `over`.

        Args:
            step: A tensor of float64.
            steps: How many; the same at every call of what is traced.
            xp: As for `at`.
        """
        if steps == 1:
            return self.at(step, xp)
        return _product(self.at(step - np.arange(steps - 1.0, -1.0, -1.0), xp))

    @abstractmethod
    def at(self, step: _Scalar, xp: _Library) -> _Scalar:
        """Return the decay of this step, computed with an array library.

        Args:
            step: A number, or a tensor of float64.
            xp: The library, numpy, tensorflow or jax.numpy: its `maximum`, `minimum`, `where`, `exp`, `cos`.
        """


def _take_numbers(schedule: Schedule) -> None:
    """Have a schedule hold its numbers as Python's own, which JSON can hold; raises as `as_number`."""
    for name, number in list(vars(schedule).items()):
        object.__setattr__(schedule, name, as_number(number, f"{name} must be a number"))


def _check_positive(schedule: Schedule, *names: str) -> None:
    for name in names:
        if not 0.0 < getattr(schedule, name) < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {getattr(schedule, name)!r}")


class _Started(Schedule):
    """A decay that is 0, so that averages are copies, before its start, and goes by the steps since then."""

    start_step: int

    def __post_init__(self) -> None:
        _take_numbers(self)

    def at(self, step: _Scalar, xp: _Library) -> _Scalar:
        # tensors come first: TensorFlow takes the others' type from them
        k = xp.maximum(step - self.start_step, 0)
        return xp.where(step >= self.start_step, self._after(k, xp), 0.0)

    @abstractmethod
    def _after(self, k: _Scalar, xp: _Library) -> _Scalar:
        """Return the decay `k` steps after the start."""


class _Limited(Schedule):
    """A decay that never exceeds a given one."""

    decay: float

    @property
    def _limit(self) -> float:  # type: ignore[override] # a value of each schedule here
        return self.decay

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", check_share(self.decay, "decay"))
        _take_numbers(self)


@dataclass(frozen=True)
class constant(_Limited, _Started):  # noqa: N801 - used as a function
    """The same decay at every step from the start on; 0, a copy, before.

    Args:
        decay: From 0 to 1.
        start_step: The first step that averages.

    Example:
        >>> from fastema import schedules
        >>> schedules.constant(0.99)(7)
        0.99
    """

    decay: float
    start_step: int = 0

    def _after(self, k: _Scalar, xp: _Library) -> _Scalar:
        return xp.minimum(k + 1.0, self.decay)  # a tensor where k is one

    def _over(self, t0: float, t1: float) -> float:
        if t0 < self.start_step - 1:  # the first step in it copies
            return 0.0
        span = t1 - t0
        return float(compound(self.decay, int(span))) if span == int(span) else self.decay**span

    def at_once(self, step: _Scalar, steps: int, xp: _Library) -> _Scalar:  # noqa: D102 - as of every schedule
        return replace(self, decay=compound(self.decay, steps)).at(step - (steps - 1), xp)


@dataclass(frozen=True)
class dynamic(_Limited, _Started):  # noqa: N801 - used as a function
    """A decay that rises with the number of updates: ``min(decay, (1 + k) / (width + k))``.

    Here ``k = step - start_step``; before the start it is 0, so that the average is a copy. With a width of
    10 this is the schedule of TensorFlow Model Garden's ``ExponentialMovingAverage`` (``dynamic_decay=True``)
    and of ``tf.compat.v1.train.ExponentialMovingAverage`` (``num_updates``), in integers and float64. d2go
    leaves the width to the user, as this does.

    Args:
        decay: From 0 to 1; the limit.
        start_step: The first step that averages.
        width: At least 1; larger rises later, and 1 is the limit at once.

    Example:
        >>> from fastema import schedules
        >>> schedule = schedules.dynamic(0.99, start_step=10)
        >>> schedule(9), schedule(10), schedule(28), schedule(10_000)
        (0.0, 0.1, 0.6785714285714286, 0.99)
    """

    decay: float
    start_step: int = 0
    width: float = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1.0 <= self.width < math.inf:
            raise ValueError(f"width must be at least 1 and finite, got {self.width!r}")

    def _after(self, k: _Scalar, xp: _Library) -> _Scalar:
        return xp.minimum((1 + k) / (self.width + k), self.decay)


@dataclass(frozen=True)
class warmup(_Limited, _Started):  # noqa: N801 - used as a function
    """A decay that rises as a power of the number of updates: ``1 - (1 + s / gamma) ** -power``.

    Here ``s = step - start_step - 1``; while it is not above 0 the decay is 0, so that the average is a
    copy. The rest is held between `min_decay` and `decay`. This is the warm-up of timm's ``ModelEmaV3``
    (``use_warmup=True``), diffusers' ``EMAModel`` (``use_ema_warmup=True``) and lucidrains' ``EMA``, after
    K. Crowson: with a power of 2/3 it reaches .999 at step 31,600 and .9999 at step 1,000,000, with one
    of 3/4 at steps 10,000 and 215,400.

    Args:
        decay: From 0 to 1; the limit.
        gamma: Above 0, in updates; larger rises later. ``inv_gamma`` of diffusers and lucidrains.
        power: Above 0; larger rises faster.
        start_step: Values are copied up to the step after it. Theirs is called ``update_after_step``.
        min_decay: From 0 to `decay`; once averaging has begun.

    Example:
        >>> from fastema import schedules
        >>> schedule = schedules.warmup(0.9999, power=0.75)
        >>> [round(schedule(step), 4) for step in (1, 2, 10, 10_000, 1_000_000)]
        [0.0, 0.4054, 0.8222, 0.999, 0.9999]
    """

    decay: float
    gamma: float = 1.0
    power: float = 2 / 3
    start_step: int = 0
    min_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "gamma", "power")
        if not 0.0 <= self.min_decay <= self.decay:
            raise ValueError(f"min_decay must be from 0 to decay, got {self.min_decay!r} and {self.decay!r}")

    def _after(self, k: _Scalar, xp: _Library) -> _Scalar:
        s = xp.maximum(k - 1, 0)
        gamma = self.gamma + 0.0 * s  # no constant: XLA would multiply by its inverse
        rising = 1.0 - (1.0 + s / gamma) ** -self.power
        return xp.where(s > 0, xp.maximum(xp.minimum(rising, self.decay), self.min_decay), 0.0)


@dataclass(frozen=True)
class equal_weights(_Started):  # noqa: N801 - used as a function
    """The mean of all values from the start on, each with the same weight: ``k / (k + 1)``.

    Here ``k = step - start_step``; at the start and before, the average is a copy. This is stochastic
    weight averaging (Izmailov et al. 2018), torch's ``AveragedModel`` with its default.

    Args:
        start_step: From 1; the first step whose value belongs to the mean.

    Example:
        >>> from fastema import schedules
        >>> [schedules.equal_weights()(step) for step in (1, 2, 3, 4)]
        [0.0, 0.5, 0.6666666666666666, 0.75]
    """

    start_step: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start_step >= 1:
            raise ValueError(f"start_step must be at least 1, the first step, got {self.start_step!r}")

    def _after(self, k: _Scalar, xp: _Library) -> _Scalar:  # noqa: ARG002 - numbers and tensors divide alike
        return k / (k + 1)

    def _over(self, t0: float, t1: float) -> float:
        before = self.start_step - 1
        return max(t0 - before, 0) / (t1 - before) if t1 > before else 0.0

    def at_once(self, step: _Scalar, steps: int, xp: _Library) -> _Scalar:  # noqa: D102 - as of every schedule
        k = step - (self.start_step - 1)
        return xp.maximum(k - steps, 0) / xp.maximum(k, 1)


@dataclass(frozen=True)
class ramp(_Limited):  # noqa: N801 - used as a function
    """A decay that rises to its limit by an exponential: ``decay * (1 - exp(-step / updates))``.

    The schedule of the YOLO family (``ModelEMA`` of YOLOv5 to YOLO11 with a ``tau`` of 2000, YOLOX, RT-DETR):
    it is at 63 % of `decay` after `updates` steps, and at 99 % after 4.6 times as many.

    Args:
        decay: From 0 to 1; the limit.
        updates: Above 0; larger rises later.

    Example:
        >>> from fastema import schedules
        >>> [round(schedules.ramp(0.9999)(step), 4) for step in (1, 2000, 20_000)]
        [0.0005, 0.6321, 0.9999]
    """

    decay: float
    updates: float = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "updates")

    def at(self, step: _Scalar, xp: _Library) -> _Scalar:  # noqa: D102 - as of every schedule
        updates = self.updates + 0.0 * step  # as in warmup
        return self.decay * (1.0 - xp.exp(-step / updates))


@dataclass(frozen=True)
class _Towards(Schedule):
    """A decay on its way from one to another, where it stays."""

    start: float
    end: float
    updates: float

    @property
    def _limit(self) -> float:  # type: ignore[override] # a value of each schedule here
        return self.end

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            object.__setattr__(self, name, check_share(getattr(self, name), name))
        _take_numbers(self)
        _check_positive(self, "updates")

    def at(self, step: _Scalar, xp: _Library) -> _Scalar:
        updates = self.updates + 0.0 * step  # as in warmup
        left = self._left(xp.minimum(step, self.updates) / updates, xp)
        return self.end - xp.maximum((self.end - self.start) * left, -1.0)  # XLA would fuse a bare product

    @abstractmethod
    def _left(self, done: _Scalar, xp: _Library) -> _Scalar:
        """Return which share of the way is left where a share of the updates is done; 0 after all."""


class cosine(_Towards):  # noqa: N801 - used as a function
    """A decay that goes from `start` to `end` along half a cosine, and stays there.

    ``end - (end - start) * (cos(pi * step / updates) + 1) / 2``. Towards 1 it is the momentum of the teachers
    of BYOL (Grill et al. 2020, from 0.996), DINO, iBOT and MoCo v3, where the first step is 0.

    Args:
        start: From 0 to 1; the decay before the first step.
        end: From 0 to 1; the decay of step `updates` and all later ones.
        updates: Above 0; the steps of the whole training, as a rule.

    Example:
        >>> from fastema import schedules
        >>> [round(schedules.cosine(0.996, 1.0, 1000)(step), 6) for step in (1, 500, 1000, 2000)]
        [0.996, 0.998, 1.0, 1.0]
    """

    def _left(self, done: _Scalar, xp: _Library) -> _Scalar:
        return (xp.cos(math.pi * done) + 1.0) / 2.0


class linear(_Towards):  # noqa: N801 - used as a function
    """A decay that goes from `start` to `end` in equal steps, and stays there.

    The momentum of the teachers of I-JEPA (Assran et al. 2023, from 0.996 to 1), V-JEPA and data2vec, where
    the first step is 0.

    Args:
        start: From 0 to 1; the decay before the first step.
        end: From 0 to 1; the decay of step `updates` and all later ones.
        updates: Above 0.

    Example:
        >>> from fastema import schedules
        >>> [round(schedules.linear(0.99, 1.0, 1000)(step), 6) for step in (1, 500, 1000, 2000)]
        [0.99001, 0.995, 1.0, 1.0]
    """

    def _left(self, done: _Scalar, xp: _Library) -> _Scalar:  # noqa: ARG002 - numbers and tensors subtract alike
        return 1.0 - done


@dataclass(frozen=True)
class growing(Schedule):  # noqa: N801 - used as a function
    """A decay whose half-life is a fraction of the training so far, up to a limit.

    ``0.5 ** (1 / min(half_life, fraction * step))``: the ramp-up of StyleGAN2-ADA and EDM, whose half-life is
    the lesser of ``ema_kimg`` and 5 % of the images seen. Their clock counts images: give ``span=batch`` to
    `EMA.update`. Without a limit it is close to ``power``, with ``gamma + 1 = log(2) / fraction``.

    Args:
        fraction: Above 0; of the steps so far, 0.05 as a rule.
        half_life: Above 0, in steps; the limit.

    Example:
        >>> from fastema import schedules
        >>> [round(schedules.growing(0.05, 500)(step), 4) for step in (1, 100, 10_000, 20_000)]
        [0.0, 0.8706, 0.9986, 0.9986]
    """

    fraction: float
    half_life: float = math.inf

    @property
    def _limit(self) -> float:  # type: ignore[override] # a value of each schedule here
        return float(0.5 ** (1.0 / self.half_life))

    def __post_init__(self) -> None:
        _take_numbers(self)
        _check_positive(self, "fraction")
        if not self.half_life > 0.0:
            raise ValueError(f"half_life must be above 0, got {self.half_life!r}")

    def at(self, step: _Scalar, xp: _Library) -> _Scalar:  # noqa: D102 - as of every schedule
        return 0.5 ** (1.0 / xp.minimum(self.fraction * xp.maximum(step, 1), self.half_life))

    def _over(self, t0: float, t1: float) -> float:
        end = math.floor(t1)
        first = min(math.floor(t0) + BLOCK, end)
        grown = max(first, math.ceil(min(self.half_life / self.fraction, end + 1)) - 1)
        harmonic = 0.0  # the sum of 1 / step while it grows, by Euler and Maclaurin: the next term is 1e-18
        if grown > first:
            harmonic = math.log(grown / first) + (1 / grown - 1 / first) / 2
            harmonic -= (1 / grown**2 - 1 / first**2) / 12
        halvings = harmonic / self.fraction + (end - grown) / self.half_life
        return super()._over(t0, min(t1, first)) * float(0.5**halvings)


def half_life(updates: float) -> constant:
    """Return the constant decay that halves the weight of a value in so many updates.

    Args:
        updates: Above 0.

    Example:
        >>> from fastema import schedules
        >>> schedules.half_life(1)
        constant(decay=0.5, start_step=0)
        >>> round(schedules.half_life(1000)(1) ** 1000, 12)
        0.5
    """
    number = as_number(updates, "updates must be a number above 0")
    if not 0.0 < number < math.inf:
        raise ValueError(f"updates must be above 0 and finite, got {shown(updates)}")
    return constant(0.5 ** (1.0 / number))


@dataclass(frozen=True)
class power(Schedule):  # noqa: N801 - used as a function
    """The decay ``(1 - 1 / step) ** (gamma + 1)``, whose window grows with the training.

    At step t a value of step s weighs in proportion to ``s ** gamma``, so that the shape of the average is
    the same at every t, and its start is forgotten. Averages of this kind can be combined into others
    afterwards: `fastema.posthoc`. Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
    Diffusion Models" (EDM2), section 3.1.

    Args:
        sigma_rel: The standard deviation of the steps' weights as a share of the training so far; 0.05
            and 0.10 are usual. Above 0, at most ``12 ** -0.5``, which weighs all steps alike.

    Attributes:
        gamma: The exponent, at least 0: the root of
            ``sigma_rel ** 2 == (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))``.

    Example:
        >>> from fastema import schedules
        >>> schedule = schedules.power(0.10)
        >>> round(schedule.gamma, 6)
        6.937204
        >>> schedule(1), round(schedule(10_000), 6)
        (0.0, 0.999207)
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        number = as_number(self.sigma_rel, "sigma_rel must be a number")
        object.__setattr__(self, "sigma_rel", number)
        if not 0.0 < self.sigma_rel <= 12**-0.5:
            raise ValueError(
                "sigma_rel must be above 0 and at most 0.288675 (12 ** -0.5, equal weights), "
                f"got {self.sigma_rel!r}"
            )

    @cached_property
    def gamma(self) -> float:
        """The exponent of the steps' weights."""
        # gamma = y - 7/3 takes the square out of the cubic: y^3 + p y + q = 0, whose largest root Viete gives
        p = -1 / 3 - self.sigma_rel**-2
        q = 2 / 27 + 4 / 3 * self.sigma_rel**-2
        radius = math.sqrt(-p / 3)
        return max(0.0, 2 * radius * math.cos(math.acos(3 * q / (2 * p * radius)) / 3) - 7 / 3)

    def at(self, step: _Scalar, xp: _Library) -> _Scalar:  # noqa: D102 - as of every schedule
        return (1.0 - 1.0 / xp.maximum(step, 1)) ** (self.gamma + 1.0)

    def _over(self, t0: float, t1: float) -> float:
        return float((t0 / t1) ** (self.gamma + 1.0))

    def at_once(self, step: _Scalar, steps: int, xp: _Library) -> _Scalar:  # noqa: D102 - as of every schedule
        if steps == 1:
            return self.at(step, xp)
        return (xp.maximum(step - steps, 0) / step) ** (self.gamma + 1.0)


def over(decay: Decay, t0: float, t1: float) -> float:
    """Return the decay of one update over a span, of whatever tells a decay.

    Args:
        decay: A number, a schedule, or a function of your own, which is asked for every whole step.
        t0: As for `Schedule.over`.
        t1: As for `Schedule.over`.

    Raises:
        TypeError: `decay` is none of these, or the function returned no number.
        ValueError: The span is not from 0 or more upwards, or a decay is not from 0 to 1.

    Example:
        >>> from fastema import schedules
        >>> schedules.over(0.5, 0, 3), schedules.over(lambda step: 0.5 if step < 3 else 0.25, 1, 3)
        (0.125, 0.125)
    """
    if isinstance(decay, Schedule):
        return check_share(decay.over(t0, t1), f"decay over {t0} to {t1}")
    if not callable(decay):
        return constant(check_share(decay, "decay")).over(t0, t1)
    steps = range(math.floor(t0) + 1, math.floor(t1) + 1)
    return math.prod([check_share(decay(step), f"decay({step})") for step in steps])


BLOCK = 1 << 14
"""How many steps' decays are computed at once."""


def _product(factors: _Scalar) -> _Scalar:
    """Multiply all elements of a vector, by halves: in a few operations, of every array library."""
    size, rest = int(factors.shape[0]), 1.0
    while size > 1:
        half = size // 2
        if size % 2:
            rest = factors[-1] * rest
        factors, size = factors[:half] * factors[half : 2 * half], half
    return factors[0] * rest


def compound(decay: _Scalar, updates: int) -> _Scalar:
    """Return the decay of one update that stands for several: ``decay ** updates``.

    By multiplications alone, so that every array library gives the same bits.

    Example:
        >>> from fastema import schedules
        >>> schedules.compound(0.5, 3)
        0.125
    """
    if updates == 1:
        return decay
    half = compound(decay, updates // 2)
    return half * half if updates % 2 == 0 else half * half * decay
