"""What does averaging add to a training step of Hugging Face's Trainer, against the usual callbacks?

    python -m fastema.bench.bench_transformers [--quick] [--json FILE]

One Trainer trains a GPT-2, and in each step one contestant acts, in turns; a step is timed from its beginning
to its end. What a contestant adds is the median of the differences to the step without any in the same turn.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from . import cli

DECAY = 0.999
MODELS = {  # name -> sizes of a GPT-2
    "tiny": {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "12M": {"vocab_size": 4096, "n_positions": 32, "n_embd": 384, "n_layer": 6, "n_head": 6},
}
WARM_UP = 3  # steps of each contestant that are left out


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


def turns_of(contestants: dict[str, Any]) -> Any:
    """Return a callback that lets one contestant act in each step, in turns, and keeps the steps' seconds."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.begun = 0.0
            self.seconds: dict[str, list[float]] = {name: [] for name in contestants}

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            for contestant in contestants.values():
                contestant.on_train_begin(*args, **kwargs)

        def on_step_begin(self, *args: Any, **_: Any) -> None:
            names, step = list(contestants), args[1].global_step
            self.turn, self.begun = names[step % len(names)], time.perf_counter()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            contestants[self.turn].on_pre_optimizer_step(*args, **kwargs)

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            contestants[self.turn].on_optimizer_step(*args, **kwargs)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            contestants[self.turn].on_step_end(*args, **kwargs)
            self.seconds[self.turn].append(time.perf_counter() - self.begun)

    return Turns()


def measure(name: str, samples: int) -> dict[str, np.ndarray]:
    """Return the seconds of steps, without averages and with each callback that is installed."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    print(f"  {name} ...", file=sys.stderr, flush=True)
    contestants = {"without": TrainerCallback()}
    for contestant, make in CONTESTANTS.items():
        try:
            contestants[contestant] = make()
        except ImportError:
            continue
    torch.manual_seed(0)
    sizes, turns = MODELS[name], turns_of(contestants)
    texts = torch.randint(sizes["vocab_size"], (64, sizes["n_positions"]))
    arguments = TrainingArguments(
        tempfile.mkdtemp(prefix="fastema-bench-"),
        max_steps=(samples + WARM_UP) * len(contestants),
        per_device_train_batch_size=2,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)),
        arguments,
        train_dataset=[{"input_ids": text, "labels": text} for text in texts],
        callbacks=[turns],
    ).train()
    return {contestant: np.array(seconds[WARM_UP:]) for contestant, seconds in turns.seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = cli.parser(__doc__, times=False)
    parser.add_argument("--samples", type=int, default=60, help="steps of each contestant, in turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all times")
    options = parser.parse_args(arguments)
    results = {name: measure(name, options.samples) for name in (["tiny"] if options.quick else MODELS)}
    for name, seconds in results.items():
        without = seconds.pop("without")
        print(f"\n{name}: a step without averages takes {np.median(without) * 1e3:.3g} ms")
        for contestant, steps in seconds.items():
            lower, added, upper = np.quantile(steps - without, (0.25, 0.5, 0.75)) * 1e3
            share = added / np.median(without) / 1e3
            print(
                f"  {contestant:28} adds {added:7.3g} ms, {share:6.1%} (quartiles {lower:.3g}, {upper:.3g})"
            )
        seconds["without"] = without
    if options.json:
        content = {name: {who: list(x) for who, x in seconds.items()} for name, seconds in results.items()}
        options.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
