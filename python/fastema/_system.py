"""What is asked of the operating system about files: locks, flushes, flags, reads at a place.

Without ``fcntl``, as on Windows, there are no locks that end with a process: nobody can tell then whether a
file is still being written.
"""

import os
import sys
import threading
from contextlib import suppress
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None  # type: ignore[assignment]

OPEN_FILES_CAN_BE_MOVED = sys.platform != "win32"
FOLDERS_CAN_BE_OPENED = hasattr(os, "O_DIRECTORY")
LIBRARY_SUFFIX = ".dll" if sys.platform == "win32" else ".so"  # of what CMake calls a module


_reading = threading.Lock()


def flags_of(*names: str) -> int:
    """Return those of these flags of `os.open` that this system has."""
    return sum(getattr(os, name, 0) for name in names)


def read_at(file: FileIO, place: int, target: memoryview) -> int:
    """Read from a place in a file on, which other threads may do meanwhile; return how many bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [target], place)
    with _reading:
        file.seek(place)
        return file.readinto(target) or 0


def opened(path: Path, *, folder: bool) -> int:
    """Return a descriptor of a file to write to, or of a folder; no link is followed, no pipe waited for.

    Raises:
        OSError: It cannot be opened.
    """
    how = "O_DIRECTORY" if folder else "O_RDWR"
    return os.open(path, flags_of(how, "O_BINARY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))


def lock(descriptor: int) -> None:
    """Hold a lock while a descriptor is open.

    Raises:
        BlockingIOError: Somebody else has it.
        OSError: Here are no locks.
    """
    if fcntl is None:
        raise OSError("no locks of files in this Python")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def flush(path: Path) -> None:
    """Have a file, or the names in a folder where that can be asked for, written to the disk."""
    if path.is_dir() and not FOLDERS_CAN_BE_OPENED:
        return
    # what is read-only to us cannot be flushed on Windows
    descriptor = os.open(path, os.O_RDONLY if FOLDERS_CAN_BE_OPENED else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_rights(descriptor: int, path: Path, rights: int) -> None:
    """Give an open file its rights, whatever the umask is."""
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, rights)
    else:
        path.chmod(rights)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder, in the place of an empty one if that is there."""
    if not OPEN_FILES_CAN_BE_MOVED:
        with suppress(FileNotFoundError):
            target.rmdir()
    source.rename(target)
