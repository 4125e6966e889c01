"""How long does a merge of large checkpoints take beside dd on the same bytes, and how much memory?

    python -m fastema.bench.bench_merge [--quick] [--folder FOLDER] [--checkpoints N] [--shards N]
                                        [--gigabytes G] [--dtype T] [--samples N] [--prepare]

Checkpoints are folders of shards with an index, in a folder of their own that is removed at the end; with
``--prepare`` they are only written there, for a later run to measure. All are read once before, and so come
from the system's cache if they fit into memory; what is written is flushed to the disk. dd reads all files
and writes as many bytes as the mean has (``conv=fsync``). Times are medians of samples in turns, the memory
is the peak of a process.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastema import checkpoint

from . import cli

_PROGRAM = """
import sys, time
from pathlib import Path
from fastema import checkpoint
begin = time.perf_counter()
checkpoint.average(sys.argv[2:], sys.argv[1])
seconds = time.perf_counter() - begin
status = Path("/proc/self/status")  # getrusage counts the process that began this one, too
lines = status.read_text().splitlines() if status.exists() else ["VmHWM: nan"]
print(seconds, next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""
_TENSOR = 1 << 26  # bytes: as large as some matrices of a language model
_SEED = 1 << 20  # bytes of numbers that are drawn; the rest repeats them


def write(folder: Path, shards: int, size: int, dtype: str, seed: int) -> None:
    """Write a checkpoint of so many shards, of so many bytes each."""
    folder.mkdir()
    element = np.dtype(checkpoint_type(dtype))
    numbers = np.random.default_rng(seed).standard_normal(_SEED // element.itemsize).astype(element)
    weight_map = {}
    for number in range(1, shards + 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        tensors = {}
        for i, begin in enumerate(range(0, size, _TENSOR)):
            count = min(_TENSOR, size - begin) // element.itemsize
            tensors[f"layers.{number}.{i}.weight"] = np.resize(numbers, count)
        checkpoint.write(folder / name, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def checkpoint_type(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def merge(folders: list[Path], target: Path) -> tuple[float, float]:
    """Merge in a process of its own; return the seconds and the bytes of memory at the peak."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, target, *folders], stdout=subprocess.PIPE, text=True, check=True
    )
    shutil.rmtree(target)
    seconds, kilobytes = done.stdout.split()
    return float(seconds), 1024 * float(kilobytes)


def dd(folders: list[Path], target: Path, size: int) -> tuple[float, float]:
    """Return the seconds that dd takes to read all files, and to write so many bytes to the disk."""
    begin = time.perf_counter()
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            _run_dd(f"if={path}", "of=/dev/null")
    read = time.perf_counter()
    _run_dd("if=/dev/zero", f"of={target}", f"count={-(-size >> 22)}", "conv=fsync")
    written = time.perf_counter()
    target.unlink()
    return read - begin, written - read


def _run_dd(*arguments: str) -> None:
    subprocess.run(["dd", "bs=4M", *arguments], stderr=subprocess.DEVNULL, check=True)


@contextmanager
def checkpoints(options: argparse.Namespace) -> Iterator[list[Path]]:
    """Write checkpoints, or find those that were prepared; remove them unless they are only prepared."""
    folder = options.folder / "bench-merge"
    names = [folder / f"checkpoint-{step}" for step in range(1, options.checkpoints + 1)]
    if not folder.exists():
        folder.mkdir()
        for seed, name in enumerate(names):
            write(name, options.shards, int(options.gigabytes * 1e9), options.dtype, seed)
        os.sync()
    yield names
    if not options.prepare:
        shutil.rmtree(folder)


def measure(folders: list[Path], samples: int) -> None:
    """Print a table of times and memory."""
    files = [path for folder in folders for path in folder.glob("*.safetensors")]
    total = sum(path.stat().st_size for path in files)
    size = total // len(folders)
    merges, dds = [], []
    for path in files:
        _run_dd(f"if={path}", "of=/dev/null")
    for _ in range(samples):
        dds.append(dd(folders, folders[0].parent / "written", size))
        merges.append(merge(folders, folders[0].parent / "mean"))
    read, written = (statistics.median(each[k] for each in dds) for k in (0, 1))
    seconds, peak = (statistics.median(each[k] for each in merges) for k in (0, 1))
    print(f"\n{len(folders)} checkpoints of {len(files) // len(folders)} files, {total / 1e9:.1f} GB in all")
    for name, took, moved in (
        ("dd, reading", read, total),
        ("dd, writing", written, size),
        ("dd, both", read + written, total + size),
        ("fastema", seconds, total + size),
    ):
        print(f"{name:<12}{took:8.2f} s{moved / took / 1e9:8.2f} GB/s")
    print(f"peak of memory {peak / 1e6:.0f} MB; {seconds / (read + written):.2f} of dd's time")


def main(arguments: list[str] | None = None) -> None:
    """Write checkpoints, and merge them."""
    parser = cli.parser(__doc__, times=False)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to use")
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of each shard")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--prepare", action="store_true", help="only write the checkpoints")
    options = parser.parse_args(arguments)
    if options.quick:
        options.gigabytes, options.samples = 0.001, 1
    with checkpoints(options) as folders:
        if not options.prepare:
            measure(folders, options.samples)


if __name__ == "__main__":
    main()
