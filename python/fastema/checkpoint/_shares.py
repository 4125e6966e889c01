"""What each of several checkpoints weighs in their merge: as decays of a learning rate or an EMA have it."""

import operator
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from .._types import check_share

Style = Literal["mean", "linear", "cosine", "minus-sqrt", "ema"]
"""How the checkpoints of a merge are weighed."""

STYLES: tuple[Style, ...] = get_args(Style)

_DECAYS: dict[Style, Callable[[np.ndarray], np.ndarray]] = {  # from 1 at 0 to 0 at 1
    "cosine": lambda x: (1.0 + np.cos(np.pi * x)) / 2.0,
    "minus-sqrt": lambda x: 1.0 - np.sqrt(x),
}


def shares(style: Style, count: int, *, alpha: float = 0.2) -> np.ndarray:
    """Return what each of so many checkpoints weighs in their merge: they sum to 1, the newest comes last.

    A merge stands for a decay of the learning rate that was never trained (WSM, Tian et al. 2025, arXiv
    2507.17634, theorem 3.1). The checkpoints of a training at a constant rate are sums of its updates. So in
    their sum with shares ``c[1] ... c[N]`` the updates between checkpoints i and i + 1 count
    ``w[i] = c[i + 1] + ... + c[N]`` times, as if they had been made at this part of the rate. A decay
    ``w[i] = d(i / N)``, that falls from d(0) = 1 at the oldest checkpoint towards d(1) = 0 one interval after
    the newest, has the shares ``c[i] = d((i - 1) / N) - d(i / N)``. This holds exactly where updates do not
    depend on the rate, and for training as far as they do not.

    * ``"linear"``: d(x) = 1 - x. All weigh 1 / N, for the mean is the merge that stands for a linear decay.
    * ``"cosine"``: d(x) = (1 + cos(pi x)) / 2. Those in the middle weigh most.
    * ``"minus-sqrt"``: d(x) = 1 - sqrt(x). The oldest weighs most, as this decay begins steeply.
    * ``"mean"``: 1 / N, whatever it stands for.
    * ``"ema"``: what is left of each in ``average = (1 - alpha) * average + alpha * checkpoint``, which
      starts at the oldest (PMA, Li et al. 2025, arXiv 2505.12082).

    Args:
        style: One of these.
        count: How many checkpoints there are, one or more, at equal distances.
        alpha: What ``"ema"`` gives to the next checkpoint, from 0 to 1; no other style reads it.

    Returns:
        A float64 for each checkpoint.

    Raises:
        TypeError: `count` is no whole number, or `alpha` none.
        ValueError: There is no such style, `count` is below 1, or `alpha` is not from 0 to 1.

    Example:
        >>> from fastema import checkpoint
        >>> checkpoint.shares("linear", 4)
        array([0.25, 0.25, 0.25, 0.25])
        >>> checkpoint.shares("minus-sqrt", 4).round(3)
        array([0.5  , 0.207, 0.159, 0.134])
        >>> checkpoint.shares("ema", 3, alpha=0.5)
        array([0.25, 0.25, 0.5 ])
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(map(repr, STYLES))}, got {style!r}")
    number = operator.index(count)
    if number < 1:
        raise ValueError(f"count must be at least 1, got {number}")
    if style in ("mean", "linear"):
        return np.full(number, 1.0 / number)
    if style == "ema":
        kept = 1.0 - check_share(alpha, "alpha")
        powers: np.ndarray = kept ** np.arange(number - 1, -1, -1, dtype=np.float64)
        powers[1:] *= alpha
        return powers
    return -np.diff(_DECAYS[style](np.arange(number + 1) / number))
