"""One update ahead, in a thread of its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .count import Count


class Background:
    """A thread that averages while the next step of training runs, one update at a time."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "fastema")
        self._pending: tuple[Future[None], Count] | None = None

    def start(self, work: Callable[[], None], before: Count) -> None:
        """Begin an update; the one before must have been joined.

        Args:
            work: What moves the averages.
            before: The count to go back to if that raises.
        """
        self._pending = self._worker.submit(work), before

    def join(self) -> tuple[BaseException, Count] | None:
        """Wait for what is under way.

        Returns:
            None, or what stopped an update and the count before it.
        """
        if self._pending is None:
            return None
        work, before = self._pending
        error = work.exception()
        self._pending = None
        return None if error is None else (error, before)
