"""From states of `fastema.jax` to those of `fastema.EMA`, and back; outside of jit."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._ema.count import Count
from .._ema.state import State
from ..ema import EMA
from .trees import Params, copied


def to_state_dict(
    ema: EMA, averages: Sequence[Params], carries: Sequence[Params], count: Count, dtype: str | None
) -> dict[str, Any]:
    """Return what `EMA.state_dict` would where averaging has come as far.

    Args:
        ema: One of the same arguments, whose averages start at those of the first decay.
        averages: For each decay a tree.
        carries: For each decay a tree; or none.
        count: How far averaging has come.
        dtype: Of the averages, as the EMA was given it.
    """
    return {
        **(state := ema.state_dict()),
        "averages": [
            state["averages"][0],
            *[EMA(x, dtype=dtype).state_dict()["averages"][0] for x in averages[1:]],
        ],
        "carries": [_by_name(EMA(tree)) for tree in carries],
        "step": count.step,
        "decay": list(count.decays) or None,
        "products": list(count.products),
        "clock": count.clock,
        "averaged": count.averaged,
    }


def of_state_dict(
    ema: EMA, carries: Sequence[Params], state: Mapping[str, Any]
) -> tuple[list[Params], list[Params], Count]:
    """Return what `to_state_dict` was given, in arrays of their own.

    Args:
        ema: One of the same arguments, whose averages are of the same types; it goes on from there.
        carries: For each decay a tree of carries, alike; or none.
        state: What `EMA.state_dict` returned.

    Raises:
        KeyError: As for `EMA.load_state_dict`.
        TypeError: As for `EMA.load_state_dict`.
        ValueError: As for `EMA.load_state_dict`.
    """
    count = State.from_dict(state).count
    decays = len(count.products)
    # as they are kept: neither divided, nor in the place of those of now
    ema.load_state_dict({**state, "products": [0.0] * decays, "decay": [1.0] * decays})
    trees = [jax.tree.map(copied, ema.averages_of(k)) for k in range(decays)]
    found = ema.state_dict()["carries"]
    return trees, [_filled(tree, each) for tree, each in zip(carries, found, strict=True)], count


def _by_name(ema: EMA) -> dict[str, Any]:
    state = ema.state_dict()
    return {**state["averages"][0], **state["copied"]}


def _filled(tree: Params, arrays: Mapping[str, np.ndarray]) -> Params:
    """Return a tree with other arrays in it, by their names."""
    ema = EMA(tree)
    state = ema.state_dict()
    ema.load_state_dict(
        {
            **state,
            "averages": [{name: arrays[name] for name in state["averages"][0]}],
            "copied": {name: arrays[name] for name in state["copied"]},
        }
    )
    return jax.tree.map(copied, ema.averages)
