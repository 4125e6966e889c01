"""fastema.EMA of torch's tensors on a device without kernels of ours: what the CPU does, to the bit.

Tensors in CPU memory that are taken for such (tests/support/other_devices.py), and a device that torch knows
as one (tests/support/foreign_device.py). Where a device departs from IEEE 754, none of these tests shows it.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest

import fastema
import mixes
import oracle
from other_devices import cpu_is_elsewhere
from processes import output_of
from twins import METHODS, WAYS, Twins, assert_equal

bfloat16 = ml_dtypes.bfloat16
pytest.importorskip("torch", reason="torch is not installed")

from fastema._arrays import foreach  # noqa: E402 - of torch
from fastema._arrays.torch import array_of, tensor_of  # noqa: E402


@pytest.fixture(autouse=True)
def elsewhere():
    with cpu_is_elsewhere():
        yield


class Library:
    """Tensors, and what is in them."""

    @staticmethod
    def device(host):
        return tensor_of(host)

    @staticmethod
    def host(tensor):
        return array_of(tensor.detach())


@pytest.fixture(params=[None, 4096], ids=["at once", "in pieces"])
def bound(request, monkeypatch):
    """Bound temporaries, so that batches are cut and tensors too."""
    if request.param:
        monkeypatch.setattr(foreach, "TEMPORARIES", request.param)


def twins_of(rng, **arguments):
    twins = Twins(Library, rng, **arguments)
    assert (twins.cpu.engine, twins.gpu.engine) == ("native", "torch")
    return twins


# --- the same bits ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bound")
@pytest.mark.parametrize("way", WAYS)
def test_averages_and_swaps_have_the_bits_of_the_cpu(rng, way):
    twins_of(rng, **WAYS[way]).check_steps_and_swaps()


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_have_the_bits_of_the_cpu(rng, method):
    twins_of(rng, **METHODS[method]).check_steps_and_reset()


@pytest.mark.usefixtures("bound")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
@pytest.mark.parametrize("of", [None, np.float32])
def test_averages_of_16_bits(rng, of, dtype, rounding):
    if dtype == np.float16 and rounding == "compensated":
        pytest.skip("no float16 average has a carry")
    weights = {name: rng.standard_normal(n).astype(of or dtype) for name, n in (("a", (30, 99)), ("b", 5))}
    weights["fortran"] = np.asfortranarray(weights["a"][:7] + 1)
    decays = [0.99, 0.0, 0.5]
    twins = twins_of(rng, weights=weights, dtype=dtype, rounding=rounding, seed=3, decay=decays)
    for _ in range(4):
        twins.step()
        twins.check()
    with twins.gpu.swapped(2), twins.cpu.swapped(2):
        twins.check()
    twins.check()


@pytest.mark.usefixtures("bound")
def test_float32_averages_with_carries(rng):
    weights = {name: rng.standard_normal(700).astype(t) for name, t in (("a", "f4"), ("b", bfloat16))}
    twins = twins_of(rng, weights=weights, decay=[0.9, 0.9999, 0.0], rounding="compensated")
    for _ in range(4):
        twins.step()
        twins.check()


@pytest.mark.usefixtures("bound")
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize(("average", "value"), mixes.MIXES)
def test_every_mix_has_numpys_bits(rng, average, value, decay):
    sizes = (7, 3000, 0, 1)
    averages = [mixes.of_many_magnitudes(rng, n, average) for n in sizes]
    values = [mixes.of_many_magnitudes(rng, n, value) for n in sizes]
    for special in (np.nan, np.inf, -np.inf, -0.0):
        values[1][rng.integers(0, 3000, 9)] = special
        averages[1][rng.integers(0, 3000, 9)] = special
    tensors = [tensor_of(x.copy()) for x in averages]
    fastema.update(tensors, [*map(tensor_of, values)], decay)
    for tensor, old, new in zip(tensors, averages, values, strict=True):
        assert oracle.same_bits(array_of(tensor), oracle.update(old, new, decay))


@pytest.mark.usefixtures("bound")
@pytest.mark.parametrize("value", [None, np.float32])
@pytest.mark.parametrize("average", [np.float16, bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_random_bits_are_those_of_the_core(rng, average, value, decay):
    sizes = (7, 3000, 0, 1)
    averages = [mixes.of_many_magnitudes(rng, n, average) for n in sizes]
    values = [mixes.of_many_magnitudes(rng, n, value or average) for n in sizes]
    values[1][:3] = np.nan, np.inf, -np.inf
    tensors = [tensor_of(x.copy()) for x in averages]
    arguments = {"rounding": "stochastic", "seed": 2**64 - 1, "step": 2**33 + 5}
    fastema.update(averages, values, decay, **arguments)
    fastema.update(tensors, [*map(tensor_of, values)], decay, **arguments)
    for tensor, needed in zip(tensors, averages, strict=True):
        assert oracle.same_bits(array_of(tensor), needed)


@pytest.mark.parametrize("first", [2**31 - 2, 2**32, 3 * 2**32 + 2**31])
def test_random_bits_of_an_element_go_by_its_place_in_a_huge_array(first):
    import torch

    part, average = foreach._Part(2, first, 1000, False), torch.zeros(1000, dtype=torch.bfloat16)
    with foreach.working():
        recorder = foreach.Recorder(average, 1000)
        random = foreach._random_bits(recorder, foreach._Batch([part], [average], [], []), 5, 9)
        foreach.run(recorder.calls)
    needed = oracle.random_bits(1000, 5, 9, 2, first)
    np.testing.assert_array_equal(random.tensor.numpy().view(np.uint32), needed)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float64"])
def test_complex_values_are_averaged_by_their_parts(rng, dtype):
    weights = {
        "a": (rng.standard_normal(6) + 1j * rng.standard_normal(6)).astype(np.complex64),
        "b": np.asfortranarray(rng.standard_normal((3, 4)) + 1j),
    }
    if dtype == "bfloat16":
        del weights["b"]
    memory = {name: x.copy(order="K") for name, x in weights.items()}
    cpu = fastema.EMA(weights, 0.75, dtype=dtype)
    other = fastema.EMA({name: tensor_of(x) for name, x in memory.items()}, 0.75, dtype=dtype)
    assert other.engine == "torch"
    for step in range(3):
        for name in weights:
            weights[name] += step * 1j
            memory[name] += step * 1j
        cpu.update()
        other.update()
        assert_equal(Library, other.averages, cpu.averages)
        with cpu.swapped(), other.swapped():
            assert_equal(None, memory, weights)
        assert_equal(None, memory, weights)


# --- where and how ------------------------------------------------------------------------------------


def asked_of_torch(act):
    """Return the names of torch's operations that a call asks for, and the bytes that it allocates."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    names, allocated = [], []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if "empty" in name:
                allocated.append(made.nbytes)
            elif not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
                names.append(name)
            return made

    with Record():
        act()
    views = {"as_strided", "view", "slice", "detach", "alias", "permute", "split", "view_as_real"}
    return [name for name in names if name not in views], allocated


SETTINGS = {
    "plain": {},
    "several": {"decay": [0.9, 0.99]},
    "from bfloat16": {"of": bfloat16},
    "16 bits": {"of": bfloat16, "dtype": "bfloat16"},
    "stochastic": {"of": np.float16, "dtype": "float16", "rounding": "stochastic"},
    "compensated": {"rounding": "compensated"},
    "16 bits compensated": {"of": bfloat16, "dtype": "bfloat16", "rounding": "compensated"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_call_asks_for_as_many_operations_however_many_tensors_there_are(rng, setting):
    def counted(length):
        arguments = dict(SETTINGS[setting])
        kind = arguments.pop("of", np.float32)
        weights = [tensor_of(rng.standard_normal((3, 5)).astype(kind)) for _ in range(length)]
        ema = fastema.EMA(weights, **arguments)
        return [asked_of_torch(act)[0] for act in (ema.update, ema.swap)]

    few, many = counted(2), counted(40)
    assert few[0] == many[0]
    assert 0 < len(few[0]) < 80
    if setting in ("plain", "several"):  # others are put aside one by one
        assert few[1] == many[1]
    if setting == "plain":
        assert few[0] == ["_foreach_copy_", "_foreach_sub_", "mul_", "_foreach_add_"]
        assert few[1] == ["_foreach_copy_"] * 3


@pytest.mark.parametrize("setting", SETTINGS)
def test_temporaries_are_bounded(rng, setting, monkeypatch):
    monkeypatch.setattr(foreach, "TEMPORARIES", 8192)
    arguments = dict(SETTINGS[setting])
    kind = arguments.pop("of", np.float32)
    weights = [tensor_of(rng.standard_normal((3, 50)).astype(kind)) for _ in range(40)]
    weights.append(tensor_of(np.asfortranarray(rng.standard_normal((99, 77)).astype(kind))))
    pairs = fastema.EMA(weights, **arguments)._parts.passes._stable.pairs[0]
    decay = 0.5 if "decay" not in arguments else [0.5, 0.25]
    rounding = {"rounding": "stochastic"} if setting == "stochastic" else {}
    _, allocated = asked_of_torch(lambda: pairs.update(decay, **rounding))
    assert 1024 < sum(allocated) <= 8192
    if setting == "plain":
        assert sum(asked_of_torch(pairs.swap)[1]) <= 8192


def test_weights_elsewhere_and_in_host_memory(rng):
    """Each place has what moves its averages; which weight lies where changes no bit."""
    here = {name: rng.standard_normal(shape) for name, shape in (("a", (4, 3)), ("b", 7), ("c", (5, 5)))}
    memory = {name: x.copy() for name, x in here.items()}
    there = {name: tensor_of(x) for name, x in memory.items()}
    with cpu_is_elsewhere(lambda tensor: tensor.dim() == 2):
        cpu, other = fastema.EMA(here, [0.5, 0.9]), fastema.EMA(there, [0.5, 0.9])
        assert other.engine == "torch"
        assert len(other._parts.passes._stable.pairs) == 2
        for step in range(3):
            for name in here:
                here[name] += step
                memory[name] += step
            cpu.update()
            other.update()
            for k in range(2):
                with cpu.swapped(k), other.swapped(k):
                    assert_equal(None, memory, here)
                assert_equal(Library, other.averages_of(k), cpu.averages_of(k))
            assert_equal(None, memory, here)


def test_the_engine_is_native_in_host_memory(rng):
    assert fastema.EMA([rng.standard_normal(3)]).engine == "native"
    with cpu_is_elsewhere(lambda _: False):
        assert fastema.EMA([tensor_of(rng.standard_normal(3))]).engine == "native"


def test_a_tensor_that_was_given_other_memory_is_followed(torch):
    weight = torch.nn.Parameter(torch.zeros(3))
    ema = fastema.EMA([weight], 0.5)
    weight.data = torch.ones(3)
    ema.update()
    assert ema.averages[0].tolist() == [0.5] * 3
    with ema.swapped():
        assert weight.tolist() == [0.5] * 3
    assert weight.tolist() == [1.0] * 3
    weight.data = torch.ones(3).half()
    with pytest.raises(RuntimeError, match=r"is float16 .* on device cpu: call ema.rebind"):
        ema.update()
    pairs = fastema.Pairs(average := torch.zeros(3), value := torch.ones(3))
    value.data = torch.full((3,), 2.0)
    pairs.update(0.5)
    assert average.tolist() == [1.0] * 3
    value.data = torch.ones(4)
    with pytest.raises(ValueError, match="must have one size"):
        pairs.update(0.5)


def test_averages_go_with_weights_that_move_to_another_device_and_back(torch, rng):
    values = [rng.standard_normal(5).astype(np.float32) for _ in range(4)]
    model = torch.nn.Linear(5, 1, bias=False)
    needed = values[0]
    for value in values[1:]:
        needed = oracle.update(needed, value, 0.75)

    def train(value):
        model.weight.data = tensor_of(value.copy()).view(1, 5)

    train(values[0])
    with cpu_is_elsewhere(lambda _: False):
        ema = fastema.EMA(model, 0.75)
        train(values[1])
        ema.update()
        assert ema.engine == "native"
    ema.rebind(model)
    train(values[2])
    ema.update()
    assert ema.engine == "torch"
    with cpu_is_elsewhere(lambda _: False):
        ema.rebind(model)
        train(values[3])
        ema.update()
        assert ema.engine == "native"
        np.testing.assert_array_equal(ema.averages["weight"].numpy()[0], needed)


def test_weights_that_share_memory_are_averaged_once(torch):
    weight = torch.ones(6)
    first, second = fastema.EMA([weight, weight.view(6)], 0.5).averages
    assert first.data_ptr() == second.data_ptr()
    halves = fastema.EMA([weight[:3], weight[3:]], 0.5)
    assert len({x.data_ptr() for x in halves.averages}) == 2
    with halves.swapped():
        pass


def test_inference_tensors_are_averaged_and_swapped(torch):
    with torch.inference_mode():
        weight = torch.ones(3)
        ema = fastema.EMA([weight], 0.5)
        weight.fill_(3.0)
    ema.update()
    with ema.swapped():
        assert weight.tolist() == [2.0] * 3
    assert weight.tolist() == [3.0] * 3


# --- states and files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_a_state_goes_on_wherever_the_weights_lie(rng, swapped):
    twins, other = (twins_of(rng, decay=[0.9, 0.99], initial="zeros") for _ in range(2))
    twins.check_states_go_to(other, swapped=swapped)


@pytest.mark.parametrize(("swapped", "initial"), [*itertools.product([False, True], ["values", "zeros"])])
def test_a_file_goes_on_wherever_the_weights_lie(tmp_path, swapped, initial):
    rng = np.random.default_rng(0)
    twins = twins_of(rng, decay=0.9, initial=initial)
    twins.step()
    if swapped:
        twins.cpu.swap()
        twins.gpu.swap()
    twins.gpu.save(tmp_path / "device")
    twins.cpu.save(tmp_path / "host")
    assert (tmp_path / "device").read_bytes() == (tmp_path / "host").read_bytes()
    other = twins_of(rng)
    other.gpu = fastema.EMA.load(tmp_path / "host", other.there)
    other.cpu = fastema.EMA.load(tmp_path / "device", other.here)
    if swapped:
        other.gpu.swap()
        other.cpu.swap()
    other.step()
    other.check()


@pytest.mark.parametrize("initial", ["values", "zeros"])
def test_a_file_is_written_by_pieces_of_bounded_size(rng, tmp_path, monkeypatch, initial):
    from fastema._arrays import torch as library

    monkeypatch.setattr(library, "_PIECE", 100)
    weights = {"a": rng.standard_normal((40, 3)).astype(np.float32), "b": rng.standard_normal(70)}
    twins = twins_of(rng, weights=weights, initial=initial)
    twins.step()
    seen, host = [], library._Storage.host
    monkeypatch.setattr(library._Storage, "host", lambda self, x: seen.append(host(self, x)) or seen[-1])
    twins.gpu.save(tmp_path / "device")
    twins.cpu.save(tmp_path / "host")
    assert max(piece.nbytes for piece in seen) <= 100
    assert (tmp_path / "device").read_bytes() == (tmp_path / "host").read_bytes()


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ({"device": "cpu"}, "device must be None where values lie on device cpu, .* got 'cpu'"),
        ({"memory": "averages"}, "memory must be None where values lie on device cpu, .* got 'averages'"),
        ({"background": True}, "background must be False"),
    ],
)
def test_what_cannot_be_is_refused_by_name(torch, arguments, needed):
    with pytest.raises(ValueError, match=needed):
        fastema.EMA({"w": torch.ones(3)}, **arguments)


def test_values_are_not_looked_at_for_what_is_not_finite(torch):
    ema = fastema.EMA({"w": torch.ones(3)})
    with pytest.raises(ValueError, match="non_finite must be 'average' where values lie on a device, got"):
        ema.update(non_finite="skip")
    assert ema.step == 0


def test_meta_tensors_are_refused(torch):
    with pytest.raises(TypeError, match=r"values\['w'\] .* it lies on meta, where there are no numbers"):
        fastema.EMA({"w": torch.ones(3, device="meta")})


def test_a_type_that_the_device_lacks_is_refused(torch, monkeypatch):
    def empty(self, *arguments, dtype, **more):  # noqa: ARG001
        raise TypeError("the MPS framework doesn't support float64")

    monkeypatch.setattr(torch.Tensor, "new_empty_strided", empty)
    with pytest.raises(TypeError, match="dtype must be a type that device cpu has, got float64: give 'flo"):
        fastema.EMA({"w": torch.ones(3)}, dtype="float64")


def test_lists_that_do_not_fit_are_refused_as_in_host_memory(torch):
    one, two = torch.ones(3), torch.ones(6)
    for averages, values, error, needed in (
        (one, two[:4], ValueError, "must have one size, got 3 and 4"),
        (one, one, ValueError, "must not overlap, and share memory"),
        (two[:4], two[2:], ValueError, "must not overlap, and share memory"),
        (two[::2], one, ValueError, "averages must be dense"),
        (one, torch.ones(3, dtype=torch.int64), TypeError, "float"),
        (one, np.ones(3, np.float32), TypeError, "values must lie on cpu, where averages lies, got ndarray"),
        (
            [one],
            [np.ones(3, np.float32)],
            TypeError,
            r"values\[0\] must lie on cpu, where averages\[0\] lies",
        ),
        (one, torch.ones(3).to_sparse(), TypeError, "values must be an array whose device's memory"),
    ):
        with pytest.raises(error, match=needed):
            fastema.update(averages, values, 0.5)
    with pytest.raises(TypeError, match="one type to be swapped"):
        fastema.swap(one, torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="decay must be from 0 to 1"):
        fastema.update(one, torch.zeros(3), 2.0)
    assert one.tolist() == [1.0] * 3
    assert two.tolist() == [1.0] * 6


# --- a device that torch knows as one -----------------------------------------------------------------

FOREIGN = """
import numpy as np, torch, fastema
from foreign_device import there, host_of

rng = np.random.default_rng(0)
from fastema._arrays.torch import array_of, tensor_of

SETTINGS = [
    {},
    {"decay": [0.9, 0.0]},
    {"dtype": "bfloat16", "rounding": "stochastic"},
    {"dtype": "float16", "rounding": "stochastic"},
    {"dtype": "bfloat16", "rounding": "compensated"},
    {"initial": "zeros"},
]
for arguments in SETTINGS:
    here = {"a": rng.standard_normal((4, 3)).astype("f4"), "b": rng.standard_normal(5).astype("f4")}
    memory = {name: x.copy() for name, x in here.items()}
    other = {name: there(tensor_of(x)) for name, x in memory.items()}
    assert other["a"].data_ptr() == 0
    cpu, ema = fastema.EMA(here, **arguments), fastema.EMA(other, **arguments)
    assert ema.engine == "torch"
    for _ in range(3):
        for name in here:
            here[name] += 1
            memory[name] += 1
        cpu.update()
        ema.update()
        for name, needed in cpu.averages.items():
            assert array_of(host_of(ema.averages[name])).tobytes() == needed.tobytes(), (arguments, name)
        with cpu.swapped(), ema.swapped():
            assert all(memory[name].tobytes() == here[name].tobytes() for name in here)
        assert all(memory[name].tobytes() == here[name].tobytes() for name in here)
    state = ema.state_dict()
    for name, needed in cpu.state_dict()["averages"][0].items():
        assert state["averages"][0][name].device.type == "cpu"
        assert array_of(state["averages"][0][name]).tobytes() == needed.tobytes()
    ema.load_state_dict(state)
print("equal")
"""


def test_a_device_that_tells_no_addresses(torch):
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch knows no devices that are made of Python")
    assert output_of(FOREIGN) == "equal"
