"""What only a GPU can show. Each test states one law; all of them skip, and say why, where there is none.

With FASTEMA_GPU=1 they fail there.

    tests="python -m pytest -n0 -q tests/cuda/test_gpu.py"
    FASTEMA_GPU=1 $tests
    compute-sanitizer --tool memcheck --error-exitcode 1 $tests -k 'not jax'
    compute-sanitizer --tool initcheck --error-exitcode 1 $tests -k 'not jax'

The laws of lists, errors and streams are tested everywhere, on a fake device (test_cuda_plan.py). With
-m slow that device takes the place of a GPU here, where a test allows it: is the test itself right?
"""

import importlib
import importlib.util
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import ml_dtypes
import numpy as np
import pytest

import fake_cuda
import fastema
import oracle
from fastema import cuda, schedules
from fastema.cuda import _offload
from mixes import MIXES, of_many_magnitudes

bfloat16 = ml_dtypes.bfloat16


def why_not():
    """Return why these tests cannot run, or nothing."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed: pip install 'fastema[cuda13]'"
    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "there is no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CUDA does not run here: {error}"


REASON = why_not()
NEEDED = os.environ.get("FASTEMA_GPU") == "1"  # where there must be one: then what cannot run has failed
pytestmark = pytest.mark.gpu


def cannot_run(reason):
    """End a test."""
    (pytest.fail if NEEDED else pytest.skip)(reason)


@pytest.fixture(autouse=True)
def gpu(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if REASON and parameters.get("library") not in FAKES:
        cannot_run(REASON)


def module(name):
    """Return a library without which a GPU is hardly used."""
    if importlib.util.find_spec(name) is None:
        cannot_run(f"{name} is not installed")
    return importlib.import_module(name)


class CuPy:
    """NumPy arrays to CuPy's and back."""

    def __init__(self):
        self.module = module("cupy")

    def device(self, array):
        memory = self.module.empty(array.nbytes, self.module.uint8)
        if array.nbytes:
            memory.set(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return Typed(memory, array.dtype, array.shape)

    def host(self, array):
        self.module.cuda.runtime.deviceSynchronize()
        return array.memory.get().view(array.dtype).reshape(array.shape)

    def overwrite(self, array, host):
        array.memory.set(np.ascontiguousarray(host).reshape(-1).view(np.uint8))


class Typed:
    """Memory of CuPy's as an array of any type, bfloat16 included, for older CuPy has no such arrays."""

    def __init__(self, memory, dtype, shape):
        self.memory, self.dtype, self.shape = memory, np.dtype(dtype), shape

    @property
    def __cuda_array_interface__(self):
        pointer = self.memory.data.ptr if self.memory.size else 0
        return {"version": 2, "shape": self.shape, "typestr": self.dtype.str, "data": (pointer, False)}


class Torch:
    """NumPy arrays to torch's and back."""

    def __init__(self):
        self.module = module("torch")
        if not self.module.cuda.is_available():
            cannot_run("torch has no CUDA here")

    def device(self, array):
        return self.tensor(array).cuda()

    def tensor(self, array):
        torch = self.module
        if array.dtype == bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    def host(self, tensor):
        torch = self.module
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).cpu().numpy().view(bfloat16)
        return tensor.cpu().numpy()

    def overwrite(self, tensor, host):
        tensor.copy_(self.device(host))


class FakeCuPy:
    """NumPy arrays to those of a fake device and back."""

    device = staticmethod(lambda array: fake_cuda.Array(array.copy()))
    host = staticmethod(lambda array: array.host)

    def overwrite(self, array, host):
        array.host[...] = host


class FakeTorch(Torch):
    """NumPy arrays to tensors that say they lie on a device, and back."""

    def __init__(self):
        self.module = pytest.importorskip("torch", reason="torch is not installed")

    def device(self, array):
        return fake_cuda.tensor(self.tensor(array))

    def host(self, tensor):
        return super().host(tensor.as_subclass(self.module.Tensor))


FAKES = FakeCuPy, FakeTorch


@pytest.fixture(
    params=[CuPy, Torch, *(pytest.param(fake, marks=pytest.mark.slow) for fake in FAKES)],
    ids=lambda library: library.__name__,
)
def library(request):
    with fake_cuda.installed() if request.param in FAKES else nullcontext():
        yield request.param()


@pytest.fixture
def torch():
    return Torch().module


# --- bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("average", "value"), MIXES)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 1.0])
def test_an_update_has_the_bits_of_the_cpu(library, rng, average, value, decay):
    sizes = [1, 3, 255, 1024, 8191, 8193, 100_003, 3_000_001]
    a = [of_many_magnitudes(rng, n, average) for n in sizes]
    v = [of_many_magnitudes(rng, n, value) for n in sizes]
    on_device = [library.device(x) for x in a], [library.device(x) for x in v]
    fastema.update(*on_device, decay)
    fastema.update(a, v, decay)
    assert all(oracle.same_bits(library.host(x), y) for x, y in zip(on_device[0], a, strict=True))


def test_all_mixes_in_one_list_have_the_bits_of_the_cpu(library, rng):
    sizes = [5, 70_000, 1, 0, 64, 65_536, 3, 200_001, 17] * 3
    mixes = [MIXES[i % len(MIXES)] for i in range(len(sizes))]
    a = [of_many_magnitudes(rng, n, t) for n, (t, _) in zip(sizes, mixes, strict=True)]
    v = [of_many_magnitudes(rng, n, t) for n, (_, t) in zip(sizes, mixes, strict=True)]
    on_device = [library.device(x) for x in a], [library.device(x) for x in v]
    pairs = fastema.Pairs(*on_device)
    for decay in (0.9, 0.99, 0.0, 0.999):
        pairs.update(decay)
        fastema.update(a, v, decay)
    assert all(oracle.same_bits(library.host(x), y) for x, y in zip(on_device[0], a, strict=True))


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_all_65536_patterns_of_16_bits_in_both_roles(library, rng, dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    for other in (np.full(2**16, 1.5, dtype), np.full(2**16, np.inf, dtype), rng.permutation(every)):
        for average, value in ((every, other), (other, every)):
            for wide in (average, average.astype(np.float32)):
                result = library.device(wide)
                fastema.update(result, library.device(value), 0.9)
                assert oracle.same_bits(library.host(result), oracle.update(wide, value, 0.9))


def test_subnormals_are_kept(library):
    tiny = np.full(1000, 3e-44, np.float32)
    average = library.device(np.zeros(1000, np.float32))
    fastema.update(average, library.device(tiny), 0.5)
    expected = oracle.update(np.zeros(1000, np.float32), tiny, 0.5)
    assert expected[0] > 0
    assert oracle.same_bits(library.host(average), expected)


@pytest.mark.parametrize(("average", "value"), MIXES)
def test_alignment_changes_no_bit(rng, average, value):
    """Views that begin anywhere, next to memory that must stay as it is."""
    library = Torch()
    size = 5003
    for first, second in itertools.product((0, 1, 2, 3, 5, 7), repeat=2):
        a, v = of_many_magnitudes(rng, size + 16, average), of_many_magnitudes(rng, size + 16, value)
        whole, values = library.device(a), library.device(v)
        fastema.update(whole[first : first + size], values[second : second + size], 0.9)
        a[first : first + size] = oracle.update(a[first : first + size], v[second : second + size], 0.9)
        assert oracle.same_bits(library.host(whole), a), (first, second)


@pytest.mark.parametrize(("average", "value"), [mix for mix in MIXES if np.dtype(mix[0]).itemsize == 2])
@pytest.mark.parametrize("decay", [0.99, 0.0])
def test_stochastic_rounding_has_the_bits_of_the_cpu(library, rng, average, value, decay):
    a, v = ([rng.standard_normal(n).astype(t) for n in (1, 1000, 100_003)] for t in (average, value))
    on_device = [library.device(x) for x in a], [library.device(x) for x in v]
    options = {"rounding": "stochastic", "seed": 7, "step": 2**40}
    fastema.update(*on_device, decay, **options)
    fastema.update(a, v, decay, **options)
    assert all(oracle.same_bits(library.host(x), y) for x, y in zip(on_device[0], a, strict=True))


@pytest.mark.parametrize(
    ("average", "value", "carry"),
    [
        ("f4", "f4", "f4"),
        ("f4", bfloat16, "f4"),
        ("f4", "f2", "f4"),
        (bfloat16, bfloat16, "i2"),
        (bfloat16, "f4", "i2"),
    ],
)
def test_carries_have_the_bits_of_the_cpu(library, rng, average, value, carry):
    a, v = rng.standard_normal(30_001).astype(average), rng.standard_normal(30_001).astype(value)
    c = np.zeros(30_001, carry)
    on_device = [library.device(x) for x in (a, v, c)]
    gpu = fastema.Pairs(on_device[0], on_device[1], carries=on_device[2])
    cpu = fastema.Pairs(a, v, carries=c)
    for decay in (0.999, 0.0, 0.9, 0.99999):
        gpu.update(decay)
        cpu.update(decay)
    assert oracle.same_bits(library.host(on_device[0]), a)
    assert library.host(on_device[2]).tobytes() == c.tobytes()


def test_several_averages_of_the_same_values_are_those_averages_one_by_one(library, rng):
    values = [rng.standard_normal(n).astype(np.float32) for n in (5, 100_003, 64)]
    lists = [[rng.standard_normal(v.size).astype(t) for v in values] for t in (np.float32, np.float64)]
    on_device = [[library.device(x) for x in one] for one in lists]
    fastema.Pairs.several(on_device, [library.device(x) for x in values]).update([0.9, 0.999])
    fastema.Pairs.several(lists, values).update([0.9, 0.999])
    for ours, theirs in zip(on_device, lists, strict=True):
        assert all(oracle.same_bits(library.host(x), y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float32, np.float64])
def test_swap_exchanges_every_bit(library, rng, dtype):
    sizes = [1, 7, 1023, 100_003]
    itemsize = np.dtype(dtype).itemsize
    a, b = ([np.frombuffer(rng.bytes(n * itemsize), dtype) for n in sizes] for _ in range(2))
    on_device = [library.device(x) for x in a], [library.device(x) for x in b]
    pairs = fastema.Pairs(*on_device)
    for left, right in ((b, a), (a, b)):
        pairs.swap()
        for ours, expected in zip(on_device, (left, right), strict=True):
            for x, y in zip(ours, expected, strict=True):
                assert library.host(x).tobytes() == y.tobytes()


def test_swaps_of_views_at_any_address(rng):
    library = Torch()
    for first, second in itertools.product((0, 1, 2, 3, 5), repeat=2):
        a, b = rng.standard_normal(2010).astype("f2"), rng.standard_normal(2010).astype("f2")
        x, y = library.device(a), library.device(b)
        fastema.swap(x[first : first + 2001], y[second : second + 2001])
        kept = a[first : first + 2001].copy()
        a[first : first + 2001] = b[second : second + 2001]
        b[second : second + 2001] = kept
        assert oracle.same_bits(library.host(x), a), (first, second)
        assert oracle.same_bits(library.host(y), b), (first, second)


# --- streams and graphs -------------------------------------------------------------------------------


def test_an_update_waits_for_what_the_current_stream_of_torch_does(torch):
    average, value = torch.zeros(1000, device="cuda"), torch.zeros(1000, device="cuda")
    pairs = fastema.Pairs(average, value)
    pairs.update(0.5)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: values change late
        value.fill_(3)
        pairs.update(0.5)
        average.add_(1)  # and what follows waits for the update
    stream.synchronize()
    assert (average == 2.5).all()


def test_an_update_waits_for_what_the_current_stream_of_cupy_does():
    cupy = CuPy().module
    average, value = cupy.zeros(1000), cupy.zeros(1000)
    pairs = fastema.Pairs(average, value)
    pairs.update(0.5)
    cupy.cuda.runtime.deviceSynchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(200):  # keeps the stream busy
            value += 1
        pairs.update(0.5)
        average += 1
    stream.synchronize()
    assert bool((average == 101).all())


def test_a_graph_of_torch_replays_with_the_decay_of_each_step(torch):
    average, value = torch.zeros(100_003, device="cuda"), torch.zeros(100_003, device="cuda")
    schedule = schedules.dynamic(0.99)
    counted = cuda.Schedule(schedule)
    pairs = fastema.Pairs([average], [value])
    pairs.update(counted)  # step 1: compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value.add_(1)
        pairs.update(counted, check=False)
    expected, seen = np.zeros(1, np.float32), np.zeros(1, np.float32)
    for step in range(2, 12):
        graph.replay()
        seen = seen + np.float32(1)
        expected = oracle.update(expected, seen, schedule(step))
        assert counted.step == step
        assert counted.decay == schedule(step)
    assert oracle.same_bits(average.cpu().numpy(), np.full(100_003, expected[0]))


def test_a_graph_of_cupy_replays_with_the_decay_of_each_step():
    cupy = CuPy().module
    average, value = cupy.zeros(5000), cupy.ones(5000)
    counted = cuda.Schedule(schedules.dynamic(0.99))
    pairs = fastema.Pairs([average], [value])
    pairs.update(counted)
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        pairs.update(counted, check=False)
        graph = stream.end_capture()
        for _ in range(5):
            graph.launch(stream)
    stream.synchronize()
    expected = np.zeros(1)
    for step in range(1, 7):
        expected = oracle.update(expected, np.ones(1), schedules.dynamic(0.99)(step))
    assert counted.step == 6
    assert oracle.same_bits(average.get(), np.full(5000, expected[0]))


def test_updates_that_are_made_and_dropped_at_once_leave_no_memory_behind(torch):
    average, value = torch.zeros(1000, device="cuda"), torch.ones(1000, device="cuda")
    fastema.update(average, value, 0.5)
    before = torch.cuda.memory_reserved()
    for _ in range(500):
        fastema.update([average, torch.zeros(10, device="cuda")], [value, value[:10]], 0.5)
    assert torch.cuda.memory_reserved() - before < 32 << 20


# --- torch --------------------------------------------------------------------------------------------


def test_autograd_sees_no_update(torch):
    weight = torch.nn.Parameter(torch.full((10,), 3.0, device="cuda"))
    average = torch.zeros(10, device="cuda")
    loss = (weight**2).sum()
    fastema.update(average, weight, 0.5)
    loss.backward()
    assert (weight.grad == 6).all()
    assert (average == 1.5).all()
    assert not average.requires_grad


def test_pairs_go_on_where_a_tensor_lies_now(torch):
    average, value = torch.zeros(1000, device="cuda"), torch.nn.Parameter(torch.ones(1000, device="cuda"))
    pairs = fastema.Pairs([average], [value])
    pairs.update(0.5)
    value.data = torch.full((1000,), 3.0, device="cuda")
    pairs.update(0.5)
    assert (average == 1.75).all()


def test_channels_last(torch):
    a, v = (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(2))
    average, value = a.cuda(), v.cuda()
    fastema.update(average, value, 0.9)
    fastema.update(a, v, 0.9)
    assert torch.equal(average.cpu(), a)


def test_arrays_on_two_sides_are_refused(torch):
    here, there = torch.zeros(3, device="cuda"), torch.zeros(3)
    with pytest.raises(TypeError, match="values must lie on cuda:0, where averages lies, got Tensor"):
        fastema.update(here, there, 0.5)
    with pytest.raises(TypeError, match=r"values must be an array whose CPU memory .* it lies on cuda:0"):
        fastema.update(there, here, 0.5)


def test_torch_and_cupy_in_one_pair(torch):
    cupy = CuPy().module
    average, value = torch.zeros(1000, device="cuda"), cupy.ones(1000, cupy.float32)
    fastema.update(average, value, 0.5)
    average.add_(1)
    fastema.swap(average, value)
    assert (average == 1).all()
    assert bool((value == 1.5).all())


def test_kerass_torch_backend_averages_and_swaps_on_the_device(torch):
    pytest.importorskip("keras", reason="keras is not installed")
    from fastema.keras.backends.torch import Torch as Backend

    average, value = torch.zeros(3, device="cuda"), torch.nn.Parameter(torch.ones(3, device="cuda"))
    engine = Backend()
    assert engine.update([average], [value], lambda: 0.5, None, "auto") == "cuda"
    engine.swap([average], [value])
    assert (value == 0.5).all()
    assert (average == 1).all()


def test_values_of_jax(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes three quarters of the device
    jax = pytest.importorskip("jax", reason="jax is not installed")
    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("jax has no CUDA here")
    cupy = CuPy().module
    for dtype in ("float32", "bfloat16"):
        average = cupy.zeros(1000, cupy.float32)
        fastema.update(average, jax.numpy.full(1000, 3, dtype), 0.5)
        assert bool((average == 1.5).all())


# --- fastema.EMA ----------------------------------------------------------------------------------------


def twins_of(library, rng, **arguments):
    """Return the same weights on both sides, each with its averages."""
    here = {
        "kernel": rng.standard_normal((400, 301)).astype(np.float32),
        "half": rng.standard_normal(70_001).astype(np.float16),
        "brain": rng.standard_normal((7, 1100)).astype(bfloat16),
        "double": rng.standard_normal(1000),
        "count": np.arange(3),
        "mask": rng.integers(0, 2, 5).astype(bool),
    }
    there = {name: library.device(x) for name, x in here.items()}
    device = arguments.pop("device", None)
    return here, there, fastema.EMA(here, **arguments), fastema.EMA(there, **arguments, device=device)


WAYS = [
    {"decay": 0.9},
    {"decay": [0.9, 0.99], "initial": "zeros", "every": 2},
    {"decay": 0.999, "device": "cpu"},
    {"decay": [0.9, 0.99], "initial": "zeros", "device": "cpu"},
]


@pytest.mark.parametrize("arguments", WAYS, ids=["plain", "zeros", "host", "host from zeros"])
def test_averages_and_swaps_of_an_ema_have_the_bits_of_the_cpu(library, rng, arguments):
    here, there, cpu, gpu = twins_of(library, rng, **arguments)
    raw = {name: library.host(x).copy() for name, x in there.items()}
    for _ in range(4):
        cpu.update()
        gpu.update()
        for name, x in here.items():
            with cpu.swapped():
                expected = x.copy()
            with gpu.swapped():
                assert library.host(there[name]).tobytes() == expected.tobytes(), name
            assert library.host(there[name]).tobytes() == raw[name].tobytes(), name
        ours, theirs = gpu.state_dict(), cpu.state_dict()
        for key in ("averages", "copied"):
            one, other = ((x if isinstance(x, list) else [x]) for x in (ours[key], theirs[key]))
            for left, right in zip(one, other, strict=True):
                for name, x in right.items():
                    found = left[name]  # of torch's weights a tensor
                    found = found if isinstance(found, np.ndarray) else library.host(found)
                    assert found.tobytes() == x.tobytes(), name
        fresh = [x * 2 if x.dtype.kind == "f" else x for x in here.values()]
        for (name, x), new in zip(here.items(), fresh, strict=True):
            x[...] = new
            raw[name] = x.copy()
            library.overwrite(there[name], x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_16_bit_ema_rounds_stochastically_with_the_bits_of_the_cpu(torch, rng, dtype):
    here = [torch.from_numpy(rng.standard_normal(n)).to(getattr(torch, dtype)) for n in (5, 100_003)]
    there = [x.cuda() for x in here]
    arguments = {"dtype": dtype, "rounding": "stochastic", "seed": 5}
    cpu, gpu = fastema.EMA(here, 0.99, **arguments), fastema.EMA(there, 0.99, **arguments)
    for _ in range(5):
        for weights in (here, there):
            for weight in weights:
                weight.add_(1)
        cpu.update()
        gpu.update()
    for ours, theirs in zip(gpu.averages, cpu.averages, strict=True):
        assert torch.equal(ours.cpu().view(torch.int16), theirs.view(torch.int16))


def test_a_modules_ema_beside_training_by_a_graph(torch):
    """An update between two replays sees the step before it, and changes nothing of the graph."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    batch, wanted = torch.randn(32, 64, device="cuda"), torch.randn(32, 8, device="cuda")

    def step():
        optimizer.zero_grad(set_to_none=False)
        ((model(batch) - wanted) ** 2).mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    ema = fastema.EMA(model, 0.9)
    expected = {name: x.detach().cpu().numpy().copy() for name, x in model.named_parameters()}
    for _ in range(5):
        graph.replay()
        ema.update()
        raw = {name: x.detach().cpu().numpy() for name, x in model.named_parameters()}
        with ema.swapped():
            model(batch)
        for name, x in model.named_parameters():
            assert oracle.same_bits(x.detach().cpu().numpy(), raw[name])
            expected[name] = oracle.update(expected[name], raw[name], 0.9)
            assert oracle.same_bits(ema.averages[name].cpu().numpy(), expected[name])


@pytest.mark.parametrize("fence", [True, False])
def test_no_weight_of_an_ema_in_host_memory_changes_before_it_was_copied(torch, monkeypatch, fence):
    monkeypatch.setattr(_offload, "SLOT", 1 << 20)
    weight = torch.zeros(8_000_000, device="cuda")
    ema = fastema.EMA(weight, 0.0, device="cpu")
    for step in range(1, 5):
        weight.fill_(step)
        ema.update(fence=fence)
        if not fence:
            ema.fence()
        weight.fill_(-1)
        assert (ema.averages == step).all()


def test_a_thread_that_never_asked_for_anything_updates(torch):
    """It has no context of CUDA's yet, and a launch needs one."""
    average, value = torch.zeros(1000, device="cuda"), torch.ones(1000, device="cuda")
    pairs = fastema.Pairs(average, value)
    pairs.update(0.5)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pairs.update, 0.5).result()
    torch.cuda.synchronize()
    assert (average == 0.75).all()


def test_threads_that_share_pairs_keep_their_decays(torch):
    average, value = torch.zeros(1000, device="cuda"), torch.ones(1000, device="cuda")
    pairs = fastema.Pairs(average, value)
    pairs.update(1.0)
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(pairs.update, 1.0 if i else 0.0) for i in range(200)]:
            done.result()
    torch.cuda.synchronize()
    assert (average == 1).all()


# --- averages in host memory --------------------------------------------------------------------------


def test_averages_in_host_memory_have_the_bits_of_the_cpu(rng, monkeypatch):
    monkeypatch.setattr(_offload, "SLOT", 1 << 20)
    library = Torch()
    averages = [rng.standard_normal(n).astype(np.float32) for n in (5, 3_000_001, 1000)]
    values = [rng.standard_normal(n).astype(bfloat16) for n in (5, 3_000_001, 1000)]
    expected = [a.copy() for a in averages]
    on_device = [library.device(v) for v in values]
    offload = cuda.Offload(averages, on_device)
    for decay in (0.9, 0.99, 0.999):
        offload.update(decay)
        fastema.update(expected, values, decay)
    offload.wait()
    assert all(oracle.same_bits(a, e) for a, e in zip(averages, expected, strict=True))


def test_values_may_change_after_a_fence(torch, monkeypatch):
    monkeypatch.setattr(_offload, "SLOT", 1 << 20)
    average, value = np.zeros(8_000_000, np.float32), torch.ones(8_000_000, device="cuda")
    offload = cuda.Offload(average, value)
    for _ in range(3):
        offload.update(0.0)
        offload.fence()
        value.add_(1)
        offload.wait()
        assert (average == value[0].item() - 1).all()
