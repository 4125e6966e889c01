"""Interrupts at any moment: an error before an instruction of this library, as signals' handlers raise it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import fastema

_OURS = str(Path(fastema.__file__).parent)


class Interrupt:
    """Raises an error once, before the n-th instruction of this library's Python code.

    Attributes:
        came: Whether there were as many.
        seen: How many there were so far.
    """

    def __init__(self, error: type[BaseException], after: int) -> None:
        self.error, self.after, self.seen, self.came = error, after, 0, False

    def _trace(self, frame: FrameType, event: str, _: object) -> object:
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.seen += 1
            if self.seen == self.after:
                self.came = True
                sys.settrace(None)
                raise self.error("an interrupt")
        return self._trace

    @contextmanager
    def within(self) -> Iterator[None]:
        """Raise it within the block, where the block gets as far, and pass over it."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        except self.error:
            if not self.came:
                raise
        finally:
            sys.settrace(before)
