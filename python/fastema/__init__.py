"""Exponential moving averages of model weights: in place, at memory bandwidth, exact to the bit.

    >>> import fastema, numpy as np
    >>> weights = [np.zeros(3)]  # or arrays of torch, JAX, TensorFlow; or a torch module
    >>> ema = fastema.EMA(weights, decay=0.9)
    >>> weights[0] += 1.0  # a step of training
    >>> ema.update()
    >>> with ema.swapped():  # evaluate with the averages
    ...     print(weights[0])
    [0.1 0.1 0.1]

Where is what?

* `EMA`: averages for training loops of your own, in any library; begin here.
* `BEMA`, `Window`: a bias-corrected average, and the mean of the last snapshots (`fastema.methods`).
* `fastema.keras`: a wrapper for the optimizers of Keras, and callbacks for `fit`.
* `fastema.transformers`: for Hugging Face's Trainer: one that shows averages, and a callback.
* `schedules`: decays that depend on the step: warm-ups, equal weights, half-lives, power functions.
* `checkpoint`: safetensors files, and the mean of several; `posthoc`: choosing the decay after the training.
* `update`, `swap`, `Pairs`, `copies`: lists of arrays, also on CUDA devices, without any state.
* `fastema.lightning`: a callback for the trainers of Lightning.
* `fastema.tensorflow`: the same for tf.Variables, also in graphs.
* `fastema.jax`: averages as pure functions, inside of jit or as part of an optimizer of optax.
* `fastema.cuda`: decays computed on the device, and averages in host memory of weights on a GPU.
* `build_config`, `instruction_sets`, `use_instruction_set`: what this build is, and what it runs on.
* `Array`, `Arrays`, `Decay`, `Rounding`: the types of arguments, for annotations of your own.

Those with a prefix are loaded when they are first named: ``import fastema`` alone loads no framework.

On the command line, ``python -m fastema`` has demo, info, bench and average. In the sources, python/docs has
whole training loops, other libraries' calls beside ours, and how averages are computed.
"""

from importlib import import_module, util
from types import ModuleType
from typing import TYPE_CHECKING

from . import _core, checkpoint, posthoc, schedules
from ._build import build_config, instruction_sets, use_instruction_set
from ._types import Array, Arrays, Decay, Rounding
from .ema import EMA
from .functional import Pairs, copies, swap, update

if TYPE_CHECKING:
    from . import cuda as cuda
    from . import jax as jax
    from . import keras as keras
    from . import lightning as lightning
    from . import methods as methods
    from . import tensorflow as tensorflow
    from . import transformers as transformers
    from .methods import BEMA, Window

__version__: str = _core.build_config()["version"]

__all__ = [
    "BEMA",
    "EMA",
    "Array",
    "Arrays",
    "Decay",
    "Pairs",
    "Rounding",
    "Window",
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

# What is loaded when it is first named, and what it cannot be loaded without.
_ON_DEMAND = {
    "cuda": (),
    "jax": ("jax",),
    "keras": ("keras",),
    "lightning": ("torch",),
    "methods": (),
    "tensorflow": ("tensorflow",),
    "transformers": ("transformers", "accelerate"),
}
_INSTALLED_BY = {
    "jax": "jax",
    "keras": "'fastema[keras]'",
    "lightning": "'fastema[lightning]'",
    "tensorflow": "'fastema[keras]'",
    "transformers": "'fastema[transformers]'",
}

if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> ModuleType | type:
        if name in ("BEMA", "Window"):
            return getattr(import_module(".methods", __name__), name)
        if name not in _ON_DEMAND:
            raise AttributeError(f"module 'fastema' has no attribute {name!r}")
        try:
            return import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name not in _ON_DEMAND[name]:
                raise
            how = f"pip install {_INSTALLED_BY[name]}"
            raise ImportError(
                f"fastema.{name} needs {error.name}, which is not installed: {how}",
                name=error.name,
            ) from error


def __dir__() -> list[str]:
    # help() asks for every name of these
    found = [name for name, needed in _ON_DEMAND.items() if all(map(util.find_spec, needed))]
    return sorted([*__all__, *found])
