"""Tensors in CPU memory that fastema takes for those of a device for which it has no kernel."""

from contextlib import contextmanager

from fastema._arrays import torch as library


@contextmanager
def cpu_is_elsewhere(which=lambda tensor: True):  # noqa: ARG005 - all of them
    """Have torch's own operations average tensors in CPU memory: those of which a function says so."""
    before = library.is_elsewhere
    library.is_elsewhere = lambda tensor: tensor.device.type == "cpu" and which(tensor)
    try:
        yield
    finally:
        library.is_elsewhere = before
