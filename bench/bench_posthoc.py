"""How close is an average that is made of snapshots to the one that was not kept, by their number?

    python -m fastema.bench.bench_posthoc [--quick] [--picture FILE]

Weights walk at random with a trend; float32 snapshots of two power averages, of sigma_rel 0.05 and 0.10, are
taken at regular steps. Errors are relative to how far the weights are from the average at the end: 1 is as
bad as the weights themselves. Dashed: with the sum of what snapshots weigh left free, as in the paper (EDM2).
"""

from pathlib import Path

import numpy as np

import fastema
from fastema import posthoc, schedules

from . import cli

SIZE = 256
KEPT = (0.05, 0.10)
COUNTS = (2, 4, 8, 16, 32, 64)
TARGETS = (0.015, 0.02, 0.03, 0.04, 0.06, 0.07, 0.08, 0.09, 0.12, 0.15, 0.18, 0.22, 0.25, 0.28)

Snapshots = dict[tuple[int, float], np.ndarray]


def train(steps: int) -> tuple[Snapshots, dict[float, np.ndarray], np.ndarray]:
    """Return snapshots at 64 regular steps, the targets as they were tracked, and the last weights."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal(SIZE)
    trend = 3 / steps * rng.standard_normal(SIZE)
    sigma_rels = (*KEPT, *TARGETS)
    averages = {sigma_rel: np.zeros(SIZE) for sigma_rel in sigma_rels}
    powers = [schedules.power(sigma_rel) for sigma_rel in sigma_rels]
    pairs = fastema.Pairs.several(list(averages.values()), values)
    snapshots: Snapshots = {}
    for step in range(1, steps + 1):
        values += trend + rng.standard_normal(SIZE) / (3 * steps**0.5)
        pairs.update([power(step) for power in powers])
        if step % (steps // max(COUNTS)) == 0:
            snapshots |= {(step, sigma_rel): averages[sigma_rel].astype(np.float32) for sigma_rel in KEPT}
    return snapshots, {sigma_rel: averages[sigma_rel] for sigma_rel in TARGETS}, values


def free_weights(steps: np.ndarray, sigma_rels: np.ndarray, target: float) -> np.ndarray:
    """Return the weights of least squares alone: one system of inner products."""
    t = steps / steps.max()
    a = np.array([schedules.power(sigma_rel).gamma + 1 for sigma_rel in sigma_rels])

    def products(other: np.ndarray, b: np.ndarray) -> np.ndarray:
        least = np.minimum.outer(t, other)
        scale = np.multiply.outer(a, b) / (np.add.outer(a, b) - 1) / least
        inner: np.ndarray = scale * (least / t[:, None]) ** a[:, None] * (least / other) ** b
        return inner

    gamma = schedules.power(target).gamma
    solved: np.ndarray = np.linalg.solve(products(t, a), products(np.ones(1), np.array([gamma + 1]))[:, 0])
    return solved


def errors(steps: int) -> dict[str, list[list[float]]]:
    """Return the errors of our weights and of free ones: for each count, of each target."""
    snapshots, exact, values = train(steps)
    found: dict[str, list[list[float]]] = {"sum 1": [], "sum free": []}
    for count in COUNTS:
        used = [key for key in snapshots if key[0] % (steps // count) == 0]
        at, sigma_rels = (np.array(column) for column in zip(*used, strict=True))
        kept = np.array([snapshots[key] for key in used], np.float64)
        for name, solve in (("sum 1", posthoc.weights), ("sum free", free_weights)):
            made = {target: solve(at, sigma_rels, target) @ kept for target in TARGETS}
            found[name].append(
                [
                    float(
                        np.linalg.norm(made[target] - exact[target]) / np.linalg.norm(values - exact[target])
                    )
                    for target in TARGETS
                ]
            )
    return found


def draw(found: dict[str, list[list[float]]], title: str, path: Path) -> None:
    """Draw the error against the target, a line for each number of snapshots."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    for i, count in enumerate(COUNTS):
        axes.plot(TARGETS, found["sum 1"][i], "o-", ms=3, color=f"C{i}", label=f"{count} steps")
        axes.plot(TARGETS, found["sum free"][i], "--", lw=0.8, color=f"C{i}")
    for sigma_rel in KEPT:
        axes.axvline(sigma_rel, color="0.7", lw=0.8)
    axes.set(xscale="log", yscale="log", xlabel="sigma_rel of the target", ylabel="relative error")
    axes.legend(title="snapshots at")
    axes.set_title(f"{title}\n(dashed: the weights' sum left free)", fontsize=10)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = cli.parser(__doc__, times=False)
    parser.add_argument("--picture", type=Path, help="where to draw the errors")
    options = parser.parse_args(arguments)
    steps = 64 * (30 if options.quick else 1000)
    title = f"Error of averages made of snapshots of {KEPT}, {steps:,} steps"
    found = errors(steps)
    print(f"\n{title}")
    for name, rows in found.items():
        print(f"\n{name}".ljust(21) + "".join(f"{target:9}" for target in TARGETS))
        for count, row in zip(COUNTS, rows, strict=True):
            print(f"snapshots at {count:2} steps".ljust(20) + "".join(f"{error:9.0e}" for error in row))
    if options.picture:
        draw(found, title, options.picture)
        print(f"\nChart: {options.picture}")


if __name__ == "__main__":
    main()
