"""Pairs of arrays on one CUDA device: the same checks and verbs as the core's, by one launch a call."""

from collections.abc import Callable
from threading import Lock
from typing import Any, Literal, Unpack

import numpy as np

from .. import _core
from .._types import Terms
from . import _driver, _plan
from ._arrays import Group
from ._driver import not_in_graph
from ._schedule import Schedule
from ._source import DECAYS, LISTS, ROUNDINGS, SWAP, update_name

_UPDATE = np.dtype(
    [
        ("tensors", "<u8"),
        ("carries", "<u8"),
        ("chunks", "<u8"),
        ("chunk", "<u4"),
        ("lists", "<u4"),
        ("decays", DECAYS),
        ("seed", "<u8"),
        ("step", "<u8"),
    ],
    align=True,
)
_SWAP = np.dtype([("tensors", "<u8"), ("chunks", "<u8"), ("chunk", "<u4")], align=True)


class DevicePairs:
    """What `fastema.Pairs` holds where its arrays lie on a CUDA device; arguments as for `_core.Pairs`.

    No call allocates, copies or waits. The exceptions: the first of each kind compiles its kernel, addresses
    that changed are uploaded, and of arrays whose library waits for no stream (JAX's) it is done on return.
    """

    engine: Literal["cuda"] = "cuda"

    def __init__(self, a: list[Any], b: list[Any], carries: list[Any], **terms: Unpack[Terms]) -> None:
        a_name, b_name = terms.get("arguments", ("averages", "values"))
        self._lists = terms.get("averages_per_value", 1)
        if self._lists > LISTS:
            raise ValueError(f"{a_name} must hold {LISTS} lists or fewer on CUDA, got {self._lists}")
        self._driver = _driver.load()
        self._arguments = {a_name: a, b_name: b, "carries": carries}
        self._terms = terms
        self._lock = Lock()  # of the arguments of a launch, which all calls share
        self._group = self._seen()
        self._swappable = terms.get("verb") == "swap"
        with self._driver.on(self._group.device):
            self._build()

    def __len__(self) -> int:
        return len(self._group.arrays[1])

    # --- the plan ---------------------------------------------------------------------------------

    def _seen(self) -> Group:
        """See where the arrays lie, and have the core check them."""
        group = Group(self._arguments, self._terms.get("single", False))
        _core.check(*group.arrays, **self._terms)
        return group

    def _build(self) -> None:
        driver, device, lists = self._driver, self._group.device, self._lists
        self._tables = _tables(self._group)
        sizes = np.array([value.size for value in self._group.arrays[1]], np.int64)
        chunk = _plan.chunk_size(int(sizes.sum()), driver.multiprocessors(device), lists)
        chunks = _plan.chunk_table(sizes, chunk)
        self._blocks = len(chunks)
        mixes = self._tables[0]["mix"].tolist()
        self._entries = {name: update_name(mixes, number) for name, number in ROUNDINGS.items()}
        self._launches: dict[str, _driver.Launch] = {}
        self._update_arguments, self._swap_arguments = np.zeros(1, _UPDATE), np.zeros(1, _SWAP)
        decays = self._update_arguments["decays"]
        self._decays, self._state = decays["value"][0], decays["device"]
        self._seed, self._step = self._update_arguments["seed"], self._update_arguments["step"]
        if self._blocks == 0:
            return
        tables = [*self._tables, chunks]
        bytes_of_tables = [table.view(np.uint8) for table in tables]
        self._memory = driver.upload(np.concatenate(bytes_of_tables), self._group.streams()[0])
        begins = [self._memory.address]
        for table in tables[:-1]:
            begins.append(begins[-1] + table.nbytes)
        tensors, carries, places = begins
        compensated = carries if self._group.arrays[2] else 0
        fixed = {"tensors": tensors, "carries": compensated, "chunks": places, "chunk": chunk, "lists": lists}
        for name, value in fixed.items():
            self._update_arguments[name] = value
        self._swap_arguments[0] = tensors, places, chunk

    def follow(self) -> None:
        """Go on where the arrays lie now.

        Raises:
            TypeError: As when they were paired.
            ValueError: As when they were paired, or a type or size is another now. Nothing has changed then.
        """
        with self._lock:
            self._follow()

    def _follow(self) -> None:
        group = self._seen()
        group.check_unchanged(self._group)
        self._group, self._swappable = group, self._terms.get("verb") == "swap"
        if self._blocks == 0:
            return
        tables = _tables(group)
        with self._driver.on(group.device):
            stream, address = group.streams()[0], self._memory.address
            self._driver.use(self._memory, stream)
            for old, new in zip(self._tables, tables, strict=True):
                for row in np.flatnonzero(old != new):
                    self._driver.write(address + int(row) * old.itemsize, new[row : row + 1], stream)
                address += old.nbytes
        self._tables = tables

    # --- the verbs --------------------------------------------------------------------------------

    def update(
        self,
        decay: Any,
        threads: int = 0,
        done: list[Any] | None = None,
        now: object = None,
        copies: None = None,
        *,
        stochastic: bool = False,
        seed: int = 0,
        step: int = 0,
    ) -> None:
        """As `_core.Pairs.update`; `decay` may be a `Schedule`."""
        assert copies is None
        with self._lock:
            self._update(decay, threads, stochastic, seed, step, counted=done is not None)
            if done is not None:
                done[0] = now

    def _update(
        self, decay: Any, threads: int, stochastic: bool, seed: int, step: int, *, counted: bool
    ) -> None:
        lists = self._lists
        schedule = decay if isinstance(decay, Schedule) else None
        if schedule is None:
            self._decays[:lists] = _core.check_numbers(decay, threads, seed, step, averages_per_value=lists)
            self._state[0] = 0
        else:
            _core.check_numbers(0.0, threads, seed, step)
        self._seed[0], self._step[0] = seed, step
        rounding = "compensated" if self._group.arrays[2] else "stochastic" if stochastic else "nearest"
        frozen = "the step, decay and seed of this one update"
        once = frozen if counted or (schedule is None and rounding == "stochastic") else None
        self._launch(self._entries[rounding], self._update_arguments, schedule, once)

    def copy(self, threads: int = 0) -> None:
        """As `_core.Pairs.copy`, of types that are averaged."""
        self.update(0.0, threads)

    def check_counted(self) -> None:
        """Raise if a CUDA graph is being captured, by which a step would be counted now and never again.

        Raises:
            RuntimeError: It is.
        """
        with self._driver.on(self._group.device):
            if any(map(self._driver.is_capturing, self._group.streams())):
                raise not_in_graph("a step that the host has counted once")

    def swap(self, threads: int = 0, then: tuple[Callable[..., object], object] | None = None) -> None:
        """As `_core.Pairs.swap`; calls a function when that is asked for."""
        with self._lock:
            _core.check_numbers(0.0, threads)
            if not self._swappable:
                swap: Terms = {**self._terms, "verb": "swap", "only_floats": True}
                _core.check(*self._group.arrays, **swap)
                self._swappable = True
            once = None if then is None else "averages where the host believes weights to be, or the reverse"
            self._launch(SWAP, self._swap_arguments, None, once)
            if then is not None:
                then[0](then[1])

    def _launch(
        self, expression: str, arguments: np.ndarray, schedule: Schedule | None, once: str | None
    ) -> None:
        """Launch a kernel.

        Args:
            expression: Which.
            arguments: As it takes them.
            schedule: What computes its decays on the device, if anything does.
            once: What would be wrong if it were replayed, if anything were.
        """
        if self._blocks == 0:
            return
        driver, group = self._driver, self._group
        with driver.on(group.device):
            streams = group.streams()
            captured = list(filter(driver.is_capturing, streams))
            stream, *others = streams
            if captured:
                self._check_replays(expression, once)
                # a graph can wait only for its own streams
                others = [other for other in others if other in captured]
            for other in others:
                driver.wait(stream, driver.record(other))
            if captured or stream.handle != self._memory.stream.handle:
                driver.use(self._memory, stream)
            if schedule is not None:
                self._state[0] = schedule.settle(group.device, self._lists, stream)
            if expression not in self._launches:
                self._launches[expression] = driver.kernel(expression, arguments, group.device)
            if schedule is not None:
                schedule.advance(stream)
            self._launches[expression](self._blocks, stream)
            for other in others:  # they may change values, and read averages
                driver.wait(other, driver.record(stream))
            if group.unaware:
                driver.finish(driver.record(stream))

    def _check_replays(self, expression: str, once: str | None) -> None:
        """Raise if a graph would do something else than this call; arguments as for `_launch`."""
        if self._group.unaware:
            once = "arrays whose library changes them without waiting for a stream of ours"
        if once is None and expression not in self._launches:
            once = "a kernel that is not compiled yet"
        if once is not None:
            raise not_in_graph(once)


def _tables(group: Group) -> tuple[np.ndarray, np.ndarray]:
    a, b, carries = group.arrays
    return _plan.tensor_table(a, b), np.array([carry.address for carry in carries], np.uint64)
