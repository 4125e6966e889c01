"""What does averaging a list of tf.Variables cost, by our op and by TensorFlow's own operations?

    python -m fastema.bench.bench_tensorflow [--quick] [--json FILE] [--picture FILE]

One update in a tf.function (or eagerly), each contestant with variables of its own.
"""

import time
from collections.abc import Callable
from typing import Any

from . import harness
from .lists import LISTS, Shapes, arrays, elements

DECAY = 0.999
MODELS: dict[str, Shapes] = {
    "one of 50M": [(50_000_100,)],
    "ResNet-50": LISTS["ResNet-50"],
    "GPT-2": LISTS["GPT-2"],
    "400 x 1,000": [(1000,)] * 400,
}


def contestants(shapes: Shapes) -> dict[str, Callable[[], object]]:
    """Return the calls; the first ones say how long tracing and compiling takes."""
    import tensorflow as tf

    import fastema.tensorflow

    values = [tf.Variable(array) for array in arrays(shapes, "f32", 2)]

    def averages() -> list[Any]:
        return [tf.Variable(array) for array in arrays(shapes, "f32", 1)]

    def ours(mine: list[Any]) -> None:
        fastema.tensorflow.update(mine, values, DECAY, engine="native")

    def plain(mine: list[Any]) -> None:
        for average, value in zip(mine, values, strict=True):
            average.assign_sub((1.0 - DECAY) * (average - value))

    def keras_way(mine: list[Any]) -> None:  # what use_ema=True of Keras' optimizers does
        for average, value in zip(mine, values, strict=True):
            average.assign(DECAY * average + (1.0 - DECAY) * value)

    def call(function: Callable[[list[Any]], None], **how: Any) -> Callable[[], object]:
        mine = averages()
        return tf.function(lambda: function(mine), **how)

    def eager(function: Callable[[list[Any]], None]) -> Callable[[], object]:
        mine = averages()
        return lambda: function(mine)

    return {
        "fastema": call(ours),
        "TensorFlow function": call(plain),
        "TensorFlow jit_compile": call(plain, jit_compile=True),
        "Keras' use_ema, function": call(keras_way),
        "fastema, eager": eager(ours),
        "TensorFlow eager": eager(plain),
    }


def measure(name: str, samples: int) -> harness.Result:
    """Measure one list; print what the first calls took."""
    shapes = MODELS[name]
    calls = contestants(shapes)
    for title, call in calls.items():
        start = time.perf_counter()
        call()
        print(f"    first call, {title}: {time.perf_counter() - start:.2f} s")
    return harness.run(name, 12 * elements(shapes), calls, {}, samples)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    options = harness.parser(__doc__).parse_args(arguments)
    names = ["400 x 1,000"] if options.quick else list(MODELS)
    results = [measure(name, options.samples) for name in names]
    harness.report(results, "Update of tf.Variables", options.json, options.picture)


if __name__ == "__main__":
    main()
