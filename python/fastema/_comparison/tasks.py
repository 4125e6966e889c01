"""The trainings that averages are compared on, from data that come with scikit-learn and with Python."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from . import network
from .network import Data, Weights

_QUICK = 100  # steps, where only the course of things is tested
_WRONG_LABELS = 0.3  # the share of the digits' training labels that are drawn at random
_FINETUNING = 50_000  # characters of code to train on
_JUDGED = 10_000  # characters to choose by, and as many to judge by
_CODE = ("argparse", "doctest", "inspect", "ipaddress", "pdb", "subprocess", "tarfile", "typing")

_HIDDEN_DIGITS, _HIDDEN_TEXT, _CONTEXT, _EMBEDDING = 64, 128, 8, 16  # sizes of the networks
_KNOWN = "\n" + "".join(map(chr, range(32, 127)))
_SYMBOLS = len(_KNOWN) + 1  # all other characters are one

# the best of .001, .003, .01, .03, .1, .3 and 1 for raw weights after a decay phase,
# by the validation data of seed 1000
_DIGITS_RATE = 0.003
_TEXT_RATE = 0.1
_FINETUNING_RATE = 0.01


class Measure(NamedTuple):
    """How weights are judged by data.

    Attributes:
        of: Judges weights by data; less is better.
        unit: Of what it returns.
        decimals: How many of it are told.
    """

    of: Callable[[Weights, Data], float]
    unit: str
    decimals: int


_NATS = Measure(network.loss, "nats per character", 4)


@dataclass(frozen=True)
class Task:
    """One training, and the data that judge it.

    Attributes:
        name: For headings.
        measure: How weights are judged.
        train: What is trained on.
        validation: What settings are chosen by.
        test: What is reported, and chooses nothing.
        start: The weights to begin with.
        rate: The constant learning rate, and that at the beginning of a decay phase.
        batch: How many examples a step takes.
        steps: How many steps there are.
        seed: Of the batches.
    """

    name: str
    measure: Measure
    train: Data
    validation: Data
    test: Data
    start: Weights
    rate: float
    batch: int
    steps: int
    seed: int


def digits(seed: int, *, quick: bool = False) -> Task:
    """Return the classification of 8 x 8 images of digits, many of whose training labels are wrong."""
    random = np.random.default_rng([seed, 0])
    images, labels = load_digits(return_X_y=True)
    order = random.permutation(len(images))
    data = Data((images[order] / 16.0).astype(np.float32), labels[order])
    train, validation, test = (data.part(part) for part in np.array_split(np.arange(len(order)), 3))
    wrong = random.random(len(train)) < _WRONG_LABELS
    train = Data(train.inputs, np.where(wrong, random.integers(0, 10, len(train)), train.labels))
    start = network.initial(random, 64, _HIDDEN_DIGITS, 10)
    return Task(
        name="digits",
        measure=Measure(network.error, "errors (%)", 2),
        train=train,
        validation=validation,
        test=test,
        start=start,
        rate=_DIGITS_RATE,
        batch=16,
        steps=_QUICK if quick else 2000,
        seed=seed,
    )


def text(seed: int, *, quick: bool = False) -> Task:
    """Return the prediction of the next character in the help texts of Python's language reference."""
    random = np.random.default_rng([seed, 1])
    train, validation, test = _split(import_module("pydoc_data.topics").topics.values(), random, quick)
    return Task(
        name="text",
        measure=_NATS,
        train=train,
        validation=validation,
        test=test,
        start=network.embedded(random, _SYMBOLS, _EMBEDDING, _CONTEXT, _HIDDEN_TEXT),
        rate=_TEXT_RATE,
        batch=64,
        steps=_QUICK if quick else 12_000,
        seed=seed,
    )


def finetuning(seed: int, start: Weights, *, quick: bool = False) -> Task:
    """Return the same of a little Python code, by a network that has learnt to predict text."""
    random = np.random.default_rng([seed, 2])
    train, validation, test = _split(map(_source, _CODE), random, quick)
    return Task(
        name="finetuning",
        measure=_NATS,
        train=Data(train.inputs[:_FINETUNING], train.labels[:_FINETUNING]),
        validation=validation,
        test=test,
        start=start,
        rate=_FINETUNING_RATE,
        batch=16,
        steps=_QUICK if quick else 2000,
        seed=seed,
    )


def _source(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"Python's module {module} must be here with its source, and is not")
    return Path(spec.origin).read_text(encoding="utf-8")


def _split(texts: Iterable[str], random: np.random.Generator, quick: bool) -> tuple[Data, Data, Data]:
    """Return eight tenths of the different paragraphs to train on, and a tenth each to judge by."""
    paragraphs = list(dict.fromkeys(part for each in texts for part in each.split("\n\n")))
    order = random.permutation(len(paragraphs))
    bounds = [len(order) * 8 // 10, len(order) * 9 // 10]
    train, validation, test = (
        _contexts("\n\n".join(paragraphs[i] for i in part)) for part in np.split(order, bounds)
    )
    judged = _JUDGED // 10 if quick else _JUDGED
    validation, test = (part.part(random.permutation(len(part))[:judged]) for part in (validation, test))
    return train, validation, test


def _contexts(joined: str) -> Data:
    codes = np.array([_KNOWN.find(character) % _SYMBOLS for character in joined])
    windows = np.lib.stride_tricks.sliding_window_view(codes, _CONTEXT + 1)
    return Data(windows[:, :-1], windows[:, -1])
