"""What must fastema know of a library of arrays? Each has a file here that says it, as a `Library`."""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from .._types import AnyArray, DType
from .packing import axes_of, laid_out
from .shards import Shards
from .watched import Watched

CPU = 1  # DLPack's kDLCPU
CUDA = 2, 13  # its kDLCUDA and kDLCUDAManaged

Place = int | str  # a CUDA device's number, or the name of a device of another kind


class Descriptor(NamedTuple):
    """The type, layout and address of an array, whose memory this process may not be able to read.

    Attributes:
        dtype: The type of its elements.
        shape: Its shape.
        strides: From an element to the next one of each axis, in bytes.
        address: Where its first element lies.
        writable: Whether it may be written.
    """

    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int
    writable: bool

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """The bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """The bytes of all elements."""
        return self.size * self.itemsize

    def dense_strides(self) -> tuple[int, ...]:
        """Return what the strides would be, in elements, of an array without holes in this order."""
        strides, step = [0] * len(self.shape), 1
        for axis in reversed(axes_of(self)):
            strides[axis], step = step, step * max(self.shape[axis], 1)
        return tuple(strides)

    def is_dense(self) -> bool:
        """Tell whether the array is as long in memory as it has elements."""
        dense = zip(self.shape, self.strides, self.dense_strides(), strict=True)
        return self.size == 0 or all(n == 1 or step == k * self.itemsize for n, step, k in dense)

    def empty(self, dtype: DType | None = None) -> np.ndarray:
        """Return an array in host memory of this shape and order, with anything in it."""
        return laid_out(np.empty(self.size, dtype or self.dtype), self)


class Location(NamedTuple):
    """Where an array on a CUDA device lies.

    Attributes:
        descriptor: Its type, layout and address.
        device: None: it has no elements, and lies nowhere.
        owner: Whose current stream it is worked on: ``"torch"`` or ``"cupy"``.
        stream: Besides, tells the stream on which it is made ready now, if any is named.
        holder: What keeps its memory alive.
        unaware: Whether its library knows of no stream of ours: then the host has to wait for us.
    """

    descriptor: Descriptor
    device: int | None
    owner: str
    stream: Callable[[], int | None] | None
    holder: AnyArray
    unaware: bool = False


class Leaf(ABC):
    """One of the user's values, an array or a variable, with what its library can do.

    Its elements lie in local arrays: one, or several of a value that is sharded over devices; and these need
    not be all of it, where other processes have the rest.

    Attributes:
        stable: Whether its local arrays stay the same memory from update to update, so that they are paired
            once.
        may_move: Whether stable ones may be given other memory after all, and are then paired anew.
        address: What tells where its memory is now, if that can become other memory.
        immutable: Whether it never changes: then new values are passed to each update.
        shards: How it is spread over processes or devices; None: its one local array is all of it.
    """

    stable = True
    may_move = False
    address: Watched = None
    immutable = False
    shards: Shards | None = None

    @abstractmethod
    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:
        """Return the local arrays to read: NumPy views of host memory, or arrays on a device; no copies.

        Args:
            value: Another value of this kind. None: this one, which is viewed again only if it has moved.
        """

    def in_place(self) -> bool:
        """Tell whether what is written into the local arrays is written into the value."""
        return False

    def obstacle(self) -> str | None:
        """Return what keeps the value from being changed, if anything does."""
        return None

    @abstractmethod
    def assign(self, arrays: Sequence[AnyArray]) -> AnyArray:
        """Write arrays, one for each local array, cast to the value's type; they are not kept.

        Returns:
            What holds them now: the value, or a new one of an immutable kind.
        """

    @abstractmethod
    def to_library(self, arrays: Sequence[AnyArray]) -> AnyArray:
        """Return an average as an array of the value's library; it is live where such arrays can change."""

    def to_state(self, array: np.ndarray) -> AnyArray:
        """Return a copy of one of this leaf's averages as states hold it: of torch's a tensor."""
        return array

    def from_state(self, array: AnyArray, name: str) -> AnyArray:  # noqa: ARG002 - what errors call it
        """Return what a state holds as a local array in host memory.

        Raises:
            ValueError: It is another process' part of the value, or of another shape.
        """
        return array

    def parts(self, array: AnyArray, name: str) -> AnyArray:  # noqa: ARG002 - what is done with it elsewhere
        """Return a view of a complex local array on a device that has an axis of its parts.

        Raises:
            TypeError: There is none.
        """
        raise TypeError(f"{name} must lie in host memory, as it is complex: leave it out with only=")

    def joined(self, parts: AnyArray) -> AnyArray:
        """Return a view of what `parts` returned as complex numbers, or a copy of parts of 16 bits."""
        raise NotImplementedError

    def written(self) -> None:  # noqa: B027 - most libraries need not know
        """Take notice that the local arrays were written behind the library's back."""


class Carried(Leaf):
    """What cannot be averaged, nor copied byte by byte, and is carried along: shown as it is, never changed.

    Keys of random numbers, tensors that are sparse or quantised, Python's numbers and functions in trees. It
    has no local arrays.

    Attributes:
        value: What was given last.
    """

    def __init__(self, value: object) -> None:
        self.value = value

    def local_arrays(self, value: AnyArray = None) -> list[AnyArray]:  # noqa: ARG002 - it has none
        return []

    def assign(self, arrays: Sequence[AnyArray]) -> AnyArray:  # noqa: ARG002
        return self.value

    def to_library(self, arrays: Sequence[AnyArray]) -> AnyArray:  # noqa: ARG002
        return self.value


class Storage(ABC):
    """What is done to a library's arrays where they lie, besides averaging."""

    @abstractmethod
    def describe(self, array: AnyArray) -> Descriptor:
        """Return an array's type, layout and address."""

    def dtype(self, array: AnyArray) -> DType:
        """Return NumPy's type of an array's elements."""
        return self.describe(array).dtype

    def shape(self, array: AnyArray) -> tuple[int, ...]:
        """Return an array's shape."""
        return self.describe(array).shape

    def device(self, array: AnyArray) -> Place | None:  # noqa: ARG002 - host memory is one place
        """Return the device that an array lies on; None: it lies in host memory."""
        return None

    @abstractmethod
    def empty_like(self, array: AnyArray, dtype: DType) -> AnyArray:
        """Return new memory beside an array, in its shape and order."""

    @abstractmethod
    def host(self, array: AnyArray) -> np.ndarray:
        """Return contents as a NumPy array: the array itself, or a copy where that cannot be."""

    def pieces(self, array: AnyArray) -> Iterator[np.ndarray]:
        """Yield contents as flat NumPy arrays, in C's order; of large ones a part each, where that can be."""
        yield np.ascontiguousarray(self.host(array)).reshape(-1)

    @abstractmethod
    def write(self, array: AnyArray, target: AnyArray) -> None:
        """Copy an array of this library or of NumPy, rounded to nearest where the target is narrower."""

    @abstractmethod
    def clear(self, array: AnyArray) -> None:
        """Set all elements to zero."""

    @abstractmethod
    def quotient(self, average: AnyArray, divisor: float) -> AnyArray:
        """Return an average divided by a number, rounded to its own type."""


class Library(ABC):
    """All that is known of a library.

    Attributes:
        rebinds: Whether its arrays may lie elsewhere at any time, without a word: then they are viewed anew.
        storage: What is done to its arrays where they lie; only of libraries with such arrays.
        owns_classes: Whether its arrays are known by their classes, and not by what each of them can do.
    """

    owns_classes = True
    rebinds = False

    storage: Storage

    @abstractmethod
    def owns(self, value: object) -> bool:
        """Tell whether something is an array or a variable of the library; imports nothing."""

    @abstractmethod
    def leaf(self, value: AnyArray, name: str) -> Leaf:
        """Return a value with what the library can do.

        Args:
            value: What `owns` says yes to.
            name: What errors call it.

        Raises:
            TypeError: Its memory cannot be viewed.
        """

    def is_on_cuda(self, array: AnyArray) -> bool:  # noqa: ARG002 - most libraries know the host alone
        """Tell whether an array lies in the memory of a CUDA device."""
        return False

    def is_elsewhere(self, array: AnyArray) -> bool:  # noqa: ARG002 - only torch has such devices
        """Tell whether an array lies on a device that is neither the CPU nor CUDA."""
        return False

    def address(self, array: AnyArray) -> Watched:  # noqa: ARG002 - of most it stays
        """Return what tells where an array lies now, if it can be given other memory."""
        return None

    def are_shown(self, values: Sequence[AnyArray]) -> bool:  # noqa: ARG002 - most make none
        """Tell whether what holds values shows them now, and no copies that the library made for a while."""
        return True

    def check_exchange(self, values: Sequence[AnyArray]) -> None:  # noqa: B027 - most know no copies
        """Raise if copies of values would go on holding the weights when averages are in their place."""

    def exchanged(self, values: Sequence[AnyArray]) -> None:  # noqa: B027
        """Forget copies of values, whose contents were exchanged."""

    def agreed(self, own: str) -> str | None:  # noqa: ARG002 - most know one process
        """Return one of the texts that the processes of this run give, the same to all of them.

        Waits for no process.

        Returns:
            None: They have nothing to agree by.
        """
        return None

    def _view(self, array: AnyArray) -> np.ndarray:  # noqa: ARG002
        raise TypeError("it may be put into other memory at any time")

    def _locate(self, array: AnyArray) -> Location:  # noqa: ARG002
        raise TypeError("its library tells no addresses of devices")

    def _on_device(self, array: AnyArray) -> AnyArray:
        """Return an array elsewhere as what is worked on."""
        return array

    def view(self, array: AnyArray, name: str) -> np.ndarray:
        """Return a NumPy view of an array's host memory.

        Args:
            array: What to view.
            name: What errors call it.

        Raises:
            TypeError: Its memory cannot be viewed.
        """
        try:
            return self._view(array)
        except (TypeError, ValueError, RuntimeError, BufferError) as reason:
            raise _not_viewed(array, name, "CPU", reason) from None

    def locate(self, array: AnyArray, name: str) -> Location:
        """Return where an array on a CUDA device lies.

        Args:
            array: What to find.
            name: What errors call it.

        Raises:
            ImportError: CuPy is not installed or cannot run.
            TypeError: Its memory cannot be viewed.
        """
        try:
            return self._locate(array)
        except (TypeError, ValueError, AttributeError, RuntimeError, BufferError) as reason:
            raise _not_viewed(array, name, "CUDA", reason) from None

    def local_array(self, array: AnyArray, name: str) -> AnyArray:
        """Return a user's array as what is worked on where it lies: a NumPy view, or itself on a device.

        Raises:
            TypeError: Its memory cannot be viewed.
        """
        if self.is_elsewhere(array):
            try:
                return self._on_device(array)
            except (TypeError, ValueError, RuntimeError) as reason:
                raise _not_viewed(array, name, "device's", reason) from None
        if self.is_on_cuda(array):
            self.locate(array, name)
            return array
        return self.view(array, name)


def unmasked(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array, or one of a class derived from NumPy's, as NumPy's own: so that no class interferes.

    Raises:
        TypeError: It has a mask, which would be dropped.
    """
    kind = type(array)
    if kind is np.ndarray:
        return array
    if hasattr(kind, "mask") and hasattr(kind, "filled"):  # NumPy's, and astropy's
        raise TypeError(
            f"{name} must be an array without a mask, which would be dropped, got {kind.__name__}; give what "
            "its .filled() returns, or its .data"
        )
    return np.asarray(array)


def _not_viewed(array: AnyArray, name: str, memory: str, reason: Exception) -> TypeError:
    kind = type(array).__name__
    return TypeError(f"{name} must be an array whose {memory} memory can be viewed, got {kind}: {reason}")


def is_loaded(value: object, module: str, name: str) -> bool:
    """Tell whether a value is of a class of a module that the user has imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)


def dtype_named(name: object) -> DType:
    """Return NumPy's type of a name, of which NumPy itself does not know bfloat16 and narrower ones."""
    return np.dtype(getattr(ml_dtypes, str(name), str(name)))
