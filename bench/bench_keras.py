"""What does averaging add to a training step of Keras, against its own use_ema=True?

    python -m fastema.bench.bench_keras [--backend BACKEND] [--quick] [--json FILE] [--picture FILE]

A step here is the optimizer's: SGD with momentum applies given gradients, compiled as each backend's fit
compiles it. What averaging adds is the time less that of the same optimizer without averages. It is a
difference of two times, so samples are long; and where arrays happen to lie in memory makes as much of it as
who averages, so each contestant has several lists of variables, that take turns within a sample.

On JAX most of it is to hand buffers in and out of the step: see "no averaging", the wrapper with averages
that stay as they are, which no way of averaging can be faster than.
"""

import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from . import cli, harness, record
from .harness import Call
from .lists import LISTS, Shapes
from .report import report

SECTION = "keras"
SAMPLE = 0.1  # seconds: of calls of a millisecond, two of which are subtracted
LISTS_EACH = 3
BACKENDS = ("tensorflow", "jax", "torch")
MODELS: dict[str, Shapes] = {
    "200 small": [(1000,)] * 200,
    "12M": [(1732, 1732)] * 4,
    "ResNet-50": LISTS["ResNet-50"],
}


def step_of(optimizer: Any, shapes: Shapes) -> Call:
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

    # what is donated is returned in the same order: XLA would copy arrays that change places
    @partial(jax.jit, donate_argnums=0)
    def jitted(state: Any, gradients: Any) -> Any:
        return optimizer.stateless_apply(state[1], gradients, state[0])

    state = ([v.value for v in variables], [v.value for v in optimizer.variables])

    def jitted_step() -> None:
        nonlocal state
        state = jitted(state, gradients)
        jax.block_until_ready(state)

    return jitted_step


def in_turns(steps: Sequence[Call]) -> Call:
    """Return a call that is the next of several."""
    turns = cycle(steps)

    def turn() -> object:
        return next(turns)()

    return turn


def without_averaging(optimizer: Any) -> Any:
    """Have a wrapper on JAX hand its averages on as they are."""
    optimizer._backend.blend = lambda average, *_: average
    return optimizer


def measure(name: str, samples: int) -> harness.Result:
    """Measure one model's variables on the backend of this process."""
    import keras

    from fastema.keras import ExponentialMovingAverage

    def sgd(**arguments: Any) -> Any:
        return keras.optimizers.SGD(0.01, momentum=0.9, **arguments)

    shapes, backend = MODELS[name], keras.backend.backend()
    makers = {
        "without": sgd,
        "Keras use_ema": lambda: sgd(use_ema=True),
        "fastema": lambda: ExponentialMovingAverage(sgd()),
    }
    if backend == "jax":
        makers["no averaging"] = lambda: without_averaging(ExponentialMovingAverage(sgd()))
    lists: dict[str, list[Call]] = {name: [] for name in makers}
    for _ in range(LISTS_EACH):
        for contestant, make in makers.items():
            lists[contestant].append(step_of(make(), shapes))
    contestants = {contestant: in_turns(steps) for contestant, steps in lists.items()}
    moved = 12 * sum(int(np.prod(s)) for s in shapes)
    gc.collect()
    gc.freeze()  # or each of its collections would walk through all that Keras and JAX have made
    moments = {"": harness.Stopwatch(sample=SAMPLE)}
    title = f"{name}, {backend}"
    return harness.run_at(moments, title, moved, contestants, ceiling={}, samples=samples)[0]


def added(result: harness.Result) -> str:
    """Return a line about what averaging adds."""
    times = {name: 1e3 * timing.median for name, timing in result.timings.items()}
    plain, keras, ours, least = (
        times.get(name) for name in ("without", "Keras use_ema", "fastema", "no averaging")
    )
    ratio = (ours - plain) / (keras - plain)
    bound = "" if least is None else f"{(least - plain) / (keras - plain):14.2f}"
    return f"{result.title:24}{plain:10.2f}{keras - plain:14.2f}{ours - plain:12.2f}{ratio:10.2f}{bound}"


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
        + "no averaging".rjust(14)
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
