"""Replacing a file so that a crash at any moment leaves the old one or the new one, each whole.

The new one is written beside the old one, under a name of its own, flushed to the disk and renamed. Nobody
waits: of several writers the last to rename wins, and each has written a whole file. New folders are made
likewise. Nothing else renames.
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from io import BufferedWriter
from pathlib import Path
from secrets import token_hex

from .. import _system

StrPath = str | os.PathLike[str]

_LONG = 100  # bytes: of a name that is not told in another; file systems take 255, some of them 143
_ANYBODY = 0o666  # the rights of a new file, before the process' umask


@contextmanager
def replacing(path: StrPath) -> Iterator[BufferedWriter]:
    """Open a file that takes the place of the one at `path` when the ``with`` block ends without an error.

    It has the rights of the old one.

    Raises:
        ValueError: `path` is there and no file.
        OSError: The file cannot be written. The old one is as it was then, unless it was the folder that
            could not be flushed.
    """
    target = Path(os.path.realpath(path))
    try:
        status = target.stat()
    except (FileNotFoundError, NotADirectoryError):
        status = None
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} must be a file or not be there")
    _check_parent(target)
    _remove_what_crashes_left(target)
    rights = _ANYBODY if status is None else stat.S_IMODE(status.st_mode) & 0o777
    beside = _Beside(target)
    try:
        with beside.begun(rights) as file:
            if status is not None:
                _system.set_rights(file.fileno(), beside.path, rights)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if _system.OPEN_FILES_CAN_BE_MOVED:  # under its lock
                beside.path.replace(target)
        if not _system.OPEN_FILES_CAN_BE_MOVED:
            beside.path.replace(target)
    except BaseException:
        beside.path.unlink(missing_ok=True)  # an interrupt may come when it has its new name
        raise
    _system.flush(target.parent)  # the new name; without it the old file could be back after a power failure


@contextmanager
def new_folder(path: StrPath) -> Iterator[Path]:
    """Make a folder to fill, which is at `path`, whole, when the ``with`` block ends without an error.

    It is filled beside, flushed and renamed. Nothing is ever replaced but an empty folder.

    Raises:
        ValueError: `path` is there, and no empty folder.
        OSError: The folder cannot be made or filled. Nothing is at `path` then that was not there, unless it
            was its parent that could not be flushed.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{path} must not be there, or be an empty folder: a folder is never replaced")
    _check_parent(target)
    _remove_what_crashes_left(target)
    beside = _Beside(target)
    descriptor = beside.made()
    try:
        yield beside.path
        for entry in beside.path.iterdir():
            _system.flush(entry)
        _system.flush(beside.path)
        _system.move_folder(beside.path, target)
    except BaseException:
        shutil.rmtree(beside.path, ignore_errors=True)  # an interrupt may come when it has its new name
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)
    _system.flush(target.parent)


def _check_parent(target: Path) -> None:
    """Raise FileNotFoundError of the folder that a target is in, and not of a name that nobody knows."""
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(target.parent))


def _prefix(target: Path) -> str:
    """Return how the names begin of what is written beside a file until it is whole."""
    name = os.fsencode(target.name)
    text = target.name if len(name) <= _LONG else blake2b(name, digest_size=16).hexdigest()
    return f".{text}."


class _Beside:
    """The path of a new file or folder until it is whole."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._choose()

    def _choose(self) -> None:
        self.path = self._target.with_name(f"{_prefix(self._target)}{token_hex(8)}.partial")

    def begun(self, rights: int) -> BufferedWriter:
        """Open the file, which nobody else has, and hold its lock while it is open.

        The lock says that somebody is writing. Nobody waits for it: a child of this process may have it, too.
        """
        while True:
            try:  # "x" follows no link
                file = open(self.path, "xb", opener=partial(os.open, mode=rights))  # noqa: SIM115
            except FileExistsError:
                self._choose()
                continue
            if self._is_ours(file.fileno()):
                return file
            file.close()  # another writer takes it for what a crash left
            self._choose()

    def made(self) -> int | None:
        """Make the folder, which nobody else has; return a descriptor that holds its lock until closed."""
        while True:
            with suppress(FileExistsError):
                self.path.mkdir()
                if not _system.FOLDERS_CAN_BE_OPENED:
                    return None
                with suppress(FileNotFoundError):  # another writer takes it for what a crash left
                    descriptor = _system.opened(self.path, folder=True)
                    if self._is_ours(descriptor):
                        return descriptor
                    os.close(descriptor)
            self._choose()

    def _is_ours(self, descriptor: int) -> bool:
        return _is_locked(descriptor) and _has_name(descriptor, self.path)


def _is_locked(descriptor: int) -> bool:
    """Lock what is new; tell whether nobody else has. Where there are no locks, nobody has."""
    try:
        _system.lock(descriptor)
    except BlockingIOError:
        return False
    except OSError:  # of some network file systems, and of Windows
        pass
    return True


def _has_name(descriptor: int, path: Path) -> bool:
    """Tell whether what is open is still to be found at a path."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _remove_what_crashes_left(target: Path) -> None:
    """Remove what writers of a target began and never will finish: that whose lock nobody holds."""
    name = re.compile(re.escape(_prefix(target)) + r"([0-9a-f]{16}\.)?partial")
    with suppress(OSError):  # a folder that cannot be listed may well be written to
        left = [entry for entry in os.listdir(target.parent) if name.fullmatch(entry)]
        for entry in left:
            with suppress(OSError):
                _remove_unless_locked(target.with_name(entry))


def _remove_unless_locked(path: Path) -> None:
    """Remove a file or folder that nobody is writing.

    Raises:
        OSError: Somebody is, or it is neither, or another user's.
    """
    descriptor = _system.opened(path, folder=stat.S_ISDIR(path.lstat().st_mode))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            _system.lock(descriptor)
            shutil.rmtree(path) if stat.S_ISDIR(mode) else path.unlink()
    finally:
        os.close(descriptor)
