"""Averages that are not exponential alone: bias-corrected ones, and means of the last snapshots.

They have the verbs of `fastema.EMA`: update, averages, swap, save and so on.

    >>> import fastema, numpy as np
    >>> weights = {"w": np.zeros(2)}
    >>> window = fastema.Window(weights, 2)
    >>> for value in (1.0, 2.0, 4.0):
    ...     weights["w"][:] = value  # a step of training
    ...     window.update()
    >>> window.averages["w"]
    array([3., 3.])
"""

from .bema import BEMA
from .window import Window

__all__ = ["BEMA", "Window"]
