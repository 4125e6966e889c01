"""The lists of arrays that are measured, as shapes."""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import ml_dtypes
import numpy as np

Shapes = Sequence[tuple[int, ...]]
ALIGNMENT = 64  # elements, a cache line or more of any type


@dataclass(frozen=True)
class Block:
    """Arrays of a list, and all of the memory that they lie in."""

    flat: np.ndarray
    arrays: list[np.ndarray]


def resnet50() -> Shapes:
    """Return the parameters of ResNet-50: 161 arrays, 25.6 million elements."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            channels = [inputs, width, width, 4 * width]
            for (a, b), kernel in zip(pairwise(channels), (1, 3, 1), strict=True):
                shapes += [(b, a, kernel, kernel), (b,), (b,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> Shapes:
    """Return the parameters of GPT-2: 148 arrays, 124 million elements."""
    d = 768
    block = [
        (d,),
        (d,),
        (d, 3 * d),
        (3 * d,),
        (d, d),
        (d,),
        (d,),
        (d,),
        (d, 4 * d),
        (4 * d,),
        (4 * d, d),
        (d,),
    ]
    return [(50257, d), (1024, d), *(shape for _ in range(12) for shape in block), (d,), (d,)]


def llama_7b() -> Shapes:
    """Return the parameters of Llama 7B: 291 arrays, 6.7 billion elements."""
    d, hidden = 4096, 11008
    layer = [(d, d)] * 4 + [(hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    return [(32000, d), *layer * 32, (d,), (32000, d)]


LISTS: dict[str, Shapes] = {
    "one of 64M": [(64_000_100,)],  # not a power of two: those can collide in caches
    "ResNet-50": resnet50(),
    "GPT-2": gpt2(),
    "1,000 x 1,000": [(1000,)] * 1000,
    "10 x 10": [(10,)] * 10,
}

DTYPES = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
    "f64": np.float64,
}

MIXES = [  # average and value
    ("f32", "f32"),
    ("f64", "f64"),
    ("bf16", "bf16"),
    ("f16", "f16"),
    ("f32", "bf16"),
    ("f32", "f16"),
    ("f64", "f32"),
    ("f64", "bf16"),
    ("f64", "f16"),
    ("bf16", "f32"),
    ("f16", "f32"),
]


def itemsize(dtype: str) -> int:
    """Return how many bytes an element of a type has."""
    return np.dtype(DTYPES[dtype]).itemsize


def elements(shapes: Shapes) -> int:
    """Return how many elements a list has."""
    return sum(math.prod(shape) for shape in shapes)


def block(shapes: Shapes, dtype: str, seed: int, *, huge_pages: bool = False) -> Block:
    """Make the arrays of a list, one after the other in memory that begins with a page.

    They are weights, N(0, .02), so that nothing is a special number. Each begins with a cache line, as
    torch's tensors do, and pages are what the system gives without being asked, again as torch's: NumPy
    asks for huge ones where an array has 4 MiB.

    Args:
        shapes: Of the arrays.
        dtype: One of `DTYPES`.
        seed: Of the numbers.
        huge_pages: Whether to ask for huge pages (Linux).
    """
    starts = [0, *accumulate(-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for shape in shapes)]
    memory = mmap.mmap(-1, starts[-1] * itemsize(dtype))
    if huge_pages:
        memory.madvise(mmap.MADV_HUGEPAGE)
    flat = np.frombuffer(memory, DTYPES[dtype])
    pool = (0.02 * np.random.default_rng(seed).standard_normal(1 << 16)).astype(DTYPES[dtype])
    for start in range(0, flat.size, pool.size):
        part = flat[start : start + pool.size]
        part[:] = pool[: part.size]
    parts = zip(starts, shapes, strict=False)
    return Block(flat, [flat[start : start + math.prod(s)].reshape(s) for start, s in parts])


def arrays(shapes: Shapes, dtype: str, seed: int) -> list[np.ndarray]:
    """Make the arrays of a list."""
    return block(shapes, dtype, seed).arrays
