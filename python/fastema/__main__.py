"""The command line: ``python -m fastema info`` and ``python -m fastema demo``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import build_config


def info() -> None:
    """Print the build configuration, a line each."""
    for name, value in build_config().items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name.replace('_', ' '):<17}{text}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastema", description="Averages of model weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print what this build is and what it finds on this machine")
    demo = commands.add_parser("demo", help="train on handwritten digits: raw against averaged weights")
    demo.add_argument("--epochs", type=int, default=20)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--picture", type=Path, default=Path("fastema-demo.png"), help="where to write it")
    options = parser.parse_args(arguments)
    if options.command == "info":
        info()
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
