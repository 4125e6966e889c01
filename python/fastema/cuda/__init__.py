"""Averages on CUDA devices: `fastema.update`, `swap` and `Pairs` take arrays there as they take others.

Here is what only a device needs: a decay computed on it, for CUDA graphs, and averages in host memory of
weights on a device. CuPy is loaded when the first array on a device comes by.
"""

from ._offload import Offload
from ._schedule import Schedule

__all__ = ["Offload", "Schedule"]
