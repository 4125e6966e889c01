"""What do updates and swaps cost on a GPU, against its copy rate and against every rival at its best?

    python -m fastema.bench.bench_cuda [--quick] [--keep] [--json FILE] [--picture FILE]
    python -m fastema.bench.bench_cuda --fake    # without a GPU: on a fake one, whose times mean nothing

Exactness comes first: results whose bits are not the CPU core's are not timed. --keep writes
bench/cuda-DATE.json, which says which kernels were run; a test says when they are others now.
"""

import hashlib
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import fastema
from fastema import cuda, schedules

from . import harness
from .lists import LISTS, Shapes, elements

DECAY = 0.999
BUDGET = 0.02  # seconds of one sample, about
FOLDER = Path(__file__).resolve().parent
TYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}
BYTES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}
MIXES = [
    ("f32", "f32"),
    ("f64", "f64"),
    ("bf16", "bf16"),
    ("f16", "f16"),
    ("f32", "bf16"),
    ("f32", "f16"),
    ("f64", "f32"),
]
Call = Callable[[], object]


def kernels_hash() -> str:
    """Return what tells these kernels from others."""
    from fastema.cuda._source import OPTIONS, SOURCE

    return hashlib.sha256("\n".join([*OPTIONS, SOURCE]).encode()).hexdigest()[:16]


def llama_7b() -> Shapes:
    """Return the parameters of Llama 7B: 291 arrays, 6.7 billion elements."""
    d, hidden = 4096, 11008
    layer = [(d, d)] * 4 + [(hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    return [(32000, d), *layer * 32, (d,), (32000, d)]


# --- the device, and its stand-in -------------------------------------------------------------------


class Gpu:
    """Tensors and time of a CUDA device, through torch."""

    fake = False

    def __init__(self) -> None:
        import torch

        self.torch, self.device = torch, "cuda"
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

    def shown(self, tensors: list[Any]) -> list[Any]:
        """Return what fastema is given."""
        return tensors

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

    def synchronize(self) -> None:
        """Wait for the device."""
        self.torch.cuda.synchronize()


class Fake(Gpu):
    """The same on the host, where fastema finds a fake device (tests/support/fake_cuda.py)."""

    fake = True

    def __init__(self, module: Any) -> None:
        import torch

        self.torch, self.device, self.name, self._module = torch, "cpu", "no GPU: a fake device", module

    def room(self) -> int:
        """Return how many bytes may be used."""
        return 1 << 22

    def cut(self, shapes: Shapes, bytes_each: int) -> Shapes:  # noqa: ARG002 - as on a GPU
        """Return a few small arrays."""
        return [(min(math.prod(shape), 5000),) for shape in shapes[:5]]

    def shown(self, tensors: list[Any]) -> list[Any]:
        """Return tensors that say they lie on a device."""
        return [self._module.tensor(tensor) for tensor in tensors]

    def seconds(self, call: Call, repeat: int) -> float:
        """Return the host's time of one call."""
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - start) / repeat

    def synchronize(self) -> None:
        """Do nothing: the fake device is done when a call returns."""


@contextmanager
def machine(fake: bool) -> Iterator[Gpu]:
    """Yield the device, or its stand-in."""
    if not fake:
        yield Gpu()
        return
    support = str(FOLDER.parent / "tests" / "support")
    if support not in sys.path:
        sys.path.insert(0, support)
    import fake_cuda

    with fake_cuda.installed():
        yield Fake(fake_cuda)


def tensors(gpu: Gpu, shapes: Shapes, dtype: str, seed: int, skew: int = 0) -> list[Any]:
    """Make the tensors of a list: weights, N(0, .02); `skew`: how many elements past an aligned address."""
    torch = gpu.torch
    generator = torch.Generator(gpu.device).manual_seed(seed)
    made = []
    for shape in shapes:
        flat = torch.empty(math.prod(shape) + skew, dtype=getattr(torch, TYPES[dtype]), device=gpu.device)
        flat.normal_(0, 0.02, generator=generator)
        made.append(flat[skew:].view(shape))
    return made


# --- exactness --------------------------------------------------------------------------------------


def check_exactness(gpu: Gpu) -> None:
    """Compare with the CPU core, bit for bit.

    Raises:
        AssertionError: A bit differs.
    """
    torch = gpu.torch
    shapes = [(3,), (1_001, 7), (65_536,), (1,), (8191,)]
    for average, value in MIXES:
        for skew in (0, 1):
            a = tensors(gpu, shapes, average, 1, skew)
            v = tensors(gpu, shapes, value, 2, 3 * skew)
            expected, values = [x.cpu().clone() for x in a], [x.cpu().clone() for x in v]
            for decay in (DECAY, 0.5, 0.0):
                fastema.update(gpu.shown(a), gpu.shown(v), decay)
                fastema.update(expected, values, decay)
            for x, y in zip(a, expected, strict=True):
                assert torch.equal(x.cpu().view(torch.uint8), y.view(torch.uint8)), (average, value, skew)


# --- rivals -----------------------------------------------------------------------------------------


def rivals(gpu: Gpu, averages: list[Any], values: list[Any]) -> dict[str, Call]:
    """Return the rivals that can average these types."""
    torch, weight = gpu.torch, 1 - DECAY
    same = averages[0].dtype == values[0].dtype
    calls: dict[str, Call] = {}
    if same:
        calls["torch _foreach_lerp_"] = lambda: torch._foreach_lerp_(averages, values, weight)
    else:

        def cast() -> None:
            torch._foreach_lerp_(averages, [value.to(averages[0].dtype) for value in values], weight)

        def mul_add() -> None:
            torch._foreach_mul_(averages, DECAY)
            torch._foreach_add_(averages, values, alpha=weight)

        wide = [torch.empty_like(average) for average in averages] if fits(gpu, averages) else None

        def copied() -> None:
            torch._foreach_copy_(wide, values)
            torch._foreach_lerp_(averages, wide, weight)

        calls |= {"torch cast, then lerp": cast, "torch mul, add": mul_add}
        if wide is not None:
            calls["torch copy to kept memory, then lerp"] = copied

    def timm() -> None:  # ModelEmaV2: update_fn=lambda e, m: decay * e + (1 - decay) * m
        for a, v in zip(averages, values, strict=True):
            a.copy_(DECAY * a + weight * v)

    calls["timm ModelEmaV2"] = timm
    for make in (cupy_elementwise, triton_kernel):
        rival = make(gpu, averages, values)
        if rival is not None:
            calls[make.__name__.replace("_", " ")] = rival
    return calls


def fits(gpu: Gpu, arrays: list[Any]) -> bool:
    """Tell whether as much memory again is free."""
    return bool(gpu.room() > 1.2 * sum(x.numel() * x.element_size() for x in arrays))


def cupy_elementwise(gpu: Gpu, averages: list[Any], values: list[Any]) -> Call | None:
    """One launch a tensor."""
    if gpu.fake or "bfloat16" in f"{averages[0].dtype} {values[0].dtype}":
        return None
    import cupy

    kernel = cupy.ElementwiseKernel("V v, float64 w", "A a", "a += (A)w * ((A)v - a)", "average")
    flat = [
        (cupy.asarray(a.view(-1)), cupy.asarray(v.view(-1))) for a, v in zip(averages, values, strict=True)
    ]

    def call() -> None:
        with cupy.cuda.ExternalStream(gpu.torch.cuda.current_stream().cuda_stream):
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


# --- measuring --------------------------------------------------------------------------------------


def measure(gpu: Gpu, calls: dict[str, Call], samples: int) -> dict[str, harness.Timing]:
    """Time each call in turns."""
    repeats = {}
    for name, call in calls.items():
        try:
            gpu.seconds(call, 2)  # first calls compile and allocate
        except gpu.torch.OutOfMemoryError:
            print(f"    no memory for {name}", file=sys.stderr)
            continue
        repeats[name] = max(1, min(200, round(BUDGET / max(gpu.seconds(call, 2), 1e-9))))
    taken: dict[str, list[float]] = {name: [] for name in repeats}
    for _ in range(samples):
        for name, repeat in repeats.items():
            taken[name].append(gpu.seconds(calls[name], 1 if gpu.fake else repeat))
    return {
        name: harness.Timing(*(float(q) for q in np.quantile(times, (0.5, 0.25, 0.75))))
        for name, times in taken.items()
    }


def copy_rate(gpu: Gpu, samples: int) -> float:
    """Return C: bytes read and written each second by a copy on the device."""
    size = min(1 << 30, gpu.room() // 4)
    a, b = (gpu.torch.empty(size, dtype=gpu.torch.uint8, device=gpu.device) for _ in range(2))
    return 2 * size / measure(gpu, {"copy": lambda: b.copy_(a)}, samples)["copy"].median


class Report:
    """What was measured, beside the goals."""

    def __init__(self, gpu: Gpu, rate: float, samples: int) -> None:
        self.gpu, self.rate, self.samples = gpu, rate, samples
        self.results: list[harness.Result] = []
        self.goals: list[dict[str, Any]] = []

    def run(self, title: str, moved: int, ours: Call, others: dict[str, Call]) -> harness.Result:
        """Measure one case."""
        print(f"  {title} ...", file=sys.stderr, flush=True)
        timings = measure(self.gpu, {"fastema": ours, **others}, self.samples)
        seconds = moved / self.rate
        result = harness.Result(title, moved, timings, harness.Timing(seconds, seconds, seconds))
        self.results.append(result)
        return result

    def goal(self, case: str, what: str, value: float, goal: float, *, at_most: bool = False) -> None:
        """Note a figure and what it was to be."""
        met = value <= goal if at_most else value >= goal
        self.goals.append({"case": case, "what": what, "value": value, "goal": goal, "met": met})

    def of_copy(self, result: harness.Result, goal: float) -> None:
        """Note the share of the copy rate."""
        share = result.bytes_moved / result.ours.median / self.rate
        self.goal(result.title, "of the copy rate C", share, goal)

    def times(self, result: harness.Result, names: list[str], goal: float) -> None:
        """Note how many times faster than the best of these rivals."""
        ratios = {name: result.ratio(name) for name in names if name in result.timings}
        if ratios:
            best = min(ratios, key=lambda name: ratios[name])
            self.goal(result.title, f"times faster than {best}", ratios[best], goal)

    def text(self) -> str:
        """Return the goals as a table."""
        width = max(len(f"{goal['case']}: {goal['what']}") for goal in self.goals) + 2
        lines = [f"{'':{width}}measured    goal"]
        for goal in self.goals:
            mark = "" if goal["met"] else "  missed"
            name = f"{goal['case']}: {goal['what']}"
            lines.append(f"{name:{width}}{goal['value']:8.3g}{goal['goal']:8.3g}{mark}")
        return "\n".join(lines)


COMPOSITIONS = ["torch cast, then lerp", "torch mul, add", "torch copy to kept memory, then lerp"]


@dataclass(frozen=True)
class Case:
    """A list that is updated, and what is expected of it."""

    name: str
    shapes: Shapes
    average: str
    value: str
    of_copy: float | None = None  # goal: share of the copy rate
    against: float | None = None  # goal: times faster than the best of torch's foreach functions
    skew: int = 0  # elements by which values are misaligned


def cases(gpu: Gpu) -> list[Case]:
    """Return all lists; the ones for a quick look come last."""
    one = min(1 << 30, gpu.room() // 8)
    odd = [(math.prod(shape) + 1,) for shape in LISTS["GPT-2"]]
    return [
        *(Case("1 GiB", [(one // BYTES[a],)], a, v, 0.97) for a, v in MIXES),
        Case("7B", llama_7b(), "f32", "f32", 0.97, 1.1),
        Case("7B", llama_7b(), "f32", "bf16", 0.97, 1.8),
        Case("GPT-2, odd sizes", odd, "f32", "f32", None, 1.5),
        Case("GPT-2, skewed views", LISTS["GPT-2"], "f32", "f32", None, 1.5, skew=1),
        Case("16 x 65,536", [(65_536,)] * 16, "f32", "f32", None, 3.0),
        Case("1,000 x 1,000", [(1000,)] * 1000, "f32", "f32", None, 4.0),
        Case("GPT-2", LISTS["GPT-2"], "f32", "f32", 0.95, 1.1),
        Case("GPT-2", LISTS["GPT-2"], "f32", "bf16", 0.95, 1.8),
    ]


def update(gpu: Gpu, report: Report, case: Case) -> None:
    """Measure updates of a list: its share of the copy rate, and rivals."""
    each = BYTES[case.average] + BYTES[case.value]
    shapes = gpu.cut(case.shapes, each)
    a, v = tensors(gpu, shapes, case.average, 1), tensors(gpu, shapes, case.value, 2, case.skew)
    pairs = fastema.Pairs(gpu.shown(a), gpu.shown(v))
    types = case.average if case.average == case.value else f"{case.average} <- {case.value}"
    moved = elements(shapes) * (each + BYTES[case.average])
    result = report.run(f"{case.name}, {types}", moved, lambda: pairs.update(DECAY), rivals(gpu, a, v))
    if case.of_copy is not None:
        report.of_copy(result, case.of_copy)
    if case.against is not None:
        report.times(result, ["torch _foreach_lerp_", *COMPOSITIONS], case.against)


def release(gpu: Gpu) -> None:
    """Give torch's unused memory back."""
    if not gpu.fake:
        gpu.torch.cuda.empty_cache()


def swap(gpu: Gpu, report: Report, name: str, shapes: Shapes) -> None:
    """Measure swaps of a list."""
    shapes = gpu.cut(shapes, 12)
    a, b = tensors(gpu, shapes, "f32", 1), tensors(gpu, shapes, "f32", 2)
    pairs = fastema.Pairs(gpu.shown(a), gpu.shown(b))
    result = report.run(f"swap {name}", 16 * elements(shapes), pairs.swap, swap_rivals(gpu, a, b))
    report.times(result, ["torch three _foreach_copy_"], 1.5)


def host(gpu: Gpu, report: Report) -> None:
    """Measure the host's time of a call, which the device need not have done when it returns."""
    for count in (1, 100, 1000):
        a, v = ([gpu.torch.zeros(16, device=gpu.device) for _ in range(count)] for _ in range(2))
        pairs = fastema.Pairs(gpu.shown(a), gpu.shown(v))
        for check in (False, True):
            taken = []
            for _ in range(20):
                gpu.synchronize()
                start = time.perf_counter()
                for _ in range(1 if gpu.fake else 50):
                    pairs.update(DECAY, check=check)
                taken.append((time.perf_counter() - start) / (1 if gpu.fake else 50))
            goal = 5 + (0.1 * 2 * count if check else 0)
            how = "addresses checked" if check else "check=False"
            value = statistics.median(taken) * 1e6
            report.goal(f"{count} tensors, {how}", "us of the host", value, goal, at_most=True)


def graphs(gpu: Gpu, report: Report) -> None:
    """Measure a captured update with a schedule on the device, against the same launched each time."""
    if gpu.fake:
        return
    torch = gpu.torch
    a, v = tensors(gpu, LISTS["GPT-2"], "f32", 1), tensors(gpu, LISTS["GPT-2"], "f32", 2)
    pairs, counted = fastema.Pairs(a, v), cuda.Schedule(schedules.dynamic(DECAY))
    pairs.update(counted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pairs.update(counted, check=False)
    calls = {"plain": lambda: pairs.update(DECAY, check=False), "replay": graph.replay}
    timings = measure(gpu, calls, report.samples)
    share = timings["replay"].median / timings["plain"].median
    report.goal("GPT-2, graph replay", "of an update's time", share, 1.05, at_most=True)


def offloads(gpu: Gpu, report: Report) -> None:
    """Measure averages in host memory against the slower of its two ways: the bus, and the CPU's update."""
    torch = gpu.torch
    shapes = gpu.cut(LISTS["GPT-2"], 12)
    v = tensors(gpu, shapes, "bf16", 2)
    averages = [np.zeros(shape, np.float32) for shape in shapes]
    offload = cuda.Offload(averages, gpu.shown(v))

    def update() -> None:
        offload.update(DECAY)
        offload.wait()

    on_host = [torch.empty(shape, dtype=torch.bfloat16, pin_memory=not gpu.fake) for shape in shapes]
    on_cpu = fastema.Pairs(averages, on_host)

    def bus() -> None:
        for target, value in zip(on_host, v, strict=True):
            target.copy_(value, non_blocking=True)
        gpu.synchronize()

    def timed(call: Call) -> float:
        call()
        taken = []
        for _ in range(report.samples):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    bound = max(timed(bus), timed(lambda: on_cpu.update(DECAY)))
    report.goal("GPT-2, offload, f32 <- bf16", "of the bus or the CPU", bound / timed(update), 0.9)


# --- the program ------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--fake", action="store_true", help="run on a fake device; times mean nothing")
    parser.add_argument("--keep", action="store_true", help="write bench/cuda-DATE.json")
    options = parser.parse_args(arguments)
    with machine(options.fake) as gpu:
        check_exactness(gpu)
        print(f"{gpu.name}: the bits of the CPU core", file=sys.stderr)
        report = Report(gpu, copy_rate(gpu, options.samples), options.samples)
        for case in cases(gpu)[-3 if options.quick else 0 :]:
            update(gpu, report, case)
            release(gpu)
        for name, shapes in (("GPT-2", LISTS["GPT-2"]), ("7B", llama_7b()))[: 1 if options.quick else 2]:
            swap(gpu, report, name, shapes)
            release(gpu)
        host(gpu, report)
        graphs(gpu, report)
        offloads(gpu, report)
    print(f"\n{gpu.name}; copies at {report.rate / 1e9:.4g} GB/s\n\n{report.text()}\n")
    for i in range(0, len(report.results), 4):
        print(f"{harness.table(report.results[i : i + 4])}\n")
    content = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": gpu.name,
        "kernels": kernels_hash(),
        "build": fastema.build_config(),
        "torch": gpu.torch.__version__,
        "copy_bytes_per_second": report.rate,
        "goals": report.goals,
        "results": [result.as_dict() for result in report.results],
    }
    files = [options.json] if options.json else []
    if options.keep:
        if options.fake:
            parser.error("--keep keeps results of a GPU, and --fake has none")
        files.append(FOLDER / f"cuda-{content['date']}.json")
    for file in files:
        file.write_text(json.dumps(content, indent=1) + "\n")
        print(f"JSON: {file}")
    if options.picture:
        harness.chart(report.results, f"Updates on {gpu.name}", options.picture)
        print(f"Chart: {options.picture}")


if __name__ == "__main__":
    main()
