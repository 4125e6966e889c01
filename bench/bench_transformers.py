"""What does averaging add to a training step of Hugging Face's Trainer, against the usual callbacks?

    python -m fastema.bench.bench_transformers [--quick] [--json FILE]

Each contestant is a callback of a Trainer of its own, with a GPT-2 of its own; a step is timed from the first
callback's beginning to the last one's end, as the Trainer calls them. A sample is the median of some steps,
and samples are taken in turns.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np

from . import harness

DECAY = 0.999
MODELS = {  # name -> sizes of a GPT-2
    "tiny": {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "12M": {"vocab_size": 4096, "n_positions": 32, "n_embd": 384, "n_layer": 6, "n_head": 6},
}
STEPS = {"tiny": 60, "12M": 12}


def fastema_callback() -> Any:
    from fastema.transformers import WeightAverages

    return WeightAverages(DECAY)


def usual_callback() -> Any:
    """Do what most scripts have: a deep copy of the model, and a loop over its parameters."""
    import torch
    from transformers import TrainerCallback

    class Usual(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            self.averages = deepcopy(model).eval().requires_grad_(False)

        @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            for average, value in zip(self.averages.parameters(), model.parameters(), strict=True):
                average.mul_(DECAY).add_(value, alpha=1 - DECAY)

    return Usual()


def ema_pytorch_callback() -> Any:
    from ema_pytorch import EMA
    from transformers import TrainerCallback

    class OfEmaPytorch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            self.ema = EMA(model, beta=DECAY, update_every=1, update_after_step=0)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ema.update()

    return OfEmaPytorch()


CONTESTANTS: dict[str, Callable[[], Any]] = {
    "fastema": fastema_callback,
    "a deep copy, mul_ and add_": usual_callback,
    "ema_pytorch": ema_pytorch_callback,
}


def training(name: str, callbacks: list[Any]) -> Callable[[], float]:
    """Return a call that trains for some steps and returns the median of their seconds."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.begun, self.seconds = 0.0, [0.0]

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.begun)

    torch.manual_seed(0)
    sizes, clock = MODELS[name], Clock()
    texts = torch.randint(sizes["vocab_size"], (64, sizes["n_positions"]))
    arguments = TrainingArguments(
        tempfile.mkdtemp(prefix="fastema-bench-"),
        max_steps=STEPS[name],
        per_device_train_batch_size=2,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM")),
        arguments,
        train_dataset=[{"input_ids": text, "labels": text} for text in texts],
        callbacks=[*callbacks, clock],
    )
    for printer in [x for x in trainer.callback_handler.callbacks if type(x).__name__ == "PrinterCallback"]:
        trainer.remove_callback(printer)

    def train() -> float:
        clock.seconds = []
        trainer.train()
        return statistics.median(clock.seconds)

    return train


def measure(name: str, samples: int) -> dict[str, harness.Timing]:
    """Return the seconds of a step, without a callback and with each that is installed."""
    print(f"  {name} ...", file=sys.stderr, flush=True)
    calls = {"without": training(name, [])}
    for contestant, make in CONTESTANTS.items():
        try:
            calls[contestant] = training(name, [make()])
        except ImportError:
            continue
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {contestant: [] for contestant in calls}
    for _ in range(samples):
        for contestant, call in calls.items():
            taken[contestant].append(call())
    return {
        contestant: harness.Timing(*(float(q) for q in np.quantile(times, (0.5, 0.25, 0.75))))
        for contestant, times in taken.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    options = harness.parser(__doc__).parse_args(arguments)
    results = {name: measure(name, options.samples) for name in (["tiny"] if options.quick else MODELS)}
    for name, timings in results.items():
        without = timings["without"].median
        print(f"\n{name}: a step without averages takes {without * 1e3:.2f} ms")
        for contestant, timing in timings.items():
            if contestant != "without":
                added = timing.median - without
                spread = f"{timing.lower * 1e3:.2f} to {timing.upper * 1e3:.2f} ms"
                print(f"  {contestant:28} adds {added * 1e3:8.3f} ms, {added / without:7.1%} (step {spread})")
    if options.json:
        content = {
            name: {contestant: vars(timing) for contestant, timing in timings.items()}
            for name, timings in results.items()
        }
        options.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
