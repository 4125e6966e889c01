"""Exponential moving averages of model weights: in place, at memory bandwidth, exact to the bit."""

from . import _core, checkpoint, posthoc, schedules
from ._build import build_config, instruction_sets, use_instruction_set
from .ema import EMA
from .functional import Pairs, copies, swap, update

__version__: str = _core.build_config()["version"]

__all__ = [
    "EMA",
    "Pairs",
    "build_config",
    "checkpoint",
    "copies",
    "instruction_sets",
    "posthoc",
    "schedules",
    "swap",
    "update",
    "use_instruction_set",
]
