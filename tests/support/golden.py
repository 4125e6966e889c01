"""What the golden files of each version hold (tests/data/golden), and how that is written as text."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from fastema import schedules

FOLDER = Path(__file__).parents[1] / "data" / "golden"
LAST, LATER = 5, 9  # the step at which averages were saved, and one that a loaded EMA goes on to
EMAS = {
    "plain": {"decay": 0.9},
    "compensated": {"decay": [0.9, 0.999], "initial": "zeros", "rounding": "compensated", "every": 2},
    "stochastic": {"decay": 0.9, "dtype": "bfloat16", "rounding": "stochastic", "seed": 7},
    "swapped": {"decay": [schedules.dynamic(0.99, start_step=1), 0.5], "buffers": "average"},
}
SHARDED = {"decay": [0.9, schedules.power(0.1)], "rounding": "compensated"}
SIGMA_RELS = (0.05, 0.10)


def weights_at(step):
    """Return the weights after a step of training. They are binary fractions, alike on every machine."""

    def numbers(*shape):
        count = np.arange(np.prod(shape, dtype=int), dtype=np.int64)
        return ((37 * count + 101 * step) % 256 - 128).reshape(shape) / 64

    return {
        "kernel": numbers(4, 2).astype(np.float32),
        "columns": np.asfortranarray(numbers(3, 2), np.float32),
        "half": numbers(6).astype(ml_dtypes.bfloat16),
        "scale": np.array(numbers(), np.float32),
        "steps": np.array(step, np.int32),
        "mask": numbers(3) > 0,
    }


def averageable(options):
    """Return the names of the weights that an EMA with these options takes."""
    only_half = options.get("dtype") == "bfloat16"
    return [name for name, x in weights_at(0).items() if not (only_half and x.dtype == np.float32)]


def train(ema, weights, steps, weights_at=weights_at):
    """Set the weights to those of each step, in place, and update."""
    for step in steps:
        for name, value in weights_at(step).items():
            if name in weights:
                weights[name][...] = value
        ema.update()


def of_model(model):
    """Return all variables of a model and its optimizer, and the weights after these changed places."""
    variables = model.optimizer.variables
    state = {
        "model": [variable.numpy() for variable in model.variables],
        "optimizer": [variable.numpy() for variable in (variables() if callable(variables) else variables)],
        "is_swapped": bool(model.optimizer.is_swapped),
    }
    model.optimizer.swap_weights()
    return {**state, "exchanged": [variable.numpy() for variable in model.variables]}


def encoded(state):
    """Return nested arrays as what JSON can hold: type, shape and bytes of each."""
    if isinstance(state, dict):
        return {key: encoded(x) for key, x in state.items()}
    if isinstance(state, list | tuple):
        return [encoded(x) for x in state]
    if isinstance(state, np.ndarray | np.generic):
        return {"dtype": state.dtype.name, "shape": list(state.shape), "bytes": state.tobytes().hex()}
    return state


def decoded(content):
    """Return what was `encoded`."""
    if isinstance(content, list):
        return [decoded(x) for x in content]
    if not isinstance(content, dict):
        return content
    if set(content) != {"dtype", "shape", "bytes"}:
        return {key: decoded(x) for key, x in content.items()}
    dtype = np.dtype(getattr(ml_dtypes, content["dtype"], content["dtype"]))
    return np.frombuffer(bytes.fromhex(content["bytes"]), dtype).reshape(content["shape"]).copy()


def write_json(path, content):
    """Write what a golden file must give, beside it."""
    path.with_suffix(".json").write_text(json.dumps(encoded(content), indent=1) + "\n", encoding="ascii")


def read_json(path):
    """Return what a golden file must give, encoded."""
    return json.loads(path.with_suffix(".json").read_text(encoding="ascii"))
