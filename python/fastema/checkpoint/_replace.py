"""Replacing a file so that a crash at any moment leaves the old one or the new one, each whole.

The new one is written beside the old one, under a lock, flushed to the disk and renamed. Nothing else knows
of locks, flushes and renames.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from io import BufferedWriter
from pathlib import Path

StrPath = str | os.PathLike[str]

_LONG = 100  # bytes: of a name that is not told in another; file systems take 255, some of them 143


@contextmanager
def replacing(path: StrPath) -> Iterator[BufferedWriter]:
    """Open a file that takes the place of the one at `path` when the ``with`` block ends without an error.

    Raises:
        ValueError: `path` is there and no file.
        OSError: The file cannot be written. Whatever is raised, the old one is as it was.
    """
    target = Path(path).resolve()
    with suppress(FileNotFoundError, NotADirectoryError):
        target.stat()  # raises what `exists` may keep to itself, as of a name that is too long
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} must be a file or not be there")
    if not target.parent.is_dir():  # said of the folder, and not of a file that nobody knows
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(target.parent))
    beside = _beside(target)
    with _locked(beside) as file:
        try:
            file.truncate(0)  # what a crash left
            yield file
            file.flush()
            os.fsync(file.fileno())
            beside.replace(target)
        except BaseException:
            beside.unlink()
            raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name; without it the old file could be back after a power failure
    finally:
        os.close(folder)


def _beside(target: Path) -> Path:
    """Return the path of the new file until it is whole: the same for all writers, so that they wait."""
    name = os.fsencode(target.name)
    text = target.name if len(name) <= _LONG else blake2b(name, digest_size=16).hexdigest()
    return target.with_name(f".{text}.partial")


def _locked(path: Path) -> BufferedWriter:
    """Open a file for writing, once no other process or thread has it open by this function."""
    while True:
        file = path.open("ab")
        with suppress(OSError):  # some network file systems have no locks: there, one writer at a time
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # the writer that had it is done, and has renamed it
