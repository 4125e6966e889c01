"""Write the golden files of this version: what must load, with the same bits, in every later one.

    python tests/support/write_golden.py

Only a new version writes new ones, beside those of older versions; none is ever written again. Needs JAX,
TensorFlow, Keras and tf_keras.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["KERAS_BACKEND"] = "tensorflow"

import jax
import keras
import numpy as np
import tensorflow as tf
import tf_keras
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fastema
import golden
from fastema import posthoc
from fastema.keras import ExponentialMovingAverage


def main():
    folder = golden.FOLDER / fastema.__version__
    folder.mkdir(parents=True)  # an error if it is there
    for name, options in golden.EMAS.items():
        write_ema(folder / f"{name}.safetensors", options)
    write_shards(folder / "shards.safetensors")
    write_snapshots(folder / "snapshots")
    write_model(keras, folder / "keras.keras")
    write_model(keras, folder / "keras-swapped.keras", swapped=True)
    write_model(tf_keras, folder / "tf-keras.keras")
    write_checkpoint(folder / "tf-keras-legacy")


def write_ema(path, options):
    """Save an EMA; beside it: its state, and that of one that went on."""
    weights = {name: golden.weights_at(0)[name] for name in golden.averageable(options)}
    ema = fastema.EMA(weights, **options)
    golden.train(ema, weights, range(1, golden.LAST + 1))
    if path.stem == "swapped":
        ema.swap(1)
    ema.save(path)
    state = ema.state_dict()
    if ema.is_swapped:
        ema.swap(1)
    golden.train(ema, weights, range(golden.LAST + 1, golden.LATER + 1))
    golden.write_json(path, {"state": state, "later": ema.state_dict()})


def write_shards(path):
    """Save an EMA of JAX arrays that are spread over four devices; beside it: the whole averages."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    specs = {"kernel": P("a", "b"), "half": P("b")}

    def placed(step):
        return {
            name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P())))
            for name, x in golden.weights_at(step).items()
        }

    ema = fastema.EMA(placed(0), **golden.SHARDED)
    for step in range(1, golden.LAST + 1):
        ema.update(placed(step))
    ema.save(path)
    averages = [
        {name: np.asarray(x) for name, x in ema.averages_of(k).items()}
        for k in range(len(golden.SHARDED["decay"]))
    ]
    golden.write_json(path, {"averages": averages, "step": ema.step})


def write_snapshots(folder):
    """Keep power averages at some steps; beside them: what they were."""
    weights = {name: x for name, x in golden.weights_at(0).items() if name in ("kernel", "half")}
    ema = fastema.EMA(weights, [fastema.schedules.power(sigma_rel) for sigma_rel in golden.SIGMA_RELS])
    snapshots, kept = posthoc.Snapshots(folder), []
    for step in range(1, golden.LAST + 1):
        golden.train(ema, weights, [step])
        if step % 2:
            averages = {sigma_rel: ema.averages_of(k) for k, sigma_rel in enumerate(golden.SIGMA_RELS)}
            snapshots.add(step, averages)
            kept += [
                {"step": step, "sigma_rel": sigma_rel, "averages": {n: x.copy() for n, x in each.items()}}
                for sigma_rel, each in averages.items()
            ]
    golden.write_json(folder, kept)


def trained_model(library, optimizer):
    """Return a model that was trained for some steps with a wrapped optimizer."""
    library.utils.set_random_seed(3)
    layers = library.layers
    model = library.Sequential([library.Input((3,)), layers.Dense(2, "tanh"), layers.Dense(1)])
    model.compile(ExponentialMovingAverage(optimizer, average_decay=0.9), loss="mse")
    weights = golden.weights_at(1)
    model.fit(weights["kernel"][:, :1] * np.ones(3), weights["kernel"][:, 1], batch_size=1, verbose=0)
    return model


def write_model(library, path, *, swapped=False):
    """Save a compiled model; beside it: its variables, and its weights once they changed places."""
    model = trained_model(library, library.optimizers.SGD(0.1, momentum=0.5))
    if swapped:
        model.optimizer.swap_weights()
    model.save(path)
    golden.write_json(path, golden.of_model(model))


def write_checkpoint(path):
    """Write a checkpoint of TensorFlow's with an optimizer that is of Keras 2's oldest kind."""
    model = trained_model(tf_keras, tf_keras.optimizers.legacy.SGD(0.1, momentum=0.5))
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(path))
    golden.write_json(path, golden.of_model(model))


if __name__ == "__main__":
    main()
