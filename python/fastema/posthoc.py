"""Post-hoc averaging: which average would another decay have given, when the training is over already?

Keep snapshots of two or more power averages (`fastema.schedules.power`) during training. Afterwards the
average of another profile, at any step up to the last snapshot, is a weighted sum of the snapshots, the one
whose own profile is closest in the sense of least squares. Karras et al. 2024, "Analyzing and Improving the
Training Dynamics of Diffusion Models" (EDM2), section 3.2.

A profile is what each step's value weighs in an average. That of a power average at step t is
``(gamma + 1) / t * (s / t) ** gamma`` for s from 0 to t: its integral from s - 1 to s is what the decays of
`power` give to step s, exactly.
"""

import operator
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import checkpoint, schedules
from ._arrays import as_view, is_array, unmasked
from ._ema.tree import Selection, Tree
from .checkpoint._replace import StrPath

__all__ = ["Snapshots", "error", "search", "weights"]

_PIECE = 1 << 20  # steps: what is held of a schedule's profile at a time
_GRID = 5  # evaluations of a search before the golden section
_GOLDEN = (3 - 5**0.5) / 2  # its smaller part


def weights(
    steps: Sequence[int] | np.ndarray,
    sigma_rels: Sequence[float] | np.ndarray,
    target: float | schedules.Schedule,
    target_step: int | None = None,
) -> np.ndarray:
    """Return what each snapshot weighs in an average that was not kept.

    The weighted sum of the snapshots' profiles is the closest to the target's, in the sense of least squares,
    of those that add up to 1: a model weight that never moved keeps its value. (The paper leaves the sum
    free.)

    Where all sigma_rels have snapshots at the same steps, this takes time and memory in proportion to their
    number. It is stable in float64 beyond 1e7 steps and thousands of snapshots: what is solved for are the
    differences of successive snapshots, and those of different times do not overlap.

    Args:
        steps: The step of each snapshot, from 1.
        sigma_rels: What `schedules.power` was given for it; two or more different ones are of use.
        target: A sigma_rel, or any schedule. With a schedule, the first value weighs also what a start before
            it would (power averages forget theirs: if that is a share, it is an error), and the time taken
            grows with the number of steps (0.2 s for a million).
        target_step: When the average is taken; at most the last snapshot's step. None: that one.

    Returns:
        A float64 for each snapshot. They add up to 1, and some are negative: the sum of their magnitudes is
        how much errors of the snapshots can grow (2 between the sigma_rels and above, 15 at 0.6 of the
        least, 50 at 0.4). A snapshot that is the target itself weighs 1 and the others 0, exactly.

    Raises:
        ValueError: There is no snapshot, or one twice, a step is not from 1, a sigma_rel is none, or
            `target_step` is not between 1 and the last snapshot's.

    Example:
        >>> from fastema import posthoc, schedules
        >>> steps, sigma_rels = [500, 500, 1000, 1000], [0.05, 0.10, 0.05, 0.10]
        >>> posthoc.weights(steps, sigma_rels, 0.05)
        array([0., 0., 1., 0.])
        >>> posthoc.weights(steps, sigma_rels, 0.075).round(3)
        array([ 0.008, -0.022,  0.371,  0.643])
        >>> posthoc.weights(steps, sigma_rels, schedules.constant(0.99)).round(3)
        array([-0.001,  0.002,  0.228,  0.771])
    """
    t, sigmas, target, end = _checked(steps, sigma_rels, target, target_step)
    same = _same(t, sigmas, target, end)
    if same.any():
        return same.astype(np.float64)
    order, again, increments = _Increments.between(t, sigmas)
    shares = increments.closest_to(target, end)
    # an increment is its snapshot less what is left in it of the one before
    shares[:-1] -= np.where(again, increments.left() * shares, 0.0)[1:]
    as_given: np.ndarray = shares[np.argsort(order)]
    return as_given


def error(
    steps: Sequence[int] | np.ndarray,
    sigma_rels: Sequence[float] | np.ndarray,
    target: float | schedules.Schedule,
    target_step: int | None = None,
) -> float:
    """Return how far the average that `weights` makes is from one that was not kept, by their profiles.

    That is the length of the difference of the profiles, relative to the target's: 0 is the average itself,
    1 is as far as nothing. Averages of values that are independent from step to step differ by as much, those
    of a random walk by far less.

    Args:
        steps: As of `weights`, like all others.
        sigma_rels: Of the snapshots.
        target: A sigma_rel, or any schedule.
        target_step: When the average is taken.

    Returns:
        The relative error; below 1e-7 it is that of rounding.

    Raises:
        ValueError: As `weights` does.

    Example:
        >>> from fastema import posthoc
        >>> steps, sigma_rels = [500, 500, 1000, 1000], [0.05, 0.10, 0.05, 0.10]
        >>> [round(posthoc.error(steps, sigma_rels, target), 3) for target in (0.03, 0.05, 0.075, 0.2)]
        [0.176, 0.0, 0.048, 0.449]
    """
    t, sigmas, target, end = _checked(steps, sigma_rels, target, target_step)
    if _same(t, sigmas, target, end).any():
        return 0.0
    _, _, increments = _Increments.between(t, sigmas)
    return increments.distance(increments.closest_to(target, end), target, end)


def search(
    score: Callable[[float], float],
    low: float,
    high: float,
    evaluations: int = 12,
    *,
    higher: bool = False,
) -> dict[float, float]:
    """Find the sigma_rel whose average has the best score, by few evaluations.

    The first five are at equal ratios from `low` to `high`; then the golden section goes on between the
    neighbours of the best, as for a score that has one optimum there.

    Args:
        score: Returns the score of a sigma_rel: `Snapshots.average` and an evaluation of it.
        low: The least sigma_rel.
        high: The largest.
        evaluations: How often `score` is called, three times or more.
        higher: Whether higher scores are better. Lower ones are, of losses.

    Returns:
        sigma_rel -> score, of all that were evaluated, the best first. Scores that are NaN are worse than all
        others.

    Raises:
        ValueError: The range is empty or has what is no sigma_rel, or `evaluations` is below three.

    Example:
        >>> from fastema import posthoc
        >>> found = posthoc.search(lambda sigma_rel: (sigma_rel - 0.08) ** 2, 0.03, 0.25, 15)
        >>> round(next(iter(found)), 3)
        0.08
    """
    if not schedules.power(low).sigma_rel < schedules.power(high).sigma_rel:
        raise ValueError(f"low must be below high, got {low} and {high}")
    if not operator.index(evaluations) >= 3:
        raise ValueError(f"evaluations must be at least 3, got {evaluations}")
    sign = -1.0 if higher else 1.0
    scores: dict[float, float] = {}

    def ranked(sigma: float) -> tuple[bool, float]:
        return np.isnan(scores[sigma]), sign * scores[sigma]

    for sigma in np.geomspace(low, high, min(_GRID, evaluations)).tolist():
        scores[sigma] = float(score(sigma))
    for _ in range(evaluations - len(scores)):
        sigmas = sorted(scores)
        i = sigmas.index(min(sigmas, key=ranked))
        before, best, after = np.log([sigmas[max(i - 1, 0)], sigmas[i], sigmas[min(i + 1, len(sigmas) - 1)]])
        larger = after if after - best > best - before else before
        sigma = float(np.exp(best + _GOLDEN * (larger - best)))
        scores[sigma] = float(score(sigma))
    return {sigma: scores[sigma] for sigma in sorted(scores, key=ranked)}


def _checked(
    steps: Sequence[int] | np.ndarray,
    sigma_rels: Sequence[float] | np.ndarray,
    target: float | schedules.Schedule,
    target_step: int | None,
) -> tuple[np.ndarray, np.ndarray, schedules.Schedule, float]:
    """Return the arguments of `weights` as arrays, a schedule and the step of the average.

    Raises:
        ValueError: As `weights` does.
    """
    t, sigmas = np.asarray(steps, np.float64), np.asarray(sigma_rels, np.float64)
    if t.ndim != 1 or t.shape != sigmas.shape or t.size == 0:
        raise ValueError(
            "steps and sigma_rels must hold a number for each of one snapshot or more, "
            f"got shapes {t.shape} and {sigmas.shape}"
        )
    unfit = t[~((t >= 1) & (t < np.inf))]
    if unfit.size:
        raise ValueError(f"steps must be finite and at least 1, the first update, got {unfit[0]:g}")
    for sigma in set(sigmas):
        schedules.power(float(sigma))
    end = t.max() if target_step is None else float(target_step)
    if not 1 <= end <= t.max():
        raise ValueError(
            f"target_step must be from 1 to {t.max():.0f}, the last snapshot, got {target_step!r}"
        )
    return (
        t,
        sigmas,
        target if isinstance(target, schedules.Schedule) else schedules.power(float(target)),
        end,
    )


def _same(t: np.ndarray, sigmas: np.ndarray, target: schedules.Schedule, end: float) -> np.ndarray:
    """Tell of each snapshot whether it is the target itself."""
    same: np.ndarray = (t == end) & (sigmas == getattr(target, "sigma_rel", None))
    return same


@dataclass(frozen=True)
class _Increments:
    """What each snapshot gained since the one before: profiles of power averages, from `begin` to `end`.

    Attributes:
        gamma: For each snapshot the exponent of its profile.
        begin: The step of the snapshot before it, of the same sigma_rel; 0 where there is none.
        end: Its own step.
    """

    gamma: np.ndarray
    begin: np.ndarray
    end: np.ndarray

    @classmethod
    def between(cls, t: np.ndarray, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray, "_Increments"]:
        """Return the order of snapshots, which of them have one of their sigma_rel before, and increments.

        Raises:
            ValueError: A snapshot is there twice.
        """
        order = np.lexsort((t, sigmas))
        t, sigmas = t[order], sigmas[order]
        again = np.append(False, sigmas[1:] == sigmas[:-1])
        before = np.where(again, np.roll(t, 1), 0.0)
        if (before == t).any():
            twice = int(np.argmax(before == t))
            raise ValueError(f"snapshots must be different, got step {t[twice]:.0f} of {sigmas[twice]} twice")
        gamma_of = {sigma: schedules.power(float(sigma)).gamma for sigma in set(sigmas)}
        return order, again, cls(np.array([gamma_of[sigma] for sigma in sigmas]), before, t)

    def left(self) -> np.ndarray:
        """Return the share that the average at the beginning has in the one at the end."""
        left: np.ndarray = (self.begin / self.end) ** (self.gamma + 1)
        return left

    def closest_to(self, target: schedules.Schedule, end: float) -> np.ndarray:
        """Return the share of each in the sum of mass 1 whose profile is closest to a target's at a step."""
        free, unit = np.zeros_like(self.end), np.zeros_like(self.end)
        mass = _share_since(self.begin, self.end, self.gamma + 1)
        size = np.sqrt(self.times(self))
        along = self.along(target, end)
        for group in self.overlapping(end):
            these = _Increments(self.gamma[group], self.begin[group], self.end[group])
            products = these.column().times(these) / np.outer(size[group], size[group])
            sides = np.stack([along[group], mass[group]], axis=1) / size[group, None]
            # least squares again, as profiles can be so alike that rounding makes them the same
            solved = np.linalg.lstsq(products, sides, rcond=None)[0] / size[group, None]
            free[group], unit[group] = solved.T
        shares: np.ndarray = free + (1.0 - mass @ free) / (mass @ unit) * unit
        return shares

    def distance(self, shares: np.ndarray, target: schedules.Schedule, end: float) -> float:
        """Return how far a sum is from the profile of a target at a step, relative to the target's length."""
        if isinstance(target, schedules.power):
            goal = _Increments(np.array(target.gamma), np.array(0.0), np.array(end))
            square = float(goal.times(goal))
        else:
            square = sum(float(part @ part) for _, part in _profile(target, int(end)))
        apart = square - 2.0 * float(shares @ self.along(target, end))
        for group in self.overlapping(end):
            these = _Increments(self.gamma[group], self.begin[group], self.end[group])
            apart += float(shares[group] @ these.column().times(these) @ shares[group])
        return float(max(apart / square, 0.0) ** 0.5)

    def overlapping(self, end: float) -> Iterator[np.ndarray]:
        """Yield the indices of those that begin before a step, in groups that do not overlap in time."""
        order = np.argsort(self.begin, kind="stable")
        order = order[self.begin[order] < end]
        reached = np.maximum.accumulate(self.end[order])
        yield from np.split(order, 1 + np.flatnonzero(self.begin[order][1:] >= reached[:-1]))

    def column(self) -> "_Increments":
        """Return the same as a column, whose products with a row are a matrix."""
        return _Increments(self.gamma[:, None], self.begin[:, None], self.end[:, None])

    def times(self, other: "_Increments") -> np.ndarray:
        """Return the inner products of profiles: integrals of powers over the time that both cover."""
        begin, end = np.maximum(self.begin, other.begin), np.minimum(self.end, other.end)
        a, b = self.gamma + 1, other.gamma + 1
        since = _share_since(begin, end, a + b - 1)
        products: np.ndarray = (
            a * b / (a + b - 1) / end * (end / self.end) ** a * (end / other.end) ** b * since
        )
        return products

    def along(self, target: schedules.Schedule, end: float) -> np.ndarray:
        """Return the inner product of each with the profile of a target at a step."""
        if isinstance(target, schedules.power):
            return self.times(_Increments(np.array(target.gamma), np.array(0.0), np.array(end)))
        sums = np.zeros_like(self.end)
        for first, profile in _profile(target, int(end)):
            step = np.arange(first, first + len(profile), dtype=np.float64)
            for gamma in np.unique(self.gamma):
                alike = np.flatnonzero(self.gamma == gamma)
                place = np.searchsorted(self.end[alike], step)  # which of them covers a step
                covered = place < len(alike)
                i, s = alike[place[covered]], step[covered]
                # the integral of its profile from s - 1 to s
                own = (s / self.end[i]) ** (gamma + 1) * _share_since(s - 1, s, gamma + 1)
                sums += np.bincount(i, own * profile[covered], len(sums))
        return sums


def _share_since(begin: np.ndarray, end: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Return ``1 - (begin / end) ** exponent`` with all digits where they are close, 0 where begin > end."""
    with np.errstate(divide="ignore"):  # since 0
        share: np.ndarray = -np.expm1(exponent * np.log1p(np.minimum(begin - end, 0.0) / end))
    return share


def _profile(schedule: schedules.Schedule, end: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a first step and what it and those after it weigh in an average at `end`, the last ones first."""
    left = 1.0
    for stop in range(end, 0, -_PIECE):
        first = max(1, stop - _PIECE + 1)
        decays = np.asarray(schedule.at(np.arange(first, stop + 1, dtype=np.float64), np))
        if first == 1:
            decays[0] = 0.0  # a start before the first value is as good as that value
        later = left * np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)
        yield first, (1.0 - decays) * later
        left = float(later[0] * decays[0])
        if left == 0.0:
            return


_NAME = re.compile(r"([0-9]{1,18})-([0-9]+(?:\.[0-9]+)?(?:e-?[0-9]{1,2})?)\.safetensors")


class Snapshots:
    """A folder with snapshots of power averages, and any other average that is made of them.

    Each snapshot is a safetensors file of its own, ``<step>-<sigma_rel>.safetensors``, written all or
    nothing.

    Args:
        folder: Where they are; made when the first one is added.

    Example:
        >>> import tempfile, fastema, numpy as np
        >>> from fastema import posthoc, schedules
        >>> weights = {"w": np.zeros(2)}
        >>> ema = fastema.EMA(weights, [schedules.power(0.05), schedules.power(0.10)])
        >>> snapshots = posthoc.Snapshots(tempfile.mkdtemp())
        >>> for step in range(1, 1001):
        ...     weights["w"][:] = step**0.5  # the training
        ...     ema.update()
        ...     if step % 100 == 0:
        ...         snapshots.add(ema.step, {0.05: ema.averages_of(0), 0.10: ema.averages_of(1)})
        >>> snapshots.average(0.08)["w"].round(3)
        array([30.189, 30.189])
        >>> snapshots.average(schedules.constant(0.99), step=750)["w"].round(3)
        array([25.412, 25.412])
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)

    def add(self, step: int, averages: Mapping[float, object]) -> None:
        """Keep averages as they are after a step.

        Args:
            step: How many updates they have seen. A snapshot of this step that is there is replaced.
            averages: sigma_rel -> averages, such as `fastema.EMA.averages_of`: an array, or a sequence or
                mapping of arrays, also nested; of the same names, shapes and types at all steps.

        Raises:
            TypeError: Averages are no arrays, or of a type that the files have not.
            ValueError: `step` is not from 1, a sigma_rel is none, or averages do not fit those that are
                there. Nothing has been written then.
            OSError: A file cannot be written.
        """
        step = operator.index(step)
        if step < 1:
            raise ValueError(f"step must be at least 1, the first update, got {step}")
        powers = {schedules.power(float(sigma)): x for sigma, x in averages.items()}
        named = {power.sigma_rel: _named(x, power.sigma_rel) for power, x in powers.items()}
        expected = self._layout()
        for sigma, (arrays, _) in named.items():
            layout = {name: (array.shape, array.dtype.newbyteorder("=")) for name, array in arrays.items()}
            expected = expected or layout
            if layout != expected:
                name = next(n for n in layout.keys() | expected if layout.get(n) != expected.get(n))
                raise ValueError(
                    f"averages[{sigma!r}] must have the names, shapes and types of the other snapshots, "
                    f"got {layout.get(name)} for {name!r}, which is {expected.get(name)} there"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        for sigma, (arrays, form) in named.items():
            texts = {"step": str(step), "sigma_rel": repr(sigma), "form": form}
            checkpoint.write(self.folder / f"{step:010d}-{sigma!r}.safetensors", arrays, texts)

    @property
    def paths(self) -> dict[tuple[int, float], Path]:
        """(step, sigma_rel) -> file, in order."""
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("*.safetensors"))
        return dict(sorted(((int(name[1]), float(name[2])), path) for name, path in found if name))

    def average(
        self,
        target: float | schedules.Schedule,
        step: int | None = None,
        *,
        output: StrPath | None = None,
        dtype: npt.DTypeLike | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Make the average that another profile would have given.

        The snapshots are read piece by piece, so they need not fit into memory, and added up in float64.

        Args:
            target: A sigma_rel, or any schedule; see `weights`.
            step: When the average is taken; at most that of the last snapshot. None: then.
            output: A safetensors file to write. None: one in the folder that is gone when nobody uses the
                averages any more.
            dtype: Of the averages, as for `fastema.checkpoint.average`. None: as in the snapshots.
            progress: Called with the bytes done and the bytes in all, after each piece.

        Returns:
            The averages as they were added, in NumPy: an array, a list, or a mapping name -> array, where
            nested names are joined by dots. They are read-only views of the file.

        Raises:
            ValueError: There are no snapshots, or they have no such step or do not fit each other.
            OSError: A snapshot cannot be read, or `output` cannot be written.
        """
        paths = self.paths
        if not paths:
            raise ValueError(f"{self.folder} must have snapshots to average, has none")
        steps, sigma_rels = zip(*paths, strict=True)
        shares = dict(zip(paths.values(), weights(steps, sigma_rels, target, step), strict=True))
        shares = {path: float(share) for path, share in shares.items() if share != 0.0}
        if output is not None:
            return _averaged(shares, output, dtype, progress)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            return _averaged(shares, Path(folder, "average.safetensors"), dtype, progress)

    def _layout(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return name -> (shape, type) of the snapshots; nothing where there is none."""
        for path in self.paths.values():
            file = checkpoint.File(path)
            return {name: (file.shapes[name], file.dtypes[name]) for name in file}
        return {}


def _averaged(
    shares: Mapping[Path, float],
    output: StrPath,
    dtype: npt.DTypeLike | None,
    progress: Callable[[int, int], None] | None,
) -> Any:
    """Write the sum of snapshots into a file, and return what it holds in the form that was added."""
    relative = list(shares.values())
    checkpoint.average(list(shares), output, weights=relative, dtype=dtype, progress=progress)
    file = checkpoint.File(output)
    form = file.metadata.get("form")
    names = [str(i) for i in range(len(file))] if form in ("array", "sequence") else list(file)
    if set(names) != set(file) or (form == "array" and len(file) != 1):
        paths = ", ".join(map(str, shares))
        raise ValueError(f"{paths} must have arrays of the form {form!r}, got {sorted(file)[:20]}")
    if form == "array":
        return file["0"]
    return [file[name] for name in names] if form == "sequence" else file


def _named(averages: object, sigma: float) -> tuple[dict[str, np.ndarray], str]:
    """Return averages by name, as NumPy sees them, and the form in which they are given back."""
    try:
        tree, found = Tree.of(averages, is_array, Selection("copy", None))
    except (TypeError, ValueError) as error:
        raise type(error)(f"averages[{sigma!r}] cannot be kept: {error}") from None
    views = {}
    for name, array in zip(tree.names, found, strict=True):
        called = f"averages[{sigma!r}][{name!r}]"
        views[name] = unmasked(array, called) if isinstance(array, np.ndarray) else as_view(array, called)
    if is_array(averages):
        return views, "array"
    listed = isinstance(averages, Sequence) and all(is_array(array) for array in averages)
    return views, "sequence" if listed else "mapping"
