"""Pairs of tensors on a device that is neither the CPU nor CUDA: the core's checks, torch's operations."""

from collections.abc import Callable
from typing import Any, Literal, Unpack

from . import _core
from ._arrays import device, is_elsewhere, local_array
from ._arrays.foreach import Lists, run, working
from ._arrays.torch import descriptors
from ._types import AnyArray, Terms


class ElsewherePairs:
    """What `fastema.Pairs` holds where its arrays lie on such a device; arguments as for `_core.Pairs`.

    A call does all that it does or, where it raises before the device begins, nothing.
    """

    engine: Literal["torch"] = "torch"

    def __init__(
        self, a: list[AnyArray], b: list[AnyArray], carries: list[AnyArray], **terms: Unpack[Terms]
    ) -> None:
        first, second = terms.get("arguments", ("averages", "values"))
        self._arguments = {first: a, second: b, "carries": carries}
        self._terms = terms
        self.follow()

    def __len__(self) -> int:
        return len([*self._arguments.values()][1])

    def follow(self) -> None:
        """Check tensors that were given other memory; calls are of what they are by then.

        Raises:
            TypeError: A type is not offered, or a tensor lies elsewhere than the first one.
            ValueError: As of the core's pairs.
        """
        self._check(self._terms)
        self._lists = Lists(*self._arguments.values())
        self._swappable = self._terms.get("verb") == "swap"

    def _check(self, terms: Terms) -> None:
        self._check_device()
        _core.check(*descriptors([*self._arguments.values()]), **terms)

    def _check_device(self) -> None:
        single, place = self._terms.get("single", False), None
        whose = next(iter(self._arguments)) + ("" if single else "[0]")
        for argument, arrays in self._arguments.items():
            for i, array in enumerate(arrays):
                name = argument if single else f"{argument}[{i}]"
                there = device(local_array(array, name)) if is_elsewhere(array) else "elsewhere"
                place = place or there
                if there != place:
                    kind = type(array).__name__
                    raise TypeError(f"{name} must lie on {place}, where {whose} lies, got {kind} {there}")

    # --- the verbs --------------------------------------------------------------------------------

    def update(
        self,
        decay: Any,
        threads: int = 0,
        done: list[Any] | None = None,
        now: object = None,
        copies: None = None,
        *,
        stochastic: bool = False,
        seed: int = 0,
        step: int = 0,
    ) -> None:
        """As `_core.Pairs.update`."""
        assert copies is None
        each = self._terms.get("averages_per_value", 1)
        decays = _core.check_numbers(decay, threads, seed, step, averages_per_value=each)
        with working():
            calls = self._lists.updated(decays, (seed, step) if stochastic else None)
            if done is not None:
                calls.append((done.__setitem__, 0, now))
            run(calls)

    def copy(self, threads: int = 0) -> None:
        """As `_core.Pairs.copy`."""
        _core.check_numbers(0.0, threads)
        with working():
            run(self._lists.copied())

    def swap(self, threads: int = 0, then: tuple[Callable[..., object], object] | None = None) -> None:
        """As `_core.Pairs.swap`; calls a function of C in the same act."""
        _core.check_numbers(0.0, threads)
        if not self._swappable:
            self._check({**self._terms, "verb": "swap", "only_floats": True})
            self._swappable = True
        with working():
            calls = self._lists.swapped()
            run(calls if then is None else [*calls, then])
