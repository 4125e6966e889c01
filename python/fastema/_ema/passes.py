"""What one update touches: averages move and copies are made, in one pass over the values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from .. import _arrays, _core
from .._types import Array
from ..functional import Engine, Pairs, paired
from .averages import Averages
from .count import Count, Now
from .exchange import to_the_end
from .tree import Nested
from .values import Locals, Values, by_device
from .views import Views

if TYPE_CHECKING:
    from ..cuda import Offload

NonFinite = Literal["average", "raise", "skip"]
_ENGINES: list[Engine] = ["native", "cuda", "torch"]  # of several the last one is shown


@dataclass
class Pass:
    """One pass over the values, checked once.

    Attributes:
        pairs: Averages that lie where their values do, by device, those in host memory first.
        named: For each of the pairs, the names of its values and these.
        offloads: Averages in host memory of values on devices.
        copies: Values that are copied, by device.
        copied_alone: Values that are copied one by one, behind where they are copied to.
        act: The pairs and copies, if they are all there is to do and native code does it at once.
        lists: Which lists of averages it moves.
    """

    pairs: list[Pairs] = field(default_factory=list)
    named: list[tuple[list[str], Locals]] = field(default_factory=list)
    offloads: list["Offload"] = field(default_factory=list)
    copies: list[Pairs] = field(default_factory=list)
    copied_alone: list[tuple[Array, Array]] = field(default_factory=list)
    act: tuple[Pairs, Pairs | None] | None = None
    lists: Sequence[int] = ()

    def decay(self, count: Count) -> float | Sequence[float]:
        """Return the decays of its lists by the update to a count, as pairs take them."""
        decays = count.decays
        if len(decays) > len(self.lists):
            decays = tuple([decays[k] for k in self.lists])
        return decays[0] if len(decays) == 1 else decays

    def check(self) -> None:
        """Wait for the update before, and raise if something was given other memory; the first pairs do so.

        Raises:
            ValueError: It was.
        """
        self.wait()
        acts = (*self.pairs, *self.copies)
        for pairs in acts[1:] if self.pairs else acts:
            pairs._check()

    def fence(self) -> None:
        """See `EMA.fence`."""
        for offload in self.offloads:
            offload.fence()

    def wait(self) -> None:
        """Return when averages in host memory of values on devices have moved."""
        for offload in self.offloads:
            offload.wait()


class Rest(NamedTuple):
    """What an interrupt left to do of an update.

    Attributes:
        passes: Who does it.
        over: What it touches.
        after: The count after it.
        moved: How many of the pairs and offloads have moved.
        cleared: Which averages are to leave zero before the first moves.
    """

    passes: "Passes"
    over: Pass
    after: Count
    moved: int
    cleared: Sequence[int] = ()

    def finish(self, now: Now) -> None:
        """Do it, and have `now` hold the count after it."""
        for k in self.cleared:
            self.passes._averages.clear(k)
        self.passes._go_on(self, now)


class Passes:
    """Carries updates out: over the same memory each time where values stay where they are.

    Args:
        values: What averages move towards.
        averages: What moves.
        local_arrays: Of each leaf, the local arrays as they are now.
        views: The modules in the memory of averages.
        seed: Of stochastic rounding. None: averages are rounded to nearest.
        threads: See `EMA`.
    """

    def __init__(
        self,
        values: Values,
        averages: Averages,
        local_arrays: Sequence[Locals],
        views: Views,
        *,
        seed: int | None,
        threads: int,
    ) -> None:
        self._values, self._averages, self._views = values, averages, views
        self._seed, self._threads = seed, threads
        checked = self._pass_over(local_arrays, averages.moving(None))
        self._on_host = not checked.offloads and all(pairs._engine == "native" for pairs in checked.pairs)
        engines = {pairs._engine for pairs in checked.pairs} or {"native"}
        self.engine: Engine = max(engines, key=_ENGINES.index)
        self._stable: Pass | None = None
        if values.are_stable and not averages.shown.is_sparse:
            self._stable = checked

    # --- the verbs --------------------------------------------------------------------------------

    def over(self, arrays: list[Array] | None, before: Count, count: Count | None = None) -> Pass:
        """Return the next pass; nothing has moved yet.

        Args:
            arrays: The new values, as `Values.matched` returns them. None: those given at first.
            before: The count until now.
            count: The count after it. None: no average will move.

        Raises:
            ValueError: The values do not fit those given at first.
        """
        stable = self._stable
        # before averages leave zero values are paired anew, so that what does not fit is noticed first
        if stable is None or before.has_zeros or arrays is not None:
            return self.over_sources(self._values.sources(arrays), count)
        return stable

    def pair_anew(self) -> None:
        """Pair averages with values that were given other memory."""
        self.wait()
        if self._stable is not None:
            self._stable = self._pass_over(self._values.local_arrays(), self._stable.lists)

    def over_sources(self, sources: Sequence[Array | None], count: Count | None) -> Pass:
        """Return a pass over what `Values.sources` returned, to a count as for `over`."""
        self.wait()
        return self._pass_over(self._values.local_arrays(sources), self._averages.moving(count))

    def average(
        self,
        sources: Sequence[Array | None],
        before: Count,
        count: Count,
        now: Now,
        *,
        non_finite: NonFinite,
        held: Count,
    ) -> None:
        """Move the averages towards what `Values.sources` returned, in any thread.

        Args:
            sources: What `Values.sources` returned.
            before: The count until now.
            count: The count after it.
            now: As for `move`.
            non_finite: See `EMA.update`.
            held: The count after it if that keeps averages from moving.
        """
        over = self.over_sources(sources, count)
        if non_finite != "average" and self.holds(over, non_finite):
            now[0] = held
        else:
            self.move(over, before, count, now)

    def check_can_look(self, non_finite: NonFinite) -> None:
        """Raise if values cannot be looked at here and now.

        Raises:
            ValueError: They lie on a device, or each process has some of their shards.
        """
        kind = "device" if self.engine == "torch" else "CUDA device"
        place = None if self._on_host else f"values lie on a {kind}"
        for leaf, name in zip(self._values.leaves, self._values.names, strict=True):
            if leaf.shards is not None and leaf.shards.owners != leaf.shards.mine:
                place = f"each process sees its own shards alone, as of values[{name!r}]"
        if place is not None:
            raise ValueError(
                f"non_finite must be 'average' where {place}, got {non_finite!r}; leave out the update of a "
                "step whose gradients have no finite norm"
            )

    def holds(self, over: Pass, non_finite: NonFinite) -> bool:
        """Tell whether averages are to stay where they are: a value holds an infinity or a NaN.

        Raises:
            FloatingPointError: One does, and `non_finite` is ``"raise"``.
        """
        for pairs, (names, values) in zip(over.pairs, over.named, strict=True):
            found = pairs.first_non_finite(self._threads)
            if found is None:
                continue
            if non_finite == "skip":
                return True
            raise FloatingPointError(
                f"values[{names[found]!r}] must be finite, got {_first_non_finite(values[found])}; leave "
                "this update out, or give non_finite='skip'"
            )
        return False

    def only_copied(self, arrays: list[Array] | None, before: Count) -> Pass | None:
        """Return a pass for what is not averaged, and note the values, before the first step that averages.

        Args:
            arrays: As for `over`.
            before: The count until now.
        """
        if arrays is None and any(leaf.immutable for leaf in self._values.leaves):
            return None
        over = self.over(arrays, before) if self._averages.copied else None
        self._values.latest = None if arrays is None else self._values.sources(arrays)
        return over

    def skip(self, over: Pass | None, count: Count, now: Now) -> None:
        """Copy what is not averaged at a step that does not average.

        Args:
            over: What `only_copied` returned. None: copy nothing.
            count: The count after the step.
            now: As for `move`.
        """
        if self.engine == "cuda" and self._stable is not None:
            for pairs in self._stable.pairs:
                pairs._check_counted()
        if over is not None:
            self._views.follow(self._values, self._averages)
            now[0] = Rest(self, over, count, len(over.pairs) + len(over.offloads))
            self._copy(over)
        now[0] = count

    def move(self, over: Pass, before: Count, count: Count, now: Now) -> None:
        """Move the averages from one count to the next.

        Args:
            over: What `over` returned.
            before: The count until now.
            count: The count after it.
            now: Made to hold that by the native code that moves them, and a `Rest` before if there is more
                to do: so it is true whatever interrupt comes up as native code returns.

        Raises:
            Exception: Nothing has changed then, but by an offload.
        """
        if self._views.each:
            self._views.follow(self._values, self._averages)
        if over.act is not None and not before.has_zeros:
            pairs, copies = over.act
            decays = count.decays
            decay = decays[0] if len(decays) == 1 else over.decay(count)
            pairs._move(decay, self._threads, now, count, copies, seed=self._seed, step=count.step)
            return
        over.check()
        cleared = count.started_since(before)
        rest = Rest(self, over, count, 0, cleared)
        if cleared:
            now[0] = rest
        rest.finish(now)

    def start_again(
        self, arrays: list[Array] | None, later: Nested, before: Count, start: Count, now: Now
    ) -> None:
        """Let the averages start at the values; all of that happens or, where it raises, nothing.

        Args:
            arrays: As for `over`.
            later: What holds them, as for `Values.keep`.
            before: The count until now.
            start: The count from then on.
            now: As for `move`.
        """
        over = self.over(arrays, before)
        over.wait()
        for pairs in (*over.pairs, *over.copies):
            pairs._check()
        local_arrays = self._values.local_arrays(self._values.sources(arrays))
        self._values.keep(later, arrays)
        self._views.follow(self._values, self._averages)
        to_the_end(self._start_at, local_arrays, start, now)

    def _start_at(self, local_arrays: Sequence[Locals], start: Count, now: Now) -> None:
        self._averages.start_at(local_arrays)
        self._values.latest = None
        now[0] = start

    def _go_on(self, rest: Rest, now: Now) -> None:
        """Move what has not moved, and copy; what was copied before is copied again."""
        over, count, moved = rest.over, rest.after, rest.moved
        decay = over.decay(count)
        for pairs in over.pairs[moved:]:
            moved += 1
            rest = Rest(self, over, count, moved)
            pairs._move(decay, self._threads, now, rest, seed=self._seed, step=count.step)
        for offload in over.offloads[moved - len(over.pairs) :]:
            offload.update(decay, self._threads)
            moved += 1
            now[0] = Rest(self, over, count, moved)
        now[0] = Rest(self, over, count, moved)
        self._copy(over)
        if over is not self._stable:
            over.wait()
        now[0] = count

    def _copy(self, over: Pass) -> None:
        for copies in over.copies:
            copies._copy(self._threads)
        for target, source in over.copied_alone:
            _arrays.write(source, target)

    def fence(self) -> None:
        """See `EMA.fence`."""
        if self._stable is not None:
            self._stable.fence()

    def wait(self) -> None:
        """Return when averages in host memory of values on devices have moved."""
        if self._stable is not None:
            self._stable.wait()

    # --- pairing ----------------------------------------------------------------------------------

    def _pass_over(self, local_arrays: Sequence[Locals], lists: Sequence[int]) -> Pass:
        """Pair some lists of averages with local arrays of each leaf; those of each device apart."""
        over, kept, names = Pass(lists=lists), self._averages, self._values.names
        for leaves in by_device(kept.averaged, local_arrays):
            averages, carries = kept.rows(leaves, lists)
            values = [x for i in leaves for x in local_arrays[i]]
            named = [names[i] for i in leaves for _ in local_arrays[i]]
            if kept.on_host and _arrays.device(values[0]) is not None:
                lying = [_arrays.describe(x) for x in values]
                _core.check(averages, lying, carries, names=named, averages_per_value=len(lists))
                over.offloads.append(_offload(kept, leaves, values, lists))
            else:
                pairs = paired(averages, values, carries, names=named, averages_per_value=len(lists))
                over.pairs.append(pairs)
                over.named.append((named, values))
        copies = kept.by_decay[0]
        for i in kept.copied:
            _check_alike(names[i], local_arrays[i], copies[i])
        for leaves in by_device((i for i in kept.copied if i not in kept.alone), local_arrays):
            targets = [x for i in leaves for x in copies[i]]
            values = [x for i in leaves for x in local_arrays[i]]
            named = [names[i] for i in leaves for _ in copies[i]]
            over.copies.append(paired(targets, values, names=named, verb="copy"))
        for i in kept.alone:
            over.copied_alone += zip(copies[i], local_arrays[i], strict=True)
        over.act = _at_once(over)
        return over


def _at_once(over: Pass) -> tuple[Pairs, Pairs | None] | None:
    if len(over.pairs) != 1 or len(over.copies) > 1 or over.offloads or over.copied_alone:
        return None
    if not over.copies:
        return over.pairs[0], None
    are_on_host = over.pairs[0]._engine == over.copies[0]._engine == "native"
    return (over.pairs[0], over.copies[0]) if are_on_host else None


def _first_non_finite(array: Array) -> str:
    host = _arrays.host(array)
    index = tuple(map(int, np.argwhere(~np.isfinite(host))[0]))
    return f"{host[index]} at {index}"


def _offload(kept: Averages, leaves: Sequence[int], values: Locals, lists: Sequence[int]) -> "Offload":
    from ..cuda import Offload  # noqa: PLC0415 - no CPU needs it

    averages = [[x for i in leaves for x in kept.by_decay[k][i]] for k in lists]
    carries = [[x for i in leaves for x in arrays[i]] for arrays in kept.carries]
    return Offload.several(averages, values, carries=carries or None)


def _check_alike(name: str, values: Locals, copies: Locals) -> None:
    for value, copy in zip(values, copies, strict=True):
        if isinstance(value, np.ndarray):
            _arrays.plain(value, f"values[{name!r}]")
        if (dtype := _arrays.dtype_of(value)) != (needed := _arrays.dtype_of(copy)):
            raise TypeError(f"values[{name!r}] must be of {needed}, got {dtype}")
        if (shape := _arrays.shape_of(value)) != (its := _arrays.shape_of(copy)):
            raise ValueError(f"values[{name!r}] must have shape {its}, got {shape}")
