"""The command line: ``python -m fastema info``, ``average``, ``demo`` and ``bench``."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from . import build_config, checkpoint


def info() -> None:
    """Print the build configuration, a line each."""
    for name, value in build_config().items():
        text = (", ".join(value) or "none yet") if isinstance(value, list) else value
        print(f"{name.replace('_', ' '):<17}{text}")


class Progress:
    """How much of a long work is done: a bar on a terminal, elsewhere a line for every tenth."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._percent = -1

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` bytes of `total` are done."""
        percent = 100 * done // total
        if percent == self._percent:
            return
        if self._stream.isatty():
            bar = "#" * (percent // 2)
            end = "\n" if done == total else ""
            print(f"\r[{bar:<50}] {percent:3} %", end=end, file=self._stream, flush=True)
        elif percent // 10 != self._percent // 10:
            print(f"{percent} %", file=self._stream, flush=True)
        self._percent = percent


def average(options: argparse.Namespace) -> int:
    """Average files of weights; return the exit status."""
    try:
        kept = checkpoint.average(
            options.files,
            options.output,
            weights=options.weights,
            dtype=options.dtype,
            progress=Progress(sys.stderr),
        )
    except (OSError, ValueError) as reason:
        print(f"{options.output} is not written: {reason}", file=sys.stderr)
        return 1
    averaged = len(checkpoint.File(options.output)) - len(kept)
    print(f"{options.output}: {averaged} tensors averaged over {len(options.files)} files")
    if kept:
        print(f"{len(kept)} of integers or booleans taken from {options.files[-1]}: {', '.join(kept)}")
    return 0


def measure(quick: bool, samples: int, folder: Path) -> None:
    """Run the benchmarks of updates, swaps and memory."""
    from .bench import bench_memory, bench_swap, bench_update  # noqa: PLC0415 - nobody else needs them

    flags = ["--quick"] if quick else []
    for name, benchmark in (("update", bench_update), ("swap", bench_swap)):
        options = ["--samples", str(samples), "--json", str(folder / f"bench-{name}.json")]
        if find_spec("matplotlib"):
            options += ["--picture", str(folder / f"bench-{name}.png")]
        benchmark.main([*flags, *options])
    bench_memory.main(flags)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastema", description="Averages of model weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print what this build is and what it finds on this machine")
    averaging = commands.add_parser(
        "average",
        help="average checkpoints on disk (safetensors)",
        description="Write the mean of safetensors files: computed in float64, rounded once, in little "
        "memory. Tensors of integers and booleans are taken from the last file.",
    )
    averaging.add_argument("files", nargs="+", metavar="FILE", help="with the same tensors each")
    averaging.add_argument("-o", "--output", required=True, metavar="FILE", help="replaced as a whole or not")
    averaging.add_argument(
        "--weights", nargs="+", type=float, metavar="WEIGHT", help="one for each file (default: all alike)"
    )
    averaging.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32", "float64"],
        help="of the averages (default: as in the files)",
    )
    demo = commands.add_parser("demo", help="train on handwritten digits: raw against averaged weights")
    demo.add_argument("--epochs", type=int, default=20)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--picture", type=Path, default=Path("fastema-demo.png"), help="where to write it")
    bench = commands.add_parser("bench", help="time updates and swaps against this machine and all rivals")
    bench.add_argument("--quick", action="store_true", help="small lists only")
    bench.add_argument("--samples", type=int, default=9, help="of each contestant, in turns")
    bench.add_argument("--folder", type=Path, default=Path(), help="where to write the numbers and charts")
    options = parser.parse_args(arguments)
    if options.command == "info":
        info()
        return 0
    if options.command == "average":
        return average(options)
    if options.command == "bench":
        measure(options.quick, options.samples, options.folder)
        return 0
    try:
        from . import demo as demonstration  # noqa: PLC0415 - loads Keras
    except ModuleNotFoundError as missing:
        print(
            f"the demo needs {missing.name}: pip install 'fastema[demo]' brings Keras, TensorFlow, "
            "scikit-learn and matplotlib",
            file=sys.stderr,
        )
        return 1
    demonstration.main(options.epochs, options.seed, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
