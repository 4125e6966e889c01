"""Averages in host memory of values on a device: right bits, right order, errors that come up. On a fake."""

import threading

import ml_dtypes
import numpy as np
import pytest

import fake_cuda
import fastema
import oracle
from fake_cuda import Array, on_device
from fastema import cuda
from fastema.cuda import _offload
from mixes import MIXES, of_many_magnitudes
from refusals import error_of

SIDE = 100  # the handle of the offload's own stream
CUPY = 2


@pytest.fixture(autouse=True)
def fake():
    with fake_cuda.installed() as driver:
        yield driver


def lists(rng):
    sizes = [5, 3000, 1, 0, 700, 64, 2048, 1023, 4]
    averages = [of_many_magnitudes(rng, n, MIXES[i % len(MIXES)][0]) for i, n in enumerate(sizes)]
    values = [of_many_magnitudes(rng, n, MIXES[i % len(MIXES)][1]) for i, n in enumerate(sizes)]
    return averages, values


@pytest.mark.parametrize("slot", [64, 4096, 64 << 20])
def test_averages_have_the_bits_of_an_update_however_they_are_cut(rng, monkeypatch, slot):
    monkeypatch.setattr(_offload, "SLOT", slot)
    averages, values = lists(rng)
    expected = [a.copy() for a in averages]
    offload = cuda.Offload(averages, on_device(values))
    for decay in (0.99, 0.0, 0.9):
        for value in values:
            value[:] = value[::-1].copy()
        expected = [oracle.update(a, v, decay) for a, v in zip(expected, values, strict=True)]
        offload.update(decay)
        offload.wait()
        assert all(oracle.same_bits(a, e) for a, e in zip(averages, expected, strict=True))
    assert len(offload) == len(averages)


def test_dense_arrays_in_any_order(rng, monkeypatch):
    monkeypatch.setattr(_offload, "SLOT", 1024)
    for order in ("C", "F"):
        a, v = (np.asarray(rng.standard_normal((3, 1, 40, 5)), order=order) for _ in range(2))
        expected = oracle.update(a, v, 0.5)
        offload = cuda.Offload(a, Array(v))
        offload.update(0.5)
        offload.wait()
        assert oracle.same_bits(a, expected)


def test_bfloat16_values_and_float32_averages_of_torch(torch):
    averages, values = torch.zeros(100), torch.full((100,), 3, dtype=torch.bfloat16)
    offload = cuda.Offload([averages], [fake_cuda.tensor(values).requires_grad_()])
    offload.update(0.5)
    offload.wait()
    assert (averages == 1.5).all()


@pytest.mark.parametrize("slot", [64, 4096, 64 << 20])
@pytest.mark.parametrize("compensated", [False, True])
def test_several_averages_and_carries_have_the_bits_of_pairs(fake, rng, monkeypatch, slot, compensated):
    monkeypatch.setattr(_offload, "SLOT", slot)
    kinds = ("f4", "f4", "f4"), ("f4", ml_dtypes.bfloat16, "f4"), (*[ml_dtypes.bfloat16] * 2, "i2")
    arrays = [(n, *kinds[i % 3]) for i, n in enumerate([5, 3000, 0, 64, 1023])]
    values = [rng.standard_normal(n).astype(v) for n, _, v, _ in arrays]
    ours = [[rng.standard_normal(n).astype(a) for n, a, _, _ in arrays] for _ in range(2)]
    theirs = [[x.copy() for x in side] for side in ours]
    our_carries, their_carries = None, None
    if compensated:
        our_carries, their_carries = ([[np.zeros(n, c) for n, *_, c in arrays] for _ in "ab"] for _ in "xy")
    offload = cuda.Offload.several(ours, on_device(values), carries=our_carries)
    pairs = fastema.Pairs.several(theirs, values, carries=their_carries)
    assert len(offload) == len(pairs) == len(arrays)
    for decays in ([0.9, 0.99], [0.0, 0.999]):
        fake.log.clear()
        offload.update(decays)
        offload.wait()
        pairs.update(decays)
        assert sum(entry[2] for entry in fake.log if entry[0] == "read") == sum(v.nbytes for v in values)
        for left, right in ((ours, theirs), (our_carries or [], their_carries or [])):
            for one, other in zip(left, right, strict=True):
                assert [x.tobytes() for x in one] == [x.tobytes() for x in other]


# --- order ----------------------------------------------------------------------------------------------


def test_what_the_device_was_asked_before_an_update_is_done_before_the_copies(fake):
    average, value = np.zeros(1000), np.ones(1000)
    offload = cuda.Offload(average, Array(value))
    fake.lazy = {CUPY}
    fake.enqueue(fake.current["cupy"], "optimizer", lambda: value.fill(3))
    assert value[0] == 1, "the optimizer did not wait: the test proves nothing"
    offload.update(0.5)
    offload.wait()
    assert (average == 1.5).all()


@pytest.mark.parametrize("fenced", [True, False])
def test_values_may_change_after_a_fence(fake, monkeypatch, fenced):
    monkeypatch.setattr(_offload, "SLOT", 1024)
    average, value = np.zeros(1000), np.ones(1000)
    offload = cuda.Offload(average, Array(value))
    fake.lazy = {SIDE}  # copies as late as the events allow
    if fenced:
        offload.update(0.5)
        offload.fence()
        fake.enqueue(fake.current["cupy"], "optimizer", lambda: value.fill(3))
    else:
        with fake.held():
            offload.update(0.5)
            fake.enqueue(fake.current["cupy"], "optimizer", lambda: value.fill(3))
    offload.wait()
    assert (average == (0.5 if fenced else 1.5)).all()


def test_what_only_speaks_dlpack_may_change_after_a_fence(fake):
    """Its library waits for no stream of ours, so the host does."""
    average, value = np.zeros(1000), np.ones(1000)
    offload = cuda.Offload(average, fake_cuda.Exporter(value))
    fake.lazy, changed, finish = {SIDE, CUPY}, threading.Event(), fake.finish

    def finish_late(event):  # in the thread that averages
        if threading.current_thread() is not threading.main_thread():
            changed.wait(5)
        finish(event)

    fake.finish = finish_late
    offload.update(0.5)
    offload.fence()
    value.fill(3)
    changed.set()
    offload.wait()
    assert (average == 0.5).all()


def test_an_update_returns_before_its_averages_have_moved(fake):
    average = np.zeros(1000)
    offload = cuda.Offload(average, Array(np.ones(1000)))
    with fake.held():
        offload.update(0.5)
        assert not average.any()
    offload.wait()
    assert (average == 0.5).all()


def test_no_update_overtakes_another(rng):
    values = [rng.standard_normal(10_000) for _ in range(3)]
    averages, expected = ([np.zeros(10_000) for _ in range(3)] for _ in range(2))
    offload = cuda.Offload(averages, on_device(values))
    for decay in (0.0, 0.5, 0.9, 0.99):
        offload.update(decay)  # waits for nobody but the one before
        expected = [oracle.update(a, v, decay) for a, v in zip(expected, values, strict=True)]
    offload.wait()
    assert all(oracle.same_bits(a, e) for a, e in zip(averages, expected, strict=True))


def test_no_slot_is_copied_to_before_it_was_averaged(fake, monkeypatch):
    monkeypatch.setattr(_offload, "SLOT", 1024)
    size = 10 * 1024 // 8
    offload = cuda.Offload(np.zeros(size), Array(np.ones(size)))
    pinned = [entry for entry in fake.log if entry[0] == "pinned"]
    assert pinned == [("pinned", None, 1024)] * 4
    fake.log.clear()
    offload.update(0.5)
    offload.wait()
    ahead, most = 0, 0
    for name, handle, *_ in fake.log:
        if (name, handle) == ("read", SIDE):
            ahead += 1
        elif (name, handle) == ("finish", SIDE):
            ahead -= 1
        most = max(most, ahead)
    assert (ahead, most) == (0, 4)
    steps = [name for name, handle, *_ in fake.log if handle == SIDE]
    assert steps[:2] == ["wait", "read"]
    assert steps.count("record") == steps.count("read") == steps.count("finish") == 10


def test_small_lists_take_no_more_pinned_memory_than_they_need(fake):
    cuda.Offload([np.zeros(3), np.zeros(9, np.float32)], on_device([np.zeros(3), np.zeros(9, np.float32)]))
    assert [entry for entry in fake.log if entry[0] == "pinned"] == [("pinned", None, 128)]


def test_nothing_to_average_is_no_error():
    offload = cuda.Offload([], [])
    offload.fence()
    offload.wait()
    offload.update(0.5)
    offload.fence()
    offload.wait()


# --- what goes wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["wait", "fence", "update"])
def test_an_error_comes_up_at_the_next_call_and_only_there(fake, call):
    average = np.zeros(10, np.float32)
    offload = cuda.Offload(average, Array(np.ones(10, np.float32)))
    fake.broken = "read"
    offload.update(0.5)
    with pytest.raises(RuntimeError, match="averages in host memory failed: the device is on fire"):
        getattr(offload, call)(*[0.5] * (call == "update"))
    fake.broken = None
    offload.wait()
    assert not average.any()
    offload.update(0.5)
    offload.wait()
    assert (average == 0.5).all()


def test_bad_numbers_and_pairs_are_refused_in_the_words_of_the_cpu():
    a, v, other = np.zeros(3), np.ones(3), np.ones(4, np.float32)
    read_only = np.zeros(3)
    read_only.flags.writeable = False
    for average, value in ((a, other), ([a], [v, v]), (a[:2], v[::2][:2]), (read_only, v), ([a, a], [v, v])):
        assert error_of(lambda x=average, y=value: cuda.Offload(x, on_device(y))) == error_of(
            lambda x=average, y=value: fastema.Pairs(x, y)
        )
    offload = cuda.Offload(a, Array(v))
    for arguments in ((-1,), ("0.5",), (0.5, -1)):
        assert error_of(lambda x=arguments: offload.update(*x)) == error_of(
            lambda x=arguments: fastema.Pairs(a, v).update(*x)
        )
    offload.wait()
    assert not a.any()


def test_arrays_on_the_wrong_side_are_refused():
    a = np.zeros(3)
    with pytest.raises(TypeError, match=r"values\[0\] must lie in CUDA memory, got ndarray"):
        cuda.Offload([a], [np.ones(3)])
    with pytest.raises(TypeError, match=r"averages\[0\] must be an array whose CPU memory"):
        cuda.Offload([Array(a)], [Array(np.ones(3))])


def test_values_are_read_where_a_tensor_lies_now(torch):
    average, value = np.zeros(4, np.float32), fake_cuda.tensor(torch.ones(4))
    offload = cuda.Offload(average, value)
    value.data = fake_cuda.tensor(torch.full((4,), 3.0))
    offload.update(0.5)
    offload.wait()
    assert (average == 1.5).all()
    value.data = fake_cuda.tensor(torch.ones(5))
    with pytest.raises(ValueError, match="averages and values must have one size, got 4 and 5"):
        offload.update(0.5)
    assert (average == 1.5).all()


def test_an_average_given_other_memory_is_noticed(torch):
    average = torch.zeros(4)
    offload = cuda.Offload(average, fake_cuda.tensor(torch.ones(4)))
    average.data = torch.zeros(4)
    with pytest.raises(ValueError, match="a tensor was given other memory, shape or strides after"):
        offload.update(0.5)
    assert not average.any()


def test_half_precision_values_take_their_own_bytes_over_the_bus(fake):
    value = np.ones(1000, ml_dtypes.bfloat16)
    offload = cuda.Offload(np.zeros(1000, np.float32), Array(value))
    fake.log.clear()
    offload.update(0.5)
    offload.wait()
    assert [entry[2] for entry in fake.log if entry[0] == "read"] == [2000]
