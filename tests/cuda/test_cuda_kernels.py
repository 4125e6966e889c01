"""The CUDA kernels without a GPU: compiled by g++, and by NVRTC for an interpreter of its output.

Both run the same launches, and must give the core's bits.
"""

import ctypes
import itertools
import math
import re
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest

import fastema
import nvrtc
import oracle
import ptx
import tolerances
from fastema import schedules
from fastema.cuda import _source
from processes import SUPPORT

INCLUDES = [SUPPORT, _source.FOLDER]
NUMBERS = {name: np.dtype(getattr(ml_dtypes, name, name)) for pair in _source.MIXES for name in pair}
CARRIES = {"float32": np.float32, "bfloat16": np.int16}
ARCHITECTURES = [60, 75, 90, 120, *(pytest.param(x, marks=pytest.mark.slow) for x in (61, 80, 86, 89, 100))]


# --- what runs a launch ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Return a function that compiles the kernels with g++."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")

    def build(*flags):
        file = tmp_path_factory.mktemp("kernels") / "kernels"
        options = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        options += ["-Wno-unused-function", *(f"-I{folder}" for folder in INCLUDES)]
        options += [f"-DMIXES={_source.bits_of(_source.MIXES.values())}"]
        subprocess.run(["g++", *options, *flags, SUPPORT / "cuda_kernels.cpp", "-o", file], check=True)
        return file

    return build


class Processor:
    """Runs what g++ made of the kernels."""

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        self._library.run.restype = ctypes.c_bool

    def launch(self, expression, blocks, parameters, _arrays):
        name = expression.removeprefix("fastema::")
        if name.startswith("update"):
            name = f"update {name[-2]}"
        pointers = (ctypes.c_void_p * len(parameters))(*(x.ctypes.data for x in parameters))
        assert self._library.run(name.encode(), blocks, pointers)


class Interpreter:
    """Runs what NVRTC made of them."""

    def __init__(self, architecture, change=lambda text: text):
        self._architecture, self._change = architecture, change

    def launch(self, expression, blocks, parameters, arrays):
        text, _, _ = nvrtc.compiled(self._architecture, expression)
        name = re.match(r"fastema::(\w+)", expression).group(1)
        kernel = ptx.Kernel(self._change(text), f"fastema_{name}")
        kernel.launch(blocks, _source.THREADS, parameters, arrays)


@pytest.fixture(scope="session")
def processor(program):
    return Processor(program("-O1", "-shared", "-fPIC"))


@pytest.fixture(scope="session", params=["g++", "sm_75", "sm_90"])
def device(request):
    """Return what runs the kernels; the two architectures have different conversions."""
    if request.param == "g++":
        return request.getfixturevalue("processor")
    nvrtc.library()
    return Interpreter(int(request.param[3:]))


def tables(averages, values, chunk):
    lists = len(averages) // len(values)
    rows = np.zeros(len(averages), _source.TENSOR)
    for i, average in enumerate(averages):
        value = values[i // lists]
        mix = _source.MIXES.get((average.dtype.name, value.dtype.name))
        rows[i] = average.ctypes.data, value.ctypes.data, value.size, mix, i
    chunks = [(group, i) for group, value in enumerate(values) for i in range(-(-value.size // chunk))]
    return rows, np.array(chunks, _source.CHUNK)


def argument(x, kind="<u8"):
    return np.array([x.ctypes.data if isinstance(x, np.ndarray) else x], kind)


def update(
    device,
    averages,
    values,
    decays,
    *,
    rounding="nearest",
    carries=(),
    chunk=1024,
    seed=0,
    step=0,
    state=None,
):
    """Update rows of averages, those that share a value following each other."""
    rows, chunks = tables(averages, values, chunk)
    carried = np.array([0 if x is None else x.ctypes.data for x in carries], np.uint64)
    asked = np.zeros(1, _source.DECAYS)
    asked["device"] = 0 if state is None else state.ctypes.data
    asked["value"][0, : len(decays)] = decays
    parameters = [argument(rows), argument(carried), argument(chunks), argument(chunk, "<u4")]
    parameters += [argument(len(decays), "<u4"), asked, argument(seed), argument(step)]
    arrays = [*averages, *values, *(x for x in carries if x is not None), rows, chunks, carried]
    arrays += [] if state is None else [state]
    expression = _source.update_name(rows["mix"].tolist(), _source.ROUNDINGS[rounding])
    device.launch(expression, len(chunks), parameters, arrays)


def swap(device, a, b, chunk=1024):
    rows, chunks = tables(a, b, chunk)
    parameters = [argument(rows), argument(chunks), argument(chunk, "<u4")]
    device.launch(_source.SWAP, len(chunks), parameters, [*a, *b, rows, chunks])


# --- arrays ------------------------------------------------------------------------------------------


def any_bits(rng, size, dtype):
    """Return numbers of the size of weights, and any bytes between them."""
    dtype = np.dtype(dtype)
    numbers = rng.standard_normal(size).astype(dtype)
    anything = np.frombuffer(rng.bytes(size * dtype.itemsize), dtype)
    return np.where(rng.random(size) < 0.5, numbers, anything)


class Placed:
    """An array that begins so many elements after a multiple of 64 bytes, and what lies around it."""

    def __init__(self, contents, offset):
        size, start = contents.nbytes, 64 + offset * contents.itemsize
        memory = np.full(size + start + 128, 0xA5, np.uint8)
        self._memory = memory[-memory.ctypes.data % 64 :]
        self._inside = slice(start, start + size)
        self.array = self._memory[self._inside].view(contents.dtype)
        self.array[:] = contents

    def is_alone(self):
        """Tell whether nothing around it was changed."""
        around = np.ones(self._memory.size, bool)
        around[self._inside] = False
        return bool((self._memory[around] == 0xA5).all())


def assert_same(ours, cores):
    for i, (one, other) in enumerate(zip(ours, cores, strict=True)):
        assert oracle.same_bits(one, other), i


OFFERED = [
    (mix, rounding)
    for rounding, offers in {
        "nearest": lambda average, value: True,  # noqa: ARG005
        "stochastic": lambda average, value: NUMBERS[average].itemsize == 2,  # noqa: ARG005
        "compensated": lambda average, value: average in CARRIES,  # noqa: ARG005
    }.items()
    for mix in _source.MIXES
    if offers(*mix)
]


# --- the bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mix", "rounding"), OFFERED)
def test_any_size_at_any_address_has_the_cores_bits(rng, device, mix, rounding):
    average, value = (NUMBERS[name] for name in mix)
    everywhere = itertools.product(range(16 // average.itemsize), range(16 // value.itemsize), [1, 9, 300])
    places = [*everywhere, *itertools.product([0, 1], [0, 1], [2500, 9001])]
    averages, values, carries = [], [], []
    for i, (a, v, size) in enumerate(places):
        averages.append(Placed(any_bits(rng, size, average), a))
        values.append(Placed(any_bits(rng, size, value), v))
        carry = np.zeros(size, CARRIES.get(mix[0], np.int16))
        if carry.dtype == np.float32:
            carry[:] = rng.standard_normal(size) * 1e-9
        else:
            carry[:] = rng.integers(-(2**15), 2**15, size)
        carries.append(Placed(carry, a if i % 3 else v))
    expected, kept = ([x.array.copy() for x in side] for side in (averages, carries))
    with_carries = rounding == "compensated"
    noise = "stochastic" if rounding == "stochastic" else "nearest"
    fastema.update(
        expected,
        [x.array for x in values],
        0.99,
        rounding=noise,
        seed=3,
        step=2**40,
        carries=kept if with_carries else None,
    )
    before = [x.array.copy() for x in values]
    update(
        device,
        [x.array for x in averages],
        [x.array for x in values],
        [0.99],
        rounding=rounding,
        seed=3,
        step=2**40,
        carries=[x.array for x in carries] if with_carries else (),
        chunk=8192,
    )
    assert_same([x.array for x in averages], expected)
    assert_same([x.array for x in carries], kept)
    assert all((x.array.view("u1") == y.view("u1")).all() for x, y in zip(values, before, strict=True))
    assert all(x.is_alone() for x in (*averages, *values, *carries))


@pytest.mark.parametrize(
    ("mix", "rounding", "role"),
    [
        (mix, rounding, role)
        for mix, rounding in OFFERED
        for role, name in zip(("average", "value"), mix, strict=True)
        if NUMBERS[name].itemsize == 2
    ],
)
def test_all_65536_patterns_of_16_bits(rng, device, mix, rounding, role):
    average, value = (NUMBERS[name] for name in mix)
    every = np.arange(2**16, dtype=np.uint16)
    a = every.view(average) if role == "average" else any_bits(rng, 2**16, average)
    v = every.view(value) if role == "value" else any_bits(rng, 2**16, value)
    ours, cores = a.copy(), a.copy()
    carry = np.zeros(2**16, CARRIES.get(mix[0], np.int16))
    kept = carry.copy()
    if rounding == "compensated":
        fastema.update(cores, v, 0.9, carries=kept)
        update(device, [ours], [v], [0.9], rounding=rounding, carries=[carry], chunk=8192)
    else:
        fastema.update(cores, v, 0.9, rounding=rounding)
        update(device, [ours], [v], [0.9], rounding=rounding, chunk=8192)
    assert_same([ours, carry], [cores, kept])


def test_several_averages_of_the_same_values_in_one_pass(rng, device):
    values = [any_bits(rng, size, np.float32) for size in (5, 1300, 64)]
    types, decays = [np.float32, np.float64, np.float32], [0.9, 0.0, 0.999]
    lists = [[any_bits(rng, x.size, dtype) for x in values] for dtype in types]
    cores = [[x.copy() for x in averages] for averages in lists]
    fastema.Pairs.several(cores, values).update(decays)
    update(device, [x for row in zip(*lists, strict=True) for x in row], values, decays)
    for ours, others in zip(lists, cores, strict=True):
        assert_same(ours, others)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_list_of_all_mixes_in_one_launch(rng, device, rounding):
    mixes = [(NUMBERS[a], NUMBERS[v]) for a, v in _source.MIXES]
    averages = [any_bits(rng, 100 + i, a) for i, (a, _) in enumerate(mixes)]
    values = [any_bits(rng, 100 + i, v) for i, (_, v) in enumerate(mixes)]
    cores = [x.copy() for x in averages]
    fastema.update(cores, values, 0.5, rounding=rounding, seed=9)
    update(device, averages, values, [0.5], rounding=rounding, seed=9)
    assert_same(averages, cores)


@pytest.mark.parametrize(("mix", "rounding"), OFFERED)
def test_a_decay_of_zero_copies_every_bit_that_fits_and_empties_carries_of_those(rng, device, mix, rounding):
    average, value = (NUMBERS[name] for name in mix)
    v = any_bits(rng, 1003, value)
    ours, cores = any_bits(rng, 1003, average), np.empty(1003, average)
    carry = np.ones(1003, CARRIES.get(mix[0], np.int16))
    kept = carry.copy()
    if rounding == "compensated":
        fastema.update(cores, v, 0.0, carries=kept)
        update(device, [ours], [v], [0.0], rounding=rounding, carries=[carry])
        assert not carry.any() or average.itemsize < value.itemsize
    else:
        fastema.update(cores, v, 0.0, rounding=rounding)
        update(device, [ours], [v], [0.0], rounding=rounding)
    assert_same([ours, carry], [cores, kept])
    if average == value:  # a NaN's payload too
        assert (ours.view("u1") == v.view("u1")).all()


def test_random_bits_go_on_where_the_place_in_an_array_needs_33_bits(rng, device):
    """The array is longer than memory, so only the chunk that crosses 2**32 is there."""
    chunk = 3072
    index = 2**32 // chunk
    first = index * chunk
    a, v = (rng.standard_normal(chunk).astype(ml_dtypes.bfloat16) for _ in range(2))
    x = a.astype(np.float32)
    x = x + np.float32(1 - 0.9) * (v.astype(np.float32) - x)
    expected = oracle.round_bf16_at_random(x, oracle.random_bits(chunk, 7, 8, 0, first))
    rows, chunks = tables([a], [v], chunk)
    rows["average"] -= np.uint64(2 * first)
    rows["value"] -= np.uint64(2 * first)
    rows["size"], chunks["index"] = first + chunk, index
    asked = np.zeros(1, _source.DECAYS)
    asked["value"] = 0.9
    parameters = [argument(rows), argument(0), argument(chunks), argument(chunk, "<u4"), argument(1, "<u4")]
    parameters += [asked, argument(7), argument(8)]
    expression = _source.update_name(rows["mix"].tolist(), 1)
    device.launch(expression, 1, parameters, [a, v, rows, chunks])
    assert (a.view(np.uint16) == expected).all()


def test_decays_and_step_may_lie_on_the_device_and_a_negative_decay_does_nothing(rng, device):
    values = [rng.standard_normal(1000).astype(np.float16)]
    averages = [any_bits(rng, 1000, np.float16) for _ in range(3)]
    before = [x.copy() for x in averages]
    cores = [[x.copy()] for x in averages]
    fastema.Pairs.several(cores, values).update([0.9, 0.5, 0.99], rounding="stochastic", seed=2, step=77)
    state = np.zeros(1, _source.STATE)
    state["step"], state["decay"][0, :3] = 77, [0.9, -1, 0.99]
    update(device, averages, values, [0, 0, 0], rounding="stochastic", seed=2, step=5, state=state)
    assert_same(averages, [cores[0][0], before[1], cores[2][0]])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_swap_exchanges_every_bit_at_any_address(rng, device, dtype):
    per_access = 16 // np.dtype(dtype).itemsize
    places = [
        *itertools.product(range(per_access), range(per_access), [1, 9, 300]),
        (0, 0, 9001),
        (0, 1, 9001),
    ]
    a = [Placed(any_bits(rng, size, dtype), place) for place, _, size in places]
    b = [Placed(any_bits(rng, size, dtype), place) for _, place, size in places]
    before = [[x.array.tobytes() for x in side] for side in (a, b)]
    swap(device, [x.array for x in a], [x.array for x in b], chunk=8192)
    assert [[x.array.tobytes() for x in side] for side in (b, a)] == before
    assert all(x.is_alone() for x in (*a, *b))


# --- schedules ---------------------------------------------------------------------------------------


def advanced(processor, asked, steps):
    """Return the decays of the first steps, a row each."""
    state, parameters = np.zeros(1, _source.STATE), np.zeros(_source.LISTS, _source.SCHEDULE)
    parameters[: len(asked)] = asked
    rows = []
    for step in range(1, steps + 1):
        device_arguments = [argument(state), parameters, argument(len(asked), "<u4")]
        processor.launch(_source.ADVANCE, 1, device_arguments, [])
        assert state["step"] == step
        rows.append(state["decay"][0, : len(asked)].copy())
    return np.array(rows)


def test_schedules_on_the_device_are_those_of_the_host(processor):
    """CUDA's pow may differ from this one by two units in the last place of a float64."""
    kinds = _source.SCHEDULES
    asked = [
        (kinds["constant"], 1, 0, 0.99, 1, 1, 0),
        (kinds["dynamic"], 1, 0, 0.9, 10, 1, 0),
        (kinds["dynamic"], 1, 7, 0.99, 10, 1, 0),
        (kinds["constant"], 3, 5, 0.9, 1, 1, 0),
        (kinds["dynamic"], 6, 2, 0.99, 10, 1, 0),
        (kinds["warmup"], 1, 2, 0.9, 1.5, 2 / 3, 0.4),
        (kinds["power"], 1, 0, 1, 1, 7.94, 0),
        (kinds["equal_weights"], 2, 3, 1, 1, 1, 0),
    ]
    on_host = [
        schedules.constant(0.99),
        schedules.dynamic(0.9),
        schedules.dynamic(0.99, start_step=7),
        schedules.constant(0.9, start_step=5),
        schedules.dynamic(0.99, start_step=2),
        lambda t: max(0.4, min(0.9, 1 - (1 + (t - 3) / 1.5) ** -(2 / 3))) if t > 3 else 0.0,
        lambda t: (1 - 1 / t) ** 7.94,
        schedules.equal_weights(3),
    ]
    for step, decays in enumerate(advanced(processor, asked, 130), 1):
        for row, schedule, decay in zip(asked, on_host, decays, strict=True):
            due = step % row[1] == 0
            needed = schedules.over(schedule, step - row[1], step) if due else -1
            assert decay == needed, (row, step)


def test_schedules_without_a_start_on_the_device_are_those_of_the_host(processor):
    """By powers alone; the cosine is a series of its own there."""
    kinds = _source.SCHEDULES
    ours = {
        (kinds["dynamic"], 1, 3, 0.9, 4.5, 1, 0): schedules.dynamic(0.9, start_step=3, width=4.5),
        (kinds["ramp"], 1, 0, 0.99, 20, 1, 0): lambda t: 0.99 * (1 - math.e ** (-t / 20)),
        (kinds["ramp"], 7, 0, 0.9, 20, 1, 0): lambda t: 0.9 * (1 - math.e ** (-t / 20)),
        (kinds["cosine"], 1, 0, 0.98, 90, 1, 0.3): lambda t: cosine(t, 90),
        (kinds["cosine"], 20, 0, 0.98, 50, 1, 0.3): lambda t: cosine(t, 50),
        (kinds["linear"], 3, 0, 0.98, 90, 1, 0.3): lambda t: 0.98 - (0.98 - 0.3) * (1 - min(t, 90) / 90),
        (kinds["growing"], 1, 0, 0.5 ** (1 / 20), 0.25, 20, 0): lambda t: 0.5 ** (1 / min(0.25 * t, 20)),
        (kinds["growing"], 5, 0, 1.0, 0.25, np.inf, 0): lambda t: 0.5 ** (1 / (0.25 * t)),
    }

    def cosine(t, steps):
        return 0.98 - (0.98 - 0.3) * ((math.cos(math.pi * (min(t, steps) / steps)) + 1) / 2)

    for step, decays in enumerate(advanced(processor, list(ours), 130), 1):
        for (row, schedule), decay in zip(ours.items(), decays, strict=True):
            every, limit = row[1], row[3]
            if step % every:
                assert decay == -1, (row, step)
            elif row[0] == kinds["cosine"]:
                needed = schedules.over(schedule, step - every, step)
                tolerances.assert_close(decay, needed, tolerances.POWERS)
            elif every > 1 and schedule(step - every + 1) == limit:
                assert decay == schedules.compound(limit, every), (row, step)
            else:
                assert decay == schedules.over(schedule, step - every, step), (row, step)


# --- what is emitted ---------------------------------------------------------------------------------

EVERY_UPDATE = [_source.update_name(_source.MIXES.values(), rounding) for rounding in range(3)]
ENTRIES = {"nearest": EVERY_UPDATE[0], "stochastic": EVERY_UPDATE[1], "compensated": EVERY_UPDATE[2]}
ENTRIES |= {"swap": _source.SWAP, "advance": _source.ADVANCE}


def test_the_source_is_one_text():
    """NVRTC has no headers to include."""
    assert "#include" not in _source.SOURCE
    assert "blend_compensated" in _source.SOURCE


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_emitted_rounds_every_operation_and_keeps_subnormals(architecture, entry):
    if architecture not in nvrtc.architectures():
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    text, cubin, log = nvrtc.compiled(architecture, ENTRIES[entry])
    entries = nvrtc.entries(text)
    assert [name for name, _ in entries] == [entry if entry in ("swap", "advance") else "update"]
    for name, body in entries:
        opcodes = set(re.findall(r"^\s*(?:@\S+\s+)?([a-z]\w*(?:\.\w+)+)", body, re.MULTILINE))
        inexact = {x for x in opcodes if re.match(r"(add|sub|mul)\.f|fma|mad\.f", x) or ".ftz" in x}
        assert not inexact, name
        local = ".local" if architecture >= 70 else ".unknown"
        assert not [x for x in opcodes if local in x or ".shared" in x or x.startswith(("atom", "bar"))]
        if name == "update":
            assert {"ld.global.cs.v4.u32", "st.global.cs.v4.u32"} <= opcodes
            assert {"ld.global.nc.v4.u32", "ld.global.nc.v2.u32"} <= opcodes
    assert cubin[:4] == b"\x7fELF"
    if architecture >= 70:  # older ones copy the decays to local memory
        assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", log)) == {"0"}
    # three blocks share the 65,536 of a multiprocessor
    assert max(int(count) for count in re.findall(r"Used (\d+) registers", log)) <= 80


@pytest.mark.parametrize("architecture", [75, 90])
def test_both_accesses_of_a_stream_are_under_way_before_the_first_is_used(architecture):
    text, _, _ = nvrtc.compiled(architecture, _source.update_name([_source.MIXES["float32", "float32"]], 0))
    (body,) = [body for name, body in nvrtc.entries(text) if name == "update"]
    loops = re.findall(r'"nounroll";(.*?)bra', body, re.DOTALL)
    orders = [re.findall(r"ld\.global\.\w+\.v4|sub\.rn|st\.global", loop) for loop in loops]
    wide = [order for order in orders if "ld.global.nc.v4" in order]
    blends = [order for order in wide if "sub.rn" in order]
    copies = [order for order in wide if "sub.rn" not in order]
    assert blends
    assert all("sub.rn" not in order[:4] and "st.global" not in order[:4] for order in blends)
    # a decay of 0 reads no average
    assert copies == [["ld.global.nc.v4"] * 2 + ["st.global"] * 2]
    # whatever the value's alignment: only at its ends is an average accessed one by one, by either
    assert len(re.findall(r"ld\.global\.cs\.u32", body)) == 1
    assert len(re.findall(r"st\.global\.cs\.u32", body)) == 2


# --- the interpreter ---------------------------------------------------------------------------------


def fused(text):
    """Return the text with each multiplication made part of the addition that takes it."""
    product = r"mul\.rn\.f32 (%f\d+), (\S+), (\S+);(.*?)add\.rn\.f32 (%f\d+), (\S+), \1;"
    return re.sub(product, r"\4fma.rn.f32 \5, \2, \3, \6;", text, flags=re.DOTALL)


CHANGES = {
    "flushed": ("float32", "float32", lambda text: text.replace("add.rn.f32", "add.rn.ftz.f32")),
    "flushed when widened": ("float64", "float32", lambda text: text.replace("cvt.f64", "cvt.ftz.f64")),
    "fused": ("float32", "float32", fused),
    "halves swapped": (
        "bfloat16",
        "bfloat16",
        lambda text: re.sub(r"(cvt\.rn\.bf16x2\.f32 \S+) (\S+), (\S+);", r"\1 \3, \2;", text),
    ),
    "another shift": ("bfloat16", "bfloat16", lambda text: re.sub(r"(shl\.b32.*), 16;", r"\1, 15;", text)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_interpreter_sees_one_wrong_instruction(rng, change):
    nvrtc.library()
    average, value, changed = CHANGES[change]
    a, v = (rng.standard_normal(2000).astype(NUMBERS[x]) for x in (average, value))
    if change.startswith("flushed"):
        a[:], v = 0, v * np.float32(1e-39)
    right, wrong = a.copy(), a.copy()
    update(Interpreter(90), [right], [v], [0.9])
    update(Interpreter(90, changed), [wrong], [v], [0.9])
    assert oracle.same_bits(right, oracle.update(a, v, 0.9))
    assert not oracle.same_bits(right, wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("mul.rn.f32", "div.full.f32"), "unknown instruction: div.full.f32"),
        (lambda text: text.replace("cvt.rn.f32.f64", "cvt.ru.f32.f64"), "unknown conversion"),
        (lambda text: re.sub(r"(ld\.global\.cs\.v4\.u32.*)\]", r"\1+4]", text), "not aligned"),
        (lambda text: re.sub(r"(ld\.global\.cs\.v4\.u32.*)\]", r"\1+16]", text), "reaches outside"),
    ],
)
def test_the_interpreter_refuses_what_it_does_not_know_and_what_a_device_would(change, message):
    nvrtc.library()
    a = Placed(np.zeros(64, np.float32), 0).array
    with pytest.raises(ValueError, match=message):
        update(Interpreter(90, change), [a], [np.ones(64, np.float32)], [0.9])


# --- the sanitizers ----------------------------------------------------------------------------------


def test_no_access_outside_of_arrays_and_nothing_undefined(program):
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    done = subprocess.run([program(*flags)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
