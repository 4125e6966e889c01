"""A CUDA device to measure on, and its stand-in on the host for machines without one."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .harness import Call, Stopwatch
from .lists import DTYPES, Shapes, elements

SAMPLE = 0.02  # seconds of one sample, about


def _nothing(_: Call) -> None:
    """Settle nothing: a device is as awake as the call before left it."""


@dataclass(frozen=True)
class Events(Stopwatch):
    """The device's own clock: events in its stream, through torch."""

    torch: Any = None

    def seconds(self, call: Call, repeat: int) -> float:
        """Return the time of one call, of so many in a row."""
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda.synchronize()
        start.record()
        for _ in range(repeat):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeat


class Gpu:
    """A CUDA device: its memory, tensors in it, and its clock."""

    fake = False

    def __init__(self) -> None:
        import torch

        self.torch, self.device = torch, "cuda"
        self.stopwatch: Stopwatch = Events(_nothing, SAMPLE, 200, (Exception,), torch)
        properties = torch.cuda.get_device_properties(0)
        self.name = f"{properties.name}, {properties.multi_processor_count} multiprocessors"

    def room(self) -> int:
        """Return how many bytes are free."""
        return int(self.torch.cuda.mem_get_info()[0])

    def cut(self, shapes: Shapes, bytes_each: int) -> Shapes:
        """Leave layers out until a list fits into half of the memory that is free."""
        shapes = list(shapes)
        while len(shapes) > 3 and elements(shapes) * bytes_each > self.room() / 2:
            del shapes[len(shapes) // 3 : len(shapes) // 3 + max(1, len(shapes) // 10)]
        return shapes

    def as_on_device(self, tensors: list[Any]) -> list[Any]:
        """Return what fastema is given."""
        return tensors

    def foreach(self) -> dict[str, Any]:
        """Return how torch's foreach functions launch here: their rate depends on it.

        A launch takes 64 tensors where its arguments have 4 KB, and 448 where they have 32.
        """
        torch, count = self.torch, 1000
        averages, values = ([torch.zeros(16, device=self.device) for _ in range(count)] for _ in "ab")
        torch._foreach_lerp_(averages, values, 0.5)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            torch._foreach_lerp_(averages, values, 0.5)
            torch.cuda.synchronize()
        launches = sum("multi_tensor" in event.name for event in profile.events())
        size = None if launches == 0 else 4096 if count / launches < 100 else 32768
        return {"launches_of_1000_tensors": launches, "argument_bytes": size, "cuda": torch.version.cuda}

    def synchronize(self) -> None:
        """Wait for the device."""
        self.torch.cuda.synchronize()


class Fake(Gpu):
    """The same on the host, where fastema finds a fake device (tests/support/fake_cuda.py)."""

    fake = True

    def __init__(self, module: Any) -> None:
        import torch

        self.torch, self.device, self.name, self._module = torch, "cpu", "no GPU: a fake device", module
        self.stopwatch = Stopwatch(_nothing, most=1)

    def room(self) -> int:
        """Return how many bytes may be used."""
        return 1 << 22

    def cut(self, shapes: Shapes, bytes_each: int) -> Shapes:  # noqa: ARG002 - as on a GPU
        """Return a few small arrays."""
        return [(min(math.prod(shape), 5000),) for shape in shapes[:5]]

    def as_on_device(self, tensors: list[Any]) -> list[Any]:
        """Return tensors that say they lie on a device."""
        return [self._module.tensor(tensor) for tensor in tensors]

    def foreach(self) -> dict[str, Any]:
        """Return nothing: torch launches nothing here."""
        return {}

    def synchronize(self) -> None:
        """Do nothing: the fake device is done when a call returns."""


@contextmanager
def machine(fake: bool) -> Iterator[Gpu]:
    """Yield the device, or its stand-in."""
    if not fake:
        yield Gpu()
        return
    here = Path(__file__).resolve().parent
    support = here.parent / "tests" / "support"  # of a clone; a wheel has it here
    folder = str(support if support.is_dir() else here)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import fake_cuda

    with fake_cuda.installed():
        yield Fake(fake_cuda)


def tensors(gpu: Gpu, shapes: Shapes, dtype: str, seed: int, skew: int = 0) -> list[Any]:
    """Make the tensors of a list: weights, N(0, .02); `skew`: how many elements past an aligned address."""
    torch = gpu.torch
    torch_type = getattr(torch, np.dtype(DTYPES[dtype]).name)
    generator = torch.Generator(gpu.device).manual_seed(seed)
    made = []
    for shape in shapes:
        flat = torch.empty(math.prod(shape) + skew, dtype=torch_type, device=gpu.device)
        flat.normal_(0, 0.02, generator=generator)
        made.append(flat[skew:].view(shape))
    return made
