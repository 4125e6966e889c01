"""What does averaging add to a training step of Keras, against its own use_ema=True?

    python -m fastema.bench.bench_keras [--backend BACKEND] [--quick] [--json FILE] [--picture FILE]

A step here is the optimizer's: SGD with momentum applies given gradients, compiled as each backend's fit
compiles it. Each contestant has variables of its own; what averaging adds is its time less that of the
same optimizer without averages.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import cli, harness, record
from .lists import LISTS, Shapes
from .report import report

SECTION = "keras"
BACKENDS = ("tensorflow", "jax", "torch")
MODELS: dict[str, Shapes] = {
    "200 small": [(1000,)] * 200,
    "12M": [(1732, 1732)] * 4,
    "ResNet-50": LISTS["ResNet-50"],
}


def step_of(optimizer: Any, shapes: Shapes) -> Callable[[], object]:
    """Return a call that does one step."""
    import keras

    rng = np.random.default_rng(1)
    variables = [keras.Variable(rng.standard_normal(s).astype(np.float32)) for s in shapes]
    gradients = [keras.ops.convert_to_tensor(np.full(s, 1e-3, np.float32)) for s in shapes]
    optimizer.build(variables)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda: optimizer.apply(gradients, variables))
    if keras.backend.backend() == "torch":
        import torch

        def step() -> None:
            with torch.no_grad():
                optimizer.apply(gradients, variables)

        return step
    import jax

    jitted = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
    state = [[v.value for v in optimizer.variables], [v.value for v in variables]]

    def jitted_step() -> None:
        state[1], state[0] = jitted(state[0], gradients, state[1])
        jax.block_until_ready(state)

    return jitted_step


def measure(name: str, samples: int) -> harness.Result:
    """Measure one model's variables on the backend of this process."""
    import keras

    from fastema.keras import ExponentialMovingAverage

    def sgd(**arguments: Any) -> Any:
        return keras.optimizers.SGD(0.01, momentum=0.9, **arguments)

    shapes = MODELS[name]
    contestants = {
        "without": step_of(sgd(), shapes),
        "Keras use_ema": step_of(sgd(use_ema=True), shapes),
        "fastema": step_of(ExponentialMovingAverage(sgd()), shapes),
    }
    moved = 12 * sum(int(np.prod(s)) for s in shapes)
    return harness.run(f"{name}, {keras.backend.backend()}", moved, contestants, {}, samples)


def added(result: harness.Result) -> str:
    """Return a line about what averaging adds."""
    plain, keras, ours = (
        1e3 * result.timings[name].median for name in ("without", "Keras use_ema", "fastema")
    )
    ratio = (ours - plain) / (keras - plain)
    return f"{result.title:24}{plain:10.2f}{keras - plain:14.2f}{ours - plain:12.2f}{ratio:10.2f}"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark: each backend in a process of its own."""
    parser = cli.parser(__doc__)
    parser.add_argument("--backend", choices=BACKENDS, help="only this one, in this process")
    options = parser.parse_args(arguments)
    names = ["200 small"] if options.quick else list(MODELS)
    if options.backend:
        os.environ["KERAS_BACKEND"] = options.backend
        results = [measure(name, options.samples) for name in names]
        for file in options.records:
            record.add(file, SECTION, results)
    else:
        results = [r for b in BACKENDS if importlib.util.find_spec(b) for r in in_process_of(b, options)]
        report(results, SECTION, "Keras step", options)
    print(
        "\nms of a step"
        + "without".rjust(22)
        + "use_ema adds".rjust(14)
        + "fastema".rjust(12)
        + "ratio".rjust(10)
    )
    print("\n".join(map(added, results)))


def in_process_of(backend: str, options: Any) -> list[harness.Result]:
    """Measure a backend in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, "-m", "fastema.bench.bench_keras", "--backend", backend]
        command += ["--samples", str(options.samples), "--json", str(file)] + ["--quick"] * options.quick
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "KERAS_BACKEND": backend}
        )
        return record.results_of(record.read(file)["sections"][SECTION])


if __name__ == "__main__":
    main()
