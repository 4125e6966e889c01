"""Averages in host memory of values on a device: copied in chunks and averaged beside the training."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import _core
from .._arrays import views, watch
from .._types import Arrays
from ..functional import as_lists
from . import _driver
from ._arrays import Group
from ._driver import not_in_graph

SLOTS = 4  # chunks on their way at once: one being averaged, the others being copied
SLOT = 64 << 20  # bytes of one
_LINE = 64  # bytes: where an array begins in a slot


@dataclass
class _Part:
    """A part of one pair."""

    averages: list[np.ndarray]  # one of each list
    carries: list[np.ndarray]
    target: np.ndarray  # where the value is copied to
    pair: int
    begin: int  # bytes from the start of the value


@dataclass
class _Chunk:
    parts: list[_Part] = field(default_factory=list)
    pairs: Any = None


class Offload:
    """Averages in host memory of values on a CUDA device.

    An update returns at once. A stream of its own waits for what the device was asked to do so far, and
    copies the values to pinned memory in chunks (four of 64 MB at most); a thread averages each chunk as
    it arrives, without Python's lock, with the bits of `fastema.update`. Where the values are to change,
    `fence` must have been called: the device then waits for the last copy, not the host for the device.

    Args:
        averages: As for `fastema.update`, in CPU memory. Not to be read or changed before `wait`.
        values: As for `fastema.update`, on one CUDA device.
        carries: As for `fastema.update`, in CPU memory.

    Raises:
        ImportError: CuPy is not installed or cannot run.
        TypeError: As for `fastema.update`, or an array is not where it must be.
        ValueError: As for `fastema.update`.

    Example:
        A training step, where ``averages`` are `fastema.copies` of the weights' values on the host::

            offload = fastema.cuda.Offload(averages, list(model.parameters()))
            for batch in batches:
                loss(model, batch).backward()
                offload.fence()  # before the weights change
                optimizer.step()
                offload.update(0.999)
            offload.wait()
    """

    def __init__(self, averages: Arrays, values: Arrays, *, carries: Arrays | None = None) -> None:
        self._set_up([averages], values, None if carries is None else [carries])

    @classmethod
    def several(
        cls, averages: Sequence[Arrays], values: Arrays, *, carries: Sequence[Arrays] | None = None
    ) -> "Offload":
        """Pair several lists of averages with the same values, which an update copies only once.

        Args:
            averages: Of each list, what `Offload` takes.
            values: As for `Offload`.
            carries: Of each list, what `Offload` takes.

        Returns:
            An offload whose `update` takes a sequence of decays, one for each list.
        """
        offload = cls.__new__(cls)
        offload._set_up(averages, values, carries)
        return offload

    def _set_up(self, averages: Sequence[Arrays], values: Arrays, carries: Sequence[Arrays] | None) -> None:
        a, b, c, self._terms = as_lists(averages, values, carries)
        single = self._terms.get("single", False)
        self._values, self._lists = b, len(averages)
        self._driver = _driver.load()
        self._averages, self._carries = views(a, "averages", single), views(c, "carries", single)
        self._group = self._seen()
        self._watched, self._followed = watch((*a, *c)), watch(b)
        with self._driver.on(self._group.device):
            self._chunks = self._cut()
            self._stream = self._driver.new_stream()
        self._worker = ThreadPoolExecutor(1, "fastema-offload")
        self._job: Future[None] | None = None
        self._read: Future[Any] | None = None  # the event after the last copy, once that is asked for

    def __len__(self) -> int:
        return len(self._values)

    def _seen(self) -> Group:
        group = Group({"values": self._values}, self._terms.get("single", False))
        _core.check(self._averages, group.arrays[0], self._carries, **self._terms)
        return group

    def _cut(self) -> list[_Chunk]:
        """Cut all values into chunks that fill a slot each, and pair their averages with the slots."""
        values, lists = self._group.arrays[0], self._lists
        total = sum(-(-value.nbytes // _LINE) * _LINE for value in values)
        size = min(SLOT, max(total, _LINE))
        count = min(SLOTS, max(1, -(-total // size)))
        slots = [self._driver.pinned(size) for _ in range(count)]
        chunks: list[_Chunk] = []
        room = 0
        for pair, value in enumerate(values):
            rows = slice(pair * lists, (pair + 1) * lists)
            averages, carries = ([_flat(x) for x in side[rows]] for side in (self._averages, self._carries))
            begin = 0
            while begin < value.nbytes:
                if room == 0:
                    chunks.append(_Chunk())
                    room = size
                nbytes = min(room, value.nbytes - begin)
                slot = slots[(len(chunks) - 1) % count]
                target = slot[size - room : size - room + nbytes].view(value.dtype)
                first = begin // value.itemsize
                part = slice(first, first + target.size)
                chunks[-1].parts.append(
                    _Part([x[part] for x in averages], [x[part] for x in carries], target, pair, begin)
                )
                begin += nbytes
                room -= min(room, -(-nbytes // _LINE) * _LINE)
        for chunk in chunks:
            averages = [x for part in chunk.parts for x in part.averages]
            carries = [x for part in chunk.parts for x in part.carries]
            targets = [part.target for part in chunk.parts]
            chunk.pairs = _core.Pairs(averages, targets, carries, averages_per_value=lists)
        self._slots = count
        return chunks

    # --- the verbs --------------------------------------------------------------------------------

    def update(self, decay: Any, threads: int = 0) -> None:
        """Average the values that the device has when it has done what it was asked for so far.

        Waits for the update before, if that is not done yet.

        Args:
            decay: As for `fastema.update`; for `several` a sequence of them.
            threads: As for `fastema.update`.

        Raises:
            RuntimeError: The update before failed, or a CUDA graph is being captured.
            TypeError: As for `fastema.update`.
            ValueError: As for `fastema.update`.
        """
        self.wait()
        decays = _core.check_numbers(decay, threads, averages_per_value=self._lists)
        self._follow()
        driver, group = self._driver, self._group
        with driver.on(group.device):
            if any(map(driver.is_capturing, group.streams())):
                raise not_in_graph("no average in host memory move")
            ready = [driver.record(stream) for stream in group.streams()]
        self._read = Future()
        asked = decays[0] if self._lists == 1 else decays
        self._job = self._worker.submit(self._work, ready, asked, threads, self._read)

    def fence(self) -> None:
        """Have the device wait, in the values' current stream, until the values have been read.

        To be called before the values change, so before the optimizer's next step.

        Raises:
            RuntimeError: The update failed.
        """
        if self._read is None:
            return
        event = self._result(self._read)
        with self._driver.on(self._group.device):
            for stream in self._group.streams():
                self._driver.wait(stream, event)
            if self._group.unaware:
                self._driver.finish(event)

    def wait(self) -> None:
        """Wait until the averages are those of the last update.

        Raises:
            RuntimeError: That update failed; some averages may have moved.
        """
        if self._job is not None:
            self._result(self._job)
            self._job = None

    def _result(self, future: "Future[Any]") -> Any:
        try:
            return future.result()
        except Exception as reason:
            self._job = self._read = None
            raise RuntimeError(f"an update of averages in host memory failed: {reason}") from reason

    def _follow(self) -> None:
        """Read values where they lie now."""
        if self._watched is not None:
            self._watched.check("offload")
        if self._followed is None or not self._followed.moved():
            return
        group = self._seen()
        group.check_unchanged(self._group)
        self._group = group
        self._followed.accept()

    # --- the worker -------------------------------------------------------------------------------

    def _work(self, ready: Sequence[Any], decay: Any, threads: int, read: "Future[Any]") -> None:
        driver, chunks, events = self._driver, self._chunks, []
        try:
            with driver.on(self._group.device):
                for event in ready:
                    driver.wait(self._stream, event)
                for chunk in chunks[: self._slots]:
                    events.append(self._copy(chunk))
                for i, chunk in enumerate(chunks):
                    if len(events) == len(chunks) and not read.done():
                        read.set_result(events[-1])
                    driver.finish(events[i])
                    chunk.pairs.update(decay, threads)
                    if len(events) < len(chunks):
                        events.append(self._copy(chunks[i + self._slots]))
                if not chunks:
                    read.set_result(driver.record(self._stream))
        except BaseException as reason:
            if not read.done():
                read.set_exception(reason)
            raise

    def _copy(self, chunk: _Chunk) -> Any:
        for part in chunk.parts:
            address = self._group.arrays[0][part.pair].address
            self._driver.read(part.target, address + part.begin, self._stream)
        return self._driver.record(self._stream)


def _flat(array: np.ndarray) -> np.ndarray:
    """Return a dense array's elements in their order in memory."""
    axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    return array.transpose(axes).reshape(-1)
