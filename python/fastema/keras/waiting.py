"""Values that a file has for a wrapped optimizer that is not built yet: Keras would warn, and drop them."""

from collections.abc import Iterator

import numpy as np

from .kinds import Optimizer, Store


def arrays_in(store: Store) -> dict[str, np.ndarray]:
    """Return what a store of Keras' files holds."""
    return {key: np.asarray(store[key]) for key in store.keys()}  # noqa: SIM118 - it is no dict


class Waiting:
    """Keeps what Keras loads into unbuilt optimizers until they are built.

    Keras loads an optimizer within another by itself, right after the outer one: there is no place
    between, so its `load_own_variables` is covered meanwhile.
    """

    def __init__(self) -> None:
        self._covered: list[Optimizer] = []
        self._values: list[tuple[Optimizer, dict[str, np.ndarray]]] = []

    def cover(self, optimizer: Optimizer) -> None:
        """Keep what is loaded into this optimizer and those within it, if they are not built."""
        self._values.clear()
        for one in _levels(optimizer):
            if not one.built and one not in self._covered:

                def keep(store: Store, one: Optimizer = one) -> None:
                    self._values.append((one, arrays_in(store)))

                object.__setattr__(one, "load_own_variables", keep)
                self._covered.append(one)

    def load(self) -> None:
        """Load what was kept; the optimizers are built now."""
        for one in self._covered:
            object.__delattr__(one, "load_own_variables")
        self._covered.clear()
        for one, values in self._values:
            one.load_own_variables(values)
        self._values.clear()


def _levels(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield an optimizer and those within it, outermost first."""
    yield optimizer
    inner = getattr(optimizer, "inner_optimizer", None)
    for one in [inner] if inner is not None else getattr(optimizer, "optimizers", []):
        yield from _levels(one)
