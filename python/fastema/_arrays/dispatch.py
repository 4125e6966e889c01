"""Which library is an array of? Asked here, once, and whoever can do something with it is asked to.

What is worked on are *local arrays*, as `local_array` returns them: NumPy's arrays in host memory, on
CUDA devices those of torch and CuPy, and on any other device torch's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike

import numpy as np

from .._types import AnyArray, DType
from .base import Carried, Descriptor, Leaf, Library, Location, Place, Storage
from .complex import ComplexLeaf
from .packing import elementwise, packed
from .watched import Addresses

KINDS = "a NumPy array, a torch tensor, a JAX array or anything else with __dlpack__"

libraries: list[Library] = []  # the first that owns a value has it; filled by the package itself


_by_class: dict[type, Library] = {}  # of classes of libraries, which stay what they are


def library_of(value: object) -> Library | None:
    """Return the library of an array or a variable; None: it is neither."""
    known = _by_class.get(type(value))
    if known is not None:
        return known
    for library in libraries:
        if library.owns(value):
            if library.owns_classes:
                _by_class[type(value)] = library
            return library
    return None


def check_array(value: object, name: str) -> None:
    """Raise if something is no array.

    Raises:
        TypeError: It is none.
    """
    _library(value, name)


def _library(value: AnyArray, name: str) -> Library:
    library = library_of(value)
    if library is None:
        raise TypeError(f"{name} must be {KINDS}, got {type(value).__name__}")
    return library


def is_array(value: object) -> bool:
    """Tell an array from a sequence of arrays."""
    return (
        isinstance(value, np.ndarray)
        or hasattr(value, "__dlpack__")
        or hasattr(value, "__cuda_array_interface__")
    )


def is_leaf(value: object) -> bool:
    """Tell one of the user's arrays or variables from what holds them."""
    return is_array(value) or library_of(value) is not None


def is_on_cuda(value: object) -> bool:
    """Tell whether something is an array in the memory of a CUDA device."""
    library = library_of(value)
    return library is not None and library.is_on_cuda(value)


def is_elsewhere(value: object) -> bool:
    """Tell whether something is an array on a device that is neither the CPU nor CUDA."""
    library = library_of(value)
    return library is not None and library.is_elsewhere(value)


def leaf(value: AnyArray, name: str) -> Leaf:
    """Return one of the user's values with what its library can do.

    Args:
        value: What `is_leaf` says yes to.
        name: What errors call it.

    Raises:
        TypeError: Its memory cannot be viewed.
        ValueError: It has no memory yet.
    """
    found = _library(value, name).leaf(value, name)
    if not isinstance(found, Carried) and "complex" in str(getattr(value, "dtype", "")):
        return ComplexLeaf(found, name)
    return found


def as_view(array: AnyArray, name: str) -> np.ndarray:
    """Return a NumPy view of an array's memory.

    Args:
        array: A torch tensor in CPU memory (also one that requires grad), a JAX array in CPU memory
            (read-only), or anything that exports CPU memory by DLPack.
        name: What errors call it.

    Raises:
        TypeError: It is no array, or its memory cannot be viewed.
    """
    return _library(array, name).view(array, name)


def local_array(array: AnyArray, name: str) -> AnyArray:
    """Return a user's array as what is worked on where it lies: a NumPy view, or itself on a device.

    Raises:
        TypeError: It is no array, or its memory cannot be viewed.
    """
    return array if type(array) is np.ndarray else _library(array, name).local_array(array, name)


def locate(array: AnyArray, name: str) -> Location | None:
    """Return where an array on a CUDA device lies; None: it is none.

    Raises:
        ImportError: CuPy is not installed or cannot run.
        TypeError: Its memory cannot be viewed.
    """
    library = library_of(array)
    return None if library is None or not library.is_on_cuda(array) else library.locate(array, name)


def rebinds(array: AnyArray) -> bool:
    """Tell whether something may give another array, or other memory, each time it is asked."""
    if isinstance(array, np.ndarray):
        return False
    library = _library(array, "values")
    return library.rebinds and not library.is_on_cuda(array)


def are_shown(values: Sequence[AnyArray]) -> bool:
    """Tell whether what holds values shows them now, and no copies that their library made for a while."""
    return all(library.are_shown(values) for library in libraries)


def check_exchange(values: Sequence[AnyArray]) -> None:
    """Raise if copies of values would go on holding the weights when averages are in their place.

    Raises:
        RuntimeError: So it is, and what to do.
    """
    for library in libraries:
        library.check_exchange(values)


def exchanged(values: Sequence[AnyArray]) -> None:
    """Have libraries forget copies of values, whose contents were exchanged."""
    for library in libraries:
        library.exchanged(values)


def agreed(own: str) -> str | None:
    """Return a text that is the same in all processes of this run, and in no other; see `Library.agreed`."""
    found = (library.agreed(own) for library in libraries)
    return next((text for text in found if text is not None), None)


def watch(arrays: Iterable[AnyArray]) -> Addresses | None:
    """Return the addresses of those arrays that can be given other memory; None: all stay.

    A view of the old memory would not notice. A torch tensor can (``tensor.data = ...``). NumPy's arrays are
    looked after by the core.
    """
    found = Addresses(
        _library(array, "values").address(array) for array in arrays if not isinstance(array, np.ndarray)
    )
    return found if len(found) else None


# --- what is done to local arrays ---------------------------------------------------------------------


def _storage(array: AnyArray) -> Storage:
    return _library(array, "values").storage


def describe(array: AnyArray) -> Descriptor:
    """Return the type, layout and address of a local array."""
    return _storage(array).describe(array)


def dtype_of(array: AnyArray) -> DType:
    """Return NumPy's type of the elements of a local array."""
    if isinstance(array, np.ndarray):  # most are, at every update
        dtype: DType = array.dtype
        return dtype
    return _storage(array).dtype(array)


def shape_of(array: AnyArray) -> tuple[int, ...]:
    """Return the shape of a local array."""
    if isinstance(array, np.ndarray):
        shape: tuple[int, ...] = array.shape
        return shape
    return _storage(array).shape(array)


def device(array: AnyArray) -> Place | None:
    """Return the device that a local array lies on; None: it lies in host memory."""
    return None if isinstance(array, np.ndarray) else _storage(array).device(array)


def empty_like(array: AnyArray) -> AnyArray:
    """Return new memory beside a local array, of its type, shape and order."""
    return _storage(array).empty_like(array, dtype_of(array))


def host(array: AnyArray) -> np.ndarray:
    """Return contents as a NumPy array: the array itself, or a copy where that cannot be."""
    return _storage(array).host(array)


def host_copy(array: AnyArray) -> np.ndarray:
    """Return a copy in host memory."""
    found = host(array)
    return found.copy(order="K") if found is array else found


class Remote:
    """A local array on a device, whose contents come to host memory when they are asked for.

    Attributes:
        dtype: Its type.
        shape: Its shape.
    """

    def __init__(self, array: AnyArray) -> None:
        self._array, found = array, describe(array)
        self.dtype, self.shape = found.dtype, found.shape

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield its contents as flat arrays, one after the other."""
        return _storage(self._array).pieces(self._array)

    def __array__(self, dtype: DType | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(host(self._array), dtype)


def write(array: AnyArray, target: AnyArray) -> None:
    """Copy a local array to another, wherever each lies, rounded to nearest where the target is narrower."""
    source, there = _storage(array), _storage(target)
    there.write(array if source is there else source.host(array), target)


def copy(array: AnyArray) -> AnyArray:
    """Return a copy in the same place."""
    made = empty_like(array)
    write(array, made)
    return made


def clear(array: AnyArray) -> None:
    """Set all elements to zero."""
    _storage(array).clear(array)


def quotient(average: AnyArray, divisor: float) -> AnyArray:
    """Return an average divided by a number, rounded to its own type."""
    return _storage(average).quotient(average, divisor)


def computed(
    function: Callable[[Iterator[np.ndarray]], np.ndarray], arrays: Sequence[AnyArray], dtype: DType
) -> AnyArray:
    """Return a function of local arrays, where the first one lies; computed on the host.

    Args:
        function: Of a piece of each array, in float64, one after the other; it may change them.
        arrays: Of one shape, one or more.
        dtype: Of what is returned, rounded once.
    """
    found = elementwise(function, [host(array) for array in arrays], dtype)
    if isinstance(arrays[0], np.ndarray):
        return found
    made = _storage(arrays[0]).empty_like(arrays[0], dtype)
    write(found, made)
    return made


def cast(array: AnyArray, dtype: DType) -> np.ndarray:
    """Return a copy in host memory, of another type."""
    made = describe(array).empty(dtype)
    write(array, made)
    return made


# --- lists of arrays ----------------------------------------------------------------------------------


def views(arrays: Sequence[AnyArray], argument: str, single: bool) -> list[np.ndarray]:
    """Return arrays as NumPy views; see `as_view`."""
    return [
        x if isinstance(x, np.ndarray) else as_view(x, argument if single else f"{argument}[{i}]")
        for i, x in enumerate(arrays)
    ]


def as_list(arrays: AnyArray | Sequence[AnyArray], argument: str) -> tuple[list[AnyArray], bool]:
    """Return the arrays as a list, and whether a single one was given.

    Raises:
        TypeError: `arrays` is neither an array nor a sequence.
    """
    if is_array(arrays):
        return [arrays], True
    if isinstance(arrays, Iterable) and not isinstance(arrays, str | bytes | Mapping):
        return list(arrays), False
    raise TypeError(f"{argument} must be {KINDS}, or a sequence of them, got {type(arrays).__name__}")


def interleaved(lists: Sequence[AnyArray | Sequence[AnyArray]], argument: str, length: int) -> list[AnyArray]:
    """Put several lists into one, in which those that share a value follow each other."""
    if len(lists) == 1:
        return as_list(lists[0], argument)[0]
    arrays = [as_list(x, f"{argument}[{k}]")[0] for k, x in enumerate(lists)]
    for k, x in enumerate(arrays):
        if len(x) != length:
            raise ValueError(f"{argument}[{k}] and values must have one length, got {len(x)} and {length}")
    return [x[i] for i in range(length) for x in arrays]


def allocate_like(
    arrays: Sequence[AnyArray],
    dtypes: Sequence[DType],
    on_host: Sequence[bool],
    file: str | PathLike[str] | None,
) -> list[AnyArray]:
    """Return new memory for each local array, in its shape and order.

    Args:
        arrays: Where it is to lie.
        dtypes: Of what is returned.
        on_host: For each, whether it is to lie in host memory instead.
        file: The path of a file to make and to map, instead of host memory.
    """
    hosted = [away or device(array) is None for array, away in zip(arrays, on_host, strict=True)]
    likes = [
        (x if isinstance(x, np.ndarray) else describe(x), dtype)
        for x, dtype, here in zip(arrays, dtypes, hosted, strict=True)
        if here
    ]
    made = iter(packed([like for like, _ in likes], [dtype for _, dtype in likes], file))
    return [
        next(made) if here else _storage(array).empty_like(array, dtype)
        for array, dtype, here in zip(arrays, dtypes, hosted, strict=True)
    ]
