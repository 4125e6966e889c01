"""The arrays of every library that fastema knows, by one file for each library.

`dispatch` tells which library an array is of, and `base` what each must be able to do. To add one: write its
file, and put its `library` in the list below. No library is imported before the user has imported it.
"""

from . import dispatch, flax, interfaces, jax, keras, numpy, tensorflow, torch
from .base import Carried, Descriptor, Leaf, Location, Place, unmasked
from .complex import ComplexLeaf
from .dispatch import (
    Remote,
    agreed,
    allocate_like,
    are_shown,
    as_list,
    as_view,
    check_array,
    check_exchange,
    clear,
    computed,
    copy,
    describe,
    device,
    dtype_of,
    empty_like,
    exchanged,
    host,
    host_copy,
    interleaved,
    is_array,
    is_elsewhere,
    is_leaf,
    is_on_cuda,
    leaf,
    library_of,
    local_array,
    locate,
    quotient,
    rebinds,
    shape_of,
    views,
    watch,
    write,
)
from .numpy import plain
from .packing import packed, packed_copies
from .tensorflow import Reader
from .watched import Addresses

__all__ = [
    "Addresses",
    "Carried",
    "ComplexLeaf",
    "Descriptor",
    "Leaf",
    "Location",
    "Place",
    "Reader",
    "Remote",
    "agreed",
    "allocate_like",
    "are_shown",
    "as_list",
    "as_view",
    "check_array",
    "check_exchange",
    "clear",
    "computed",
    "copy",
    "describe",
    "device",
    "dtype_of",
    "empty_like",
    "exchanged",
    "host",
    "host_copy",
    "interleaved",
    "is_array",
    "is_elsewhere",
    "is_leaf",
    "is_on_cuda",
    "leaf",
    "library_of",
    "local_array",
    "locate",
    "packed",
    "packed_copies",
    "plain",
    "quotient",
    "rebinds",
    "shape_of",
    "unmasked",
    "views",
    "watch",
    "write",
]

dispatch.libraries += [
    numpy.library,
    torch.library,
    jax.library,
    flax.library,
    keras.library,
    tensorflow.library,
    interfaces.library,  # last: most arrays have these
]
