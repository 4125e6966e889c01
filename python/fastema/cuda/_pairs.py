"""Pairs of arrays on one CUDA device: the same checks and verbs as the core's, by one launch a call."""

from threading import Lock
from typing import Any

import numpy as np

from .. import _core
from . import _driver, _plan
from ._arrays import Group
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

Names = tuple[str, str, bool, int]  # of both sides, whether each is one array, lists of averages


class DevicePairs:
    """What `fastema.Pairs` holds where its arrays lie on a CUDA device; arguments as for `_core.Pairs`.

    No call allocates, copies or waits. The exceptions: the first of each kind compiles its kernel, and
    addresses that changed are uploaded.
    """

    def __init__(
        self, a: list[Any], b: list[Any], carries: list[Any], names: Names, *, exchanged: bool
    ) -> None:
        a_name, b_name, _, lists = names
        if lists > LISTS:
            raise ValueError(f"{a_name} must hold {LISTS} lists or fewer on CUDA, got {lists}")
        self._driver = _driver.load()
        self._arguments = {a_name: a, b_name: b, "carries": carries}
        self._named = names
        self._lock = Lock()  # of the arguments of a launch, which all calls share
        self._group = self._seen(exchanged)
        self._exchangeable = exchanged
        # The core checks numbers too: an update of no arrays does nothing else.
        self._numbers = _core.Pairs([], [], [], *self._named, False)
        with self._driver.on(self._group.device):
            self._build()

    def __len__(self) -> int:
        return len(self._group.faces[1])

    # --- the plan ---------------------------------------------------------------------------------

    def _seen(self, exchanged: bool) -> Group:
        """See where the arrays lie, and have the core check them."""
        group = Group(self._arguments, self._named[2])
        a, b, carries = group.faces
        _core.Pairs(a, b, carries, *self._named, exchanged)
        return group

    def _build(self) -> None:
        driver, device, lists = self._driver, self._group.device, self._named[3]
        self._tables = _tables(self._group)
        sizes = np.array([value.size for value in self._group.faces[1]], np.int64)
        chunk = _plan.chunk_size(int(sizes.sum()), driver.multiprocessors(device))
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
        compensated = carries if self._group.faces[2] else 0
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
        group = self._seen(False)
        group.check_unchanged(self._group)
        self._group, self._exchangeable = group, False
        if self._blocks == 0:
            return
        tables = _tables(group)
        with self._driver.on(group.device):
            stream, address = group.streams()[0], self._memory.address
            for old, new in zip(self._tables, tables, strict=True):
                for row in np.flatnonzero(old != new):
                    self._driver.write(address + int(row) * old.itemsize, new[row : row + 1], stream)
                address += old.nbytes
        self._tables = tables

    # --- the verbs --------------------------------------------------------------------------------

    def update_plainly(self, decay: Any, threads: int) -> None:
        """As `_core.Pairs.update_plainly`."""
        self.update(decay, threads, False, 0, 0)

    def update(self, decay: Any, threads: int, stochastic: bool, seed: int, step: int) -> None:
        """As `_core.Pairs.update`; `decay` may be a `Schedule`."""
        with self._lock:
            self._update(decay, threads, stochastic, seed, step)

    def _update(self, decay: Any, threads: int, stochastic: bool, seed: int, step: int) -> None:
        lists = self._named[3]
        schedule = decay if isinstance(decay, Schedule) else None
        if schedule is None:
            self._numbers.update(decay, threads, stochastic, seed, step)
            if lists == 1:
                self._decays[0] = float(decay)
            else:
                self._decays[:lists] = [float(x) for x in decay]
            self._state[0] = 0
        else:
            self._numbers.update([0.0] * lists if lists > 1 else 0.0, threads, stochastic, seed, step)
        self._seed[0], self._step[0] = seed, step
        rounding = "compensated" if self._group.faces[2] else "stochastic" if stochastic else "nearest"
        self._launch(self._entries[rounding], self._update_arguments, schedule)

    def swap(self, threads: int) -> None:
        """As `_core.Pairs.swap`."""
        with self._lock:
            if not self._exchangeable:
                self._check_exchangeable()
            self._numbers.swap(threads)
            self._launch(SWAP, self._swap_arguments, None)

    def _check_exchangeable(self) -> None:
        a, b, carries = self._group.faces
        _core.Pairs(_empty(a), _empty(b), _empty(carries), *self._named, False).swap(0)
        _core.Pairs(a, b, [], *self._named, True)  # no two may overlap
        self._exchangeable = True

    def _launch(self, expression: str, arguments: np.ndarray, schedule: Schedule | None) -> None:
        if self._blocks == 0:
            return
        driver, group = self._driver, self._group
        with driver.on(group.device):
            stream, *others = group.streams()
            for other in (*others, *group.producers):
                driver.wait(stream, driver.record(other))
            if schedule is not None:
                self._state[0] = schedule.settle(group.device, self._named[3], stream)
            if expression not in self._launches:
                self._launches[expression] = driver.kernel(expression, arguments, group.device)
            if schedule is not None:
                schedule.advance(stream)
            self._launches[expression](self._blocks, stream)
            self._memory.stream = stream
            for other in others:
                driver.wait(other, driver.record(stream))


def _tables(group: Group) -> tuple[np.ndarray, np.ndarray]:
    a, b, carries = group.faces
    return _plan.tensor_table(a, b), np.array([carry.ctypes.data for carry in carries], np.uint64)


def _empty(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Return arrays without elements, of the same types and as writable."""
    made = [np.empty(0, array.dtype) for array in arrays]
    for empty, array in zip(made, arrays, strict=True):
        empty.flags.writeable = array.flags.writeable
    return made
