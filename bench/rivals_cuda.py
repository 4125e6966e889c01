"""Each rival on a CUDA device at its best, as rivals.py has them on the CPU."""

import importlib.util
from typing import Any

from .device import Gpu
from .harness import Call

DECAY = 0.999
FOREACH = "torch _foreach_lerp_"
COMPOSITIONS = ["torch cast, then lerp", "torch mul, add", "torch copy to kept memory, then lerp"]


def rivals(gpu: Gpu, averages: list[Any], values: list[Any]) -> dict[str, Call]:
    """Return the rivals that can average these types."""
    torch, weight = gpu.torch, 1 - DECAY
    same = averages[0].dtype == values[0].dtype
    calls: dict[str, Call] = {}
    if same:
        calls[FOREACH] = lambda: torch._foreach_lerp_(averages, values, weight)
    else:

        def cast() -> None:
            torch._foreach_lerp_(averages, [value.to(averages[0].dtype) for value in values], weight)

        def mul_add() -> None:
            torch._foreach_mul_(averages, DECAY)
            torch._foreach_add_(averages, values, alpha=weight)

        # the cast needs as much as these
        wide = [torch.empty_like(average) for average in averages] if fits(gpu, averages, 2) else None

        def copied() -> None:
            torch._foreach_copy_(wide, values)
            torch._foreach_lerp_(averages, wide, weight)

        compositions = [cast, mul_add] if wide is None else [cast, mul_add, copied]
        calls |= dict(zip(COMPOSITIONS, compositions, strict=False))

    def timm() -> None:  # ModelEmaV2: update_fn=lambda e, m: decay * e + (1 - decay) * m
        for a, v in zip(averages, values, strict=True):
            a.copy_(DECAY * a + weight * v)

    calls["timm ModelEmaV2"] = timm
    for make in (cupy_elementwise, triton_kernel):
        rival = make(gpu, averages, values)
        if rival is not None:
            calls[make.__name__.replace("_", " ")] = rival
    return calls


def fits(gpu: Gpu, arrays: list[Any], times: int = 1) -> bool:
    """Tell whether so many times as much memory again is free."""
    return bool(gpu.room() > 1.2 * times * sum(x.numel() * x.element_size() for x in arrays))


def cupy_elementwise(gpu: Gpu, averages: list[Any], values: list[Any]) -> Call | None:
    """One launch a tensor."""
    if gpu.fake or "bfloat16" in f"{averages[0].dtype} {values[0].dtype}":
        return None
    import cupy

    kernel = cupy.ElementwiseKernel("V v, float64 w", "A a", "a += (A)w * ((A)v - a)", "average")
    flat = [
        (cupy.asarray(a.view(-1)), cupy.asarray(v.view(-1))) for a, v in zip(averages, values, strict=True)
    ]

    stream = cupy.cuda.ExternalStream(gpu.torch.cuda.current_stream().cuda_stream)

    def call() -> None:
        with stream:
            for a, v in flat:
                kernel(v, 1 - DECAY, a)

    return call


def triton_kernel(gpu: Gpu, averages: list[Any], values: list[Any]) -> Call | None:
    """One launch a tensor."""
    if gpu.fake or not importlib.util.find_spec("triton"):
        return None
    from .triton_rival import launch

    pairs = list(zip(averages, values, strict=True))

    def call() -> None:
        for a, v in pairs:
            launch(a, v, 1 - DECAY)

    return call


def swap_rivals(gpu: Gpu, a: list[Any], b: list[Any]) -> dict[str, Call]:
    """Return other exact ways to swap."""
    torch = gpu.torch

    def clones() -> None:
        for x, y in zip(a, b, strict=True):
            kept = x.clone()
            x.copy_(y)
            y.copy_(kept)

    calls: dict[str, Call] = {"torch clone, two copies": clones}
    if fits(gpu, a):
        kept = [torch.empty_like(x) for x in a]

        def foreach() -> None:
            torch._foreach_copy_(kept, a)
            torch._foreach_copy_(a, b)
            torch._foreach_copy_(b, kept)

        calls["torch three _foreach_copy_"] = foreach
    return calls
