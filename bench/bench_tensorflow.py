"""What does averaging a list of tf.Variables cost, by our op and by TensorFlow's own operations?

    python -m fastema.bench.bench_tensorflow [--quick] [--json FILE] [--picture FILE]

One update in a tf.function (or eagerly), each contestant with variables of its own.
"""

import time
from collections.abc import Callable

from . import harness
from .lists import LISTS, Shapes, arrays, elements
from .rivals import RIVALS

DECAY = 0.999
OTHERS = ("TensorFlow function", "TensorFlow jit_compile", "Keras use_ema, function", "TensorFlow eager")
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

    averages, values = arrays(shapes, "f32", 1), arrays(shapes, "f32", 2)

    def ours() -> Callable[[], object]:
        lists = [[tf.Variable(array) for array in x] for x in (averages, values)]
        return lambda: fastema.tensorflow.update(*lists, DECAY, engine="native")

    return {
        "fastema": tf.function(ours()),
        "fastema, eager": ours(),
        **{name: RIVALS[name](averages, values, DECAY) for name in OTHERS},
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
