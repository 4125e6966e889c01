"""What does averaging a list of tf.Variables cost, by our op and by TensorFlow's own operations?

    python -m fastema.bench.bench_tensorflow [--quick] [--json FILE] [--picture FILE]

One update in a tf.function (or eagerly): time in turns in one process, all with the same variables, as where
these lie makes up to twice the time; then the further memory at the peak, in a process each.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from . import cli, harness
from .lists import LISTS, Shapes, arrays, elements
from .report import report
from .rivals import RIVALS, tf_eager

DECAY = 0.999
OTHERS = {
    **{
        name: RIVALS[name]
        for name in ("TensorFlow function", "TensorFlow jit_compile", "Keras use_ema, function")
    },
    "TensorFlow eager": tf_eager,  # nobody's way where time counts
}
MODELS: dict[str, Shapes] = {
    "one of 50M": [(50_000_100,)],
    "ResNet-50": LISTS["ResNet-50"],
    "GPT-2": LISTS["GPT-2"],
    "400 x 1,000": [(1000,)] * 400,
}


def contestants(shapes: Shapes, only: str | None = None) -> dict[str, Callable[[], object]]:
    """Return the calls, or one of them; the first ones say how long tracing and compiling takes."""
    import tensorflow as tf

    import fastema.tensorflow

    # Keras makes averages of its own
    averages, values = ([tf.Variable(x) for x in arrays(shapes, "f32", seed)] for seed in (1, 2))
    ours = partial(fastema.tensorflow.update, averages, values, DECAY)
    makers = {
        "fastema": lambda: tf.function(ours),
        "fastema, eager": lambda: ours,
        **{name: partial(rival, averages, values, DECAY) for name, rival in OTHERS.items()},
    }
    return {name: make() for name, make in makers.items() if only in (None, name)}


MEMORY = """
import sys
from pathlib import Path
from fastema.bench.bench_tensorflow import MODELS, contestants

def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

def grown(calls):
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
    before = peak()
    for _ in range(calls):
        call()
    return (peak() - before) // 1024

contestants([(3,)])[sys.argv[2]]()  # loads what it needs
call = contestants(MODELS[sys.argv[1]], sys.argv[2])[sys.argv[2]]
print(grown(3), grown(5))
"""


def memory(name: str, title: str) -> str:
    """Return by how many MB the process grows in the first three calls, and in later ones."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, name, title], capture_output=True, text=True, check=True
    )
    return " + ".join(done.stdout.split()[-2:])


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
    options = cli.parser(__doc__).parse_args(arguments)
    names = ["400 x 1,000"] if options.quick else list(MODELS)
    results = [measure(name, options.samples) for name in names]
    report(results, "tensorflow", "Update of tf.Variables", options)
    print("Further memory at the peak, MB: the first three calls + the next five")
    for name in names:
        size = 4 * elements(MODELS[name]) / 2**20
        for title in results[0].timings:
            print(f"{name:<13}({size:>3.0f} MB of averages)  {title:<26}{memory(name, title):>10}")


if __name__ == "__main__":
    main()
