"""A list of arrays as the kernels read it: two tables, built once and kept in device memory.

A block reads its row of the chunk table, then that of its tensor, and streams. So one launch serves any
number of tensors of any sizes and types, and a step costs the host nothing but the launch.
"""

from collections.abc import Sequence

import numpy as np

from .._arrays import Descriptor
from ._source import CHUNK, MIXES, TENSOR


def tensor_table(averages: Sequence[Descriptor], values: Sequence[Descriptor]) -> np.ndarray:
    """Return a row for each average.

    Args:
        averages: Those that share a value follow each other.
        values: One for as many averages as share it.
    """
    lists = len(averages) // max(len(values), 1)
    table = np.zeros(len(averages), TENSOR)
    for i, average in enumerate(averages):
        value = values[i // lists]
        table[i] = average.address, value.address, average.size, _mix(average, value), i
    return table


def _mix(average: Descriptor, value: Descriptor) -> int:
    """Return the number of a mix. What is no mix is only copied or exchanged, as floats of its size."""
    mix = average.dtype.name, value.dtype.name
    return MIXES[mix if mix in MIXES else (f"float{8 * value.itemsize}",) * 2]


def chunk_size(elements: int, multiprocessors: int, lists: int = 1) -> int:
    """Return how many elements a block works on: enough blocks for all, but no more work than need be.

    Args:
        elements: Of all values together.
        multiprocessors: Of the device; each gets 8 blocks of a small list.
        lists: How many averages each value has. Of several each reads the chunk's values anew, which all
            blocks together must have left in the cache: 34 MB by 8,192 on an H100, whose cache has 50.
    """
    even = elements // (8 * multiprocessors) // 1024 * 1024
    return min(8192 if lists == 1 else 2048, max(1024, even))


def chunk_table(sizes: np.ndarray, chunk: int) -> np.ndarray:
    """Return a row for each block: whole chunks first, so that short ones fill the tail.

    Args:
        sizes: Of the values.
        chunk: Elements of a whole chunk.
    """
    whole, rest = np.divmod(sizes, chunk)
    groups = np.arange(len(sizes))
    short = groups[rest > 0][np.argsort(-rest[rest > 0], kind="stable")]
    table = np.empty(int(whole.sum()) + len(short), CHUNK)
    table["group"] = np.concatenate([np.repeat(groups, whole), short])
    firsts = np.repeat(np.cumsum(whole) - whole, whole)
    table["index"] = np.concatenate([np.arange(len(firsts)) - firsts, whole[short]])
    return table
