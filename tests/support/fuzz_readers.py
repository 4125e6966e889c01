"""Fuzzes all that reads files, guided by coverage: `python tests/support/fuzz_readers.py -max_total_time=60`.

Arguments are libFuzzer's; it needs the package atheris. It begins with the corpus in tests/data, and ends
with an error at the first input of which something does not hold (`inputs.check`) or which takes more than
10 s or 1 GiB, and prints the path of that input.
"""

import gc
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FunctionType

import atheris

import inputs

MEMORY = Path("/dev/shm")  # files there are on no disk
FOLDER = "FASTEMA_FUZZ_FOLDER"  # in the environment: where to read files
LIMIT = 1 << 30  # bytes, for one input


def main(arguments):
    """Fuzz in a process of its own, which may end anyhow; return its status."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        begin = Path(folder) / "begin"
        begin.mkdir()
        for data in inputs.seeds():
            (begin / inputs.name_of(data)).write_bytes(data)
        # it goes to another folder
        arguments = [each if each.startswith("-") else os.path.abspath(each) for each in arguments]
        program = [sys.executable, __file__, *arguments]
        if not any(map(os.path.isfile, arguments)):  # else these inputs alone are read
            program += [begin, inputs.CORPUS]
        return subprocess.run(program, env={**os.environ, FOLDER: folder}, check=False).returncode


def fuzz(folder, arguments):
    """Fuzz until something is found or the time is over; ends this process."""
    instrument()

    def one_input(data):
        limit = address_space() + LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        inputs.check(data, folder)

    def mutated(data, longest, seed):
        return inputs.mutated(data, longest, seed, atheris.Mutate)

    program = f"{sys.executable} {__file__}"  # libFuzzer starts it again where it merges corpora
    options = ["-timeout=10", "-max_len=4096", "-mutate_depth=2", f"-artifact_prefix={Path.cwd()}/"]
    atheris.Setup([program, *options, *arguments], one_input, custom_mutator=mutated)
    (folder / "victim.txt").write_text("what nobody may touch")
    os.chdir(folder)
    atheris.Fuzz()


def instrument():
    """Have all functions of fastema tell the fuzzer where they go: its hook knows no editable installs."""
    for each in gc.get_objects():
        if isinstance(each, FunctionType) and (each.__module__ or "").split(".")[0] == "fastema":
            atheris.instrument_func(each)


def address_space():
    """Return the bytes of this process' address space."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    return int(pages) * resource.getpagesize()


if __name__ == "__main__":
    if FOLDER in os.environ:
        fuzz(Path(tempfile.mkdtemp(dir=os.environ[FOLDER])), sys.argv[1:])
    else:
        sys.exit(main(sys.argv[1:]))
