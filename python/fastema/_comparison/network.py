"""A network of one hidden layer in NumPy, and its training by stochastic gradient descent with momentum."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Weights = Mapping[str, np.ndarray]

_MOMENTUM = 0.9


@dataclass(frozen=True)
class Data:
    """Inputs with the class of each: vectors of numbers, or rows of symbols, which are embedded."""

    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: np.ndarray) -> "Data":
        """Return those of some places."""
        return Data(self.inputs[index], self.labels[index])


def initial(random: np.random.Generator, inputs: int, hidden: int, classes: int) -> Weights:
    """Return random weights, as He et al. 2015 have them, for vectors of so many numbers."""

    def kernel(rows: int, columns: int) -> np.ndarray:
        scale = np.float32((2.0 / rows) ** 0.5)
        return scale * random.standard_normal((rows, columns), np.float32)

    return {
        "hidden": kernel(inputs, hidden),
        "hidden_bias": np.zeros(hidden, np.float32),
        "output": kernel(hidden, classes),
        "output_bias": np.zeros(classes, np.float32),
    }


def embedded(random: np.random.Generator, symbols: int, size: int, context: int, hidden: int) -> Weights:
    """Return random weights for rows of symbols, after which another one of them comes."""
    embedding = random.standard_normal((symbols, size)).astype(np.float32)
    return {"embedding": embedding, **initial(random, context * size, hidden, symbols)}


def loss(weights: Weights, data: Data) -> float:
    """Return the mean cross-entropy, in nats."""
    logits = _forward(weights, data.inputs)[-1].astype(np.float64)
    highest = logits.max(1)
    total = highest + np.log(np.exp(logits - highest[:, None]).sum(1))
    return float((total - logits[np.arange(len(data)), data.labels]).mean())


def error(weights: Weights, data: Data) -> float:
    """Return how many of a hundred are taken for another class."""
    return float(100.0 * (_forward(weights, data.inputs)[-1].argmax(1) != data.labels).mean())


def gradient(weights: Weights, data: Data) -> Weights:
    """Return the gradient of the mean cross-entropy."""
    vectors, hidden, logits = _forward(weights, data.inputs)
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    of_logits = exponentials / exponentials.sum(1, keepdims=True)
    of_logits[np.arange(len(data)), data.labels] -= 1.0
    of_logits /= len(data)
    of_hidden = (of_logits @ weights["output"].T) * (hidden > 0)
    gradients = {
        "hidden": vectors.T @ of_hidden,
        "hidden_bias": of_hidden.sum(0),
        "output": hidden.T @ of_logits,
        "output_bias": of_logits.sum(0),
    }
    if "embedding" in weights:
        symbols, size = weights["embedding"].shape
        is_symbol = np.arange(symbols)[:, None] == data.inputs.reshape(-1)
        of_vectors = of_hidden @ weights["hidden"].T
        gradients["embedding"] = is_symbol.astype(np.float32) @ of_vectors.reshape(-1, size)
    return gradients


def _forward(weights: Weights, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return vectors, hidden activations and logits."""
    vectors = weights["embedding"][inputs].reshape(len(inputs), -1) if "embedding" in weights else inputs
    hidden = np.maximum(vectors @ weights["hidden"] + weights["hidden_bias"], 0.0)
    return vectors, hidden, hidden @ weights["output"] + weights["output_bias"]


@dataclass
class Training:
    """A training on its way."""

    weights: Weights
    momentum: Weights
    data: Data
    batch: int
    random: np.random.Generator
    step: int = 0

    def branch(self) -> "Training":
        """Return a training that goes on from here on its own, with the same batches."""
        kept = self.data, self.batch
        return Training(
            copy.deepcopy(self.weights),
            copy.deepcopy(self.momentum),
            *kept,
            copy.deepcopy(self.random),
            self.step,
        )

    def run(self, until: int, rate: Callable[[int], float], after: Callable[[int], None]) -> None:
        """Train up to a step, in place.

        Args:
            until: The last step.
            rate: The learning rate of a step.
            after: Called with each step when it is done.
        """
        while self.step < until:
            self.step += 1
            batch = self.data.part(self.random.integers(0, len(self.data), self.batch))
            for name, slope in gradient(self.weights, batch).items():
                self.momentum[name] *= _MOMENTUM
                self.momentum[name] += slope
                self.weights[name] -= np.float32(rate(self.step)) * self.momentum[name]
            after(self.step)
