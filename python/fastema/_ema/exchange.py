"""Weights out, averages in, and back: bit for bit, from wherever it was interrupted."""

import os
from collections.abc import Callable
from contextlib import ContextDecorator, suppress
from functools import partial
from itertools import count as numbers
from threading import RLock, get_ident
from typing import NamedTuple, TypeVar
from weakref import ReferenceType, ref

import numpy as np

from .. import _arrays, _core
from .._types import MIXES, Array
from ..functional import paired
from .averages import Averages
from .count import Count
from .tree import Nested
from .values import Locals, Values, by_device, check_writable
from .views import Views

T = TypeVar("T")


class Swapped(NamedTuple):
    """Averages are in the place of the weights.

    Attributes:
        k: Of which decay.
        saved_weights: Of each leaf whose contents are not exchanged, the weights.
    """

    k: int
    saved_weights: dict[int, Locals]


class _Covering(NamedTuple):
    """Averages are, or were, in the place of weights.

    Attributes:
        exchange: Whose.
        thread: Which put them there.
    """

    exchange: "ReferenceType[Exchange]"
    thread: int


_stack: list[_Covering] = []  # the last on top; some of them are gone, or have their weights back
_numbers = numbers(1)  # of blocks
_lock = RLock()  # while contents are exchanged, which others might exchange, too
if hasattr(os, "register_at_fork"):  # no child is born in the midst of it
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def any_swapped() -> bool:
    """Tell whether averages of any EMA are in the place of weights, or were lately."""
    return bool(_stack)


def _coverings() -> "list[tuple[Exchange, int]]":
    """Return whose averages are in the place of weights, the last at the end, and the thread of each."""
    found = []
    for covering in [*_stack]:
        exchange = covering.exchange()
        if exchange is None:
            with suppress(ValueError):  # another thread was first
                _stack.remove(covering)
        elif exchange.swapped is not None:
            found.append((exchange, covering.thread))
    return found


def to_the_end(act: Callable[..., T], *arguments: object) -> T:
    """Call what can be called again from wherever it was interrupted; if so, again, and raise that then."""
    try:
        return act(*arguments)
    except BaseException:  # an interrupt comes once; what else is raised, is again
        act(*arguments)
        raise


class Block:
    """One ``with`` statement that is to see averages.

    Attributes:
        restores: Whether the weights are to be back after it: they were there before it, or before a block
            that it outlives.
        number: Of blocks that were entered later, greater.
    """

    __slots__ = ("__weakref__", "number", "restores")

    def __init__(self) -> None:
        self.restores, self.number = False, 0


class Swapping(_core.Scope, ContextDecorator):
    """Averages are in the place of the weights within a ``with`` statement; see `EMA.swapped`.

    Args:
        enter: Puts them there for a block, which it notes when that has begun.
        leave: Puts the weights back, if the block is to.
    """

    def __init__(self, enter: Callable[[Block], None], leave: Callable[[Block], None]) -> None:
        block = Block()
        super().__init__(partial(enter, block), partial(leave, block))
        self._makers = enter, leave

    def _recreate_cm(self) -> "Swapping":
        return Swapping(*self._makers)


class Exchange:
    """Exchanges weights and averages, and knows where either is meanwhile.

    Contents are exchanged in place by one call for each device. Where that cannot be, weights are saved and
    averages are written over them.

    Attributes:
        values: The weights.
        averages: What is kept of them.
        views: The modules in the memory of these.
        swapped: What was asked for last. Set before the first array is changed, and reset after the last has
            come back: whatever happens between can be undone.
    """

    def __init__(self, values: Values, averages: Averages, threads: int, views: Views) -> None:
        self.values, self.averages, self._threads, self.views = values, averages, threads, views
        self.swapped: Swapped | None = None
        self._blocks: list[ReferenceType[Block]] = []  # that are open, and not lost
        self._buffers: list[dict[str, Array]] = []  # that a module had before
        self._exchanged: set[_arrays.Place] = set()  # the devices where contents are exchanged
        # exchanged with those in host memory, and tells so where an interrupt comes up as native code returns
        self._swap_flag = np.zeros(1), np.ones(1)

    def check_not_swapped(self, call: str) -> None:
        """Raise if averages are in the place of the weights.

        Raises:
            RuntimeError: They are.
        """
        if self.swapped is not None:
            raise RuntimeError(
                f"{call} needs the weights, and averages are in their place: call swap() first"
            )

    def check_not_covered(self, call: str) -> None:
        """Raise if another EMA's averages are in the place of these weights, or of what is in their place.

        Raises:
            RuntimeError: They are.
        """
        for exchange, _ in _coverings()[::-1]:
            if exchange is self:
                return  # those below are covered by these
            if self._meets(exchange):
                raise RuntimeError(
                    f"{call} needs these values, and another EMA's averages are in the place of some: "
                    "call its swap() first"
                )

    def _check_thread(self) -> None:
        """Raise if another thread has put averages in the place of some weights.

        Raises:
            RuntimeError: It has.
        """
        for exchange, thread in _coverings():
            if thread != get_ident() and self._meets(exchange):
                whose = "these" if exchange is self else "another EMA's"
                raise RuntimeError(
                    f"swap() needs these values, and another thread has put {whose} averages in the place of "
                    "some: evaluate one after the other"
                )

    def _meets(self, other: "Exchange") -> bool:
        return not self.values.memory().isdisjoint(other.values.memory())

    # --- where averages and weights are -----------------------------------------------------------

    def kept(self, k: int, i: int) -> Locals:
        """Return a leaf's average as it is kept, wherever that is."""
        if i in self.averages.carried:
            return []
        swapped = self.swapped
        away = (
            swapped is not None
            and i not in swapped.saved_weights
            and (k == swapped.k or i in self.averages.copied)
            and self._is_exchanged(_arrays.device(self.averages.by_decay[k][i][0]))
        )
        return self.values.leaves[i].local_arrays() if away else self.averages.by_decay[k][i]

    def average_of(self, k: int, i: int, count: Count) -> Locals:
        """Return a leaf's average as the user sees it."""
        blank = count.is_blank and i not in self.averages.copied and i not in self.averages.carried
        kept = self._present if blank else self.kept
        if self.averages.is_kept(k, i, count):
            return kept(k, i)
        return self.averages.shown.computed(k, lambda j: kept(j, i), count)

    def _present(self, k: int, i: int) -> Locals:
        """Return a copy of the weights of a leaf as they are now, of the average's type."""
        leaf, latest, kept = self.values.leaves[i], self.values.latest, self.averages.by_decay[k][i]
        source = None if latest is None else latest[i]
        if leaf.immutable and source is None:  # nobody told of others than the first
            return kept
        copies = [_arrays.empty_like(average) for average in kept]
        for weight, copy in zip(leaf.local_arrays(source), copies, strict=True):
            _arrays.write(weight, copy)
        return copies

    def weights(self) -> dict[int, Locals]:
        """Return the weights of each leaf while averages are in their place, else nothing."""
        if self.swapped is None:
            return {}
        k, saved = self.swapped
        return {i: saved.get(i, average) for i, average in sorted(self.averages.by_decay[k].items())}

    def nested(self, k: int, count: Count) -> Nested:
        """Return the k-th averages in arrays of the values' library, shaped as the values."""
        leaves = self.values.leaves
        averages = [self.average_of(k, i, count) for i in range(len(leaves))]
        if self.averages.on_host:
            averages = [[_arrays.host(x) for x in local] for local in averages]
        return self.values.build([leaf.to_library(x) for leaf, x in zip(leaves, averages, strict=True)])

    # --- the verbs --------------------------------------------------------------------------------

    def swap(self, k: int, count: Count) -> None:
        """Put the k-th averages in the place of the weights, or the weights back."""
        _core.locked(_lock, self._swap, k, count)

    def _swap(self, k: int, count: Count) -> None:
        if self.swapped is None:
            self._put_averages(k, count)
        else:
            self._put_weights()

    def enter(self, k: int, count: Count, block: Block) -> None:
        """Put the k-th averages in the place of the weights for a block, unless they are there."""
        _core.locked(_lock, self._enter, k, count, block)

    def _enter(self, k: int, count: Count, block: Block) -> None:
        block.number = next(_numbers)
        if self.swapped is None:
            block.restores = True
            self._blocks.append(ref(block))
            self._put_averages(k, count)
            return
        if self.averages.checked_index(k) != self.swapped.k:
            raise RuntimeError(
                f"swapped({k}) needs the weights, and the averages of swapped({self.swapped.k}) are in their "
                "place: leave that first"
            )
        self.check_not_covered("swapped()")
        self._check_thread()
        self._blocks.append(ref(block))

    def leave(self, block: Block) -> None:
        """Put the weights back after a block, if it is to, and called again, do what was interrupted of that.

        If others that began in it are open still, as in tasks that take turns, the next one does so instead.
        """
        _core.locked(_lock, self._leave, block)

    def _leave(self, block: Block) -> None:
        self._blocks = [x for x in self._blocks if x() not in (None, block)]
        others = (x() for x in self._blocks)
        later = [x for x in others if x is not None and x.number > block.number]
        if block.restores and later:
            later[0].restores = True
        elif block.restores and self.swapped is not None:
            self._put_weights()
        block.restores = False

    def resume(self, k: int, weights: dict[int, Locals], count: Count) -> None:
        """Put averages in the place of weights that were saved earlier, whatever the values are now."""
        _core.locked(_lock, self._resume, k, weights, count)

    def _resume(self, k: int, weights: dict[int, Locals], count: Count) -> None:
        leaves = self.values.leaves
        before = [[_arrays.copy(x) for x in leaf.local_arrays()] for leaf in leaves]
        self._buffers = self.values.held_buffers()
        try:
            self.swapped = Swapped(k, weights)
            _stack.append(_Covering(ref(self), get_ident()))
            for i, leaf in enumerate(leaves):
                leaf.assign(weights[i] if count.is_blank else self.average_of(k, i, count))
        except BaseException:
            for leaf, values in zip(leaves, before, strict=True):
                leaf.assign(values)
            self.swapped = None
            raise

    def copy_to(self, others: Nested | None, k: int, count: Count) -> Nested:
        """Write averages into other values, or the values themselves, for good; see `EMA.copy_to`."""
        if others is None:
            self.check_not_swapped("copy_to()")
            self.check_not_covered("copy_to()")
            self.values.check_own("copy_to()")
            self.values.check_exchange()
        targets = self.values.targets(others)
        averages = [self.average_of(k, i, count) for i in range(len(self.values.leaves))]
        for target in targets:
            if others is not None:
                _check_fits(target.name, target.local_arrays, averages[target.place])
            if not target.leaf.immutable:
                check_writable(target.leaf, target.name, "copy_to()")

        def write() -> list[Array]:
            written = [target.leaf.assign(averages[target.place]) for target in targets]
            self.values.exchanged()
            return written

        return self.values.build_given(to_the_end(write))

    def pull(self, amount: float, k: int, count: Count) -> None:
        """Move the values towards the k-th averages; see `EMA.pull`."""
        self.check_not_swapped("pull()")
        self.check_not_covered("pull()")
        self.values.check_writable("pull()")
        self.values.check_exchange()
        if amount == 0.0:
            return
        leaves = self.values.leaves
        averages = {i: self.average_of(k, i, count) for i in self.averages.averaged}
        values = {i: leaves[i].local_arrays() for i in averages}
        apart = [i for i in averages if not leaves[i].in_place()]
        values.update({i: [_arrays.copy(x) for x in values[i]] for i in apart})
        for i, average in averages.items():
            _check_pulls(self.values.names[i], values[i], average)
        acts = []
        for together in by_device(averages, values):
            names = [self.values.names[i] for i in together for _ in values[i]]
            pulled, towards = ([x for i in together for x in lists[i]] for lists in (values, averages))
            acts.append((paired(pulled, towards, names=names, arguments=_PULLED, once=True), [False]))

        def pull() -> None:
            for pairs, done in acts:
                if not done[0]:
                    pairs._move(1.0 - amount, self._threads, done, True, seed=None, step=0)
            for i in averages:
                if leaves[i].in_place():
                    leaves[i].written()
                else:
                    leaves[i].assign(values[i])
            self.values.exchanged()

        to_the_end(pull)

    def _put_averages(self, k: int, count: Count) -> None:
        leaves = self.values.leaves
        self.values.check_writable("swap()")
        self.values.check_exchange()
        k = self.averages.checked_index(k)
        exchanged = (*self.averages.averaged, *self.averages.copied)
        viewed = self.views.are_used()  # who computes in this memory, computes with averages
        apart = [i for i in sorted(exchanged) if viewed or not self._exchangeable(k, i, count)]
        copy = _arrays.host_copy if self.averages.on_host else _arrays.copy
        weights = {i: [copy(x) for x in leaves[i].local_arrays()] for i in apart}
        averages = {i: self.average_of(k, i, count) for i in apart}
        self._check_thread()
        self._buffers = self.values.held_buffers()
        try:
            self.swapped = Swapped(k, weights)
            _stack.append(_Covering(ref(self), get_ident()))
            for i in apart:
                leaves[i].assign(averages[i])
            self._exchange(k)
            self.values.exchanged()
        except BaseException:
            to_the_end(self._undo)
            raise

    def _put_weights(self) -> None:
        if len(_stack) > 1:
            self.check_not_covered("swap()")
        to_the_end(self._undo)
        self.values.check_kept()

    def _undo(self) -> None:
        """Undo `_put_averages`, from wherever it was interrupted, and this, too."""
        if self.swapped is not None:
            self._exchange(self.swapped.k, back=True)
            for i, weights in self.swapped.saved_weights.items():
                self.values.leaves[i].assign(weights)
            self.values.exchanged()
            self.values.put_back(self._buffers)
            self.swapped = None
        for covering in [*_stack]:
            if covering.exchange() is self:
                _stack.remove(covering)

    # --- exchanging contents ----------------------------------------------------------------------

    def _is_exchanged(self, device: _arrays.Place | None) -> bool:
        return device in self._exchanged if device is not None else bool(self._swap_flag[0][0])

    def _exchangeable(self, k: int, i: int, count: Count) -> bool:
        """Tell whether a value and its average can exchange contents, and both stay what they are."""
        leaf = self.values.leaves[i]
        if not leaf.in_place() or i in self.averages.alone or not self.averages.is_kept(k, i, count):
            return False
        if count.is_blank and i not in self.averages.copied:
            return False
        return all(
            _arrays.dtype_of(value) == _arrays.dtype_of(average)
            and _arrays.device(value) == _arrays.device(average)
            for value, average in zip(leaf.local_arrays(), self.averages.by_decay[k][i], strict=True)
        )

    def _exchange(self, k: int, *, back: bool = False) -> None:
        """Exchange contents with all leaves whose weights are not saved, but where that is done already."""
        saved = self.swapped.saved_weights if self.swapped is not None else {}
        leaves = [i for i in self.averages.by_decay[k] if i not in saved and i not in self.averages.carried]
        local_arrays = {i: self.values.leaves[i].local_arrays() for i in leaves}
        for together in by_device(leaves, local_arrays):
            device = _arrays.device(local_arrays[together[0]][0])
            if self._is_exchanged(device) != back:
                continue
            averages = [x for i in together for x in self.averages.by_decay[k][i]]
            values = [x for i in together for x in local_arrays[i]]
            names = [self.values.names[i] for i in together for _ in local_arrays[i]]
            if device is None:
                averages.append(self._swap_flag[0])
                values.append(self._swap_flag[1])
                names.append("")  # nobody's
            pairs = paired(averages, values, names=names, verb="swap", once=True)
            if device is None:
                pairs.swap(self._threads)
            else:
                pairs._swap(self._threads, (self._exchanged.symmetric_difference_update, {device}))
        for i in leaves:
            self.values.leaves[i].written()


_PULLED = "values", "averages"  # what errors call the two lists, whose roles are exchanged


def _check_pulls(name: str, values: Locals, averages: Locals) -> None:
    """Raise if a value cannot be moved towards its average where it is."""
    for value, average in zip(values, averages, strict=True):
        if _arrays.device(value) != _arrays.device(average):
            raise ValueError("device must be None for pull(), got 'cpu': use copy_to()")
        kinds = _arrays.dtype_of(value).name, _arrays.dtype_of(average).name
        if kinds not in MIXES:
            raise TypeError(
                f"values[{name!r}] must be of a type that moves towards {kinds[1]} averages for pull(), got "
                f"{kinds[0]}: use copy_to()"
            )


def _check_fits(name: str, targets: Locals, averages: Locals) -> None:
    for target, average in zip(targets, averages, strict=True):
        if (shape := _arrays.shape_of(target)) != (needed := _arrays.shape_of(average)):
            raise ValueError(f"values[{name!r}] must have shape {needed}, got {shape}")
        held, dtype = _arrays.dtype_of(average), _arrays.dtype_of(target)
        # NumPy casts to texts, objects and durations, too
        if dtype.kind in "OSUm" or not np.can_cast(held, dtype, "same_kind"):
            raise TypeError(f"values[{name!r}] must be able to hold {held}, got {dtype}")
