"""All averages of one training, by fastema: each watches the same weights."""

from collections.abc import Iterator
from pathlib import Path

from .. import checkpoint, posthoc, schedules
from ..checkpoint._shares import Style
from ..ema import EMA
from ..methods import BEMA, Window
from .network import Weights

DECAYS = {
    **{f"decay {decay}": schedules.constant(decay) for decay in (0.9, 0.99, 0.999, 0.9999)},
    "decay 0.9999, dynamic": schedules.dynamic(0.9999),
}
SIGMA_RELS = (0.05, 0.10)  # of the power averages that snapshots are kept of
TAILS = (0.1, 0.2, 0.4)  # shares of the training, at its end
LENGTHS = (0.01, 0.05, 0.2)  # shares of the training that a window's snapshots are spread over
BIAS_POWERS = (0.2, 0.4, 0.6)  # 0.2 is the paper's

_SNAPSHOTS = 5  # of a window
_CHECKPOINTS = 50  # of a whole training, to merge
_KEPT = 20  # snapshots of each power average
_UNCORRECTED = 1e3  # a power of the age, by which nothing is left of the way

Setting = tuple[str, str]  # a method, and how what it was told is called


class Running:
    """The averages that can go on in another training: exponential ones and windows.

    Args:
        weights: What is trained, in place.
        steps: How many steps the training has.
    """

    def __init__(self, weights: Weights, steps: int) -> None:
        self.steps = steps
        self._ema = EMA(weights, list(DECAYS.values()))
        self._windows = [
            Window(weights, _SNAPSHOTS, every=part(steps, length / _SNAPSHOTS)) for length in LENGTHS
        ]

    def update(self) -> None:
        """Take the weights in as they are after a step."""
        for average in (self._ema, *self._windows):
            average.update()

    def branch(self, weights: Weights) -> "Running":
        """Return the same averages, to go on with weights that begin as these are now."""
        other = Running(weights, self.steps)
        for new, old in zip((other._ema, *other._windows), (self._ema, *self._windows), strict=True):
            new.load_state_dict(old.state_dict())
        return other

    def all(self) -> Iterator[tuple[Setting, Weights]]:
        """Yield each average, by its setting."""
        for k, called in enumerate(DECAYS):
            yield ("EMA", called), self._ema.averages_of(k)
        for length, window in zip(LENGTHS, self._windows, strict=True):
            yield ("LAWA", f"last {length:.0%}"), window.averages


class Averages:
    """All averages of a training at a constant rate, and checkpoints of it.

    Args:
        weights: What is trained, in place.
        steps: How many steps the training has.
        folder: For checkpoints, and for snapshots of power averages.
    """

    def __init__(self, weights: Weights, steps: int, folder: Path) -> None:
        self.running, self.snapshots = Running(weights, steps), posthoc.Snapshots(folder / "snapshots")
        self._weights, self._steps, self._folder = weights, steps, folder
        self.checkpoints: list[Path] = []  # of raw weights, the newest last
        self._powers = EMA(weights, [schedules.power(sigma) for sigma in SIGMA_RELS])
        self._tails = EMA(weights, [schedules.equal_weights(1 + round(steps * (1 - tail))) for tail in TAILS])
        every = part(steps, LENGTHS[0] / _SNAPSHOTS)
        self._bemas = {f"eta {power}": BEMA(weights, every=every, bias_power=power) for power in BIAS_POWERS}
        self._bemas["eta 0.2, 2nd half"] = BEMA(weights, every=every, start_step=steps // 2)
        self._uncorrected = BEMA(weights, every=every, bias_power=_UNCORRECTED)

    def update(self, step: int) -> None:
        """Take the weights in as they are after a step."""
        self.running.update()
        for average in (self._powers, self._tails, *self._bemas.values(), self._uncorrected):
            average.update()
        if step % part(self._steps, 1 / _KEPT) == 0:
            kept = {sigma: self._powers.averages_of(k) for k, sigma in enumerate(SIGMA_RELS)}
            self.snapshots.add(step, kept)
        if step % part(self._steps, 1 / _CHECKPOINTS) == 0:
            self.checkpoints.append(self._folder / f"{step}.safetensors")
            checkpoint.write(self.checkpoints[-1], self._weights)

    def early(self) -> Iterator[tuple[Setting, Weights]]:
        """Yield those averages that are meant to be of use in the course of a training, by their settings."""
        yield from self.running.all()
        for called, bema in self._bemas.items():
            yield ("BEMA", called), bema.averages

    def all(self) -> Iterator[tuple[Setting, Weights]]:
        """Yield each average that was kept, and each merge of checkpoints, by its setting."""
        yield from self.early()
        for k, sigma in enumerate(SIGMA_RELS):
            yield ("power EMA", f"sigma_rel {sigma:.2f}"), self._powers.averages_of(k)
        for k, tail in enumerate(TAILS):
            yield ("SWA", f"last {tail:.0%}"), self._tails.averages_of(k)
        yield ("BEMA's EMA", "uncorrected"), self._uncorrected.averages
        for tail in TAILS:
            yield ("WSM", f"linear, last {tail:.0%}"), self._merged("linear", tail)
        yield ("WSM", "cosine, last 20%"), self._merged("cosine", 0.2)
        yield ("WSM", "minus-sqrt, last 20%"), self._merged("minus-sqrt", 0.2)
        yield ("PMA", "last 20%"), self._merged("ema", 0.2)

    def _merged(self, style: Style, tail: float) -> Weights:
        merged = self._folder / "merged.safetensors"
        checkpoint.average(self.checkpoints[-round(_CHECKPOINTS * tail) :], merged, style=style)
        return dict(checkpoint.File(merged))


def part(steps: int, share: float) -> int:
    """Return how many steps a share of the training is, at least one."""
    return max(1, round(steps * share))
