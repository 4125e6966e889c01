"""What averages that are made of several lists of arrays share: all of an EMA but its decay."""

from typing import Any, ClassVar

from .._ema.averages import Form
from .._ema.count import Count, Rule
from .._ema.parts import Options, Parts
from .._ema.passes import NonFinite
from .._ema.shown import Shown
from .._ema.tree import Buffers, Nested, Only, Selection
from .._ema.views import Views
from .._types import DType, check_choice, check_count
from ..checkpoint._replace import StrPath
from ..ema import EMA


class Method(EMA):
    """Averages with the verbs of an EMA, that go by the number of updates."""

    _method: ClassVar[str]

    def _set_up(
        self,
        values: Nested,
        rule: Rule,
        shown: Shown,
        start: Count,
        own: dict[str, Any],
        *,
        dtype: DType | None = None,
        buffers: Buffers,
        device: str | None,
        threads: int,
        memory: StrPath | None,
        only: Only | None,
    ) -> None:
        """Make all parts.

        Args:
            values: As for `EMA`.
            rule: Which lists move when.
            shown: How averages come of them.
            start: The count before the first update, with a product for each list.
            own: The arguments that no EMA has, as they are saved.
            dtype: Of the lists; None: as of an EMA's averages.
            buffers: As for `EMA`.
            device: As for `EMA`.
            threads: As for `EMA`.
            memory: As for `EMA`.
            only: As for `EMA`.
        """
        check_choice(buffers, "buffers", ("copy", "average", "ignore"))
        check_choice(device, "device", (None, "cpu"))
        threads, lists = check_count(threads, "threads"), len(start.products)
        self._pace, self._start, self._now, self._background = rule, start, [start], None
        self._config = {
            "every": rule.every,
            "start_step": rule.start_step,
            "rounding": "nearest",
            "seed": 0,
            "decay": [0.0] * lists,  # a file has a number for each list
            "dtype": None if dtype is None else dtype.name,
            "buffers": buffers,
            "method": {"name": self._method, **own},
        }
        form = Form(shown, lists, dtype, "nearest", device == "cpu", memory, buffers)
        self._parts = Parts.of(values, Options(Selection(buffers, only), form, False, None, threads, Views()))

    def update(
        self,
        values: Nested | None = None,
        *,
        span: float = 1,
        fence: bool = True,
        non_finite: NonFinite = "average",
    ) -> None:
        """Count a step of training, and take the values in where it is time to.

        Args:
            values: As for `EMA.update`.
            span: 1, as these averages go by the number of updates.
            fence: As for `EMA.update`.
            non_finite: As for `EMA.update`.

        Raises:
            FloatingPointError: As for `EMA.update`.
            RuntimeError: As for `EMA.update`.
            ValueError: As for `EMA.update`, or `span` is not 1.
        """
        if span != 1:
            raise ValueError(
                f"span must be 1 for fastema.{self._method}, which counts updates alone, got {span!r}"
            )
        super().update(values, fence=fence, non_finite=non_finite)

    @property
    def step(self) -> int:
        """The number of updates seen. It cannot be set, as what is kept belongs to certain steps."""
        return self._settled().step

    @step.setter
    def step(self, step: int) -> None:
        raise RuntimeError(
            f"step cannot be set for fastema.{self._method}, whose arrays are those of certain steps, got "
            f"{step!r}; call reset() to start again"
        )
