"""``python -m fastema posthoc``: which length of the average is best, from snapshots of a training."""

import argparse
import importlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import posthoc, schedules
from .progress import Progress

Score = Callable[[str], float]

_SHOWN = 9  # lengths in the table, where none are asked for
_POINTS = 200  # of a line in a picture
_TICKS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25)  # where an axis is labelled


class Row(NamedTuple):
    """A length, and what is known of its average.

    Attributes:
        sigma: Its sigma_rel.
        error: As `posthoc.error`.
        growth: How much errors of the snapshots grow: the sum of what they weigh, regardless of signs.
        score: What it was judged; None, if nobody did.
    """

    sigma: float
    error: float
    growth: float
    score: float | None = None


class Kept(NamedTuple):
    """The snapshots in a folder, and the step of the averages to make of them."""

    snapshots: posthoc.Snapshots
    steps: list[int]
    sigmas: list[float]
    step: int

    @classmethod
    def of(cls, folder: Path, step: int | None) -> "Kept":
        """Find the snapshots in a folder.

        Raises:
            ValueError: There is none.
        """
        snapshots = posthoc.Snapshots(folder)
        keys = list(snapshots.paths)
        if not keys:
            raise ValueError(f"{folder} must have snapshots of posthoc.Snapshots, and has none")
        steps, sigmas = [key[0] for key in keys], [key[1] for key in keys]
        return cls(snapshots, steps, sigmas, max(steps) if step is None else step)

    def row(self, sigma: float, score: float | None = None) -> Row:
        """Return what is known of a length."""
        shares = posthoc.weights(self.steps, self.sigmas, sigma, self.step)
        error = posthoc.error(self.steps, self.sigmas, sigma, self.step)
        return Row(sigma, error, float(np.abs(shares).sum()), score)


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "posthoc",
        help="choose the length of an average after the training",
        description="Of snapshots that fastema.posthoc.Snapshots keeps: say how close averages of other "
        "lengths (sigma_rel) come, write them, and find the one with the best score. Draws profiles, errors "
        "and scores.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the snapshots")
    parser.add_argument("--step", type=int, help="when the average is taken (default: the last snapshot's)")
    parser.add_argument(
        "--sigmas", nargs="+", type=float, metavar="SIGMA_REL", help="lengths to write averages of"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("posthoc"),
        metavar="FOLDER",
        help="for averages and the picture; made where it is not there (default: posthoc)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32", "float64"],
        help="of the averages (default: as in the snapshots)",
    )
    judge = parser.add_mutually_exclusive_group()
    judge.add_argument(
        "--score", metavar="MODULE:FUNCTION", help="takes the path of an average and returns its score"
    )
    judge.add_argument(
        "--command",
        dest="scorer",
        metavar="COMMAND",
        help="prints the score of an average, as the last thing; {} stands for its path, or it comes last",
    )
    parser.add_argument("--higher", action="store_true", help="higher scores are better (default: lower)")
    parser.add_argument(
        "--range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="of lengths, where a score is searched for and no --sigmas are given",
    )
    parser.add_argument("--evaluations", type=int, default=12, help="of the search (default: 12)")


def run(options: argparse.Namespace) -> int:
    """Tell, write and choose averages; return the exit status."""
    try:
        kept = Kept.of(options.folder, options.step)
        low, high = options.range or _range(kept.sigmas)
        lengths = np.geomspace(low, high, _SHOWN).tolist()
        rows = [kept.row(sigma) for sigma in options.sigmas or lengths]  # refuses what is none
        if len({_path(options, row.sigma) for row in rows}) < len(rows):
            raise ValueError("--sigmas must differ within six digits, by which their files are called")
        score = _score_of(options)
        options.output.mkdir(parents=True, exist_ok=True)
        if options.sigmas:
            rows = _written(kept, options, rows, score)
        elif score:
            rows = _searched(kept, options, score, (low, high))
        _tell(rows, options, chosen=score is not None)
        _draw(kept, rows, (low, high), options.output / "posthoc.png")
    except (OSError, ValueError) as reason:
        print(f"fastema posthoc: {reason}", file=sys.stderr)
        return 1
    return 0


def _range(sigmas: list[float]) -> tuple[float, float]:
    """Return between which lengths averages are close, and errors of the snapshots do not grow too far."""
    return 0.6 * min(sigmas), min(2 * max(sigmas), 0.28)


def _path(options: argparse.Namespace, sigma: float) -> Path:
    path: Path = options.output / f"average-{sigma:.6g}.safetensors"
    return path


def _written(kept: Kept, options: argparse.Namespace, rows: list[Row], score: Score | None) -> list[Row]:
    """Write the average of each length, and judge it."""
    made = []
    for row in rows:
        path = _path(options, row.sigma)
        _write(kept, row.sigma, path, options.dtype)
        made.append(row._replace(score=None if score is None else score(str(path))))
        _say(made[-1], len(made), len(rows))
    return made


def _searched(kept: Kept, options: argparse.Namespace, score: Score, ends: tuple[float, float]) -> list[Row]:
    """Judge averages of several lengths, and write the best."""
    judged: list[Row] = []

    def judge(sigma: float) -> float:
        with tempfile.TemporaryDirectory(dir=options.output) as folder:
            path = Path(folder, "average.safetensors")
            _write(kept, sigma, path, options.dtype)
            judged.append(kept.row(sigma, score(str(path))))
        _say(judged[-1], len(judged), options.evaluations)
        return float(judged[-1].score or 0.0)

    posthoc.search(judge, *ends, options.evaluations, higher=options.higher)
    best = _best(judged, higher=options.higher)
    _write(kept, best.sigma, _path(options, best.sigma), options.dtype)
    return sorted(judged)


def _write(kept: Kept, sigma: float, path: Path, dtype: str | None) -> None:
    progress = Progress(sys.stderr) if sys.stderr.isatty() else None  # lines would hide those of the scores
    kept.snapshots.average(sigma, kept.step, output=path, dtype=dtype, progress=progress)


def _say(row: Row, done: int, total: int) -> None:
    score = "" if row.score is None else f", score {row.score:.6g}"
    print(f"{done} of {total}: sigma_rel {row.sigma:.4g}{score}", file=sys.stderr, flush=True)


# --- scores ---------------------------------------------------------------------------------------------


def _score_of(options: argparse.Namespace) -> Score | None:
    """Return what judges an average.

    Raises:
        ValueError: It cannot be found.
    """
    if options.score is not None:
        return _function(options.score)
    return None if options.scorer is None else _command(options.scorer)


def _function(name: str) -> Score:
    module, _, names = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in names.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as reason:
        raise ValueError(
            f"--score must be MODULE:FUNCTION that can be imported, got {name!r}: {reason}"
        ) from None

    def score(path: str) -> float:
        try:
            judged = found(path)
        except (OSError, ValueError) as reason:  # not one of ours, which are told without a traceback
            raise RuntimeError(f"--score {name} failed on {path}") from reason
        try:
            return float(judged)
        except (TypeError, ValueError):
            raise ValueError(f"--score must return a number, and {name} returned {judged!r}") from None

    return score


def _command(text: str) -> Score:
    words = shlex.split(text)
    if not words:
        raise ValueError("--command must be a command, got none")

    def score(path: str) -> float:
        filled = [word.replace("{}", path) for word in words]
        done = subprocess.run(
            filled if filled != words else [*words, path], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise ValueError(
                f"--command must succeed, and {shlex.join(done.args)} ended with {done.returncode}"
            )
        try:
            return float(done.stdout.split()[-1])
        except (IndexError, ValueError):
            last = done.stdout.strip().splitlines()[-1:]
            raise ValueError(f"--command must print a number as the last thing, got {last}") from None

    return score


# --- what is told and drawn -----------------------------------------------------------------------------


def _tell(rows: list[Row], options: argparse.Namespace, *, chosen: bool) -> None:
    """Print a table of the lengths, and where the averages are."""
    print(f"{'sigma_rel':>9}  {'error':>8}  {'growth':>6}" + ("  score" if chosen else ""))
    for row in rows:
        score = "" if row.score is None else f"  {row.score:.6g}"
        print(f"{row.sigma:9.4g}  {row.error:8.2g}  {row.growth:6.3g}{score}")
    if chosen:
        best = _best(rows, higher=options.higher)
        print(f"the best: sigma_rel {best.sigma:.6g} in {_path(options, best.sigma)}")
    elif options.sigmas:
        print(f"averages: {options.output}")


def _best(rows: list[Row], *, higher: bool) -> Row:
    """Return the row of the best score.

    Raises:
        ValueError: All scores are NaN.
    """
    scores = {row: row.score for row in rows if row.score is not None and not np.isnan(row.score)}
    if not scores:
        raise ValueError("scores must be numbers, and each of them was NaN")
    return (max if higher else min)(scores, key=lambda row: scores[row])


def _draw(kept: Kept, rows: list[Row], ends: tuple[float, float], path: Path) -> None:
    """Draw the profiles, the errors and, if there are any, the scores."""
    if not find_spec("matplotlib"):
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a while

    scored = [row for row in rows if row.score is not None]
    panels = 3 if scored else 2
    axes = (figure := Figure(figsize=(5 * panels, 4), layout="constrained")).subplots(1, panels)
    _draw_profiles(axes[0], kept, rows)
    _draw_errors(axes[1], kept, ends)
    if scored:
        by_length = sorted(scored)
        axes[2].plot([row.sigma for row in by_length], [row.score for row in by_length], "o-", ms=4)
        axes[2].set(ylabel="score", title="scores")
        _along_lengths(axes[2], (by_length[0].sigma, by_length[-1].sigma))
    for each in axes:
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    print(f"picture: {path}")


def _draw_profiles(axes: Any, kept: Kept, rows: list[Row]) -> None:
    """Draw what steps weigh: in averages that were kept, in those that are wanted, and in what is made."""
    at = np.linspace(0, kept.step, _POINTS + 1)[1:]
    for sigma in sorted(set(kept.sigmas)):
        axes.plot(at, _profile(sigma, kept.step, at), color="0.6", lw=1)
    for i, row in enumerate(rows):
        shares = posthoc.weights(kept.steps, kept.sigmas, row.sigma, kept.step)
        made = sum(
            share * _profile(sigma, step, at)
            for share, sigma, step in zip(shares.tolist(), kept.sigmas, kept.steps, strict=True)
            if share
        )
        axes.plot(at, _profile(row.sigma, kept.step, at), color=f"C{i % 10}", lw=1)
        axes.plot(at, made, "--", color=f"C{i % 10}", lw=1, label=f"{row.sigma:.3g}")
    axes.set(xlabel="step", ylabel="weight", title="profiles (grey: kept; dashed: made)")
    axes.legend(fontsize=8, title="sigma_rel")


def _profile(sigma: float, step: int, at: np.ndarray) -> np.ndarray:
    """Return the profile of a power average that is taken at a step, at some steps; 0 after it."""
    gamma = schedules.power(sigma).gamma
    return np.where(at <= step, (gamma + 1) / step * (at / step) ** gamma, 0.0)


def _along_lengths(axes: Any, ends: tuple[float, float]) -> None:
    """Let the x axis be of lengths, at equal ratios."""
    axes.set(xscale="log", xlabel="sigma_rel")
    axes.minorticks_off()
    ticks = [tick for tick in _TICKS if ends[0] * 0.999 <= tick <= ends[1] * 1.001]
    axes.set_xticks(ticks, labels=map(str, ticks))


def _draw_errors(axes: Any, kept: Kept, ends: tuple[float, float]) -> None:
    """Draw how far averages are from the profiles that they are meant to have, and what was kept."""
    own = sorted(sigma for sigma in set(kept.sigmas) if ends[0] <= sigma <= ends[1])
    rows = [kept.row(sigma) for sigma in sorted({*np.geomspace(*ends, 41).tolist(), *own})]
    axes.plot([row.sigma for row in rows], [max(row.error, 1e-9) for row in rows], label="error")
    axes.plot([row.sigma for row in rows], [row.growth for row in rows], ":", label="growth of rounding")
    for sigma in own:
        axes.axvline(sigma, color="0.6", lw=1)
    axes.set(yscale="log", ylim=(1e-5, None), ylabel="relative error", title="error of the synthesis")
    _along_lengths(axes, ends)
    axes.legend(fontsize=8)
