"""What one update touches: averages move and copies are made, in one pass over the values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import _memory
from .._arrays import is_movable
from ..functional import Pairs
from .averages import Averages, Rounding
from .count import Count
from .tree import Array, Arrays
from .values import Values, by_device

if TYPE_CHECKING:
    from ..cuda import Offload


class Group(NamedTuple):
    """Averages and values of some leaves that lie in one memory."""

    pairs: Pairs
    leaves: list[int]


@dataclass
class Pass:
    """One pass over the values, checked once.

    Attributes:
        groups: Averages that lie where their values do, by device, those in host memory first.
        offloads: Averages in host memory of values on devices.
        copies: Values that are copied.
        bytes_copied: Values of one byte an element, behind where they are copied to.
        watched: Arrays that are copied and can be given other memory, which must not have happened.
        addresses: Where these lie.
    """

    groups: list[Group] = field(default_factory=list)
    offloads: list["Offload"] = field(default_factory=list)
    copies: list[Pairs] = field(default_factory=list)
    bytes_copied: list[tuple[Array, Array]] = field(default_factory=list)
    watched: Arrays = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)

    def fence(self) -> None:
        """See `EMA.fence`."""
        for offload in self.offloads:
            offload.fence()

    def wait(self) -> None:
        """Return when averages in host memory of values on devices have moved."""
        for offload in self.offloads:
            offload.wait()


class Passes:
    """Carries updates out: over the same memory each time where values stay where they are.

    Args:
        values: What averages move towards.
        averages: What moves.
        local_arrays: Of each leaf, the local arrays as they are now.
        rounding: See `EMA`.
        seed: See `EMA`.
        threads: See `EMA`.
    """

    def __init__(
        self,
        values: Values,
        averages: Averages,
        local_arrays: Sequence[Arrays],
        *,
        rounding: Rounding,
        seed: int,
        threads: int,
    ) -> None:
        self._values, self._averages = values, averages
        self._seed = seed if rounding == "stochastic" else None
        self._threads = threads
        checked = self._pass_over(local_arrays)
        self._stable = checked if values.are_stable else None
        self._addresses = values.addresses()

    # --- the verbs --------------------------------------------------------------------------------

    def over(self, arrays: Arrays | None, before: Count) -> Pass:
        """Return the next pass; nothing has moved yet.

        Args:
            arrays: The new values, as `Values.matched` returns them. None: those given at first.
            before: The count until now.

        Raises:
            ValueError: The values do not fit those given at first.
        """
        stable = self._stable
        # before averages leave zero values are paired anew, so that what does not fit is noticed first
        if stable is None or before.has_blank or not (arrays is None or self._values.are_given(arrays)):
            return self.over_sources(self._values.sources(arrays))
        if self._addresses and (addresses := self._values.addresses()) != self._addresses:
            self.wait()
            stable = self._stable = self._pass_over(self._values.local_arrays())
            self._addresses = addresses
        return stable

    def over_sources(self, sources: Arrays) -> Pass:
        """Return a pass over what `Values.sources` returned."""
        self.wait()
        return self._pass_over(self._values.local_arrays(sources))

    def average(self, sources: Arrays, before: Count, count: Count) -> None:
        """Move the averages towards what `Values.sources` returned, in any thread."""
        self.move(self.over_sources(sources), before, count)

    def move(self, over: Pass, before: Count, count: Count) -> None:
        """Move the averages from one count to the next.

        Raises:
            Exception: Nothing has changed then, but by an offload. After an interrupt, which comes up when
                native code returns, all has.
        """
        stable = over is self._stable
        for k in () if stable else count.started_since(before):
            self._averages.clear(k)
        if over.watched and [x.data_ptr() for x in over.watched] != over.addresses:
            raise ValueError("a buffer was given other memory after it was paired; make the EMA anew")
        if over.offloads:
            over.wait()
        decays, threads = count.decays, self._threads
        decay = decays if len(decays) > 1 else decays[0]
        try:
            for group in over.groups[1:]:  # before the first moves
                group.pairs._check_unmoved()
            for group in over.groups:
                if self._seed is None:
                    group.pairs.update(decay, threads)
                else:
                    group.pairs.update(
                        decay, threads, rounding="stochastic", seed=self._seed, step=count.step
                    )
        except (TypeError, ValueError) as error:
            raise self._values.named(error, group.leaves) from None
        for offload in over.offloads:
            offload.update(decay, threads)
        for copies in over.copies:
            copies.update(0.0, threads)  # which copies bits, whatever they mean
        for target, source in over.bytes_copied:
            _memory.write(source, target)
        if not stable:
            over.wait()

    def fence(self) -> None:
        """See `EMA.fence`."""
        if self._stable is not None:
            self._stable.fence()

    def wait(self) -> None:
        """Return when averages in host memory of values on devices have moved."""
        if self._stable is not None:
            self._stable.wait()

    # --- pairing ----------------------------------------------------------------------------------

    def _pass_over(self, local_arrays: Sequence[Arrays]) -> Pass:
        """Pair the averages with local arrays of each leaf; those of each device apart."""
        over, kept = Pass(), self._averages.by_decay
        views = {i: self._values.views(i, local) for i, local in enumerate(local_arrays)}
        for leaves in by_device(self._averages.averaged, views):
            averages = [[x for i in leaves for x in arrays[i]] for arrays in kept]
            carries = [[x for i in leaves for x in arrays[i]] for arrays in self._averages.carries]
            values = [x for i in leaves for x in local_arrays[i]]
            away = self._averages.on_host and _memory.device(views[leaves[0]][0]) is not None
            try:
                if away:
                    over.offloads.append(_offload()(averages, values, carries=carries or None))
                else:
                    pairs = Pairs.several(averages, values, carries=carries or None)
                    over.groups.append(Group(pairs, leaves))
            except (TypeError, ValueError) as error:
                raise self._values.named(error, leaves) from None
        copied = self._averages.copied
        for i in copied:
            _check_alike(self._values.names[i], views[i], kept[0][i])
        wide = [i for i in copied if _memory.face(kept[0][i][0]).itemsize > 1]
        for leaves in by_device(wide, views):
            targets = [_memory.bits(x) for i in leaves for x in kept[0][i]]
            sources = [_memory.bits(x) for i in leaves for x in views[i]]
            try:
                over.copies.append(Pairs(targets, sources))
            except (TypeError, ValueError) as error:
                raise self._values.named(error, leaves) from None
        for i in copied:
            over.watched += [x for x in local_arrays[i] if is_movable(x)]
            if _memory.face(kept[0][i][0]).itemsize == 1:
                over.bytes_copied += zip(kept[0][i], views[i], strict=True)
        over.addresses += [x.data_ptr() for x in over.watched]
        return over


def _offload() -> Any:
    from ..cuda import Offload  # noqa: PLC0415 - no CPU needs it

    return Offload.several


def _check_alike(name: str, values: Arrays, copies: Arrays) -> None:
    for value, copy in zip(map(_memory.face, values), map(_memory.face, copies), strict=True):
        if value.dtype != copy.dtype:
            raise TypeError(f"values[{name!r}] must be of {copy.dtype}, got {value.dtype}")
        if value.shape != copy.shape:
            raise ValueError(f"values[{name!r}] must have shape {copy.shape}, got {value.shape}")
