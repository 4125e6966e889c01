"""What differs between the backends of Keras: variables, reading and assigning them, conditions.

Each backend is a class with the same methods as `base.Backend`, and one of it serves one optimizer.
"""

from .base import Backend, dtype_of, is_floating, name_of, native

__all__ = ["Backend", "dtype_of", "is_floating", "load", "name_of", "native"]


def load(name: str) -> Backend:
    """Return a new backend.

    Args:
        name: ``"tensorflow"``, ``"jax"`` or ``"torch"``, as ``keras.backend.backend()`` says.

    Raises:
        NotImplementedError: There is no such backend here.
    """
    if name == "tensorflow":
        from .tensorflow import TensorFlow  # noqa: PLC0415 - one backend is loaded, not all

        return TensorFlow()
    if name == "jax":
        from .jax import Jax  # noqa: PLC0415

        return Jax()
    if name == "torch":
        from .torch import Torch  # noqa: PLC0415

        return Torch()
    raise NotImplementedError(f"fastema.keras needs TensorFlow, JAX or torch below Keras, got {name}")
