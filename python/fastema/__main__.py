"""The command line: ``python -m fastema info``, ``average``, ``posthoc``, ``demo`` and ``bench``."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from . import __version__, build_config
from ._commands import average, posthoc


def info() -> None:
    """Print the build configuration, a line each."""
    for name, value in build_config().items():
        text = (", ".join(value) or "none yet") if isinstance(value, list) else value
        print(f"{name.replace('_', ' '):<17}{text}")


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


def demonstrate(options: argparse.Namespace) -> int:
    """Run the demo; return the exit status."""
    try:
        if options.methods:
            from ._comparison import report  # noqa: PLC0415 - loads scikit-learn

            report.main(options.seeds, options.picture or Path("fastema-methods.png"), options.quick)
        else:
            from . import demo  # noqa: PLC0415 - loads Keras

            demo.main(options.epochs, options.seed, options.picture or Path("fastema-demo.png"))
    except ModuleNotFoundError as missing:
        print(
            f"the demo needs {missing.name}: pip install 'fastema[demo]' brings Keras, TensorFlow, "
            "scikit-learn and matplotlib",
            file=sys.stderr,
        )
        return 1
    return 0


def _seeds(text: str) -> int:
    seeds = int(text)
    if seeds < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, as differences have a spread, got {seeds}")
    return seeds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastema", description="Averages of model weights.")
    parser.add_argument("--version", action="version", version=f"fastema {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print what this build is and what it finds on this machine")
    average.add_to(commands)
    posthoc.add_to(commands)
    demo = commands.add_parser("demo", help="train on handwritten digits: raw against averaged weights")
    demo.add_argument("--epochs", type=int, default=20)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument(
        "--picture",
        type=Path,
        help="where to write it (default: fastema-demo.png; of methods, fastema-methods.png)",
    )
    demo.add_argument("--methods", action="store_true", help="compare all methods on three trainings instead")
    demo.add_argument("--seeds", type=_seeds, default=5, help="how many, of methods (default: 5)")
    demo.add_argument("--quick", action="store_true", help="hardly train, of methods: for tests")
    bench = commands.add_parser("bench", help="time updates and swaps against this machine and all rivals")
    bench.add_argument("--quick", action="store_true", help="small lists only")
    bench.add_argument("--samples", type=int, default=9, help="of each contestant, in turns")
    bench.add_argument("--folder", type=Path, default=Path(), help="where to write the numbers and charts")
    options = parser.parse_args(arguments)
    if options.command == "info":
        info()
        return 0
    if options.command == "average":
        return average.run(options)
    if options.command == "posthoc":
        return posthoc.run(options)
    if options.command == "bench":
        measure(options.quick, options.samples, options.folder)
        return 0
    return demonstrate(options)


if __name__ == "__main__":
    sys.exit(main())
