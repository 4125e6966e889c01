"""How far averaging has come: steps, the clock, decays; and what `every`, `start_step` and a span mean."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias, cast

from .. import schedules
from .._types import Decay, as_number, check_count, check_decay, check_share, shown


class Pace(NamedTuple):
    """When there is an update, and how far it moves each average.

    Attributes:
        decays: Of each average a number or a schedule.
        several: Whether they were given as a sequence, if of one.
        every: Average at every so many steps only, with the decay that the time since then has as a whole.
        start_step: The first step of the clock that averages; before it, an average is a copy.
        fixed: The decays of `every` steps of the clock from there on; none where one is a schedule.
    """

    decays: tuple[Decay, ...]
    several: bool
    every: int
    start_step: int
    fixed: tuple[float, ...]

    @classmethod
    def of(cls, decay: Decay | Sequence[Decay], every: int, start_step: int) -> "Pace":
        """Check the constructor's arguments.

        Raises:
            TypeError: One is no number.
            ValueError: One is outside of its range, or there is no decay.
        """
        several = isinstance(decay, Sequence) and not isinstance(decay, str | bytes)
        decays = tuple(map(check_decay, cast(Sequence[Decay], decay if several else [decay])))
        if not decays:
            raise ValueError("decay must hold one decay or more, got none")
        every, start_step = check_count(every, "every", 1), check_count(start_step, "start_step")
        shares = [schedules.compound(decay, every) for decay in decays if not callable(decay)]
        fixed = tuple(shares) if len(shares) == len(decays) else ()
        return cls(decays, several, every, start_step, fixed)

    def averages_at(self, step: int, clock: float) -> bool:
        """Tell whether averages move at a step and its time, or it is only counted."""
        return step % self.every == 0 or clock < self.start_step  # before the start each step copies

    def decays_after(self, before: "Count", clock: float) -> tuple[float, ...]:
        """Return the decays of an update that follows on a count; raises as `decays_over`."""
        return self.decays_over(before.averaged, clock)

    def decays_over(self, t0: float, t1: float) -> tuple[float, ...]:
        """Return the decays of an update that takes the clock's time from `t0` to `t1` at once.

        Raises:
            TypeError: A schedule returned no number.
            ValueError: A schedule returned a number that is no decay.
        """
        if t0 < self.start_step - 1:  # it contains a step that copies
            return (0.0,) * len(self.decays)
        if self.fixed and t1 - t0 == self.every:
            return self.fixed
        if t1 - t0 != 1 or not isinstance(t1, int):
            return tuple([schedules.over(decay, t0, t1) for decay in self.decays])
        # most spans are one step: the same without the microsecond that any span takes
        asked = [decay(t1) if callable(decay) else decay for decay in self.decays]
        return tuple([x if 0.0 <= x <= 1.0 else check_share(x, f"decay({t1})") for x in asked])


class Rule(Protocol):
    """What says when there is an update, and how far it moves each average: a `Pace`, or a method's own."""

    @property
    def several(self) -> bool: ...

    @property
    def every(self) -> int: ...

    @property
    def start_step(self) -> int: ...

    def averages_at(self, step: int, clock: float) -> bool: ...

    def decays_after(self, before: "Count", clock: float) -> tuple[float, ...]: ...


class Count(NamedTuple):
    """How far averaging has come. Never changed: each update makes the next one.

    Attributes:
        step: How many updates were seen.
        clock: How much time has passed: the sum of all spans, each of 1 unless it was given.
        averaged: Until which time of the clock values were averaged.
        decays: The last ones used, of each average; none before the first.
        products: Of each average the product of all decays used, if it starts at zeros: the share that its
            start has in it. 1: nothing was averaged so far, and it still is the first values. 0, if it starts
            at the values.
    """

    step: int
    clock: float
    averaged: float
    decays: tuple[float, ...]
    products: tuple[float, ...]

    @classmethod
    def at_start(cls, decays: int, *, zeros: bool) -> "Count":
        """Return the count before the first update, of so many averages that start at zeros or the values."""
        return cls(0, 0, 0, (), (1.0 if zeros else 0.0,) * decays)

    def skip(self, span: float) -> "Count":
        """Return the count after a step that is only counted."""
        return self._replace(step=self.step + 1, clock=self.clock + span)

    def hold(self, span: float) -> "Count":
        """Return the count after a step whose values were not averaged, though it was time to.

        Averages stay what they are, also where nothing was averaged so far: values of now cannot be shown.
        """
        held = self.skip(span)
        return held if held.decays else held._replace(decays=(1.0,) * len(self.products))

    def next(self, pace: Rule, span: float) -> "Count":
        """Return the count after a step at which averages move, over all the time since they last did.

        Raises:
            TypeError: A schedule returned no number.
            ValueError: A schedule returned a number that is no decay.
        """
        clock = self.clock + span
        decays, products = pace.decays_after(self, clock), self.products
        if any(products):
            products = tuple(x * decay for x, decay in zip(products, decays, strict=True))
        return Count(self.step + 1, clock, clock, decays, products)

    def at_step(self, step: int, pace: Rule) -> "Count":
        """Return the count as if so many updates had been seen, each with a span of 1.

        Averages stay what they are, and count as those of that step: also those that have not moved yet.

        Raises:
            RuntimeError: Updates took other spans, so that no step tells the time.
        """
        if self.clock != self.step:
            raise RuntimeError(
                "step cannot be set where updates took other spans than 1: no step tells the time, the "
                f"clock is at {self.clock} after {self.step} updates; call reset() first"
            )
        clock, averaged = times_of(step, pace.every)
        averaged = max(averaged, min(step, pace.start_step - 1))  # before the start each step copies
        unmoved = (1.0,) * len(self.products) if averaged else ()
        return Count(step, clock, averaged, self.decays or unmoved, self.products)

    @property
    def is_blank(self) -> bool:
        """Whether steps were counted and none has averaged: what is shown then are the weights of now."""
        return self.step > 0 and not self.decays

    @property
    def has_zeros(self) -> bool:
        """Whether nothing was averaged yet of some averages that start at zeros."""
        return 1.0 in self.products

    def started_since(self, before: "Count") -> list[int]:
        """Return which averages leave zero by the update between two counts."""
        products = zip(before.products, self.products, strict=True)
        return [k for k, (old, new) in enumerate(products) if old == 1.0 and new < 1.0]

    def divisor(self, k: int) -> float:
        """Return what the k-th averages are to be divided by where they are shown."""
        product = self.products[k]
        return 1.0 if product == 1.0 else 1.0 - product


class Rest(Protocol):
    """What an interrupt left to do of an update."""

    def finish(self, now: "Now") -> None:
        """Do it, and have `now` hold the count after it."""


Now: TypeAlias = "list[Count | Rest]"
"""How far averaging has come: the only item of a list, which native code changes as averages move."""


def settled(now: Now) -> Count:
    """Return how far averaging has come, when all that was begun is done."""
    while not isinstance(found := now[0], Count):
        found.finish(now)
    return found


def times_of(step: int, every: int) -> tuple[float, float]:
    """Return the clock, and the time of the last average, where each step took a span of 1."""
    return step, step - step % every


def check_span(span: object, name: str = "span") -> float:
    """Return how much time passes by an update; an int where it is whole, which adds up exactly.

    Raises:
        TypeError: It is no number.
        ValueError: It is not above 0, or not finite.
    """
    number = as_number(span, f"{name} must be a number above 0")
    if not 0.0 < number < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, got {shown(span)}")
    return int(number) if number % 1 == 0 else number
