"""torch: parameters and averages change in place; on CPUs and CUDA devices by native code."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from ... import _formula
from ..._arrays import as_view
from ...functional import Pairs, swap
from ..kinds import Carrier, Context, Engine, Gradient, Operation, Tensor, Variable, VariableList
from .base import Backend, is_floating, native, natives_of, variables_in


def _tensors(variables: Iterable[Variable]) -> list[torch.Tensor]:
    return [native(variable).data for variable in variables]


class Torch(Backend):
    """torch tensors, changed in place; see `Backend`."""

    def __init__(self) -> None:
        self._pairs: Pairs | None = None
        self._addresses: list[int] = []
        # a counter, its version, what it says
        self._counted: tuple[torch.Tensor | None, int, int] = (None, 0, 0)

    def numpy(self, variable: Variable) -> np.ndarray:
        value = native(variable).detach().cpu()
        return np.array(as_view(value, "variable")) if is_floating(variable) else value.numpy()

    def hold(self, variable: Variable) -> Tensor:
        return native(variable).detach().clone()

    def assign(self, variable: Variable, value: Tensor) -> Operation:
        value = native(value)
        if isinstance(value, np.ndarray) and value.dtype.name == "bfloat16":
            value = torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        with torch.no_grad():
            native(variable).copy_(torch.as_tensor(value))

    def gradients(
        self,
        loss: Tensor,
        var_list: VariableList,
        output: Tensor,
        tape: object,
        scale: Callable[[Tensor], Tensor],
    ) -> list[Gradient]:
        if tape is not None:
            raise ValueError(f"tape must be None with torch, which records by itself, got {tape!r}")
        scaled = scale(loss() if callable(loss) else loss)
        variables = variables_in(var_list)
        parameters = natives_of(variables, torch.Tensor)
        # not backward: it would add to what .grad holds from elsewhere
        found = torch.autograd.grad(scaled, parameters, grad_outputs=output, allow_unused=True)
        return list(zip(found, variables, strict=True))

    def unrecorded(self) -> Context:
        context: Context = torch.no_grad()
        return context

    def count(self, iterations: Variable) -> Tensor:
        return self._count(native(iterations), 0)

    def count_after_step(self, iterations: Variable) -> Tensor:
        return self._count(native(iterations), 1)

    def _count(self, counter: torch.Tensor, steps: int) -> int:
        """Return what a counter says, from memory where nothing but so many steps has assigned it.

        To ask its device waits until that has done all it was asked for.
        """
        before, version, count = self._counted
        if counter.is_inference():  # of which torch counts no versions
            return int(counter)
        if counter is before and counter._version == version + steps:
            count += steps
        else:
            count = int(counter)
        self._counted = counter, counter._version, count
        return count

    def update(
        self,
        averages: Sequence[Variable],
        variables: Sequence[Variable],
        decay: Callable[[], Tensor],
        when: Tensor,
        engine: Engine,
    ) -> Carrier:
        targets, values = _tensors(averages), _tensors(variables)
        carrier: Carrier = "graph" if engine == "graph" else _native_carrier([*targets, *values])
        if carrier == "graph" and engine == "native":
            raise RuntimeError(f"engine='native' cannot run here: {_reason([*targets, *values])}")
        if when is None or when:
            if carrier != "graph":
                self._paired(targets, values).update(float(decay()))
            else:
                for target, value in zip(targets, values, strict=True):
                    target.copy_(_blended(target, value, float(decay())))
        return carrier

    def _paired(self, averages: list[torch.Tensor], values: list[torch.Tensor]) -> Pairs:
        addresses = [x.data_ptr() for x in (*averages, *values)]
        if self._pairs is None or addresses != self._addresses:
            self._pairs = Pairs(averages, values)
            self._addresses = addresses
        return self._pairs

    def blend(self, average: Tensor, value: Tensor, decay: Callable[[], Tensor], when: Tensor) -> Tensor:
        with torch.no_grad():
            average, value = torch.as_tensor(average), torch.as_tensor(value)
            return _blended(average, value, float(decay())) if when is None or when else average

    def swap(self, a: Iterable[Variable], b: Iterable[Variable]) -> None:
        x, y = _tensors(a), _tensors(b)
        if _native_carrier([*x, *y]) != "graph":
            swap(x, y)
            return
        for first, second in zip(x, y, strict=True):
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)


def _places(tensors: list[torch.Tensor]) -> list[str]:
    return sorted({str(x.device) for x in tensors})


def _has_cupy() -> bool:
    from ...cuda import _driver  # noqa: PLC0415 - no CPU needs it

    return _driver.runs()


def _native_carrier(tensors: list[torch.Tensor]) -> Carrier:
    """Return what carries out native code where these tensors lie; ``"graph"`` if nothing does."""
    places = _places(tensors)
    if places in ([], ["cpu"]):
        return "native"
    on_one_device = len(places) == 1 and places[0].startswith("cuda")
    return "cuda" if on_one_device and _has_cupy() else "graph"


def _reason(tensors: list[torch.Tensor]) -> str:
    places = _places(tensors)
    if len(places) == 1 and places[0].startswith("cuda"):
        return f"weights lie on {places[0]}, which needs a CuPy that runs: pip install 'fastema[cuda13]'"
    return f"weights lie on {', '.join(places)}"


def _blended(average: torch.Tensor, value: torch.Tensor, decay: float) -> torch.Tensor:
    compute = torch.float64 if average.dtype == torch.float64 else torch.float32
    blended: torch.Tensor = _formula.blend(
        average,
        value,
        *_formula.weigh(decay),
        compute=compute,
        cast=lambda x, dtype: torch.as_tensor(x, dtype=dtype),
        where=lambda condition, x, y: x if condition else y,
    )
    return blended
