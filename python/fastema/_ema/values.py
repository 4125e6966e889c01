"""The user's values: which arrays they are, by which names, and where each of them lies by now."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from .. import _arrays, _core
from .._arrays import Carried, ComplexLeaf, Leaf, Place
from .._types import FLOATS, AnyArray, Array, DType
from .tree import Nested, Selection, Tree

Locals = list[AnyArray]  # the local arrays of a leaf, as they are worked on: NumPy's, or on a device


class Signature(NamedTuple):
    """What a local array is like; averages are made for it.

    Attributes:
        dtype: Its type.
        shape: Its shape.
        device: The device that it lies on; None: host memory.
    """

    dtype: DType
    shape: tuple[int, ...]
    device: Place | None

    def __str__(self) -> str:
        kind = "CUDA device" if isinstance(self.device, int) else "device"
        place = "" if self.device is None else f" on {kind} {self.device}"
        return f"{self.dtype} of shape {self.shape}{place}"


class Values:
    """The arrays that were given to be averaged, each once, however often it was given (tied weights).

    Nothing is kept of arrays that never change (JAX's), since every step of training leaves others.

    Attributes:
        leaves: The distinct arrays, and what is carried along.
        names: Of each leaf, the first one that it was given under.
        local_names: Of each leaf, the names of its local arrays: several only where it is sharded.
        buffers: The names of a module's buffers.
        latest: Of each leaf the array that an update was given which averaged nothing; while none has.
        later: What the last update was given, if that were others than these. They are not looked at until
            they are asked for.
        elsewhere: Whether the last update was given arrays of another library than these.
        moving: Where those leaves lie that can be given other memory.
    """

    def __init__(self, given: Nested, tree: Tree) -> None:
        self._given, self._tree = given, tree
        self.buffers = tree.buffers
        self.leaves: list[Leaf] = []
        self.names: list[str] = []
        self.local_names: list[list[str]] = []
        self.latest: list[Array | None] | None = None
        self.later: Nested | None = None
        self.elsewhere = False
        self._arrays: list[Array | None] = []  # of each value in the tree; None if it never changes
        self._places: list[int] = []  # of each value in the tree, its leaf
        self._firsts: list[int] = []  # of each leaf, its first value in the tree

    @classmethod
    def of(cls, given: Nested, selection: Selection, *, unchanging: bool) -> tuple["Values", list[Locals]]:
        """Take the user's values apart.

        Args:
            given: What `fastema.EMA` is given.
            selection: Which of them are meant.
            unchanging: Whether values that can change are refused.

        Returns:
            The values, and of each leaf the local arrays as they are now.

        Raises:
            TypeError: Something is no array, or its memory cannot be viewed.
            ValueError: A value can change, and must not; or there are none.
        """
        if isinstance(given, Iterator):
            given = list(given)
        tree, arrays = Tree.of(given, _arrays.is_leaf, selection)
        values = cls(given, tree)
        return values, values._take(arrays, unchanging)

    def _take(self, arrays: list[Array], unchanging: bool) -> list[Locals]:
        found: list[Locals] = []
        places: dict[object, int] = {}
        for array, name in zip(arrays, self._tree.names, strict=True):
            constant = name in self._tree.constants
            leaf = Carried(array) if constant else _arrays.leaf(array, f"values[{name!r}]")
            if unchanging and not leaf.immutable and not isinstance(leaf, Carried):
                raise ValueError(
                    "background must be False unless values cannot change meanwhile, as JAX arrays; "
                    f"values[{name!r}] is of {type(array).__name__}"
                )
            local = leaf.local_arrays(array if leaf.immutable else None)
            # an immutable array that is given twice may well become two
            alone = leaf.immutable or constant
            key = id(leaf) if alone else _memory_of(local[0]) if leaf.stable and local else id(array)
            place = places.setdefault(key or id(array), len(self.leaves))
            if place == len(self.leaves):
                self.leaves.append(leaf)
                self.names.append(name)
                several = len(local) > 1
                names = [f"{name}/{j}" for j in range(len(local))] if several else [name][: len(local)]
                self.local_names.append(names)
                self._firsts.append(len(self._places))
                found.append(local)
            self._places.append(place)
            self._arrays.append(None if leaf.immutable else array)
        if not any(found):
            raise ValueError(
                f"values must hold an array that can be averaged or copied, and there is none in "
                f"{sorted(self._tree.names)}"
            )
        self._leaf_of = dict(zip(self._tree.names, self._places, strict=True))
        self.signatures = [_signatures_of(local) for local in found]
        self._orders = _orders_of(found)
        self._reader = _arrays.Reader(self.leaves)
        self._carried = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Carried)]
        self._is_passed = any(leaf.immutable for leaf in self.leaves)
        if self._is_passed:
            self._given, self._tree.containers = None, []  # a step leaves others, and nothing keeps these
        watched = self._tree.containers
        self._contents = None if watched is None else _core.Contents(watched)
        self.moving = _arrays.Addresses(leaf.address for leaf in self.leaves if leaf.may_move)
        return found

    # --- shape ------------------------------------------------------------------------------------

    def matched(self, other: Nested) -> list[Array]:
        """Return the arrays of other values of this shape, one for each that was given, in order.

        Raises:
            ValueError: They have another shape.
        """
        return self._tree.arrays(other)

    def targets(self, others: Nested | None = None) -> list["Target"]:
        """Return what averages are written into for good: the values, or others of their shape.

        Raises:
            TypeError: One of the others is no array, or its memory cannot be viewed.
            ValueError: They have another shape, or one is sharded otherwise than the value.
        """
        given = zip(self._tree.names, self._places, strict=True)
        if others is None:
            return [Target(name, place, self.leaves[place], []) for name, place in given]
        targets = []
        for array, (name, place) in zip(self.matched(others), given, strict=True):
            carried = isinstance(self.leaves[place], Carried)
            leaf = Carried(array) if carried else _arrays.leaf(array, f"values[{name!r}]")
            if leaf.shards != self.leaves[place].shards:
                raise ValueError(f"values[{name!r}] must be sharded, or whole, as it was at first")
            targets.append(Target(name, place, leaf, leaf.local_arrays(array)))
        return targets

    def by_name(self, arrays: Mapping[int, Locals]) -> dict[str, Array]:
        """Return the local arrays of some leaves by their names."""
        return {
            name: array
            for i, local in arrays.items()
            for name, array in zip(self.local_names[i], local, strict=True)
        }

    def build(self, of_leaves: Sequence[Array]) -> Nested:
        """Put one array for each leaf together as the values were given."""
        return self._tree.build(of_leaves[place] for place in self._places)

    def build_given(self, arrays: Iterable[Array]) -> Nested:
        """Put one array for each that was given together as the values were."""
        return self._tree.build(arrays)

    # --- reading ----------------------------------------------------------------------------------

    @property
    def are_stable(self) -> bool:
        """Whether the values' memory is paired once, and not read anew at each update."""
        return all(leaf.stable for leaf in self.leaves)

    @property
    def are_passed(self) -> bool:
        """Whether a value never changes, so that each update is given others."""
        return self._is_passed

    def are_given(self, arrays: list[Array]) -> bool:
        """Tell whether arrays in order are those that are averaged already."""
        return all(map(operator.is_, arrays, self._arrays))

    def sources(self, arrays: list[Array] | None) -> list[Array | None]:
        """Return for each leaf the array to read; None: its own, as it is by then.

        Raises:
            ValueError: None were given, and a leaf never changes.
        """
        if arrays is not None:
            return [arrays[place] for place in self._firsts]
        for leaf, name in zip(self.leaves, self.names, strict=True):
            if leaf.immutable:
                raise ValueError(
                    f"values must be given: values[{name!r}] {leaf.obstacle()}, and a step leaves others"
                )
        return [None] * len(self.leaves)

    def local_arrays(self, sources: Sequence[Array | None] | None = None) -> list[Locals]:
        """Return the local arrays of each leaf, read from what `sources` returned; None: from its own."""
        if sources is None:
            return [leaf.local_arrays() for leaf in self.leaves]
        return self._reader.local_arrays(sources)

    def keep(self, later: Nested | None, arrays: list[Array] | None) -> None:
        """Keep what an update was given, to be changed by a swap; nothing of what never changes."""
        if arrays is None:
            return
        for i in self._carried:
            leaf = self.leaves[i]
            assert isinstance(leaf, Carried)
            leaf.value = arrays[self._firsts[i]]
        if not self._is_passed:
            pairs = zip(arrays, self._arrays, strict=True)
            self.elsewhere = any(
                type(x) is not type(y) and _arrays.library_of(x) is not _arrays.library_of(y)
                for x, y in pairs
            )
            self.later = None if self.elsewhere else later

    def forget(self) -> None:
        """Take notice that an update was given these values again."""
        self.later, self.elsewhere = None, False

    # --- other arrays in their place ----------------------------------------------------------------

    def is_container(self, other: Nested) -> bool:
        """Tell whether this is what holds the values, which is looked at anyway."""
        return other is self._given and not self._is_passed

    @property
    def given(self) -> Nested:
        """What holds the values."""
        return self._given

    def module(self) -> Nested:
        """Return the torch module that holds the values.

        Raises:
            TypeError: They are held by something else.
        """
        module = self._given
        if not hasattr(module, "state_dict") or not hasattr(module, "named_parameters"):
            raise TypeError(f"values must be a torch module, got {type(module).__name__}: use averages")
        return module

    def placed(self) -> Iterable[tuple[str, int, Array | None]]:
        """Return of each value that was given its name, its leaf and, if it can change, the array."""
        return zip(self._tree.names, self._places, self._arrays, strict=True)

    def replaced(self) -> bool:
        """Tell whether what holds the values holds other arrays by now."""
        if self._contents is not None and not self._contents.changed():
            return False
        if not _arrays.are_shown(self._arrays):
            return False
        try:
            if self._is_passed or self.are_given(self.matched(self._given)):
                if self._contents is not None:
                    self._contents.accept()  # other things changed, as buffers that no checkpoint holds
                return False
        except ValueError:
            pass
        return True

    def held_buffers(self) -> list[dict[str, Array]]:
        """Return which buffers a module's parts hold."""
        return [
            {key: x for key, x in held.items() if key not in hidden} for held, hidden in self._tree.buffers_of
        ]

    def put_back(self, before: list[dict[str, Array]]) -> None:
        """Have a module hold the very buffers that `held_buffers` returned."""
        for (held, hidden), buffers in zip(self._tree.buffers_of, before, strict=True):
            for key in [key for key in held if key not in hidden and key not in buffers]:
                del held[key]
            for key, buffer in buffers.items():
                if held.get(key) is not buffer:
                    held[key] = buffer

    def check_kept(self) -> None:
        """Raise if other values were replaced since `held_buffers` was called.

        Raises:
            RuntimeError: They were.
        """
        if self.replaced():
            raise RuntimeError(
                "values must stay the arrays that they are while averages are in their place, and some were "
                "replaced: the weights are back in those given before; call ema.rebind(values)"
            )

    def leaf_named(self, name: str) -> int | None:
        """Return the leaf that a value of some name is."""
        return self._leaf_of.get(name)

    def check_follows(self, before: "Values", *, call: str | None) -> None:
        """Raise if these cannot take the place of others.

        Args:
            before: Those until now.
            call: What was asked to have these follow. None: nothing, and they were found: then they must be
                alike in all.

        Raises:
            RuntimeError: They were found, and differ.
            ValueError: They were asked for, and differ.
        """
        ours, theirs = self._tied(), before._tied()
        if (missing := theirs.keys() - ours.keys()) | (more := ours.keys() - theirs.keys()):
            raise _refusal(
                call,
                f"values must have the names given at first; missing: {sorted(missing)}, unknown: "
                f"{sorted(more)}; make the EMA anew",
            )
        for name, first in ours.items():
            if call is None and first != theirs[name]:
                is_now, was = (
                    "an array of its own" if other == name else f"the same array as values[{other!r}]"
                    for other in (first, theirs[name])
                )
                raise RuntimeError(
                    f"values[{name!r}] is {is_now} now, and was {was} at first: call ema.rebind(values) to "
                    "go on so"
                )
        for i, name in enumerate(self.names):
            place = before.leaf_named(name)
            if place is not None and self.leaves[i].shards != before.leaves[place].shards:
                raise _refusal(call, f"values[{name!r}] must be sharded, or whole, as it was at first")
            if place is not None and name not in self.buffers:
                _check_kind(name, self.leaves[i], before.leaves[place])
                _check_signature(name, self.signatures[i], before.signatures[place], call)

    def _tied(self) -> dict[str, str]:
        """Return of each name but those of buffers the first one that its leaf has."""
        return {
            name: self.names[place]
            for name, place in zip(self._tree.names, self._places, strict=True)
            if name not in self.buffers
        }

    def are_as_before(self) -> bool:
        """Tell whether all arrays are of the types, shapes, orders and devices that they were of."""
        found = self.local_arrays()
        return [_signatures_of(local) for local in found] == self.signatures and _orders_of(
            found
        ) == self._orders

    def memory(self) -> set[object]:
        """Return what tells whether other values are these: objects and addresses."""
        found: set[object] = {id(array) for array in self._arrays if array is not None}
        for leaf in self.leaves:
            if leaf.stable and not isinstance(leaf, Carried):
                found.update(_memory_of(x) for x in leaf.local_arrays())
        return found - {None}

    # --- checks -----------------------------------------------------------------------------------

    def check_own(self, call: str) -> None:
        """Raise if the last update was given what cannot take the place of these.

        Raises:
            RuntimeError: It was.
        """
        if self.elsewhere:
            raise RuntimeError(
                f"{call} must change what the last update was given, and that was of another library than "
                "the values given at first: call ema.rebind(values) with what is to be changed"
            )

    def check_writable(self, call: str) -> None:
        """Raise if something keeps a value from being changed."""
        self.check_own(call)
        for leaf, name in zip(self.leaves, self.names, strict=True):
            check_writable(leaf, name, call)

    def check_exchange(self) -> None:
        """Raise if copies of the values would go on holding the weights when averages are in their place."""
        _arrays.check_exchange(self._arrays)

    def exchanged(self) -> None:
        """Have libraries forget copies of values, whose contents were exchanged."""
        _arrays.exchanged(self._arrays)


class Target(NamedTuple):
    """An array that is given averages for good.

    Attributes:
        name: What errors call it.
        place: The leaf whose averages it is given.
        leaf: What can be done with it.
        local_arrays: Where it is none of the values.
    """

    name: str
    place: int
    leaf: Leaf
    local_arrays: Locals


def check_writable(leaf: Leaf, name: str, call: str) -> None:
    """Raise if something keeps one value from being changed."""
    obstacle = leaf.obstacle()
    if leaf.immutable:
        raise TypeError(f"{call} must change values[{name!r}], which {obstacle}: use `averages` or copy_to()")
    if obstacle is not None:
        raise ValueError(f"{call} must change values[{name!r}], which {obstacle}")


def by_device(
    leaves: Iterable[int], local_arrays: Sequence[Locals] | Mapping[int, Locals]
) -> list[list[int]]:
    """Return leaves whose values lie in one memory together; those in host memory come first."""
    on_host: list[int] = []
    groups: dict[Place, list[int]] = {}
    for i in leaves:
        device = _arrays.device(local_arrays[i][0])
        (on_host if device is None else groups.setdefault(device, [])).append(i)
    return [
        together
        for together in (on_host, *(groups[device] for device in sorted(groups, key=_rank)))
        if together
    ]


def _rank(device: Place) -> tuple[bool, Place]:
    """Return what devices are sorted by: those of CUDA come first."""
    return isinstance(device, str), device


def _memory_of(array: Array) -> object:
    """Return what tells an array's memory from others'; nothing for arrays without elements."""
    found = _arrays.describe(array)
    return (found.address, found.shape, found.strides, found.dtype) if found.size else None


def _signatures_of(local: Locals) -> list[Signature]:
    return [Signature(_arrays.dtype_of(x), _arrays.shape_of(x), _arrays.device(x)) for x in local]


def _orders_of(found: Sequence[Locals]) -> list[tuple[int, ...]]:
    return [_arrays.describe(x).strides for local in found for x in local]


def _check_kind(name: str, leaf: Leaf, before: Leaf) -> None:
    for kind, yes, no in (
        (Carried, "carried along", "an array"),
        (ComplexLeaf, "complex", "of real numbers"),
    ):
        if isinstance(leaf, kind) != isinstance(before, kind):
            needed, got = (no, yes) if isinstance(leaf, kind) else (yes, no)
            raise TypeError(f"values[{name!r}] must be {needed}, as it was at first, got one that is {got}")


def _check_signature(name: str, now: list[Signature], before: list[Signature], call: str | None) -> None:
    """Raise if a value became another one; with a call, only if it is of another shape or kind."""
    if now == before:
        return
    if call is None:
        cure = "make the EMA anew"
        if [x.shape for x in now] == [x.shape for x in before]:
            cure = "call ema.rebind(values) to go on with it"
        needed, got = (" and ".join(map(str, x)) for x in (before, now))
        raise RuntimeError(f"values[{name!r}] must be {needed}, as it was at first, and is {got}: {cure}")
    for this, other in zip(now, before, strict=True):
        if this.shape != other.shape:
            raise ValueError(f"values[{name!r}] must have shape {other.shape}, got {this.shape}")
        if this.dtype != other.dtype and not (this.dtype in FLOATS and other.dtype in FLOATS):
            raise TypeError(f"values[{name!r}] must be of {other.dtype}, got {this.dtype}")


def _refusal(call: str | None, text: str) -> Exception:
    return RuntimeError(text) if call is None else ValueError(text)
