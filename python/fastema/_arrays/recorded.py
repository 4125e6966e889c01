"""Arithmetic that is written down as calls, to be made later and at once, in memory that is there already.

Operators of `Numbers` are those that `_formula` uses. Each takes a buffer for its result, which it gives back
when nobody has the result any more; so the buffers of one batch of elements serve the next.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import ReferenceType

import numpy as np

from .._types import AnyArray

Call = tuple[Any, ...]  # a function and its arguments


class Recorder:
    """Calls that were written down, and the buffers that they compute in.

    Args:
        like: A tensor on the device where they are.
        most: How many elements a buffer has.

    Attributes:
        calls: What was written down.
        size: How many elements there are in this batch.
    """

    def __init__(self, like: AnyArray, most: int) -> None:
        import torch  # noqa: PLC0415 - loaded already, here and below: who asks has a tensor

        self._torch, self._like, self._most = torch, like, most
        self._loans: list[_Loan] = []
        self._free: dict[str, list[_Loan]] = defaultdict(list)
        self.calls: list[Call] = []
        self.size = most

    def record(self, function: Any, *arguments: Any) -> None:
        """Write a call down."""
        self.calls.append((function, *arguments))

    def new(self, kind: str) -> "Numbers":
        """Return a buffer, with anything in it."""
        free = self._free[kind]
        if free:
            memory = free.pop().memory
        else:
            memory = self._like.new_empty(self._most, dtype=getattr(self._torch, kind))
        made = Numbers(self, memory[: self.size], kind, None)
        loan = _Loan(made, free.append)
        loan.memory = memory
        self._loans.append(loan)
        return made

    def gathered(self, tensors: Sequence[AnyArray], kind: str) -> "Numbers":
        """Return a copy of tensors, one after the other."""
        made = self.new(kind)
        self.record(self._torch._foreach_copy_, made.beside(tensors), tensors)
        return made

    def places(self, begins: Sequence[int], sizes: Sequence[int]) -> "Numbers":
        """Return the words that count elements of several arrays, each from a number on."""
        made = self.new("int32")
        self.record(partial(self._torch.arange, self.size, out=made.tensor))
        before = np.cumsum([0, *sizes[:-1]])
        self._add(made, sizes, [begin - int(first) for begin, first in zip(begins, before, strict=True)])
        return made

    def repeated(self, numbers: Sequence[int], sizes: Sequence[int]) -> "Numbers":
        """Return words that are the same for each element of an array."""
        made = self.new("int32")
        self.record(made.tensor.zero_)
        self._add(made, sizes, numbers)
        return made

    def _add(self, made: "Numbers", sizes: Sequence[int], numbers: Sequence[int]) -> None:
        self.record(self._torch._foreach_add_, made.tensor.split(sizes), [*map(_signed, numbers)])

    def where(self, condition: "Numbers", x: Any, y: Any) -> "Numbers":
        """Return those of `x` where a condition holds, else those of `y`; one of them may be a number."""
        kind: str = next((each.kind for each in (x, y) if isinstance(each, Numbers)), "int32")
        made = self.new(kind)
        if isinstance(y, Numbers):
            self.record(made.tensor.copy_, y.tensor)
        else:
            self.record(made.tensor.fill_, _operand(y))
        if isinstance(x, Numbers):
            self.record(partial(self._torch.where, condition.tensor, x.tensor, made.tensor, out=made.tensor))
        else:
            self.record(made.tensor.masked_fill_, condition.tensor, _operand(x))
        return made

    def cast(self, x: Any, dtype: Any) -> "Numbers":
        """Return numbers as words, or words as numbers; of a key, the lower half."""
        if isinstance(x, Key):
            return x.low
        made = self.new("float32" if np.dtype(dtype) == np.float32 else "int32")
        self.record(made.tensor.copy_, x.tensor)
        return made

    def bitcast(self, x: "Numbers", dtype: str) -> "Numbers":
        """Return the same bits, in the same memory, as ``"uint32"`` words or ``"float32"`` numbers."""
        kind: str = "float32" if dtype == "float32" else "int32"
        return Numbers(self, x.tensor.view(getattr(self._torch, kind)), kind, x)


class _Loan(ReferenceType["Numbers"]):
    """A buffer that is used until numbers are gone; it runs no code of Python's, which an interrupt may end.

    Attributes:
        memory: That buffer.
    """

    memory: AnyArray


class Key:
    """Words of 64 bits as two of 32, for `_formula.random_bits`."""

    def __init__(self, low: "Numbers", high: "Numbers") -> None:
        self.low, self._high = low, high

    def __rshift__(self, _: Any) -> "Key":
        return Key(self._high, self._high)


class Numbers:
    """Numbers of a batch in a buffer. Those of ``int32`` count as unsigned words, compared below 2**31 only.

    Devices have int32 everywhere, and unsigned words hardly anywhere.

    Attributes:
        tensor: Where they will be.
        kind: Their type.
    """

    __hash__ = None  # type: ignore[assignment] # `==` compares elements

    def __init__(self, recorder: Recorder, tensor: AnyArray, kind: str, held: object) -> None:
        self._recorder, self.tensor, self.kind, self._held = recorder, tensor, kind, held

    def beside(self, tensors: Sequence[AnyArray]) -> list[AnyArray]:
        """Return the buffer's parts in the shapes and orders of tensors."""
        found, begin = [], 0
        for each in tensors:
            found.append(self.tensor.as_strided(each.shape, each.stride(), begin))
            begin += each.numel()
        return found

    def scatter(self, tensors: Sequence[AnyArray]) -> None:
        """Write numbers to tensors, rounded to nearest where these are narrower."""
        self._recorder.record(self._recorder._torch._foreach_copy_, tensors, self.beside(tensors))

    def scatter_lower(self, tensors: Sequence[AnyArray]) -> None:
        """Write the lower halves of words to tensors of int16; the words are left as these are, signed."""
        for function, operand in (("bitwise_and_", 0xFFFF), ("bitwise_xor_", 0x8000), ("sub_", 0x8000)):
            self._recorder.record(getattr(self.tensor, function), operand)
        self.scatter(tensors)

    def blend(self, value: "Numbers", weight: float) -> None:
        """Move averages towards values, in the memory of both: see `_formula.blend`."""
        value -= self
        value *= weight
        self += value

    def __iadd__(self, other: Any) -> "Numbers":
        self._recorder.record(self.tensor.add_, _operand(other))
        return self

    def __isub__(self, other: Any) -> "Numbers":
        self._recorder.record(self.tensor.sub_, _operand(other))
        return self

    def __imul__(self, other: Any) -> "Numbers":
        self._recorder.record(self.tensor.mul_, _operand(other))
        return self

    def _made(self, function: str, other: Any, kind: str | None = None) -> "Numbers":
        made = self._recorder.new(kind or self.kind)
        operation = getattr(self._recorder._torch, function)
        self._recorder.record(partial(operation, self.tensor, _operand(other), out=made.tensor))
        return made

    def __add__(self, other: Any) -> "Numbers":
        return self._made("add", other)

    def __sub__(self, other: Any) -> "Numbers":
        return self._made("sub", other)

    def __mul__(self, other: Any) -> "Numbers":
        return self._made("mul", other)

    def __and__(self, other: Any) -> "Numbers":
        return self._made("bitwise_and", other)

    def __or__(self, other: Any) -> "Numbers":
        return self._made("bitwise_or", other)

    def __xor__(self, other: Any) -> "Numbers":
        return self._made("bitwise_xor", other)

    def __lshift__(self, other: Any) -> "Numbers":
        return self._made("bitwise_left_shift", other)

    def __rshift__(self, other: Any) -> "Numbers":
        shifted = self._made("bitwise_right_shift", other)  # which repeats the sign
        self._recorder.record(shifted.tensor.bitwise_and_, (1 << (32 - int(other))) - 1)
        return shifted

    def __mod__(self, other: Any) -> "Numbers":
        return self & (int(other) - 1)  # a power of two

    def __lt__(self, other: Any) -> "Numbers":
        return self._made("lt", other, "bool")

    def __gt__(self, other: Any) -> "Numbers":
        return self._made("gt", other, "bool")

    def __eq__(self, other: object) -> "Numbers":  # type: ignore[override]
        return self._made("eq", other, "bool")


def _operand(x: Any) -> Any:
    """Return what torch computes with: a tensor, or one of Python's numbers."""
    if isinstance(x, Numbers):
        return x.tensor
    return _signed(int(x)) if isinstance(x, int | np.integer) else float(x)


def _signed(word: int) -> int:
    """Return an unsigned word's bits as a number with a sign."""
    return (word + 2**31) % 2**32 - 2**31
