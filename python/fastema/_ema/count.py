"""How far averaging has come: the step, the decays last used, and what `every` and `start_step` mean."""

from collections.abc import Sequence
from typing import NamedTuple, cast

from .. import schedules
from .._types import Decay, check_count, check_decay, check_share


class Pace(NamedTuple):
    """When there is an update, and how far it moves each average.

    Attributes:
        decays: Of each average a number or a schedule.
        several: Whether they were given as a sequence, if of one.
        every: Average at every so many steps only, with the decay that many steps have together.
        start_step: The first step that averages; before it, an average is a copy.
        fixed: The decays of every update from there on; none where one is a schedule.
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
        several = isinstance(decay, Sequence) and not isinstance(decay, str)
        decays = tuple(map(check_decay, cast(Sequence[Decay], decay if several else [decay])))
        if not decays:
            raise ValueError("decay must hold one decay or more, got none")
        every, start_step = check_count(every, "every", 1), check_count(start_step, "start_step")
        shares = [schedules.compound(decay, every) for decay in decays if not callable(decay)]
        fixed = tuple(shares) if len(shares) == len(decays) else ()
        return cls(decays, several, every, start_step, fixed)

    def averages_at(self, step: int) -> bool:
        """Tell whether averages move at a step, or it is only counted."""
        return step % self.every == 0

    def decays_at(self, step: int) -> tuple[float, ...]:
        """Return the decays of the update at a step, which takes `every` steps at once.

        Raises:
            TypeError: A schedule returned no number.
            ValueError: A schedule returned a number that is no decay.
        """
        if step < self.start_step:
            return (0.0,) * len(self.decays)
        if self.fixed:
            return self.fixed
        asked = [decay(step) if callable(decay) else decay for decay in self.decays]
        return tuple([schedules.compound(check_share(x, f"decay({step})"), self.every) for x in asked])


class Count(NamedTuple):
    """How far averaging has come. Never changed: each update makes the next one.

    Attributes:
        step: How many updates were seen.
        decays: The last ones used, of each average; none before the first.
        products: Of each average the product of all decays used, if it starts at zeros: the share that its
            start has in it. 1: nothing was averaged so far, and it still is the first values. 0, if it starts
            at the values.
    """

    step: int
    decays: tuple[float, ...]
    products: tuple[float, ...]

    @classmethod
    def at_start(cls, decays: int, *, zeros: bool) -> "Count":
        """Return the count before the first update, of so many averages that start at zeros or the values."""
        return cls(0, (), (1.0 if zeros else 0.0,) * decays)

    def skip(self) -> "Count":
        """Return the count after a step that is only counted."""
        return Count(self.step + 1, self.decays, self.products)

    def next(self, pace: Pace) -> "Count":
        """Return the count after a step at which averages move.

        Raises:
            TypeError: A schedule returned no number.
            ValueError: A schedule returned a number that is no decay.
        """
        step = self.step + 1
        decays, products = pace.decays_at(step), self.products
        if any(products):
            products = tuple(x * decay for x, decay in zip(products, decays, strict=True))
        return Count(step, decays, products)

    @property
    def has_blank(self) -> bool:
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
