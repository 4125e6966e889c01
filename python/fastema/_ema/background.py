"""One update ahead, in a thread of its own."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from weakref import WeakSet

from .count import Count, Now, settled


class Task:
    """An update that another thread carries out, once or never.

    Args:
        work: What moves the averages.
        now: What `work` makes the count in there when they have moved.
        after: That count.
    """

    def __init__(self, work: Callable[[], None], now: Now, after: Count) -> None:
        self.now, self.after = now, after
        self._work, self._claim, self._done = work, Lock(), Future[None]()

    def run(self) -> None:
        """Carry it out, but where it was withdrawn."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._work()
        except BaseException as error:
            self._done.set_exception(error)
        else:
            self._done.set_result(None)

    def withdraw(self) -> None:
        """Have it never run, unless it does already."""
        if self._claim.acquire(blocking=False):
            self.after = settled(self.now)
            self._done.set_result(None)

    def error(self) -> BaseException | None:
        """Return what stopped it, when it is done."""
        return self._done.exception()


class Background:
    """A thread that averages while the next step of training runs, one update at a time."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "fastema")
        self._pending: Task | None = None
        self._submitted: Task | None = None
        _all.add(self)

    def start(self, task: Task) -> None:
        """Begin an update; the one before must have been joined."""
        self._pending = task
        self._worker.submit(task.run)
        self._submitted = task

    @property
    def pending(self) -> Task | None:
        """What is under way, or done and not forgotten. What an interrupt kept from starting is withdrawn."""
        task = self._pending
        if task is not None and task is not self._submitted:
            task.withdraw()
        return task

    def forget(self) -> None:
        """Forget what was done."""
        self._pending = self._submitted = None

    def rest(self) -> None:
        """Wait for what is under way, whatever becomes of it."""
        if (task := self.pending) is not None:
            task.error()

    def start_anew(self) -> None:
        """Take another thread: a process that was forked has none of its parent's."""
        self._worker = ThreadPoolExecutor(1, "fastema")


_all: WeakSet[Background] = WeakSet()


def _rest() -> None:
    for background in [*_all]:
        background.rest()


def _start_anew() -> None:
    for background in [*_all]:
        background.start_anew()


if hasattr(os, "register_at_fork"):  # a child has the averages of an update that was done, and no thread
    os.register_at_fork(before=_rest, after_in_child=_start_anew)
