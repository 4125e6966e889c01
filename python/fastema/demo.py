"""The demo: a classifier trained on wrong labels, judged by its raw and by its averaged weights.

A third of the training labels is drawn at random, and the learning rate is high. So each batch pulls
the weights elsewhere; the last ones carry the noise of the last batches, and their average does not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from .keras import ExponentialMovingAverage

WRONG_LABELS = 0.3  # the share of training labels drawn at random
LEARNING_RATE = 0.3
DECAY = 0.995  # averages over about 1 / (1 - decay) = 200 steps, four epochs


@dataclass(frozen=True)
class Score:
    """Held-out accuracies after one epoch, from 0 to 1."""

    raw: float
    averaged: float


class Judge(keras.callbacks.Callback):  # type: ignore[misc]  # Keras is untyped
    """Evaluates both sets of weights on held-out data after each epoch."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        super().__init__()
        self.data = x, y
        self.scores: list[Score] = []

    def _accuracy(self) -> float:
        return float(self.model.evaluate(*self.data, batch_size=1000, verbose=0)[1])

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Add the held-out accuracies to the record, and to the epoch's line of progress."""
        raw = self._accuracy()
        with self.model.optimizer.averaged_weights():
            averaged = self._accuracy()
        self.scores.append(Score(raw, averaged))
        if logs is not None:
            logs |= {"held_out_raw": raw, "held_out_averaged": averaged}


def run(epochs: int = 20, seed: int = 0, verbose: int = 2) -> list[Score]:
    """Train on scikit-learn's handwritten digits; return the held-out accuracies of each epoch.

    Args:
        epochs: How many times to pass over the 898 training images.
        seed: Of the split, the wrong labels, the initial weights and the batches.
        verbose: Keras' progress: 0 silent, 1 a bar, 2 a line an epoch.
    """
    keras.utils.set_random_seed(seed)
    random = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).astype(np.float32)
    x_train, x_held_out, y_train, y_held_out = train_test_split(x, y, test_size=0.5, random_state=seed)
    wrong = random.random(len(y_train)) < WRONG_LABELS
    y_train = np.where(wrong, random.integers(0, 10, len(y_train)), y_train)

    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    )
    model.compile(
        ExponentialMovingAverage(keras.optimizers.SGD(LEARNING_RATE), average_decay=DECAY),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    judge = Judge(x_held_out, y_held_out)
    model.fit(x_train, y_train, batch_size=16, epochs=epochs, verbose=verbose, callbacks=[judge])
    return judge.scores


def table(scores: list[Score], rows: int = 6) -> str:
    """Return the accuracies of some epochs, first and last among them, as a plain table."""
    lines = ["held-out accuracy   raw weights   averaged weights", "-" * 50]
    for i in sorted({round(i) for i in np.linspace(0, len(scores) - 1, rows)}):
        lines.append(f"epoch {i + 1:<11}{scores[i].raw:>12.1%}{scores[i].averaged:>18.1%}")
    return "\n".join(lines)


def picture(scores: list[Score], path: Path) -> None:
    """Write both curves as a picture."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(scores) + 1)
    for name, colour in (("averaged", "tab:blue"), ("raw", "tab:orange")):
        accuracies = [100 * getattr(score, name) for score in scores]
        axes.plot(epochs, accuracies, "-o", ms=4, color=colour, label=f"{name} weights")
    axes.set(
        title=f"Digits, {WRONG_LABELS:.0%} of the training labels drawn at random",
        xlabel="epoch",
        ylabel="accuracy on held-out images (%)",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main(epochs: int, seed: int, path: Path) -> None:
    """Train, print the table and write the picture."""
    print(
        f"Training on 898 handwritten digits, {WRONG_LABELS:.0%} of whose labels are drawn at random;\n"
        "judging raw and averaged weights on 899 others.\n"
    )
    scores = run(epochs, seed)
    picture(scores, path)
    print(f"\n{table(scores)}\n\nBoth curves: {path}")
