"""What do updates and swaps cost on a GPU, against its copy rate and against every rival at its best?

    python -m fastema.bench.bench_cuda [--quick] [--keep] [--json FILE] [--picture FILE]
    python -m fastema.bench.bench_cuda --fake    # without a GPU: on a fake one, whose times mean nothing

Exactness comes first: results whose bits are not the CPU core's are not timed. --keep writes
bench/cuda-DATE.json, which says which kernels were run; a test says when they are others now.
"""

import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fastema
from fastema import cuda, schedules

from . import cli, harness
from .device import Gpu, machine, tensors
from .harness import Call
from .lists import LISTS, MIXES, Shapes, elements, itemsize, llama_7b
from .record import plain
from .report import chart, tables
from .rivals_cuda import COMPOSITIONS, DECAY, FOREACH, rivals, swap_rivals

FOLDER = Path(__file__).resolve().parent


def kernels_hash() -> str:
    """Return what tells these kernels from others."""
    from fastema.cuda._source import OPTIONS, SOURCE

    return hashlib.sha256("\n".join([*OPTIONS, SOURCE]).encode()).hexdigest()[:16]


# --- exactness --------------------------------------------------------------------------------------


def check_exactness(gpu: Gpu) -> None:
    """Compare with the CPU core, bit for bit.

    Raises:
        AssertionError: A bit differs.
    """
    torch = gpu.torch
    shapes = [(3,), (1_001, 7), (65_536,), (1,), (8191,)]
    for case in (
        Case("", shapes, *mix, how, skew=skew) for how in HOW for mix in HOW[how] for skew in (0, 1)
    ):
        a = tensors(gpu, shapes, case.average, 1, case.skew)
        v = tensors(gpu, shapes, case.value, 2, 3 * case.skew)
        expected, values = [x.cpu().clone() for x in a], [x.cpu().clone() for x in v]
        ours = paired(gpu, case, [a], v)
        cores = fastema.Pairs(expected, values, carries=carries_of(gpu, expected, case))
        for decay in (DECAY, 0.5, 0.0):
            for pairs in (ours, cores):
                pairs.update(decay, **case.terms())
        for x, y in zip(a, expected, strict=True):
            assert torch.equal(x.cpu().view(torch.uint8), y.view(torch.uint8)), case


# --- measuring --------------------------------------------------------------------------------------


def copy_rate(gpu: Gpu, samples: int) -> float:
    """Return C: bytes read and written each second by a copy on the device."""
    size = min(1 << 30, gpu.room() // 4)
    a, b = (gpu.torch.empty(size, dtype=gpu.torch.uint8, device=gpu.device) for _ in range(2))
    return 2 * size / harness.measure({"copy": lambda: b.copy_(a)}, samples, gpu.stopwatch)["copy"].median


class Report:
    """What was measured, beside the goals."""

    def __init__(self, gpu: Gpu, rate: float, samples: int) -> None:
        self.gpu, self.rate, self.samples = gpu, rate, samples
        self.results: list[harness.Result] = []
        self.goals: list[dict[str, Any]] = []

    def run(self, title: str, moved: int, ours: Call, others: dict[str, Call]) -> harness.Result:
        """Measure one case."""
        print(f"  {title} ...", file=sys.stderr, flush=True)
        timings = harness.measure({"fastema": ours, **others}, self.samples, self.gpu.stopwatch)
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


@dataclass(frozen=True)
class Case:
    """A list that is updated, and what is expected of it."""

    name: str
    shapes: Shapes
    average: str
    value: str
    rounding: str = "nearest"
    averages: int = 1  # of each value
    of_copy: float | None = None  # goal: share of the copy rate
    against: float | None = None  # goal: times faster than the best of torch's foreach functions
    skew: int = 0  # elements by which values are misaligned

    def terms(self) -> dict[str, Any]:
        """Return how an update is to round."""
        return {"rounding": "stochastic", "seed": 1, "step": 3} if self.rounding == "stochastic" else {}

    def title(self, shapes: Shapes) -> str:
        """Return what it is called where it was cut to these shapes."""
        types = self.average if self.average == self.value else f"{self.average} <- {self.value}"
        how = "" if self.rounding == "nearest" else f", {self.rounding}"
        several = "" if self.averages == 1 else f", {self.averages} averages"
        return f"{titled(self.name, self.shapes, shapes)}, {types}{how}{several}"


# The mixes of each rounding. Of the others one is like another.
HOW = {
    "nearest": MIXES,
    "stochastic": [("bf16", "bf16"), ("f16", "f16"), ("bf16", "f32"), ("f16", "f32")],
    "compensated": [("f32", "f32"), ("f32", "bf16"), ("bf16", "bf16")],
}


def carries_of(gpu: Gpu, averages: list[Any], case: Case) -> list[Any] | None:
    """Return carries that hold nothing, if the case has any."""
    if case.rounding != "compensated":
        return None
    kind = gpu.torch.float32 if case.average == "f32" else gpu.torch.int16
    return [gpu.torch.zeros_like(x, dtype=kind) for x in averages]


def cases(gpu: Gpu) -> list[Case]:
    """Return all lists; the ones for a quick look come last."""
    one = min(1 << 30, gpu.room() // 8)
    odd = [(math.prod(shape) + 1,) for shape in LISTS["GPT-2"]]
    return [
        *(
            Case("1 GiB", [(one // itemsize(mix[0]),)], *mix, how, of_copy=0.97)
            for how, mixes in HOW.items()
            for mix in mixes
        ),
        *(Case("1 GiB", [(one // 4,)], "f32", "f32", averages=n, of_copy=0.97) for n in (2, 4)),
        Case("7B", llama_7b(), "f32", "f32", of_copy=0.97, against=1.1),
        Case("7B", llama_7b(), "f32", "bf16", of_copy=0.97, against=1.8),
        Case("GPT-2, odd sizes", odd, "f32", "f32", against=1.5),
        Case("GPT-2, skewed views", LISTS["GPT-2"], "f32", "f32", against=1.5, skew=1),
        Case("16 x 65,536", [(65_536,)] * 16, "f32", "f32", against=3.0),
        Case("1,000 x 1,000", [(1000,)] * 1000, "f32", "f32", against=4.0),
        Case("GPT-2", LISTS["GPT-2"], "f32", "f32", of_copy=0.95, against=1.1),
        Case("GPT-2", LISTS["GPT-2"], "f32", "bf16", of_copy=0.95, against=1.8),
    ]


def paired(gpu: Gpu, case: Case, averages: list[list[Any]], values: list[Any]) -> fastema.Pairs:
    """Return the pairs of a case on the device."""
    carries = carries_of(gpu, averages[0], case)
    return fastema.Pairs.several(
        [gpu.as_on_device(x) for x in averages],
        gpu.as_on_device(values),
        carries=None if carries is None else [gpu.as_on_device(carries)],
    )


def update(gpu: Gpu, report: Report, case: Case) -> None:
    """Measure updates of a list: its share of the copy rate, and rivals."""
    held = itemsize(case.average) * (2 if case.rounding == "compensated" else 1) * case.averages
    shapes = gpu.cut(case.shapes, held + itemsize(case.value))
    a = [tensors(gpu, shapes, case.average, 1) for _ in range(case.averages)]
    v = tensors(gpu, shapes, case.value, 2, case.skew)
    pairs, decay = paired(gpu, case, a, v), [DECAY] * case.averages if case.averages > 1 else DECAY
    result = report.run(
        case.title(shapes),
        elements(shapes) * (2 * held + itemsize(case.value)),
        lambda: pairs.update(decay, **case.terms()),
        rivals(gpu, a[0], v) if case.rounding == "nearest" and case.averages == 1 else {},
    )
    if case.of_copy is not None:
        report.of_copy(result, case.of_copy)
    if case.against is not None:
        report.times(result, [FOREACH, *COMPOSITIONS], case.against)


def titled(name: str, asked: Shapes, shapes: Shapes) -> str:
    """Return the name of a list, and how much of it there is where it was cut to fit."""
    if list(shapes) == list(asked):
        return name
    return f"{name} cut to {elements(shapes):.3g} of {elements(asked):.3g} elements"


def release(gpu: Gpu) -> None:
    """Give torch's unused memory back."""
    if not gpu.fake:
        gpu.torch.cuda.empty_cache()


def swap(gpu: Gpu, report: Report, name: str, shapes: Shapes) -> None:
    """Measure swaps of a list."""
    asked, shapes = shapes, gpu.cut(shapes, 12)
    a, b = tensors(gpu, shapes, "f32", 1), tensors(gpu, shapes, "f32", 2)
    pairs = fastema.Pairs(gpu.as_on_device(a), gpu.as_on_device(b))
    title = f"swap {titled(name, asked, shapes)}"
    result = report.run(title, 16 * elements(shapes), pairs.swap, swap_rivals(gpu, a, b))
    report.times(result, ["torch three _foreach_copy_"], 1.5)


def host(gpu: Gpu, report: Report) -> None:
    """Measure the host's time of a call, which the device need not have done when it returns."""
    clock = harness.Stopwatch(lambda _: gpu.synchronize(), most=1 if gpu.fake else 50)
    for count in (1, 100, 1000):
        a, v = ([gpu.torch.zeros(16, device=gpu.device) for _ in range(count)] for _ in range(2))
        values = gpu.as_on_device(v)
        pairs, ema = fastema.Pairs(gpu.as_on_device(a), values), fastema.EMA(values, DECAY)
        checked = 0.1 * 2 * count
        calls = {
            "check=False": (partial(pairs.update, DECAY, check=False), 5),
            "addresses checked": (partial(pairs.update, DECAY), 5 + checked),
            "EMA.update": (ema.update, 5 + checked),
        }
        for how, (call, goal) in calls.items():
            value = harness.measure({how: call}, 20, clock)[how].median * 1e6
            report.goal(f"{count} tensors, {how}", "us of the host", value, goal, at_most=True)


def first_call(gpu: Gpu) -> float:
    """Return the seconds of a process' first update: its kernel is compiled, or read from the disk."""
    a, v = tensors(gpu, [(16,)], "f32", 1), tensors(gpu, [(16,)], "f32", 2)
    gpu.synchronize()
    begun = time.perf_counter()
    fastema.update(gpu.as_on_device(a), gpu.as_on_device(v), DECAY)
    gpu.synchronize()
    return time.perf_counter() - begun


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
    timings = harness.measure(calls, report.samples, gpu.stopwatch)
    share = timings["replay"].median / timings["plain"].median
    report.goal("GPT-2, graph replay", "of an update's time", share, 1.05, at_most=True)


def offloads(gpu: Gpu, report: Report) -> None:
    """Measure averages in host memory against the slower of its two ways: the bus, and the CPU's update."""
    torch = gpu.torch
    shapes = gpu.cut(LISTS["GPT-2"], 12)
    name = titled("GPT-2", LISTS["GPT-2"], shapes)
    v = tensors(gpu, shapes, "bf16", 2)
    averages = [np.zeros(shape, np.float32) for shape in shapes]
    offload = cuda.Offload(averages, gpu.as_on_device(v))

    def update() -> None:
        offload.update(DECAY)
        offload.wait()

    on_host = [torch.empty(shape, dtype=torch.bfloat16, pin_memory=not gpu.fake) for shape in shapes]
    on_cpu = fastema.Pairs(averages, on_host)

    def bus() -> None:
        for target, value in zip(on_host, v, strict=True):
            target.copy_(value, non_blocking=True)
        gpu.synchronize()

    calls = {"offload": update, "bus": bus, "CPU": lambda: on_cpu.update(DECAY)}
    timings = harness.measure(calls, report.samples, harness.Stopwatch(lambda _: gpu.synchronize(), most=1))
    bound = max(timings["bus"].median, timings["CPU"].median)
    share = bound / timings["offload"].median
    report.goal(f"{name}, offload, f32 <- bf16", "of the bus or the CPU", share, 0.9)


# --- the program ------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = cli.parser(__doc__ or "", times=False)
    parser.add_argument("--samples", type=int, default=9, help="of each contestant, in turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all numbers")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where to draw them")
    parser.add_argument("--fake", action="store_true", help="run on a fake device; times mean nothing")
    parser.add_argument("--keep", action="store_true", help="write bench/cuda-DATE.json")
    options = parser.parse_args(arguments)
    files = [options.json] if options.json else []
    if options.keep:
        if options.fake:
            parser.error("--keep keeps results of a GPU, and --fake has none")
        files.append(FOLDER / f"cuda-{datetime.now(UTC).date().isoformat()}.json")
    with machine(options.fake) as gpu:
        first = first_call(gpu)
        check_exactness(gpu)
        print(f"{gpu.name}: the bits of the CPU core", file=sys.stderr)
        report = Report(gpu, copy_rate(gpu, options.samples), options.samples)
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "device": gpu.name,
            "kernels": kernels_hash(),
            "build": fastema.build_config(),
            "torch": gpu.torch.__version__,
            "foreach": gpu.foreach(),
            "first_update_seconds": first,
            "copy_bytes_per_second": report.rate,
        }
        swaps = [("GPT-2", LISTS["GPT-2"]), ("7B", llama_7b())][: 1 if options.quick else 2]
        for measured in (
            *(partial(update, case=case) for case in cases(gpu)[-3 if options.quick else 0 :]),
            *(partial(swap, name=name, shapes=shapes) for name, shapes in swaps),
            host,
            graphs,
            offloads,
        ):
            measured(gpu, report)
            release(gpu)
            for file in files:  # each time: a machine that is lent may be taken back
                content = {**about, "goals": report.goals, "results": [*map(plain, report.results)]}
                file.write_text(json.dumps(content, indent=1) + "\n")
    versions = f"torch {gpu.torch.__version__} {about['foreach'] or ''}".strip()
    print(f"\n{gpu.name}; copies at {report.rate / 1e9:.4g} GB/s; {versions}")
    print(f"The first update took {first:.2g} s.\n\n{report.text()}\n")
    for table in tables(report.results):
        print(f"{table.text()}\n")
    for file in files:
        print(f"JSON: {file}")
    if options.picture:
        chart(report.results, f"Updates on {gpu.name}", options.picture)
        print(f"Chart: {options.picture}")


if __name__ == "__main__":
    main()
