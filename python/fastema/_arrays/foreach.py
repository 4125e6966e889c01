"""Averages that torch's own operations move, on devices for which fastema has no kernel.

`torch._foreach_*` takes many tensors at once: one launch where the device has such kernels; where it has not,
torch does one for each. Every operation rounds for itself, as in `cpp/src/formula.hpp`: `lerp` and
``add(alpha=)`` may be fused. So bits are NumPy's where the device computes as IEEE 754 says.

What is to be done is a list of calls, made without an instruction of Python between them, and so without an
interrupt. All memory for them is allocated before the first. They go batch by batch, which bounds it.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import starmap
from operator import call
from typing import NamedTuple

import numpy as np

from .. import _formula
from .._types import AnyArray
from .recorded import Call, Key, Numbers, Recorder

TEMPORARIES = 64 << 20  # bytes at most, of each type that is computed in or exchanged
_ALL = 1 << 62  # elements

_BUFFERS = {"nearest": 2, "compensated": 8, "stochastic": 16}  # that are in use at once, at most


@contextmanager
def working() -> Iterator[None]:
    """Have torch record no gradients, write inference tensors and run no code of the user's classes."""
    import torch  # noqa: PLC0415 - loaded already, here and below: who asks has tensors

    with torch.inference_mode(), torch._C.DisableTorchFunction():
        yield


def run(calls: Sequence[Call]) -> None:
    """Make calls one after the other, while `working`."""
    deque(starmap(call, calls), maxlen=0)


class _Part(NamedTuple):
    """Elements of a pair.

    Attributes:
        pair: Its number.
        begin: The first of them, in their order in memory.
        size: How many.
        is_all: Whether they are all.
    """

    pair: int
    begin: int
    size: int
    is_all: bool

    def of(self, tensor: AnyArray) -> AnyArray:
        """Return these elements of a tensor."""
        if self.is_all:
            return tensor
        axes = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
        return tensor.permute(axes).view(-1)[self.begin : self.begin + self.size]


class _Batch(NamedTuple):
    """Parts of pairs of one mix of types, that are moved together.

    Attributes:
        parts: Which they are.
        averages: Theirs.
        values: Theirs.
        carries: Theirs; none where nothing is compensated.
    """

    parts: list[_Part]
    averages: list[AnyArray]
    values: list[AnyArray]
    carries: list[AnyArray]

    @property
    def sizes(self) -> list[int]:
        """The sizes of the parts."""
        return [part.size for part in self.parts]


class _Mix(NamedTuple):
    """Pairs of one mix of types.

    Attributes:
        average: The type of averages.
        value: That of values.
        pairs: The numbers of those that have elements, and how many.
    """

    average: AnyArray
    value: AnyArray
    pairs: list[tuple[int, int]]


class Lists:
    """Averages and values on one device, which were checked, and are given no other memory.

    Args:
        averages: Those that share a value follow each other.
        values: One for all averages in a row that share it.
        carries: None, or one for each average.
    """

    def __init__(
        self, averages: Sequence[AnyArray], values: Sequence[AnyArray], carries: Sequence[AnyArray]
    ) -> None:
        self._averages, self._values, self._carries = averages, values, carries
        self._each = len(averages) // max(len(values), 1)
        self._mixes = [self._mixes_of(k) for k in range(self._each)]  # of each average of a value
        self._cut: dict[tuple[int, int], list[_Batch]] = {}

    def _mixes_of(self, k: int) -> list[_Mix]:
        found = defaultdict(list)
        for pair in range(k, len(self._averages), self._each):
            average, value = self._averages[pair], self._values[pair // self._each]
            if average.numel():
                found[average.dtype, value.dtype].append((pair, average.numel()))
        return [_Mix(*kinds, pairs) for kinds, pairs in found.items()]

    def _batch(self, parts: list[_Part]) -> _Batch:
        return _Batch(
            parts,
            [part.of(self._averages[part.pair]) for part in parts],
            [part.of(self._values[part.pair // self._each]) for part in parts],
            [part.of(self._carries[part.pair]) for part in parts] if self._carries else [],
        )

    def _batches(self, mix: _Mix, most: int) -> list[_Batch]:
        """Return batches of at most so many elements, which are cut once."""
        key = mix.pairs[0][0], most
        if key not in self._cut:
            cut: list[list[_Part]] = [[]]
            room = most
            for pair, size in mix.pairs:
                for begin in range(0, size, most):
                    part = _Part(pair, begin, min(most, size - begin), size <= most)
                    if part.size > room:
                        cut.append([])
                        room = most
                    cut[-1].append(part)
                    room -= part.size
            self._cut[key] = [self._batch(parts) for parts in cut]
        return self._cut[key]

    # --- the verbs, as calls ----------------------------------------------------------------------

    def copied(self) -> list[Call]:
        """Return calls that copy values to averages."""
        return [made for mix in self._mixes[0] for made in self._copied(mix)] if self._mixes else []

    def _copied(self, mix: _Mix) -> list[Call]:
        import torch  # noqa: PLC0415

        (everything,) = self._batches(mix, _ALL)
        calls: list[Call] = [(torch._foreach_copy_, everything.averages, everything.values)]
        if everything.carries:
            calls.append((torch._foreach_zero_, everything.carries))
        return calls

    def swapped(self) -> list[Call]:
        """Return calls that exchange contents, by way of a copy of a batch."""
        import torch  # noqa: PLC0415

        calls: list[Call] = []
        for mix in self._mixes[0] if self._mixes else ():
            batches = self._batches(mix, TEMPORARIES // mix.average.itemsize)
            recorder = Recorder(self._averages[0], max(sum(batch.sizes) for batch in batches))
            for batch in batches:
                recorder.size = sum(batch.sizes)
                kept = recorder.gathered(batch.averages, str(mix.average).removeprefix("torch."))
                recorder.record(torch._foreach_copy_, batch.averages, batch.values)
                kept.scatter(batch.values)
                del kept  # or the next batch would have another buffer
            calls += recorder.calls
        return calls

    def updated(self, decays: Sequence[float], place: tuple[int, int] | None) -> list[Call]:
        """Return calls that move averages.

        Args:
            decays: One for each average of a value.
            place: Seed and step of stochastic rounding. None: averages are rounded to nearest.
        """
        calls: list[Call] = []
        moved: list[tuple[float, _Mix]] = []
        way, itemsize = "nearest", 4
        for decay, mixes in zip(decays, self._mixes, strict=False):
            for mix in mixes:
                at_random = bool(self._carries or place) and mix.average.itemsize == 2
                # what copies without a loss needs neither random bits nor a carry
                if decay == 0.0 and (mix.average.itemsize >= mix.value.itemsize or not at_random):
                    calls += self._copied(mix)
                    continue
                moved.append((decay, mix))
                itemsize = max(itemsize, mix.average.itemsize)
                way = "compensated" if self._carries else "stochastic" if at_random else way
        if not moved:
            return calls
        most = TEMPORARIES // (itemsize * _BUFFERS[way])
        most = 1 << (most.bit_length() - 1)  # no part crosses a multiple of 2**32 elements
        batches = [(decay, batch) for decay, mix in moved for batch in self._batches(mix, most)]
        recorder = Recorder(self._averages[0], max(sum(batch.sizes) for _, batch in batches))
        for decay, batch in batches:
            recorder.size = sum(batch.sizes)
            _move(recorder, batch, decay, place)
        return calls + recorder.calls


# --- the arithmetic of a batch ------------------------------------------------------------------------


def _move(recorder: Recorder, batch: _Batch, decay: float, place: tuple[int, int] | None) -> None:
    import torch  # noqa: PLC0415

    kind = batch.averages[0].dtype
    weight = 1.0 - decay if kind == torch.float64 else float(np.float32(1.0 - decay))
    if kind.itemsize == 2:
        _move_short(recorder, batch, decay, weight, place)
    elif batch.carries:
        _move_compensated(recorder, batch, weight)
    else:
        steps = recorder.gathered(batch.values, str(kind).removeprefix("torch."))
        beside = steps.beside(batch.averages)
        recorder.record(torch._foreach_sub_, beside, batch.averages)
        steps *= weight
        recorder.record(torch._foreach_add_, batch.averages, beside)


def _move_compensated(recorder: Recorder, batch: _Batch, weight: float) -> None:
    """Move float32 averages: the twin of ``blend_compensated`` in cpp/src/formula.hpp."""
    high, low = (recorder.gathered(tensors, "float32") for tensors in (batch.averages, batch.carries))
    step = recorder.gathered(batch.values, "float32")
    step -= high
    step -= low
    step *= weight
    step += low
    total = high + step
    taken = total - high
    step -= taken
    high -= total - taken
    high += step
    high.scatter(batch.carries)
    total.scatter(batch.averages)


def _move_short(
    recorder: Recorder, batch: _Batch, decay: float, weight: float, place: tuple[int, int] | None
) -> None:
    """Move averages of 16 bits, which are computed in float32 and rounded once."""
    import torch  # noqa: PLC0415

    value = recorder.gathered(batch.values, "float32")
    halves = [tensor.view(torch.int16) for tensor in batch.averages]
    if decay == 0.0:
        average = value
    else:
        if batch.carries:
            upper, lower = (recorder.gathered(tensors, "int32") for tensors in (halves, batch.carries))
            average = recorder.bitcast(_formula.join_bf16(upper, lower), "float32")
            del upper, lower
        else:
            average = recorder.gathered(batch.averages, "float32")
        average.blend(value, weight)
    del value
    bits = recorder.bitcast(average, "uint32")
    if batch.carries:
        high, low = _formula.split_bf16(bits, recorder.where)
        (high >> np.uint32(16)).scatter_lower(halves)
        low.scatter_lower(batch.carries)
    elif place is None:
        average.scatter(batch.averages)
    else:
        random = _random_bits(recorder, batch, *place)
        if batch.averages[0].dtype == torch.bfloat16:
            half = _formula.round_bf16_at_random(bits, random, recorder.where) >> np.uint32(16)
        else:
            tools = recorder.bitcast, recorder.cast, recorder.where
            half = _formula.narrow_f16_at_random(bits, random, *tools)
        half.scatter_lower(halves)


def _random_bits(recorder: Recorder, batch: _Batch, seed: int, step: int) -> Numbers:
    parts = batch.parts
    pairs, begins = (np.array(x, np.uint64) for x in ([x.pair for x in parts], [x.begin for x in parts]))
    keys = _formula.key_of(np.full(1, seed, np.uint64), np.uint64(step), pairs, begins)
    low, high = keys & np.uint64(2**32 - 1), keys >> np.uint64(32)
    place = recorder.places([part.begin for part in parts], batch.sizes)
    key = Key(*(recorder.repeated(words.tolist(), batch.sizes) for words in (low, high)))
    random: Numbers = _formula.random_bits(place, key, recorder.cast, recorder.where)
    return random
