"""How a file takes another's place: nobody waits, no other file is touched, and each is whole."""

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from fastema import checkpoint
from fastema.checkpoint import _replace
from processes import output_of, python


@pytest.fixture
def path(tmp_path):
    return tmp_path / "averages.safetensors"


def ones(path):
    checkpoint.write(path, {"w": np.ones(3)})
    assert checkpoint.File(path)["w"].tolist() == [1.0] * 3


def test_a_child_that_lives_on_since_a_save_does_not_block_the_next(path):
    """It has all that was open at the fork, and so a lock, too."""
    code = """
        import os, signal, sys
        import numpy as np
        from fastema import checkpoint

        signal.alarm(60)  # ends this process if it waits for ever
        asked, told = os.pipe()
        fsync = os.fsync

        def fork_and_fsync(descriptor):
            os.fsync = fsync
            if os.fork() == 0:
                os.close(told)
                os.read(asked, 1)  # until the parent has ended
                os._exit(0)
            fsync(descriptor)

        os.fsync = fork_and_fsync
        for generation in range(3):
            checkpoint.write(sys.argv[1], {"w": np.full(3, generation)})
        print(checkpoint.File(sys.argv[1])["w"])
    """
    assert output_of(code, path) == "[2 2 2]"
    assert os.listdir(path.parent) == [path.name]


def test_what_a_living_writer_has_begun_is_left_to_it(path):
    with _replace.replacing(path) as file:
        file.write(b"begun ")
        file.flush()
        for _ in range(3):
            ones(path)
        file.write(b"and ended")
    assert path.read_bytes() == b"begun and ended"
    assert os.listdir(path.parent) == [path.name]


def test_a_file_that_was_taken_for_what_a_crash_left_is_begun_again(path, monkeypatch):
    """Between its creation and its lock another writer may remove it."""
    flock, calls = fcntl.flock, []

    def removed(file, how):
        calls.append(how)
        if len(calls) == 1:
            (left,) = path.parent.glob(".*")
            left.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed)
    ones(path)
    assert len(calls) == 2
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["partial", "00000000000000aa.partial"])
def test_a_link_with_the_name_of_what_is_written_is_not_followed(path, name, monkeypatch):
    tokens = iter(["00000000000000aa", "00000000000000bb"])
    monkeypatch.setattr(_replace, "token_hex", lambda _: next(tokens))
    victim, link = path.with_name("victim"), path.with_name(f".{path.name}.{name}")
    victim.write_text("mine")
    link.symlink_to(victim)
    ones(path)
    assert victim.read_text() == "mine"
    assert link.is_symlink()


def test_a_pipe_with_the_name_of_what_is_written_is_not_waited_for(path):
    pipe = path.with_name(f".{path.name}.partial")
    os.mkfifo(pipe)
    code = """
        import signal, sys
        import numpy as np
        from fastema import checkpoint

        signal.alarm(60)
        checkpoint.write(sys.argv[1], {"w": np.ones(3)})
    """
    done = python(code, path)
    assert done.returncode == 0, done.stderr
    assert pipe.is_fifo()
    assert checkpoint.File(path)["w"].sum() == 3


@pytest.mark.parametrize("rights", [0o600, 0o640, 0o666, 0o444])
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_that_is_replaced_keeps_its_rights_from_the_first_byte_on(path, rights, umask):
    before = os.umask(umask)
    try:
        path.touch()
        path.chmod(rights)
        with _replace.replacing(path):
            (begun,) = path.parent.glob(".*")
            assert begun.stat().st_mode & 0o777 == rights
        assert path.stat().st_mode & 0o777 == rights
    finally:
        os.umask(before)


def test_an_interrupt_just_after_the_rename_is_an_interrupt(path, monkeypatch):
    ones(path)
    replace = Path.replace

    def interrupted(self, target):
        replace(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(path, {"w": np.zeros(2)})
    assert checkpoint.File(path)["w"].tolist() == [0.0] * 2
    assert os.listdir(path.parent) == [path.name]


def test_links_in_a_circle_are_the_systems_own_error(path):
    path.symlink_to(path.name)
    for call in (lambda: ones(path), lambda: checkpoint.File(path)):
        with pytest.raises(OSError, match="symbolic links"):
            call()


def test_16_writers_without_locks_leave_one_whole_file(path):
    code = """
        import errno, fcntl, os, sys
        import numpy as np
        from fastema import checkpoint

        def no_locks(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        fcntl.flock = no_locks
        path, children = sys.argv[1], []
        checkpoint.write(path, {"w": np.zeros(1000)})
        for generation in range(1, 17):
            children.append(os.fork())
            if children[-1] == 0:
                try:
                    for _ in range(10):
                        checkpoint.write(path, {"w": np.full(1000 * generation, generation)})
                        read = checkpoint.File(path)["w"]
                        assert read.size == 1000 * max(read[0], 1) and (read == read[0]).all()
                except BaseException as error:
                    print(repr(error), flush=True)
                os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        print(os.listdir(os.path.dirname(path)), checkpoint.File(path)["w"][0] > 0)
    """
    assert output_of(code, path) == f"['{path.name}'] True"


def test_where_there_are_no_locks_nothing_that_may_be_written_is_removed(path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    other = path.with_name(f".{path.name}.0123456789abcdef.partial")
    other.write_text("perhaps another's")
    ones(path)
    assert other.read_text() == "perhaps another's"


@pytest.mark.parametrize(
    "missing", ["", "O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_NOCTTY O_CLOEXEC fchmod preadv"]
)
def test_a_system_without_locks_of_files_or_more_saves_and_loads(path, missing):
    """`import fastema` needed the module fcntl."""
    code = """
        import os, sys
        from pathlib import Path

        sys.modules["fcntl"] = None
        for name in sys.argv[2].split():
            delattr(os, name)

        import numpy as np
        import fastema
        from fastema import _system
        from fastema.checkpoint import _replace

        _system.OPEN_FILES_CAN_BE_MOVED = not sys.argv[2]
        path, weights = Path(sys.argv[1]), {"w": np.ones(3)}
        other = path.with_name(f".{path.name}.0123456789abcdef.partial")
        other.write_text("perhaps another's")
        for rights in (0o666, 0o640):
            fastema.EMA(weights).save(path)
            path.chmod(rights)
        with _replace.replacing(path) as file:
            file.write(path.read_bytes())
        assert path.stat().st_mode & 0o777 == 0o640
        assert fastema.EMA.load(path, weights).averages["w"].tolist() == [1.0] * 3
        folder = path.with_name("folder")
        folder.mkdir()
        with _replace.new_folder(folder) as begun:
            (begun / "w").write_text("written")
        assert (folder / "w").read_text() == "written"
        assert other.read_text() == "perhaps another's"
        print(sorted(os.listdir(path.parent)))
    """
    expected = sorted([path.name, "folder", f".{path.name}.0123456789abcdef.partial"])
    assert output_of(code, path, missing) == str(expected)
