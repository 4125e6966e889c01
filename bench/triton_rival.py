"""An update in Triton, as its tutorials write one: a launch for each tensor."""

from typing import Any

import triton
import triton.language as tl


@triton.jit  # which takes annotations for code
def _average(average, value, size, weight, block: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0) * block + tl.arange(0, block)
    inside = places < size
    a = tl.load(average + places, mask=inside)
    v = tl.load(value + places, mask=inside).to(a.dtype)
    tl.store(average + places, a + weight.to(a.dtype) * (v - a), mask=inside)


def launch(average: Any, value: Any, weight: float) -> None:
    """Update one tensor."""
    size = average.numel()
    _average[(triton.cdiv(size, 1024),)](average, value, size, weight, block=1024)
