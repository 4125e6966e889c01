"""What the original optimizer, TensorFlow Model Garden's, gave: averages after each step, by case."""

import json
from pathlib import Path

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "tfm_ema.json").read_text(encoding="ascii"))


def _arguments_of(case):
    decay, start, dynamic = (part.split("=")[1] for part in case.split(","))
    return {"average_decay": float(decay), "start_step": int(start), "dynamic_decay": dynamic == "True"}


CASES = {name: _arguments_of(name) for name in GOLDEN if name.startswith("decay=")}
