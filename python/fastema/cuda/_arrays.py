"""Arrays on a CUDA device: do they lie on the same one, and on which streams are they worked on?"""

from collections.abc import Callable

from .._arrays import Descriptor, check_array, locate
from .._types import AnyArray, DType
from . import _driver
from ._driver import Stream


class Group:
    """Arrays of one device, and the streams they are worked on.

    Args:
        arguments: Lists of arrays by the names of their arguments; the first array lies on the device.
        single: Whether each is one array, not a list.

    Attributes:
        unaware: Whether an array's library knows of no stream of ours: then the host has to wait for us.

    Raises:
        TypeError: An array lies elsewhere, or cannot be viewed.
    """

    def __init__(self, arguments: dict[str, list[AnyArray]], single: bool) -> None:
        where: tuple[str, int] | None = None
        self.arrays: list[list[Descriptor]] = []
        self._owners: dict[str, None] = {}  # in order, each once
        self._producers: list[Callable[[], int | None]] = []  # tell on which streams others make them ready
        self._held = []
        self._driver = _driver.load()
        self.unaware = False
        for argument, arrays in arguments.items():
            found = []
            for i, array in enumerate(arrays):
                name = argument if single else f"{argument}[{i}]"
                one = locate(array, name)
                if one is None:
                    check_array(array, name)
                    beside = f"on cuda:{where[1]}, where {where[0]} lies" if where else "in CUDA memory"
                    raise TypeError(f"{name} must lie {beside}, got {type(array).__name__} elsewhere")
                if where is None and one.device is not None:
                    where = name, one.device
                if where is not None and one.device not in (None, where[1]):
                    raise TypeError(
                        f"{name} must lie on cuda:{where[1]}, where {where[0]} lies, "
                        f"got {type(array).__name__} on cuda:{one.device}"
                    )
                found.append(one.descriptor)
                self._owners[one.owner] = None
                if one.stream is not None:
                    self._producers.append(one.stream)
                self._held.append(one.holder)
                self.unaware |= one.unaware
            self.arrays.append(found)
        self.device = 0 if where is None else where[1]

    def kinds(self) -> list[list[tuple[DType, int]]]:
        """Return the types and sizes of all arrays."""
        return [[(array.dtype, array.size) for array in arrays] for arrays in self.arrays]

    def check_unchanged(self, before: "Group") -> None:
        """Refuse another device, type or size.

        Raises:
            ValueError: One differs.
        """
        if (self.device, self.kinds()) != (before.device, before.kinds()):
            raise ValueError(
                "a tensor was given memory of another size, type or device after it was paired; "
                "make the pairs anew"
            )

    def streams(self) -> list[Stream]:
        """Return the streams that arrays are worked on now, each once, that of the first array first."""
        if len(self._owners) == 1 and not self._producers:
            (owner,) = self._owners
            return [self._driver.current_stream(owner, self.device)]
        found = [self._driver.current_stream(owner, self.device) for owner in self._owners]
        named = (stream() for stream in self._producers)
        each: dict[int, Stream] = {}
        for one in (*found, *(Stream(handle) for handle in named if handle is not None)):
            each.setdefault(one.handle, one)
        return list(each.values())
