"""Each rival at its best: what a knowledgeable user of that library would write.

A rival is a function from averages, values (lists of NumPy arrays) and a decay to a call that does one
update. It raises ImportError where its library is missing, and Unable where it cannot do these types.
"""

from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np

from .harness import THREADS, Call

Arrays = list[np.ndarray]


class Unable(Exception):  # noqa: N818 - a reason, no error
    """The rival has no way to average these types."""


def need_one_type(averages: Arrays, values: Arrays) -> None:
    if averages[0].dtype != values[0].dtype:
        raise Unable


def numpy_naive(averages: Arrays, values: Arrays, decay: float) -> Call:
    w = averages[0].dtype.type(1 - decay)

    def call() -> None:
        for a, v in zip(averages, values, strict=True):
            a += w * (v - a)  # noqa: PLW2901 - in place

    return call


def numpy_chunked(averages: Arrays, values: Arrays, decay: float) -> Call:
    w, chunk = averages[0].dtype.type(1 - decay), 1 << 15
    buffer = np.empty(chunk, averages[0].dtype)
    pairs = [(a.reshape(-1), v.reshape(-1)) for a, v in zip(averages, values, strict=True)]

    def call() -> None:
        for a, v in pairs:
            for i in range(0, a.size, chunk):
                part = a[i : i + chunk]
                t = buffer[: part.size]
                np.subtract(v[i : i + chunk], part, out=t)
                np.multiply(t, w, out=t)
                np.add(part, t, out=part)

    return call


def numexpr(averages: Arrays, values: Arrays, decay: float) -> Call:
    import numexpr as ne

    need_one_type(averages, values)
    if averages[0].dtype not in (np.float32, np.float64):
        raise Unable
    ne.set_num_threads(THREADS)
    w = averages[0].dtype.type(1 - decay)

    def call() -> None:
        for a, v in zip(averages, values, strict=True):
            ne.evaluate("a + w * (v - a)", {"a": a, "v": v, "w": w}, out=a)

    return call


def numba(averages: Arrays, values: Arrays, decay: float) -> Call:
    import numba as nb

    if any(array.dtype.itemsize < 4 for array in (averages[0], values[0])):
        raise Unable
    nb.set_num_threads(THREADS)
    w = averages[0].dtype.type(1 - decay)

    @nb.njit(parallel=True)
    def update(a: Any, v: Any, w: Any) -> None:
        for i in nb.prange(a.size):
            a[i] += w * (v[i] - a[i])

    pairs = [(a.reshape(-1), v.reshape(-1)) for a, v in zip(averages, values, strict=True)]

    def call() -> None:
        for a, v in pairs:
            update(a, v, w)

    return call


def tensors(arrays: Arrays) -> list[Any]:
    import torch

    torch.set_num_threads(THREADS)
    if arrays[0].dtype == ml_dtypes.bfloat16:
        return [torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in arrays]
    return [torch.from_numpy(x) for x in arrays]


def torch_foreach(averages: Arrays, values: Arrays, decay: float) -> Call:
    import torch

    a, v = tensors(averages), tensors(values)
    if a[0].dtype == v[0].dtype:
        return lambda: torch._foreach_lerp_(a, v, 1 - decay)

    def call() -> None:  # lerp refuses a mix
        torch._foreach_mul_(a, decay)
        torch._foreach_add_(a, v, alpha=1 - decay)

    return call


def torch_lerp(averages: Arrays, values: Arrays, decay: float) -> Call:
    need_one_type(averages, values)
    a, v = tensors(averages), tensors(values)

    def call() -> None:
        for x, y in zip(a, v, strict=True):
            x.lerp_(y, 1 - decay)

    return call


def _module(tensors: list[Any]) -> Any:
    import torch

    return torch.nn.ParameterList([torch.nn.Parameter(t, requires_grad=False) for t in tensors])


def torch_averaged_model(averages: Arrays, values: Arrays, decay: float) -> Call:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    need_one_type(averages, values)
    model = _module(tensors(values))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return lambda: averaged.update_parameters(model)


def timm_v3(averages: Arrays, values: Arrays, decay: float) -> Call:
    """Do what timm's ModelEmaV3 does: both state dictionaries, then one call for all."""
    import torch

    a, v = _module(tensors(averages)), _module(tensors(values))

    @torch.no_grad()
    def call() -> None:
        ours, theirs = [], []
        for x, y in zip(a.state_dict().values(), v.state_dict().values(), strict=True):
            if x.is_floating_point():
                ours.append(x)
                theirs.append(y.to(x.dtype))  # nothing where it is the same type
        torch._foreach_lerp_(ours, theirs, weight=1 - decay)

    return call


def _tf_variables(arrays: Arrays) -> list[Any]:
    import tensorflow as tf

    return [array if isinstance(array, tf.Variable) else tf.Variable(array) for array in arrays]


def _tf_step(averages: Arrays, values: Arrays, decay: float) -> Call:
    import tensorflow as tf

    a, v = _tf_variables(averages), _tf_variables(values)

    def call() -> None:
        for x, y in zip(a, v, strict=True):
            x.assign_add((1 - decay) * (tf.cast(y, x.dtype) - x))

    return call


def tf_eager(averages: Arrays, values: Arrays, decay: float) -> Call:
    return _tf_step(averages, values, decay)


def tf_function(averages: Arrays, values: Arrays, decay: float) -> Call:
    import tensorflow as tf

    call: Call = tf.function(_tf_step(averages, values, decay))
    return call


def tf_jit(averages: Arrays, values: Arrays, decay: float) -> Call:
    import tensorflow as tf

    call: Call = tf.function(_tf_step(averages, values, decay), jit_compile=True)
    return call


def keras_use_ema(averages: Arrays, values: Arrays, decay: float) -> Call:
    """Do what a Keras optimizer with use_ema=True does after each step, in a tf.function."""
    import keras
    import tensorflow as tf

    need_one_type(averages, values)
    if keras.backend.backend() != "tensorflow":
        raise Unable
    variables = [keras.Variable(v) for v in values]
    optimizer = keras.optimizers.SGD(use_ema=True, ema_momentum=decay)
    optimizer.build(variables)
    optimizer.iterations.assign(1)
    call: Call = tf.function(lambda: optimizer._update_model_variables_moving_average(variables))
    return call


def jax_donated(averages: Arrays, values: Arrays, decay: float) -> Call:
    import jax

    need_one_type(averages, values)
    if averages[0].dtype == np.float64:
        raise Unable  # without a switch for the whole process
    state = [jax.numpy.array(a) for a in averages]
    fixed = [jax.numpy.array(v) for v in values]
    w = averages[0].dtype.type(1 - decay)
    step = jax.jit(lambda a, v: [x + w * (y - x) for x, y in zip(a, v, strict=True)], donate_argnums=0)

    def call() -> None:
        state[:] = step(state, fixed)
        jax.block_until_ready(state)

    return call


RIVALS: dict[str, Callable[[Arrays, Arrays, float], Call]] = {
    "NumPy a += w * (v - a)": numpy_naive,
    "NumPy out=, in chunks": numpy_chunked,
    "numexpr": numexpr,
    "numba parallel": numba,
    "torch _foreach_lerp_": torch_foreach,
    "torch lerp_": torch_lerp,
    "torch AveragedModel": torch_averaged_model,
    "as timm ModelEmaV3": timm_v3,
    "TensorFlow function": tf_function,
    "TensorFlow jit_compile": tf_jit,
    "Keras use_ema, function": keras_use_ema,
    "JAX jit, donated": jax_donated,
}


FEW = (  # for a look
    "NumPy a += w * (v - a)",
    "numba parallel",
    "torch _foreach_lerp_",
    "torch AveragedModel",
    "as timm ModelEmaV3",
    "TensorFlow function",
    "JAX jit, donated",
)


def contestants(
    averages: Arrays, values: Arrays, decay: float, names: Iterable[str] = tuple(RIVALS)
) -> dict[str, Call]:
    """Return the rivals of these names that are installed and can do this."""
    calls = {}
    for name in names:
        try:
            calls[name] = RIVALS[name](averages, values, decay)
        except (ImportError, Unable):
            continue
    return calls
