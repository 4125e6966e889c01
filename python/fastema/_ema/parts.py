"""The parts of an EMA: made for certain arrays, and made anew together when others take their place."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from .._types import Array
from .averages import Averages, Form
from .exchange import Exchange
from .mapping import check_not_of_values
from .passes import Passes
from .tree import Nested, Selection
from .values import Values
from .views import Views


class Options(NamedTuple):
    """What all parts are made with.

    Attributes:
        selection: Which of the arrays that are given are meant.
        form: What averages are to be.
        unchanging: Whether values that can change are refused.
        seed: Of stochastic rounding. None: averages are rounded to nearest.
        threads: See `EMA`.
        views: The modules in the memory of averages.
    """

    selection: Selection
    form: Form
    unchanging: bool
    seed: int | None
    threads: int
    views: Views


class Parts(NamedTuple):
    """Values, their averages, and what exchanges and averages them.

    Attributes:
        values: The user's values.
        averages: What is kept of them.
        exchange: Knows where either is.
        passes: Moves averages towards values.
        options: What these were made with.
    """

    values: Values
    averages: Averages
    exchange: Exchange
    passes: Passes
    options: Options

    @classmethod
    def of(
        cls, given: Nested, options: Options, before: "Parts | None" = None, *, call: str | None = None
    ) -> "Parts":
        """Make all parts.

        Args:
            given: What holds the values.
            options: What parts are made with.
            before: Those whose place these take: their averages go on. They are left as they are.
            call: See `Values.check_follows`.
        """
        values, local = Values.of(given, options.selection, unchanging=options.unchanging)
        if before is not None:
            before._check_process()
            before.passes.wait()
            values.check_follows(before.values, call=call)
        elif options.form.memory is not None:
            check_not_of_values(options.form.memory, values.names, local)
        old = None if before is None else (before.values, before.averages)
        averages = Averages(values, local, options.form, old)
        exchange = Exchange(values, averages, options.threads, options.views)
        passes = Passes(values, averages, local, options.views, seed=options.seed, threads=options.threads)
        return cls(values, averages, exchange, passes, options)

    def _check_process(self) -> None:
        """Raise in a child whose averages its parent has as well: both would change one file.

        Raises:
            RuntimeError: This is one.
        """
        process = self.averages.process
        if process not in (None, os.getpid()):
            raise RuntimeError(
                "averages that are mapped from a file (memory=) must be used in the process that made them "
                f"({process}), and this is a child forked from it ({os.getpid()}): each would change "
                "the other's; save() them there and load() them here, or make the EMA in the child"
            )

    def followed(self) -> "Parts":
        """Return parts for what holds the values by now; these, if it holds the same.

        Raises:
            RuntimeError: It holds arrays that cannot take the place of those that it held, or another
                process has these averages.
        """
        if self.averages.process is not None:
            self._check_process()
        values = self.values
        if self.exchange.swapped is not None or values.later is not None:
            return self
        if not values.replaced():
            if not values.moving or not values.moving.moved():
                return self
            if values.are_as_before():
                self.passes.pair_anew()
                values.moving.accept()
                return self
        return Parts.of(values.given, self.options, self)

    def bound(self) -> "Parts":
        """Return parts for the values that the last update was given, which are to be changed or read.

        Raises:
            RuntimeError: As for `followed`.
        """
        if self.values.later is None or self.exchange.swapped is not None:
            return self.followed()
        return Parts.of(self.values.later, self.options, self, call="update()")

    def given(self, others: Nested) -> tuple["Parts", list[Array] | None, Nested]:
        """Return parts for what an update is given, the arrays to read, and what holds them.

        No arrays are returned where they are the values themselves.

        Raises:
            RuntimeError: They cannot take the place of the values.
            ValueError: They are shaped otherwise.
        """
        if self.averages.process is not None:
            self._check_process()
        values = self.values
        if isinstance(others, Iterator):
            others = list(others)
        if values.is_container(others):
            values.forget()
            return self.followed(), None, None
        try:
            arrays = values.matched(others)
        except ValueError:
            if not hasattr(others, "named_parameters"):
                raise
            return Parts.of(others, self.options, self, call="update()"), None, None  # buffers come and go
        if values.are_given(arrays):
            values.forget()
            return self.followed(), None, None
        return self, arrays, others
