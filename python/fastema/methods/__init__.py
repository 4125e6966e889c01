"""Averages that are not exponential alone: bias-corrected ones.

They have the verbs of `fastema.EMA`: update, averages, swap, save and so on.
"""

from .bema import BEMA

__all__ = ["BEMA"]
