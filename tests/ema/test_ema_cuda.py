"""fastema.EMA of weights on a CUDA device: what it does in host memory, to the bit. On a fake device.

Tensors of torch that say they lie on a device, and arrays as CuPy has them. What torch and CuPy do on a real
one is left to test_gpu.py.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest

import fake_cuda
import fastema
import oracle
from fake_cuda import Array
from fastema import _arrays
from fastema.cuda import _offload
from twins import METHODS as SHARED
from twins import WAYS, Twins, assert_equal, hosted, weights_of

bfloat16 = ml_dtypes.bfloat16
CUPY, TORCH = 2, 1  # the handles of their streams


@pytest.fixture(autouse=True)
def fake():
    fake_cuda.kernels()
    with fake_cuda.installed() as driver:
        yield driver


class OfCuPy:
    """Arrays as CuPy has them."""

    stream = CUPY

    def device(self, host, device=0):
        return Array(host, device)

    def host(self, array):
        return array.host if isinstance(array, Array) else np.asarray(array)


class OfTorch:
    """Tensors of torch."""

    stream = TORCH

    def __init__(self):
        self.torch = pytest.importorskip("torch", reason="torch is not installed")

    def device(self, host, device=0):
        if host.dtype == bfloat16:
            return fake_cuda.tensor(
                self.torch.from_numpy(host.view(np.int16)).view(self.torch.bfloat16), device
            )
        return fake_cuda.tensor(self.torch.from_numpy(host), device)

    def host(self, array):
        if isinstance(array, np.ndarray):
            return array
        array = array.detach().as_subclass(self.torch.Tensor)
        if array.dtype == self.torch.bfloat16:
            return array.view(self.torch.int16).numpy().view(bfloat16)
        return array.numpy()


@pytest.fixture(params=[OfCuPy, OfTorch], ids=["CuPy", "torch"])
def library(request):
    return request.param()


OFFLOADED = {"device": "cpu"}


@pytest.fixture(params=[None, OFFLOADED], ids=["device", "host"])
def beside(request):
    return request.param


@pytest.mark.parametrize("way", WAYS)
def test_averages_and_swaps_have_the_bits_of_the_cpu(library, rng, way, beside):
    Twins(library, rng, **WAYS[way], beside=beside).check_steps_and_swaps()


MANY = "more snapshots than one launch updates"
METHODS = {**SHARED, MANY: {"of": fastema.Window, "size": 10}}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_have_the_bits_of_the_cpu(library, rng, method, beside):
    Twins(library, rng, **METHODS[method], beside=beside).check_steps_and_reset()


@pytest.mark.parametrize(
    ("dtype", "rounding", "beside"),
    [
        (np.float16, "nearest", None),
        (np.float16, "nearest", OFFLOADED),
        (np.float16, "stochastic", None),
        (bfloat16, "nearest", OFFLOADED),
        (bfloat16, "stochastic", None),
        (bfloat16, "compensated", None),
        (bfloat16, "compensated", OFFLOADED),
    ],
)
def test_averages_of_16_bits(library, rng, dtype, rounding, beside):
    weights = {name: rng.standard_normal(n).astype(dtype) for name, n in (("a", 3000), ("b", 5))}
    arguments = {"dtype": dtype, "rounding": rounding, "seed": 3, "decay": 0.99}
    twins = Twins(library, rng, weights=weights, beside=beside, **arguments)
    for _ in range(4):
        twins.step()
    twins.check()
    with twins.gpu.swapped(), twins.cpu.swapped():
        twins.check()
    twins.check()


def test_float32_averages_with_carries(library, rng, beside):
    weights = {name: rng.standard_normal(70).astype(t) for name, t in (("a", "f4"), ("b", bfloat16))}
    twins = Twins(library, rng, weights=weights, beside=beside, decay=[0.9, 0.9999], rounding="compensated")
    for _ in range(4):
        twins.step()
    twins.check()


# --- where and how ------------------------------------------------------------------------------------


def test_averages_lie_beside_the_weights_and_an_update_is_one_launch(fake, library, rng):
    twins = Twins(library, rng, weights={"a": rng.standard_normal(10), "b": rng.standard_normal((3, 4))})
    assert all(_arrays.device(average) == 0 for average in twins.gpu.averages.values())
    twins.step()
    fake.log.clear()
    twins.gpu.update()
    ((name, stream, _),) = fake.log
    assert (name[:15], stream) == ("fastema::update", library.stream)


def test_where_types_are_alike_contents_are_exchanged_in_place_by_one_launch(fake, library, rng):
    twins = Twins(library, rng, weights={"a": rng.standard_normal(10), "b": rng.standard_normal((3, 4))})
    twins.step()
    before = [_arrays.describe(x).address for x in twins.gpu.averages.values()]
    fake.log.clear()
    twins.gpu.swap()
    asked = [name for name, *_ in fake.log]
    assert asked.count("fastema::swap") == 1
    assert set(asked) <= {"fastema::swap", "write", "free"}  # of its table; no contents are copied
    weights = [_arrays.describe(x).address for x in twins.there.values()]
    assert [_arrays.describe(x).address for x in twins.gpu.averages.values()] == weights
    twins.gpu.swap()
    assert [_arrays.describe(x).address for x in twins.gpu.averages.values()] == before


def test_weights_on_several_devices_and_in_host_memory(library, rng):
    """Each device has a launch of its own; which weight lies where changes no bit."""
    shapes = {"first": (40, 3), "second": (1000,), "host": (7,), "last": (5, 5), "count": ()}
    here = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    here["count"] = np.array(1)
    memory = {name: x.copy() for name, x in here.items()}
    place = {"first": 1, "second": 0, "last": 1, "count": 0}
    there = {name: library.device(x, place[name]) if name in place else x for name, x in memory.items()}
    cpu, gpu = fastema.EMA(here, [0.5, 0.9]), fastema.EMA(there, [0.5, 0.9])
    for step in range(3):
        for name in here:
            here[name] += step
            memory[name] += step
        cpu.update()
        gpu.update()
        for k in range(2):
            with cpu.swapped(k), gpu.swapped(k):
                assert_equal(library, there, here)
            assert_equal(library, gpu.averages_of(k), cpu.averages_of(k))
        assert_equal(library, there, here)
    found = {name: _arrays.device(_arrays.local_array(x, name)) for name, x in gpu.averages.items()}
    assert found == {**place, "host": None}


def test_weights_that_share_memory_are_averaged_once(library, rng):
    shared = library.device(rng.standard_normal(5))
    ema = fastema.EMA([shared, shared], 0.5)
    first, second = ema.averages
    assert _arrays.describe(first).address == _arrays.describe(second).address


# --- states and files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_a_state_goes_on_wherever_the_weights_lie(library, rng, beside, swapped):
    arguments = {"decay": [0.9, 0.99], "initial": "zeros", "beside": beside}
    twins, other = (Twins(library, rng, **arguments) for _ in range(2))
    twins.check_states_go_to(other, swapped=swapped)


def test_a_state_is_a_copy(library, rng, beside):
    twins = Twins(library, rng, decay=0.5, beside=beside)
    twins.step()
    before = twins.gpu.state_dict()
    kept = {name: hosted(library, x).copy() for name, x in before["averages"][0].items()}
    twins.step()
    assert_equal(library, before["averages"][0], kept)


@pytest.mark.parametrize(("swapped", "initial"), [*itertools.product([False, True], ["values", "zeros"])])
def test_a_file_goes_on_wherever_the_weights_lie(library, tmp_path, beside, swapped, initial):
    rng = np.random.default_rng(0)
    twins = Twins(library, rng, decay=0.9, initial=initial, beside=beside)
    twins.step()
    if swapped:
        twins.cpu.swap()
        twins.gpu.swap()
    twins.gpu.save(tmp_path / "device")
    twins.cpu.save(tmp_path / "host")
    assert (tmp_path / "device").read_bytes() == (tmp_path / "host").read_bytes()
    other = Twins(library, rng)
    other.gpu = fastema.EMA.load(tmp_path / "host", other.there, **(beside or {}))
    other.cpu = fastema.EMA.load(tmp_path / "device", other.here)
    if swapped:
        other.gpu.swap()
        other.cpu.swap()
    other.step()
    other.check()


def test_averages_are_copied_to_weights_elsewhere(library, rng, beside):
    twins = Twins(library, rng, decay=0.5, beside=beside)
    twins.step()
    expected = {name: np.zeros_like(x) for name, x in twins.here.items()}
    twins.cpu.copy_to(expected)
    on_host = {name: np.zeros_like(x) for name, x in twins.here.items()}
    twins.gpu.copy_to(on_host)
    assert_equal(None, on_host, expected)
    on_device = {name: library.device(np.zeros_like(x)) for name, x in twins.here.items()}
    for ema in (twins.gpu, twins.cpu):
        ema.copy_to(on_device)
        assert_equal(library, on_device, expected)


# --- what is refused ----------------------------------------------------------------------------------


def test_arrays_with_holes_are_refused_by_name(library, rng, beside):
    for dtype in (np.float32, np.int32, bool)[: 3 if library.stream == CUPY else 2]:
        values = {"fine": rng.standard_normal(4), "holes": library.device(np.zeros((4, 6), dtype)[:, ::2])}
        with pytest.raises(ValueError, match="values"):
            fastema.EMA(values, **(beside or {}))


def test_the_stride_of_an_axis_of_one_is_nobodys(library, beside):
    """Rows of larger arrays have any, and are dense."""
    memory = np.ones(5)
    weight = library.device(np.lib.stride_tricks.as_strided(memory, (1, 5), (4000, 8)))
    ema = fastema.EMA([weight], 0.5, initial="zeros", **(beside or {}))
    memory += 2
    ema.update()
    with ema.swapped():
        assert (memory == 3).all()
    memory += 1
    ema.copy_to()
    assert (memory == 3).all()


def test_read_only_arrays_are_averaged_and_not_swapped(rng):
    weight = rng.standard_normal(5)
    weight.flags.writeable = False
    ema = fastema.EMA({"w": Array(weight)}, 0.5)
    ema.update()
    with pytest.raises(ValueError, match=r"swap\(\) must change values\['w'\], which is read-only"):
        ema.swap()


def test_a_swap_that_one_device_refuses_is_taken_back_on_the_others(library, rng):
    """Two weights that overlap cannot be exchanged with two averages."""
    first, memory = library.device(rng.standard_normal(5)), rng.standard_normal(8)
    overlapping = [library.device(memory[:5], 1), library.device(memory[3:], 1)]
    ema = fastema.EMA([first, *overlapping], 0.5)
    before = library.host(first).copy(), memory.copy()
    ema.update()
    library.host(first)[:] += 1
    with pytest.raises(ValueError, match=r"values\['1'\] and values\['2'\] must not overlap"):
        ema.swap()
    assert not ema.is_swapped
    assert oracle.same_bits(library.host(first), before[0] + 1)
    assert oracle.same_bits(memory, before[1])


def test_a_tensor_that_moved_on_its_device_is_followed_and_a_buffer_is_too():
    library = OfTorch()
    torch = library.torch
    value, buffer = fake_cuda.tensor(torch.ones(4)), fake_cuda.tensor(torch.ones(4, dtype=torch.int32))
    ema = fastema.EMA([value, buffer], 0.5)
    value.data = fake_cuda.tensor(torch.full((4,), 3.0))
    ema.update()
    assert (library.host(ema.averages[0]) == 2).all()
    buffer.data = fake_cuda.tensor(torch.full((4,), 7, dtype=torch.int32))
    ema.update()
    assert (library.host(ema.averages[1]) == 7).all()
    buffer.data = torch.ones(4, dtype=torch.int32)
    value.data = fake_cuda.tensor(torch.ones(5))
    ema = fastema.EMA([value], 0.5)
    value.data = fake_cuda.tensor(torch.ones(6))
    with pytest.raises(
        ValueError, match=r"averages\['0'\] and values\['0'\] must have one size, got 5 and 6"
    ):
        ema.update()
    assert ema.step == 0


def test_nothing_moves_where_one_device_refuses():
    torch = OfTorch().torch
    first, second = fake_cuda.tensor(torch.ones(4), 0), fake_cuda.tensor(torch.ones(4), 1)
    ema = fastema.EMA([first, second, host := np.ones(4)], 0.5)
    host += 1
    first.add_(1)
    second.data = fake_cuda.tensor(torch.ones(5), 1)
    with pytest.raises(ValueError, match=r"values\['1'\] must have one size"):
        ema.update()
    assert all(
        (np.asarray(average) == 1).all()
        for average in (ema._parts.averages.by_decay[0][i][0] for i in (2, 0))
    )


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("non_finite", ["raise", "skip"])
def test_values_on_a_device_are_not_looked_at_which_is_an_error(library, device, non_finite):
    weight = np.ones(3)
    ema = fastema.EMA(library.device(weight), 0.5, device=device, every=2)
    weight += np.nan
    with pytest.raises(
        ValueError, match="non_finite must be 'average' where values lie on a CUDA device, got"
    ):
        ema.update(non_finite=non_finite)
    assert ema.step == 0
    pairs = fastema.Pairs([library.device(np.zeros(3))], [library.device(weight)])
    with pytest.raises(ValueError, match="pairs must lie in host memory"):
        pairs.first_non_finite()


# --- averages in host memory --------------------------------------------------------------------------


def test_averages_in_host_memory_are_shown_there(library, rng, tmp_path):
    weights = {name: library.device(x) for name, x in weights_of(rng).items()}
    ema = fastema.EMA(weights, 0.5, device="cpu", memory=tmp_path / "averages")
    for name, average in ema.averages.items():
        assert isinstance(_arrays.local_array(average, name), np.ndarray)
    assert (tmp_path / "averages").stat().st_size > 4000
    with pytest.raises(ValueError, match="memory must be None where values lie on a CUDA device"):
        fastema.EMA(weights, 0.5, memory=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_stochastic_rounding_beside_a_device_is_refused(library, rng):
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'compensated' where device is 'cpu'"):
        fastema.EMA(library.device(rng.standard_normal(3)), rounding="stochastic", device="cpu")


@pytest.mark.parametrize("fence", ["default", "called", "none"])
def test_no_weight_changes_before_it_was_copied(fake, monkeypatch, fence):
    """Whatever the device is asked for after an update."""
    monkeypatch.setattr(_offload, "SLOT", 1024)
    weight = np.ones(1000)
    ema = fastema.EMA(Array(weight), 0.5, device="cpu")
    weight += 2
    fake.lazy = {100}  # the stream of the copies, which are as late as the events allow

    def optimizer():
        fake.enqueue(fake.current["cupy"], "optimizer", lambda: weight.fill(9))

    if fence == "none":
        with fake.held():
            ema.update(fence=False)
            optimizer()
    else:
        ema.update(fence=fence == "default")
        if fence == "called":
            ema.fence()
        optimizer()
    assert (ema.averages == (5 if fence == "none" else 2)).all()


def test_an_update_returns_before_averages_in_host_memory_have_moved(fake):
    ema = fastema.EMA(Array(np.ones(1000)), 0.5, initial="zeros", start_step=0, device="cpu")
    ema.update()
    with fake.held():
        ema.update(fence=False)
        assert (ema._parts.averages.by_decay[0][0][0] == 0.5).all()
    ema.wait()
    assert (ema._parts.averages.by_decay[0][0][0] == 0.75).all()


@pytest.mark.parametrize("call", ["update", "wait", "swap", "state_dict", "fence"])
def test_what_goes_wrong_beside_the_device_comes_up_at_the_next_call(fake, call):
    ema = fastema.EMA(Array(np.ones(10)), 0.5, device="cpu")
    with fake.held():
        ema.update(fence=False)
        fake.broken = "read"
    while not ema._parts.passes._stable.offloads[0]._job.done():
        pass
    fake.broken = None
    with pytest.raises(RuntimeError, match="averages in host memory failed: the device is on fire"):
        getattr(ema, call)()
    ema.update()
    assert (ema.averages == 1).all()


# --- torch --------------------------------------------------------------------------------------------


@pytest.fixture
def module():
    """A module of torch whose parameters and buffers say they lie on a device."""
    torch = OfTorch().torch
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2).bfloat16()
    )
    for part in module:
        for name, parameter in part._parameters.items():
            part._parameters[name] = torch.nn.Parameter(fake_cuda.tensor(parameter.detach()))
        for name, buffer in part._buffers.items():
            part._buffers[name] = fake_cuda.tensor(buffer)
    return module


def test_a_module_on_a_device(module, beside):
    torch = OfTorch().torch
    ema = fastema.EMA(module, 0.5, **(beside or {}))
    before = {name: x.detach().clone() for name, x in module.state_dict().items()}
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(2)
    raw = {name: x.detach().clone() for name, x in module.state_dict().items()}
    ema.update()
    with ema.swapped():
        for name, tensor in module.state_dict().items():
            buffer = "running" in name or "num_batches" in name
            if not buffer:
                average = before[name].float()
                average += 0.5 * (raw[name].float() - average)
            expected = raw[name] if buffer else average.to(tensor.dtype)
            assert torch.equal(tensor, expected), name
        assert all(parameter.requires_grad for parameter in module.parameters())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, raw[name])
    assert ema.averages["2.weight"].dtype == torch.float32
    assert not ema.averages["2.weight"].requires_grad


def test_a_backward_pass_through_weights_that_were_swapped_is_an_error(module, beside):
    torch = OfTorch().torch
    ema = fastema.EMA(module, 0.5, **(beside or {}))
    loss = module[0](fake_cuda.tensor(torch.ones(3, 4, requires_grad=True))).sum()
    ema.swap()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def keras_engine(monkeypatch):
    """The engine of the Keras wrapper on torch, as if CuPy were installed."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("keras", reason="keras is not installed")
    from fastema.keras.backends import torch as backend

    monkeypatch.setattr(backend, "_has_cupy", lambda: True)
    return backend.Torch()


@pytest.mark.parametrize("engine", ["auto", "native", "graph"])
def test_kerass_wrapper_on_torch_has_the_bits_of_the_cpu_on_a_device(fake, keras_engine, rng, engine):
    library = OfTorch()
    twins = [{name: x.astype(t) for name, x in weights_of(rng).items() if x.size} for t in ("f4", "f4")]
    averages, values = (list(twin.values()) for twin in twins)
    on_device = [[library.device(x.copy(order="K")) for x in side] for side in (averages, values)]
    for decay in (0.9, 0.99):
        carrier = keras_engine.update(*on_device, lambda decay=decay: decay, None, engine)
        assert carrier == ("graph" if engine == "graph" else "cuda")
        fastema.update(averages, values, decay)
    for ours, theirs in zip(on_device[0], averages, strict=True):
        assert oracle.same_bits(library.host(ours), theirs)
    keras_engine.swap(*on_device)
    for ours, theirs in zip(on_device[1], averages, strict=True):
        assert oracle.same_bits(library.host(ours), theirs)
    assert any(name == "fastema::swap" for name, *_ in fake.log)


def test_kerass_wrapper_on_torch_pairs_once_until_a_tensor_moves(keras_engine):
    torch = OfTorch().torch
    average, value = fake_cuda.tensor(torch.zeros(3)), fake_cuda.tensor(torch.ones(3))
    keras_engine.update([average], [value], lambda: 0.5, None, "auto")
    first = keras_engine._pairs
    keras_engine.update([average], [value], lambda: 0.5, None, "auto")
    assert keras_engine._pairs is first
    value.data = fake_cuda.tensor(torch.full((3,), 3.0))
    keras_engine.update([average], [value], lambda: 0.5, None, "auto")
    assert (OfTorch().host(average) == 1.875).all()
