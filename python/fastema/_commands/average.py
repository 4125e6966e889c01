"""``python -m fastema average``: merges checkpoints on disk."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .. import checkpoint
from ..checkpoint._choice import best, by_number, last
from ..checkpoint._mean import relative_weights
from ..checkpoint._replace import StrPath
from ..checkpoint._shares import STYLES
from .progress import Progress


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "average",
        help="average checkpoints on disk (safetensors)",
        usage="%(prog)s FILE [FILE ...] -o FILE [options]",  # or --weights would take the files, too
        description="Write the mean of checkpoints: safetensors files, or folders with such files as Hugging "
        "Face lays them out. It is computed in float64, rounded once, in little memory. Tensors of integers "
        "and booleans, and the other files of a folder, come from the newest checkpoint.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a file or folder, with the same tensors each; the newest last, or with the numbers of steps in "
        "names that are alike otherwise",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="a file is replaced as a whole or not, a folder never",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--style",
        choices=STYLES,
        default="mean",
        help="what files weigh: as much as the decay of a learning rate that they stand for, or as in an EMA",
    )
    how.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="WEIGHT",
        help="one for each file, which stay in their order then",
    )
    how.add_argument(
        "--between",
        action="store_true",
        help="of two running means (EMA.save of schedules.equal_weights): the mean of what came in between",
    )
    parser.add_argument(
        "--clocks",
        nargs=2,
        type=float,
        metavar=("N1", "N2"),
        help="of --between: how much each is the mean of, where the files do not say so",
    )
    parser.add_argument("--last", type=int, metavar="K", help="take the last K of the files alone")
    parser.add_argument("--best", type=int, metavar="N", help="take the best N of them, by --metric")
    parser.add_argument(
        "--metric",
        metavar="FILE",
        help="with a number for each file: JSON of path -> number, CSV of path,number, or Hugging Face's "
        "trainer_state.json",
    )
    parser.add_argument("--higher", action="store_true", help="higher numbers are better (default: lower)")
    parser.add_argument(
        "--metric-name",
        default="eval_loss",
        metavar="NAME",
        help="of the number in a trainer_state.json (default: eval_loss)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32", "float64"],
        help="of the averages (default: as in the files)",
    )


def run(options: argparse.Namespace) -> int:
    """Average checkpoints; return the exit status."""
    try:
        newest, kept = (_between if options.between else _mean)(options)
    except (OSError, ValueError) as reason:
        print(f"{options.output} is not written: {reason}", file=sys.stderr)
        return 1
    if kept:
        print(f"{len(kept)} tensors taken from {newest}: {', '.join(kept)}")
    return 0


def _mean(options: argparse.Namespace) -> tuple[StrPath, list[str]]:
    """Write the mean; return the newest checkpoint, and which tensors are its own."""
    if options.clocks is not None:
        raise ValueError("--clocks must be given with --between")
    files = _chosen(options)
    weights = relative_weights(len(files), options.style, options.weights)
    for file, weight in zip(files, weights, strict=True):
        print(f"{weight / sum(weights):8.4f}  {file}")
    kept = checkpoint.average(
        files,
        options.output,
        style=options.style,
        weights=options.weights,
        dtype=options.dtype,
        progress=Progress(sys.stderr),
    )
    print(f"{options.output}: the mean of {len(files)} checkpoints")
    return files[-1], kept


def _between(options: argparse.Namespace) -> tuple[StrPath, list[str]]:
    """Write the mean between two running means; return the later one, and which tensors are its own."""
    if len(options.files) != 2 or any(x is not None for x in (options.last, options.best, options.metric)):
        raise ValueError(
            f"--between must have two files, and no others to choose from, got {len(options.files)}"
        )
    earlier, later = options.files if options.clocks else by_number(options.files)
    kept = checkpoint.between(
        earlier,
        later,
        options.output,
        clocks=options.clocks,
        dtype=options.dtype,
        progress=Progress(sys.stderr),
    )
    print(f"{options.output}: the mean between {earlier} and {later}")
    return later, kept


def _chosen(options: argparse.Namespace) -> Sequence[StrPath]:
    """Return the files to average, the newest last.

    Raises:
        ValueError: Options do not go together, or there are not so many files, or no numbers for them.
        OSError: The file of numbers cannot be read.
    """
    if (options.best is None) != (options.metric is None):
        raise ValueError("--best must be given with --metric, and --metric with --best")
    chooses = options.last is not None or options.best is not None
    if options.weights is not None:
        if chooses:
            raise ValueError("--weights must have one for each file, and not go with --last or --best")
        return list(options.files)
    files: Sequence[StrPath] = by_number(options.files)
    if options.last is not None:
        files = last(files, options.last)
    if options.best is not None:
        files = best(files, options.metric, options.best, higher=options.higher, name=options.metric_name)
    return files
