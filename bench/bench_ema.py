"""What does EMA.update add to the update of its pairs, and what does an average cost elsewhere?

    python -m fastema.bench.bench_ema [--quick]

EMA keeps count, asks the schedule and looks after swaps; that must cost microseconds, whatever the number of
arrays. Rivals are those that keep count themselves: they are given the same torch parameters.
"""

from collections.abc import Callable
from typing import Any

import fastema

from . import cli, harness, rivals
from .lists import LISTS, Shapes, arrays
from .report import report

DECAY = 0.999
RIVALS = ("torch AveragedModel", "as timm ModelEmaV3")


def torch_list(name: str, shapes: Shapes, samples: int) -> harness.Result:
    """Measure one list of torch parameters."""
    averages, values = arrays(shapes, "f32", 1), arrays(shapes, "f32", 2)
    parameters = rivals.tensors(values)
    ema = fastema.EMA(parameters, DECAY)
    pairs = fastema.Pairs(fastema.copies(values), parameters)
    calls: dict[str, Callable[[], object]] = {
        "fastema": ema.update,
        "Pairs.update": lambda: pairs.update(DECAY),
    }
    for rival in RIVALS:
        calls[rival] = rivals.RIVALS[rival](averages, values, DECAY)
    calls |= _torch_ema(parameters)
    return harness.run(f"{name}, torch", 3 * sum(a.nbytes for a in averages), calls, {}, samples)


def _torch_ema(parameters: list[Any]) -> dict[str, Callable[[], object]]:
    try:
        import torch_ema
    except ImportError:
        return {}
    return {"torch_ema": torch_ema.ExponentialMovingAverage(parameters, DECAY, use_num_updates=False).update}


def jax_list(name: str, shapes: Shapes, samples: int) -> harness.Result:
    """Measure one list of JAX arrays, which are paired anew at each update."""
    import jax

    averages, values = arrays(shapes, "f32", 1), arrays(shapes, "f32", 2)
    fixed = [jax.numpy.array(value) for value in values]
    ema = fastema.EMA(fixed, DECAY)
    pairs = fastema.Pairs(fastema.copies(values), values)
    calls = {
        "fastema": lambda: ema.update(fixed),
        "Pairs.update": lambda: pairs.update(DECAY),
        "JAX jit, donated": rivals.jax_donated(averages, values, DECAY),
    }
    return harness.run(f"{name}, JAX", 3 * sum(a.nbytes for a in averages), calls, {}, samples)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    options = cli.parser(__doc__).parse_args(arguments)
    lists = {"10 x 10": LISTS["10 x 10"], "161 x 10": [(10,)] * 161}
    if not options.quick:
        lists["ResNet-50"] = LISTS["ResNet-50"]
    results = []
    for measured in (torch_list, jax_list):
        for name, shapes in lists.items():
            try:
                results.append(measured(name, shapes, options.samples))
            except ImportError as missing:
                print(f"{measured.__name__}: {missing}")
    report(results, "ema", "EMA.update", options)
    for result in results:
        added = result.ours.median - result.timings["Pairs.update"].median
        print(f"{result.title}: EMA.update adds {added * 1e6:.2f} us to Pairs.update")


if __name__ == "__main__":
    main()
