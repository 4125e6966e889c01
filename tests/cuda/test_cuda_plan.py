"""Lists of arrays on a CUDA device: where they go, how they are cut, what is refused. On a fake device."""

import inspect
import re
import threading
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fake_cuda
import fastema
import laws
import oracle
from fake_cuda import Array, on_device
from fastema import cuda, schedules
from fastema.cuda import _driver, _plan
from mixes import MIXES, of_many_magnitudes
from processes import output_of
from refusals import BAD_NUMBERS, BAD_PAIRS, error_of, read_only
from tolerances import POWERS, assert_close

bfloat16 = ml_dtypes.bfloat16


@pytest.fixture(autouse=True)
def fake():
    fake_cuda.kernels()
    with fake_cuda.installed() as driver:
        yield driver


def test_the_fake_device_has_the_face_of_the_real_one():
    for name, method in vars(_driver.Driver).items():
        if not name.startswith("_"):
            other = getattr(fake_cuda.Driver, name)
            assert list(inspect.signature(other).parameters) == list(inspect.signature(method).parameters)


def test_cupy_has_what_the_driver_asks_of_it():
    """As far as that can be told without a device: names, and numbers of arguments."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    from_cupy = mock.MagicMock(spec=cupy)
    from_cupy.cuda = mock.MagicMock(spec=cupy.cuda)
    from_cupy.cuda.runtime = mock.MagicMock(spec=cupy.cuda.runtime)
    from_cupy.cuda.driver = mock.MagicMock(spec=cupy.cuda.driver)
    from_cupy.cuda.alloc_pinned_memory.return_value = bytearray(64)
    module = from_cupy.RawModule.return_value = mock.MagicMock(spec=cupy.RawModule)
    module.get_function.return_value = mock.MagicMock(spec=cupy.RawKernel)
    module.get_function.return_value.kernel = mock.MagicMock(spec=cupy.cuda.function.Function)
    driver, stream = _driver.Driver(from_cupy), _driver.Stream(7)
    from_cupy.cuda.runtime.getDevice.return_value = 1
    from_cupy.cuda.runtime.streamIsCapturing.return_value = False
    with driver.on(1):
        driver.device_of(4096)
        driver.multiprocessors(1)
        driver.current_stream("cupy", 1)
        driver.new_stream()
        driver.wait(stream, driver.record(stream))
        driver.finish(driver.record(stream))
        driver.synchronize()
        memory = driver.upload(np.zeros(4), stream)
        driver.read(driver.pinned(64), 4096, stream)
        driver.imported(None)
        driver.empty((2, 3), (4, 8), np.dtype(np.float32))
        driver.copy(4096, 8192, 24, stream)
        driver.clear(4096, 24, stream)
        driver.kernel("fastema::swap", np.zeros(2, [("a", "<u8"), ("b", "<u4")]), 1)(12, stream)
    runtime = from_cupy.cuda.runtime
    arguments = from_cupy.cuda.driver.launchKernel.call_args.args
    assert arguments[1:10] == (12, 1, 1, 256, 1, 1, 0, 7, arguments[9])
    address, size = runtime.mallocAsync.return_value, 32
    assert runtime.mallocAsync.call_args.args == (size, 7)
    del memory
    assert runtime.freeAsync.call_args.args == (address, 7)
    assert runtime.memcpyAsync.call_count == 3


# --- the plan -----------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 50_000), max_size=30), chunk=st.sampled_from([1024, 2048, 8192]))
def test_chunks_cover_every_element_once_and_short_ones_come_last(sizes, chunk):
    table = _plan.chunk_table(np.array(sizes, np.int64), chunk)
    covered = [np.zeros(size, int) for size in sizes]
    lengths = []
    for group, index in table.tolist():
        part = covered[group][index * chunk : (index + 1) * chunk]
        part += 1
        lengths.append(len(part))
    assert all((counts == 1).all() for counts in covered)
    assert lengths == sorted(lengths, reverse=True)
    assert 0 not in lengths


@given(elements=st.integers(0, 10**11), multiprocessors=st.integers(1, 200))
def test_a_chunk_leaves_every_multiprocessor_eight_blocks_unless_it_would_be_tiny(elements, multiprocessors):
    chunk = _plan.chunk_size(elements, multiprocessors)
    assert 1024 <= chunk <= 8192
    assert chunk % 1024 == 0
    assert elements // chunk >= 8 * multiprocessors or chunk == 1024


def test_the_values_of_several_lists_chunks_stay_in_the_cache_until_the_last_has_read_them():
    """Of float32 values with all that an H100 has under way: 132 multiprocessors, 8 blocks each."""
    for lists in (2, 8):
        assert _plan.chunk_size(10**9, 132, lists) * 8 * 132 * 4 < 10e6  # of 50 MB


def test_an_update_of_any_list_is_one_launch_and_nothing_else(fake, rng):
    sizes = [0, 5, 70_000, 1, 64, 65_536, 3, 0, 17]
    averages = [of_many_magnitudes(rng, n, MIXES[i % len(MIXES)][0]) for i, n in enumerate(sizes)]
    values = [of_many_magnitudes(rng, n, MIXES[i % len(MIXES)][1]) for i, n in enumerate(sizes)]
    pairs = fastema.Pairs(on_device(averages), on_device(values))
    expected = averages
    for decay in (0.99, 0.0, 0.5):
        expected = [oracle.update(a, v, decay) for a, v in zip(expected, values, strict=True)]
        fake.log.clear()
        pairs.update(decay)
        assert [(name[:15], stream) for name, stream, *_ in fake.log] == [("fastema::update", 2)]
        assert all(oracle.same_bits(a, e) for a, e in zip(averages, expected, strict=True))
    assert len(pairs) == len(sizes)


def test_lists_without_elements_launch_nothing(fake):
    fastema.update([], [], 0.5)
    fastema.update(on_device(np.zeros((0, 3))), on_device(np.zeros((0, 3))), 0.5)
    cuda_list = on_device([np.zeros(0, np.float32)] * 2)
    fastema.Pairs(cuda_list, cuda_list).swap()
    assert fake.log == []
    with pytest.raises(ValueError, match="decay must be from 0 to 1"):
        fastema.update(on_device(np.zeros(0)), on_device(np.zeros(0)), 2.0)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_stochastic_rounding_has_the_bits_of_the_cpu(rng, dtype):
    sizes = [1, 1000, 20_001, 64]
    averages, values = ([rng.standard_normal(n).astype(dtype) for n in sizes] for _ in range(2))
    expected = [a.copy() for a in averages]
    options = {"rounding": "stochastic", "seed": 7, "step": 2**40}
    fastema.update(expected, values, 0.99, **options)
    fastema.update(on_device(averages), on_device(values), 0.99, **options)
    assert all(oracle.same_bits(a, e) for a, e in zip(averages, expected, strict=True))


@pytest.mark.parametrize(("average", "value", "carry"), [("f4", "f4", "f4"), (bfloat16, bfloat16, "i2")])
def test_carries_have_the_bits_of_the_cpu(rng, average, value, carry):
    a, v = rng.standard_normal(3000).astype(average), rng.standard_normal(3000).astype(value)
    ours, theirs = ((a.copy(), np.zeros(3000, carry)) for _ in range(2))
    cpu = fastema.Pairs(ours[0], v, carries=ours[1])
    gpu = fastema.Pairs(*on_device([theirs[0], v]), carries=on_device(theirs[1]))
    for _ in range(5):
        cpu.update(0.999)
        gpu.update(0.999)
    assert oracle.same_bits(*(x[0] for x in (ours, theirs)))
    assert (ours[1].view(np.uint8) == theirs[1].view(np.uint8)).all()
    with pytest.raises(ValueError, match="rounding must be 'nearest' where averages have carries"):
        gpu.update(0.999, rounding="stochastic")


def test_several_averages_of_the_same_values_are_those_averages_one_by_one(fake, rng):
    values = [rng.standard_normal(n).astype(np.float32) for n in (5, 0, 30_003, 64)]
    decays, dtypes = [0.9, 0.999, 0.0], [np.float32, np.float64, np.float32]
    lists = [[rng.standard_normal(v.size).astype(dtype) for v in values] for dtype in dtypes]
    expected = [
        [oracle.update(a, v, decay) for a, v in zip(averages, values, strict=True)]
        for averages, decay in zip(lists, decays, strict=True)
    ]
    pairs = fastema.Pairs.several(on_device(lists), on_device(values))
    fake.log.clear()
    pairs.update(decays)
    assert len(fake.log) == 1
    for averages, right in zip(lists, expected, strict=True):
        assert all(oracle.same_bits(a, e) for a, e in zip(averages, right, strict=True))


def test_swap_exchanges_every_bit(rng):
    a = [np.frombuffer(rng.bytes(n * 8), t).copy() for n, t in ((9000, "f8"), (3, "f2"), (77, "f4"))]
    b = [np.frombuffer(rng.bytes(x.nbytes), x.dtype).copy() for x in a]
    before = [x.tobytes() for x in (*b, *a)]
    fastema.swap(on_device(a), on_device(b))
    assert [x.tobytes() for x in (*a, *b)] == before
    pairs = fastema.Pairs(on_device(a), on_device(b))
    pairs.swap()
    pairs.swap()
    assert [x.tobytes() for x in (*a, *b)] == before


def test_more_than_eight_lists_are_refused():
    lists = [[on_device(np.zeros(3))] for _ in range(9)]
    with pytest.raises(ValueError, match="averages must hold 8 lists or fewer on CUDA, got 9"):
        fastema.Pairs.several(lists, [on_device(np.ones(3))])


# --- what is refused, as on the CPU -------------------------------------------------------------------


def needs_a_device(case):
    averages = BAD_PAIRS[case][0]
    return isinstance(averages[0] if isinstance(averages, list) else averages, np.ndarray)


@pytest.mark.parametrize("case", [case for case in BAD_PAIRS if needs_a_device(case) and case != "numbers"])
def test_a_bad_pair_is_refused_in_the_words_of_the_cpu(fake, case):
    averages, values, *_ = BAD_PAIRS[case]
    for verb in (
        lambda a, v: fastema.update(a, v, 0.5),
        fastema.Pairs,
        fastema.swap,
    ):
        on_cpu = error_of(lambda verb=verb: verb(averages, values))
        assert error_of(lambda verb=verb: verb(on_device(averages), on_device(values))) == on_cpu
    assert fake.log == []


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_NUMBERS)
def test_a_bad_number_is_refused_in_the_words_of_the_cpu(fake, arguments, error, message):
    a, v = np.zeros(10), np.ones(10)
    pairs = fastema.Pairs(on_device(a), on_device(v))
    fake.log.clear()
    with pytest.raises(error, match=re.escape(message)):
        pairs.update(**arguments)
    assert fake.log == []


def f32(size):
    return np.zeros(size, np.float32)


SHARED = f32(3)
BAD_SWAPS = {
    "read-only": lambda on: fastema.Pairs(on([f32(3)]), on([read_only(f32(3))])),
    "shared": lambda on: fastema.Pairs(on([f32(3), f32(3)]), on([SHARED, SHARED])),
    "types": lambda on: fastema.Pairs(on([f32(3)]), on([np.zeros(3, np.float16)])),
    "carries": lambda on: fastema.Pairs(on(f32(3)), on(f32(3)), carries=on(f32(3))),
    "several": lambda on: fastema.Pairs.several(on([[f32(3)], [f32(3)]]), on([f32(3)])),
}


@pytest.mark.parametrize("case", BAD_SWAPS)
def test_pairs_that_cannot_be_swapped_say_so_in_the_words_of_the_cpu(fake, case):
    make = BAD_SWAPS[case]
    on_cpu = error_of(lambda: make(lambda x: x).swap())
    pairs = make(on_device)
    fake.log.clear()
    assert error_of(pairs.swap) == on_cpu
    assert fake.log == []


BAD_CALLS = {
    "carry of another type": lambda on: fastema.Pairs(on(f32(3)), on(f32(3)), carries=on(np.zeros(3))),
    "carry of another size": lambda on: fastema.Pairs(on(f32(3)), on(f32(3)), carries=on(f32(4))),
    "carry that is the average": lambda on: fastema.Pairs(on(SHARED), on(f32(3)), carries=on(SHARED)),
    "no carry for it": lambda on: fastema.Pairs(on(np.zeros(3)), on(np.zeros(3)), carries=on(np.zeros(3))),
    "lengths": lambda on: fastema.Pairs.several(on([[f32(3)], []]), on([f32(3)])),
    "sizes": lambda on: fastema.Pairs.several(on([[f32(3)], [f32(4)]]), on([f32(3)])),
    "decays": lambda on: fastema.Pairs.several(on([[f32(3)]] * 1 + [[f32(3)]]), on([f32(3)])).update([0.1]),
    "a number": lambda on: fastema.Pairs.several(on([[f32(3)], [f32(3)]]), on([f32(3)])).update(0.5),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_carries_and_lists_are_refused_in_the_words_of_the_cpu(case):
    call = BAD_CALLS[case]
    assert error_of(lambda: call(on_device)) == error_of(lambda: call(lambda x: x))


def test_arrays_elsewhere_are_refused_by_name(torch):
    here, there = Array(np.zeros(3)), Array(np.zeros(3), device=1)
    with pytest.raises(
        TypeError, match=r"values\[1\] must lie on cuda:0, where averages\[0\] lies, got Array"
    ):
        fastema.update([here, Array(np.zeros(3))], [Array(np.zeros(3)), there], 0.5)
    with pytest.raises(TypeError, match="values must lie on cuda:0, where averages lies, got ndarray elsew"):
        fastema.update(here, np.zeros(3), 0.5)
    with pytest.raises(TypeError, match="b must lie on cuda:0, where a lies, got Tensor elsewhere"):
        fastema.swap(here, torch.zeros(3))
    with pytest.raises(TypeError, match=r"values must be an array whose CPU memory .*: it lies on a CUDA"):
        fastema.update(np.zeros(3), here, 0.5)
    with pytest.raises(TypeError, match=r"values must be an array whose CPU memory .*: it lies on cuda:0"):
        fastema.update(np.zeros(3), fake_cuda.tensor(np.zeros(3)), 0.5)


def test_tensors_that_cannot_be_viewed_are_refused(torch):
    here = Array(np.zeros(3, np.float32))
    raw = fake_cuda.tensor(torch.empty(3, dtype=torch.bits16))
    with pytest.raises(
        TypeError, match=r"values must be an array whose CUDA memory can be viewed, got OnCuda"
    ):
        fastema.update(here, raw, 0.5)
    counts = fake_cuda.tensor(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"values must be float16, bfloat16, .* got dtype\('int64'\)"):
        fastema.update(here, counts, 0.5)
    negated = fake_cuda.tensor(torch._neg_view(torch.ones(3)))
    with pytest.raises(TypeError, match=r"values must be an array whose CUDA memory .* it is negated or con"):
        fastema.update(here, negated, 0.5)
    with pytest.raises(TypeError, match=r"values\[0\] must be a NumPy array, a torch tensor, .* got str"):
        fastema.update([here], ["weights"], 0.5)


def test_tensors_whose_memory_was_taken_away_are_refused(torch):
    """As FSDP and offloading do: their address is 0, which a launch dies of, and torch with it."""
    average, value = (fake_cuda.tensor(torch.zeros(3)) for _ in "ab")
    pairs = fastema.Pairs(average, value)
    pairs.update(0.5)
    value.untyped_storage().resize_(0)
    for call in (lambda: fastema.update(average, value, 0.5), lambda: pairs.update(0.5)):
        with pytest.raises(TypeError, match=r"values must be .* it has no memory, or its storage is empty"):
            call()
    value.untyped_storage().resize_(12)
    value.fill_(1)
    pairs.update(0.5)
    assert (average == 0.5).all()


def test_without_cupy_the_error_says_how_to_install_it():
    code = """
        import sys
        sys.modules["cupy"] = None
        import numpy as np, fastema

        class OnDevice:
            __cuda_array_interface__ = dict(version=3, shape=(3,), typestr="<f4", data=(4096, False))

        try:
            fastema.update(OnDevice(), OnDevice(), 0.5)
        except ImportError as error:
            print(error)
    """
    assert "averaging arrays in CUDA memory needs CuPy: pip install 'fastema[cuda13]'" in output_of(code)


def test_the_module_loads_no_cupy():
    assert output_of("import sys, fastema.cuda; print('cupy' in sys.modules)") == "False"


# --- kinds of arrays, streams, devices ----------------------------------------------------------------


def test_torch_tensors_of_every_type_are_averaged_in_place(torch):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        average, value = torch.zeros(2, 3, dtype=dtype), torch.full((2, 3), 2, dtype=dtype)
        fastema.update([fake_cuda.tensor(average)], [fake_cuda.tensor(value).requires_grad_()], 0.5)
        assert (average == 1).all()
    average, value = (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(2))
    fastema.update(fake_cuda.tensor(average), fake_cuda.tensor(value + 1), 0.5)
    assert (average == 0.5).all()


def test_what_is_exported_as_read_only_is_read_and_not_written(fake):
    value = np.ones(5, np.float32)
    value.flags.writeable = False
    average = f32(5)
    fastema.update(Array(average), fake_cuda.Exporter(value), 0.5)
    assert (average == 0.5).all()
    fake.log.clear()
    for call in (
        lambda: fastema.update(fake_cuda.Exporter(value), Array(average), 0.5),
        lambda: fastema.swap(Array(average), fake_cuda.Exporter(value)),
    ):
        with pytest.raises(ValueError, match="must be writ"):
            call()
    assert fake.log == []
    assert (value == 1).all()


def test_tensors_on_rocm_are_averaged_by_torch(fake, torch, monkeypatch):
    """There torch calls a device "cuda" that runs none of our kernels."""
    monkeypatch.setattr(torch.version, "hip", "6.2", raising=False)
    average, value = fake_cuda.tensor(torch.zeros(3)), fake_cuda.tensor(torch.ones(3))
    monkeypatch.setattr(type(average), "is_cpu", False, raising=False)
    pairs = fastema.Pairs(average, value)
    pairs.update(0.5)
    assert (average == 0.5).all()
    assert pairs._engine == "torch"
    assert fake.log == []


def test_whatever_speaks_dlpack_is_averaged():
    average, value = f32(5), np.ones(5, np.float32)
    fastema.update(fake_cuda.Exporter(average), fake_cuda.Exporter(value), 0.5)
    assert (average == 0.5).all()


@pytest.fixture
def on_gpu(monkeypatch):
    """Return a function that makes an array of JAX which says it lies on a device."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from fastema._arrays import jax as library

    monkeypatch.setattr(library._Jax, "is_on_cuda", lambda self, array: True)  # noqa: ARG005
    return jax.numpy.asarray


def test_values_of_jax_are_read_when_the_call_returns(fake, on_gpu):
    """XLA waits for no stream of ours before a step that was donated a value overwrites it."""
    average, fake.lazy = f32(3), {2}
    pairs = fastema.Pairs(Array(average), on_gpu(np.ones(3, np.float32)))
    pairs.update(0.5)
    assert (average == 0.5).all()
    fastema.update(Array(average), on_gpu(np.ones(3, np.float32)), 0.5)
    assert (average == 0.75).all()
    with (
        fake.capture(fake.current["cupy"]),
        pytest.raises(RuntimeError, match="without waiting for a stream"),
    ):
        pairs.update(0.5, check=False)


def test_what_only_speaks_dlpack_is_read_when_the_call_returns(fake):
    average, fake.lazy = f32(3), {2}
    fastema.update(Array(average), fake_cuda.Exporter(np.ones(3, np.float32)), 0.5)
    assert (average == 0.5).all()


def test_work_goes_to_the_current_stream_of_the_arrays_library(fake, torch):
    a, v = fake_cuda.tensor(torch.zeros(3)), fake_cuda.tensor(torch.ones(3))
    pairs = fastema.Pairs([a], [v])
    fake.current["torch"] = _driver.Stream(9)
    fake.log.clear()
    pairs.update(0.5)
    assert [(name[:6], *rest) for name, *rest in fake.log] == [
        ("record", 1),
        ("wait", 9, 1),
        ("fastem", 9, 1),
    ]
    fake.log.clear()
    pairs.update(0.5)
    assert [stream for _, stream, *_ in fake.log] == [9]


def test_libraries_wait_for_each_other(fake, torch):
    pairs = fastema.Pairs([fake_cuda.tensor(torch.zeros(3))], [Array(np.ones(3, np.float32), stream=55)])
    fake.log.clear()
    pairs.update(0.5)
    torchs, cupys = 1, 2
    assert [(name[:6], *rest) for name, *rest in fake.log] == [
        ("record", cupys),
        ("wait", torchs, cupys),
        ("record", 55),
        ("wait", torchs, 55),
        ("fastem", torchs, 1),
        ("record", torchs),
        ("wait", cupys, torchs),
        ("record", torchs),
        ("wait", 55, torchs),
    ]


def test_a_producer_is_asked_for_its_stream_at_each_update(fake):
    """Its last one may be destroyed."""
    value = Array(np.ones(3, np.float32), stream=55)
    average = f32(3)
    pairs = fastema.Pairs(Array(average), value)
    fake.destroyed, value.stream, fake.lazy = {55}, 56, {56}
    fake.enqueue(_driver.Stream(56), "step", lambda: value.host.fill(3))
    pairs.update(0.5)
    assert (average == 1.5).all()
    value.stream = None
    pairs.update(0.5)
    assert (average == 2.25).all()


def test_a_producers_next_step_waits_until_its_values_are_read(fake):
    value, average = Array(np.ones(3, np.float32), stream=55), f32(3)
    fake.lazy = {2}
    fastema.Pairs(Array(average), value).update(0.5)
    fake.enqueue(_driver.Stream(55), "step", lambda: value.host.fill(3))
    fake.synchronize()
    assert (average == 0.5).all()


def test_libraries_on_one_stream_do_not_wait(fake, torch):
    fake.current = dict.fromkeys(fake.current, _driver.Stream(0))
    pairs = fastema.Pairs([fake_cuda.tensor(torch.zeros(3))], [Array(np.ones(3, np.float32))])
    fake.log.clear()
    pairs.update(0.5)
    assert len(fake.log) == 1


def test_a_launch_has_the_decay_of_its_call_however_late_it_runs(fake):
    average = f32(3)
    fake.lazy.add(2)
    pairs = fastema.Pairs(Array(average), Array(np.ones(3, np.float32)))
    for decay in (0.5, 0.0, 1.0):
        pairs.update(decay)
    value = np.full(3, 3, np.float32)
    fastema.update(Array(average), Array(value), 0.5)  # its tables are gone already
    assert (average == 0).all(), "it did not wait: the test proves nothing"
    fake.synchronize()
    assert (average == 2).all()


def test_the_arrays_device_is_the_current_one(fake):
    fastema.update(Array(f32(3), device=3), Array(f32(3), device=3), 0.5)
    assert set(fake.entered) == {3}


def test_tables_made_in_one_stream_are_there_in_another(fake):
    average = f32(3)
    fake.lazy = {2}
    pairs = fastema.Pairs(Array(average), Array(np.ones(3, np.float32)))
    counted = cuda.Schedule(0.5)
    fake.current["cupy"] = _driver.Stream(9)
    pairs.update(0.5)
    assert (average == 0.5).all()
    fake.lazy = {9}
    pairs.update(counted)
    fake.current["cupy"] = _driver.Stream(12)
    pairs.update(counted)
    assert (average == 0.875).all()
    assert counted.step == 2


def test_tables_that_moved_in_one_stream_are_read_by_another_before(fake, torch):
    average, value = fake_cuda.tensor(torch.zeros(4)), fake_cuda.tensor(torch.ones(4))
    pairs, first = fastema.Pairs(average, value), average.data
    fake.lazy = {1}
    pairs.update(0.5)
    average.data = fake_cuda.tensor(torch.zeros(4))
    fake.current["torch"] = _driver.Stream(9)
    pairs.update(0.5)
    fake.synchronize()
    assert (first == 0.5).all()
    assert (average == 0.5).all()


def test_tables_are_not_given_back_while_another_stream_reads_them(fake):
    average = f32(3)
    pairs = fastema.Pairs(Array(average), Array(np.ones(3, np.float32)))
    fake.lazy = {9}
    fake.current["cupy"] = _driver.Stream(9)
    pairs.update(0.5)
    fake.current["cupy"] = _driver.Stream(12)
    pairs.update(0.5)
    del pairs
    fake.synchronize()
    assert (average == 0.75).all()


def test_tables_are_given_back_on_the_stream_that_used_them_last(fake):
    pairs = fastema.Pairs(Array(f32(3)), Array(f32(3)))
    fake.current["cupy"] = _driver.Stream(12)
    pairs.update(0.5)
    del pairs
    assert set(fake.freed) == {12}


# --- tensors that move --------------------------------------------------------------------------------


def test_pairs_go_on_where_a_tensor_lies_now(fake, torch):
    averages, values = ([fake_cuda.tensor(torch.zeros(4) + x) for _ in range(3)] for x in (0, 1))
    pairs = fastema.Pairs(averages, values)
    pairs.update(0.5)
    values[1].data = fake_cuda.tensor(torch.full((4,), 3.0))
    fake.log.clear()
    pairs.update(0.5)
    assert [(name[:5], *rest) for name, *rest in fake.log] == [("write", 1, 32), ("faste", 1, 3)]
    assert [float(a[0]) for a in averages] == [0.75, 1.75, 0.75]
    pairs.swap()
    assert [float(v[0]) for v in values] == [0.75, 1.75, 0.75]


def test_a_carry_that_moved_is_found(torch):
    average, value, carry = (fake_cuda.tensor(torch.zeros(4) + x) for x in (1, 2, 0))
    pairs = fastema.Pairs(average, value, carries=carry)
    carry.data = fake_cuda.tensor(torch.zeros(4))
    pairs.update(1 - 2**-30)
    assert (carry == 2**-30).all()


def test_a_tensor_that_changed_its_size_type_or_device_is_refused_and_nothing_changes(torch):
    for other in (torch.ones(5), torch.ones(4, dtype=torch.float16)):
        average, value = fake_cuda.tensor(torch.zeros(4)), fake_cuda.tensor(torch.ones(4))
        pairs = fastema.Pairs([average], [value])
        held = [average.data, value.data]
        value.data = fake_cuda.tensor(other)
        if other.dtype == torch.float32:
            average.data = fake_cuda.tensor(torch.zeros(5))  # a pair again, but not the old one
        with pytest.raises(ValueError, match="given memory of another size, type or device after it was pai"):
            pairs.update(0.5)
        assert (held[0] == 0).all()
        average.data, value.data = held
        pairs.update(0.5)
        assert (average == 0.5).all()


def test_a_tensor_that_moved_onto_another_is_refused(torch):
    a, v = ([fake_cuda.tensor(torch.zeros(4)) for _ in range(2)] for _ in range(2))
    pairs = fastema.Pairs(a, v)
    v[0].data = a[1].data
    with pytest.raises(ValueError, match=re.escape("averages[1] and values[0] must not overlap")):
        pairs.update(0.5)
    v[0].data = v[1].data  # may be read twice, but not exchanged
    pairs.update(0.5)
    with pytest.raises(ValueError, match=re.escape("values[0] and values[1] must not overlap")):
        pairs.swap()


def test_addresses_are_not_asked_for_without_check(fake, torch):
    average, value = fake_cuda.tensor(torch.zeros(4)), fake_cuda.tensor(torch.ones(4))
    old = value.data
    pairs = fastema.Pairs([average], [value])
    value.data = fake_cuda.tensor(torch.full((4,), 3.0))
    fake.log.clear()
    pairs.update(0.5, check=False)
    assert len(fake.log) == 1
    assert (average == 0.5).all(), old


# --- decays computed on the device --------------------------------------------------------------------

SCHEDULES = [
    0.9,
    schedules.constant(0.9, start_step=3),
    schedules.dynamic(0.9),
    schedules.dynamic(0.9, start_step=5),
    schedules.equal_weights(),
    schedules.equal_weights(6),
    schedules.dynamic(0.9, width=3),
    schedules.linear(0.3, 0.9, 12),
]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_on_the_device_is_that_schedule(rng, schedule, every):
    average, values = rng.standard_normal(100), rng.standard_normal((20, 100))
    expected, value = average.copy(), values[0].copy()
    pairs = fastema.Pairs(Array(average), Array(value))
    counted = cuda.Schedule(schedule, step=2, every=every)
    for step, new in enumerate(values, start=3):
        value[:] = new
        pairs.update(counted)
        if step % every == 0:
            decay = schedules.over(schedule, step - every, step)
            expected = oracle.update(expected, value, decay)
            assert counted.decay == decay
        else:
            assert counted.decay < 0
        assert counted.step == step
        assert oracle.same_bits(average, expected)


@pytest.mark.parametrize("kind", laws.KINDS.values(), ids=laws.KINDS)
@settings(max_examples=25)
@given(every=laws.steps_at_once, start=laws.starts, held=laws.held_values)
def test_every_so_many_steps_of_the_device_is_each(kind, every, start, held):
    def average(schedule, every, values):
        average, value = laws.FIRST.copy(), laws.FIRST.copy()
        pairs, counted = fastema.Pairs(Array(average), Array(value)), cuda.Schedule(schedule, every=every)
        for x in values:
            value[:] = x
            pairs.update(counted)
        return average

    laws.assert_every_is_each(average, kind, every, start, held)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.warmup(0.999),
        schedules.warmup(0.9, start_step=4, min_decay=0.7),
        schedules.power(0.1),
        schedules.ramp(0.99, 30),
        schedules.cosine(0.3, 0.99, 60),
        schedules.growing(0.05, 3),
        schedules.growing(0.3),
    ],
    ids=repr,
)
def test_a_schedule_with_a_power_is_that_schedule_but_for_the_math_library(schedule):
    counted, pairs = cuda.Schedule(schedule), fastema.Pairs(Array(f32(3)), Array(f32(3)))
    for step in range(1, 100):
        pairs.update(counted)
        assert_close(counted.decay, schedule(step), POWERS)


def test_several_averages_have_a_schedule_each_and_one_count(fake, rng):
    value, lists = rng.standard_normal(50), [np.zeros(50), np.zeros(50)]
    pairs = fastema.Pairs.several([[Array(a)] for a in lists], [Array(value)])
    counted = cuda.Schedule([schedules.dynamic(0.99), 0.5])
    expected = [np.zeros(50), np.zeros(50)]
    for step in (1, 2, 3):
        fake.log.clear()
        pairs.update(counted)
        assert sum(name.startswith("fastema") for name, *_ in fake.log) == 2
        for k, decay in enumerate((schedules.dynamic(0.99)(step), 0.5)):
            expected[k] = oracle.update(expected[k], value, decay)
    assert counted.step == 3
    assert counted.decay == [schedules.dynamic(0.99)(3), 0.5]
    assert all(oracle.same_bits(a, e) for a, e in zip(lists, expected, strict=True))


def test_a_step_that_a_graph_counts_on_another_stream_is_seen(fake):
    pairs, counted = fastema.Pairs(Array(f32(3)), Array(f32(3))), cuda.Schedule(0.5)
    pairs.update(counted)
    fake.lazy = {77}
    counted._launch(1, _driver.Stream(77))  # as a graph does when it is replayed there
    assert counted.step == 2


def test_schedules_that_a_device_cannot_follow_are_refused():
    with pytest.raises(
        TypeError, match=r"schedules\[1\] must be a number or a schedule that a device computes"
    ):
        cuda.Schedule([0.5, float])
    with pytest.raises(ValueError, match="decay must be from 0 to 1, got 2"):
        cuda.Schedule(2)
    with pytest.raises(ValueError, match="step must be a whole number from 0 below"):
        cuda.Schedule(0.5, step=-1)
    with pytest.raises(ValueError, match="every must be 1 or more, below"):
        cuda.Schedule(0.5, every=0)
    with pytest.raises(ValueError, match="schedules must be from 1 to 8, got 9"):
        cuda.Schedule([0.5] * 9)


def test_a_schedule_fits_its_pairs():
    pairs, elsewhere = (fastema.Pairs(Array(f32(3), device=d), Array(f32(3), device=d)) for d in (0, 1))
    with pytest.raises(ValueError, match="averages and decay must have one length, got 1 and 2"):
        pairs.update(cuda.Schedule([0.5, 0.5]))
    counted = cuda.Schedule(0.5)
    pairs.update(counted)
    with pytest.raises(ValueError, match="decay must count on cuda:1, not cuda:0"):
        elsewhere.update(counted)
    assert counted.step == 1
    with pytest.raises(TypeError, match="decay must be a number from 0 to 1, got Schedule"):
        fastema.update(f32(3), f32(3), counted)


# --- graphs -------------------------------------------------------------------------------------------


def replay(graph):
    for action in graph:
        action()


def test_a_graph_replays_with_the_decay_of_each_step(fake):
    average, value = np.zeros(100), np.zeros(100)
    schedule = schedules.dynamic(0.99)
    pairs, counted = fastema.Pairs(Array(average), Array(value)), cuda.Schedule(schedule)
    pairs.update(counted)
    with fake.capture(fake.current["cupy"]) as graph:
        pairs.update(counted, check=False)
    expected = average.copy()
    for step in range(2, 6):
        value += 1
        replay(graph)
        expected = oracle.update(expected, value, schedule(step))
        assert oracle.same_bits(average, expected)
    assert counted.step == 5


def test_what_a_graph_works_with_outlives_the_pairs(fake):
    """It may be replayed as they are dropped, or later."""
    average = np.zeros(3)
    pairs, counted = fastema.Pairs(Array(average), Array(np.ones(3))), cuda.Schedule(0.5)
    pairs.update(counted)
    with fake.capture(fake.current["cupy"]) as graph:
        pairs.update(counted, check=False)
    del pairs, counted
    assert not fake.freed
    replay(graph)
    assert (average == 0.75).all()


@pytest.mark.parametrize("capturing", ["torch", "cupy"])
def test_a_graph_of_one_library_takes_arrays_of_another(fake, torch, capturing):
    average, value = fake_cuda.tensor(torch.zeros(3)), np.ones(3, np.float32)
    pairs = fastema.Pairs(average, Array(value))
    pairs.update(0.5)
    with fake.capture(fake.current[capturing]) as graph:
        pairs.update(0.5, check=False)
    replay(graph)
    fake.synchronize()
    assert (average == 0.75).all()


def test_a_graph_of_a_constant_decay_replays(fake):
    average = np.zeros(3)
    pairs = fastema.Pairs(Array(average), Array(np.ones(3)))
    pairs.update(0.5)
    with fake.capture(fake.current["cupy"]) as graph:
        pairs.update(0.5, check=False)
    replay(graph)
    assert (average == 0.75).all()


def captured_calls(torch):
    """Yield calls whose replays would do something else than each call would."""
    new = lambda: fastema.Pairs(Array(f32(3)), Array(f32(3)))  # noqa: E731
    warm, unused, half = new(), new(), Array(np.zeros(3, np.float16))
    warm.update(0.5)
    host_memory = "copied from host memory that is gone by then"
    yield lambda: fastema.update(Array(f32(3)), Array(f32(3)), 0.5), host_memory
    yield lambda: fastema.swap(Array(f32(3)), Array(f32(3))), host_memory
    yield lambda: warm.update(cuda.Schedule(0.5)), host_memory
    yield new, host_memory
    yield lambda: unused.update(0.5), "a kernel that is not compiled yet"
    rounded = fastema.Pairs(half, Array(np.ones(3, np.float16)))
    rounded.update(0.5, rounding="stochastic", step=1)
    yield (
        lambda: rounded.update(0.5, rounding="stochastic", step=2),
        "the step, decay and seed of this one update",
    )
    moved = fake_cuda.tensor(torch.zeros(4))
    pairs = fastema.Pairs(moved, fake_cuda.tensor(torch.ones(4)))
    pairs.update(0.5)
    moved.data = fake_cuda.tensor(torch.zeros(4))
    yield lambda: pairs.update(0.5), host_memory
    ema, seldom = fastema.EMA(Array(f32(3)), 0.5), fastema.EMA(Array(f32(3)), 0.5, every=3)
    ema.update()
    yield ema.update, "the step, decay and seed of this one update"
    yield seldom.update, "a step that the host has counted once"
    yield ema.swap, host_memory
    beside = fastema.EMA(Array(f32(3)), 0.5, device="cpu")
    yield beside.update, "no average in host memory move"


def test_what_a_graph_would_freeze_is_refused_and_nothing_has_changed(fake, torch):
    for call, seen in captured_calls(torch):
        cupys, torchs = fake.current["cupy"], fake.current["torch"]
        with fake.capture(cupys) as graph, fake.capture(torchs) as other:
            with pytest.raises(RuntimeError, match=f"a CUDA graph is being captured, and .*{seen}") as caught:
                call()
            assert "before the capture make fastema.Pairs" in str(caught.value)
            assert not graph
            assert not other


def test_an_ema_that_was_refused_in_a_graph_has_counted_nothing(fake):
    weight = np.ones(3)
    ema = fastema.EMA(Array(weight), 0.5)
    ema.update()
    with fake.capture(fake.current["cupy"]), pytest.raises(RuntimeError, match="is being captured"):
        ema.update()
    with fake.capture(fake.current["cupy"]), pytest.raises(RuntimeError, match="is being captured"):
        ema.swap()
    assert ema.step == 1
    assert not ema.is_swapped
    ema.update()
    assert ema.step == 2


# --- Keras on torch -----------------------------------------------------------------------------------


def test_kerass_torch_backend_averages_and_swaps_on_the_device(fake, torch, monkeypatch):
    pytest.importorskip("keras", reason="keras is not installed")
    from fastema.keras.backends import torch as backend

    average, value = fake_cuda.tensor(torch.zeros(3)), fake_cuda.tensor(torch.ones(3))
    engine = backend.Torch()
    for asked in ("auto", "native"):
        assert engine.update([average], [value], lambda: 0.5, None, asked) == "cuda"
    assert (average == 0.75).all()
    fake.log.clear()
    engine.swap([average], [value])
    assert [name for name, *_ in fake.log if name.startswith("fastema")] == ["fastema::swap"]
    assert (value == 0.75).all()
    monkeypatch.setattr(backend, "_has_cupy", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"engine='native' cannot run here: .* needs a CuPy that runs: pip install 'fast"
    ):
        engine.update([average], [value], lambda: 0.5, None, "native")


# --- threads ------------------------------------------------------------------------------------------


def test_each_thread_launches_with_its_own_decay(fake):
    """All calls of one `Pairs` fill in the same arguments: another thread must not before the launch."""
    averages, values = np.zeros(1000), np.ones(1000)
    pairs = fastema.Pairs(Array(averages), Array(values))
    pairs.update(1.0)  # compiles
    current, first, second = fake.current_stream, threading.Event(), threading.Event()

    def slowly(owner, device):
        if threading.current_thread() is not threading.main_thread():
            first.set()
            second.wait(0.2)  # long enough for the other, unless it is kept out
        return current(owner, device)

    fake.current_stream = slowly
    copying = threading.Thread(target=pairs.update, args=(0.0,))
    copying.start()
    first.wait()
    pairs.update(1.0)  # which changes nothing
    second.set()
    copying.join()
    assert (averages == 1).all()
