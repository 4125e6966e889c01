"""Decays computed on the device, so that a captured graph replays with another decay each time."""

from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

import numpy as np

from .. import _core
from .._types import check_count, check_share
from . import _driver
from ._driver import Stream
from ._source import ADVANCE, LISTS, SCHEDULE, SCHEDULES, STATE

_ADVANCE = np.dtype([("state", "<u8"), ("schedules", SCHEDULE, LISTS), ("lists", "<u4")], align=True)


class Schedule:
    """A decay, or several, that a CUDA device computes from a step it counts itself.

    Given as the decay of `Pairs.update`, each update counts one step and averages with that step's decay,
    without a word from the host. So an update can be captured in a CUDA graph together with a training
    step: run it once before the capture, which compiles the kernels, and pass ``check=False`` in it. The
    arrays must live as long as the graph; what pairs and schedule keep on the device does so by itself.

    Args:
        schedules: One of `fastema.schedules` (none of your own) or a number; for
            `Pairs.several` a sequence of them, one for each list of averages.
        step: How many updates were seen before, as in a checkpoint.
        every: Average at every so many updates, with the product of their decays.

    Raises:
        TypeError: The device does not know a schedule.
        ValueError: `step` or `every` is out of range, or there are more than 8 schedules.

    Example:
        >>> from fastema import cuda, schedules
        >>> cuda.Schedule(schedules.dynamic(0.999), step=1000).step
        1000
    """

    def __init__(self, schedules: Any, *, step: int = 0, every: int = 1) -> None:
        self._single = not isinstance(schedules, Sequence)
        given = [schedules] if self._single else list(schedules)
        if not 0 < len(given) <= LISTS:
            raise ValueError(f"schedules must be from 1 to {LISTS}, got {len(given)}")
        _core.check_numbers(0.0, step=step)
        step, every = check_count(step, "step"), check_count(every, "every")
        if not 0 < every < 2**32:
            raise ValueError(f"every must be 1 or more, below 2**32, got {every}")
        self._arguments = np.zeros(1, _ADVANCE)
        self._arguments["lists"] = len(given)
        for i, schedule in enumerate(given):
            name = "schedules" if self._single else f"schedules[{i}]"
            self._arguments["schedules"][0, i] = _parameters(schedule, name, every)
        self._start = step
        self._memory: _driver.Allocation | None = None
        self._device = 0
        self._launch: Callable[[int, Stream], None] | None = None

    def __len__(self) -> int:
        return int(self._arguments["lists"][0])

    @property
    def step(self) -> int:
        """How many updates were seen. Waits for the device."""
        return int(self._state()["step"][0])

    @property
    def decay(self) -> Any:
        """The decay of the last update, or a list of them. Waits for the device.

        It is negative where that update averaged nothing.
        """
        decays = [float(decay) for decay in self._state()["decay"][0, : len(self)]]
        return decays[0] if self._single else decays

    def _state(self) -> np.ndarray:
        state = np.zeros(1, STATE)
        if self._memory is None:
            state["step"] = self._start
        else:
            driver = _driver.load()
            with driver.on(self._device):
                driver.synchronize()  # a graph counts on whatever stream it is replayed
                driver.read(state.view(np.uint8), self._memory.address, self._memory.stream)
                driver.finish(driver.record(self._memory.stream))
        return state

    # --- what Pairs asks for ----------------------------------------------------------------------

    def settle(self, device: int, lists: int, stream: Stream) -> int:
        """Return the address of the state on a device.

        Raises:
            ValueError: It counts on another device already, or not for so many lists.
        """
        if lists != len(self):
            raise ValueError(f"averages and decay must have one length, got {lists} and {len(self)}")
        if self._memory is None:
            driver, state = _driver.load(), np.zeros(1, STATE)
            state["step"] = self._start
            memory = driver.upload(state, stream)
            self._launch = driver.kernel(ADVANCE, self._arguments, device)
            self._memory, self._device = memory, device
            self._arguments["state"] = memory.address
        elif device != self._device:
            raise ValueError(
                f"decay must count on cuda:{device}, not cuda:{self._device}, as the averages lie there"
            )
        return self._memory.address

    def advance(self, stream: Stream) -> None:
        """Count a step and compute its decay, in the order of a stream."""
        if self._launch is not None and self._memory is not None:
            _driver.load().use(self._memory, stream)
            self._launch(1, stream)


# Of each kind: start_step, decay, scale, power and least, as schedules.cuh reads them.
_ROWS: dict[str, Callable[[Any], tuple[float, ...]]] = {
    "constant": lambda x: (x.start_step, x.decay, 1.0, 1.0, 0.0),
    "dynamic": lambda x: (x.start_step, x.decay, x.width, 1.0, 0.0),
    "warmup": lambda x: (x.start_step, x.decay, x.gamma, x.power, x.min_decay),
    "power": lambda x: (0, 1.0, 1.0, x.gamma + 1.0, 0.0),
    "equal_weights": lambda x: (x.start_step, 1.0, 1.0, 1.0, 0.0),
    "ramp": lambda x: (0, x.decay, x.updates, 1.0, 0.0),
    "cosine": lambda x: (0, x.end, x.updates, 1.0, x.start),
    "linear": lambda x: (0, x.end, x.updates, 1.0, x.start),
    "growing": lambda x: (0, x._limit, x.fraction, x.half_life, 0.0),
}


def _parameters(schedule: Any, name: str, every: int) -> tuple[Any, ...]:
    kind = type(schedule).__name__
    if isinstance(schedule, SupportsFloat) and not callable(schedule):
        return SCHEDULES["constant"], every, 0, check_share(schedule, "decay"), 1.0, 1.0, 0.0
    if type(schedule).__module__ != "fastema.schedules" or kind not in SCHEDULES:
        raise TypeError(
            f"{name} must be a number or a schedule that a device computes ({', '.join(SCHEDULES)}), "
            f"got {schedule!r}"
        )
    return SCHEDULES[kind], every, *_ROWS[kind](schedule)
