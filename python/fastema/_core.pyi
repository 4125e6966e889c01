from collections.abc import Sequence
from typing import Any

class Pairs:
    def __init__(
        self,
        a: Sequence[Any],
        b: Sequence[Any],
        a_name: str,
        b_name: str,
        single: bool,
        exchanged: bool,
    ) -> None: ...
    def __len__(self) -> int: ...
    def update(self, decay: float, threads: int = 0) -> None: ...
    def swap(self, threads: int = 0) -> None: ...

def instruction_sets() -> list[str]:
    """Name the instruction sets that this build holds and this machine runs, best first.

    Example:
        >>> import fastema
        >>> fastema.instruction_sets()[-1]
        'baseline'
    """

def use_instruction_set(name: str) -> None:
    """Choose the instruction set of every later call, in all threads.

    The bits do not depend on it: this is for tests and comparisons. The environment variable
    ``FASTEMA_ISA`` does the same at import.

    Args:
        name: One of `instruction_sets()`.

    Raises:
        ValueError: This machine or this build has no such instruction set.

    Example:
        >>> import fastema
        >>> fastema.use_instruction_set("baseline")
        >>> fastema.build_config()["instruction_set"]
        'baseline'
        >>> fastema.use_instruction_set(fastema.instruction_sets()[0])
    """

def build_config() -> dict[str, Any]: ...
