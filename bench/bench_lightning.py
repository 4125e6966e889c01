"""What does averaging add to a training step in Lightning, against its own EMAWeightAveraging?

    python -m fastema.bench.bench_lightning [--quick]

A sample is a training of its own, without its first steps: from the start of a batch to the end of the last
one, by a callback that looks at the clock. All contestants train the same layers by SGD on one row, so that a
step is short; what averaging adds is its time less that of the trainer without it.
"""

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from . import cli, harness
from .report import report

MODELS = {"tiny": [10] * 2, "12M": [1732] * 5}  # widths of linear layers
FIRST = 3  # steps that are not timed
RIVAL = "Lightning's own"


@dataclass(frozen=True)
class OfTrainings(harness.Stopwatch):
    """The clock of a training: a contestant is given a number of steps and returns the seconds of one."""

    def seconds(self, call: Any, repeat: int) -> float:
        """Return the time of one step, of so many in one training."""
        return float(call(repeat))


STOPWATCH = OfTrainings(settle=lambda _: None, sample=0.3, most=1000)


def training(pl: Any, widths: list[int], callback: Callable[[], Any] | None) -> Callable[[int], float]:
    """Return a function of a number of steps, which does them and returns the seconds of one."""
    import torch
    from torch import nn

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*map(nn.Linear, widths, widths[1:]))

        def training_step(self, batch: Any, _: int) -> Any:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == FIRST:
                self.start = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            self.end = time.perf_counter()

    def train(steps: int) -> float:
        clock = Clock()
        trainer = pl.Trainer(
            max_steps=steps + FIRST,
            max_epochs=-1,
            accelerator="cpu",
            callbacks=[*([] if callback is None else [callback()]), clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        rows = torch.ones(1, widths[0]).expand(steps + FIRST, -1)
        trainer.fit(Model(), torch.utils.data.DataLoader(rows))
        return (clock.end - clock.start) / steps

    return train


def measure(pl: Any, name: str, samples: int) -> harness.Result:
    """Measure one model."""
    from fastema.lightning import WeightAverages

    widths = MODELS[name]
    theirs = getattr(pl.callbacks, "EMAWeightAveraging", None)  # from Lightning 2.6 on
    contestants: dict[str, Any] = {
        "without": training(pl, widths, None),
        "fastema": training(pl, widths, lambda: WeightAverages(decay=0.999)),
        **({} if theirs is None else {RIVAL: training(pl, widths, lambda: theirs(decay=0.999))}),
    }
    moved = 12 * sum((a + 1) * b for a, b in pairwise(widths))
    at = {"": STOPWATCH}
    return harness.run_at(at, name, moved, contestants, ceiling={}, samples=samples)[0]


def added(result: harness.Result) -> str:
    """Return a line about what averaging adds."""
    plain = result.timings["without"].median
    times = [1e6 * (t.median - plain) for name, t in result.timings.items() if name != "without"]
    ratio = f"{times[0] / times[1]:8.3f}" if len(times) == 2 else ""
    return f"{result.title:12}{1e6 * plain:12.0f}" + "".join(f"{t:18.0f}" for t in times) + ratio


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    options = cli.parser(__doc__).parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers
        import lightning.pytorch as pl

        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        results = [measure(pl, name, options.samples) for name in (["tiny"] if options.quick else MODELS)]
    report(results, "lightning", "A step in Lightning", options)
    print("us of a step     without      fastema adds   Lightning's adds   ratio")
    print("\n".join(map(added, results)))


if __name__ == "__main__":
    main()
