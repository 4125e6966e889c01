"""How far ahead memory is asked for: found out by the calls themselves, and no bit depends on it."""

import os
import sys
import threading

import numpy as np
import pytest

import fastema
import mixes
import oracle
from fastema import _core
from processes import PATIENCE, output_of, python, skip_without

BEYOND = 4_500_003  # elements: of 16 bits, too, more than caches may hold
DISTANCES = [0, 256, 2048, 10**6]
WAYS = ["nearest", "stochastic", "compensated"]


@pytest.fixture(autouse=True)
def _nothing_found_before_and_after():
    _core.tune(-1)
    yield
    _core.tune(-1)


def carries_of(average, way):
    carry = {np.float32: np.float32, mixes.bfloat16: np.int16}.get(average)
    return np.zeros(BEYOND, carry) if way == "compensated" and carry else None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("average", "value"), mixes.MIXES)
def test_no_bit_depends_on_the_distance(rng, average, value, way):
    if way == "compensated" and carries_of(average, way) is None:
        pytest.skip("averages of this type have no carry")
    start, v = (rng.standard_normal(BEYOND, np.float32).astype(kind) for kind in (average, value))
    results = []
    for i, distance in enumerate(DISTANCES):
        _core.tune(distance)
        a, carries = start.copy(), carries_of(average, way)
        rounding = "stochastic" if way == "stochastic" else "nearest"
        fastema.update(a, v, 0.99, carries=carries, rounding=rounding, step=3, threads=1 + i % 2)
        results.append(a)
    if way == "nearest":
        assert oracle.same_bits(results[0], oracle.update(start, v, 0.99))
    assert all(oracle.same_bits(results[0], result) for result in results[1:])
    assert _core.tuned() == []


def found():
    return {(loop["average"], loop["value"], loop["rounding"], loop["together"]) for loop in _core.tuned()}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_are_right_while_distances_take_turns_and_when_one_is_chosen(rng, threads):
    a, v = (rng.standard_normal(BEYOND, np.float32) for _ in range(2))
    expected = a.copy()
    calls = 0
    while not found() and calls < 500:
        fastema.update(a, v, 0.9, threads=threads)
        expected = oracle.update(expected, v, 0.9)
        calls += 1
    fastema.update(a, v, 0.9, threads=threads)
    assert found() == {("float32", "float32", "nearest", threads > 1)}
    assert oracle.same_bits(a, oracle.update(expected, v, 0.9))
    (line,) = fastema.build_config()["tuning"]
    many = "several threads" if threads > 1 else "one thread"
    assert line.startswith(f"float32 <- float32, nearest, {many}: ")
    assert line.endswith(" bytes ahead")


def test_lists_that_caches_hold_are_not_looked_at(rng):
    arrays = [rng.standard_normal(1000) for _ in range(100)]
    pairs = fastema.Pairs(arrays, [np.ones(1000) for _ in range(100)])
    for _ in range(1000):
        pairs.update(0.9)
    assert found() == set()


def test_many_threads_that_look_at_once_get_their_own_bits(rng):
    v = rng.standard_normal(BEYOND, np.float32)
    start = rng.standard_normal(BEYOND, np.float32)
    expected = start
    for _ in range(10):
        expected = oracle.update(expected, v, 0.9)
    right = []

    def average(threads):
        mine = start.copy()
        for _ in range(10):
            fastema.update(mine, v, 0.9, threads=threads)
        right.append(oracle.same_bits(mine, expected))

    callers = [threading.Thread(target=average, args=(1 + i % 2,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert right == [True] * 4


LOOK = f"""
    import numpy as np
    import fastema

    a, v = np.zeros({BEYOND}, np.float32), np.ones({BEYOND}, np.float32)
    for _ in range(60):
        fastema.update(a, v, 0.9, threads=1)
    print(fastema.build_config()["tuning"])
"""


def test_the_environment_turns_it_off():
    assert output_of(LOOK, FASTEMA_TUNE="0") == "[]"
    assert output_of(LOOK, FASTEMA_TUNE="1").startswith("['float32 <- float32, nearest, one thread: ")
    assert "FASTEMA_TUNE must be 0 or 1, got 'no'" in python("import fastema", FASTEMA_TUNE="no").stderr


AFTER_TORCH = f"""
    import os, signal, time
    import numpy as np
    import torch
    import fastema
    from fastema import _core

    a, v = np.zeros({BEYOND}, np.float32), np.ones({BEYOND}, np.float32)
    expected, x = a.copy(), torch.ones(400, 400)
    w = np.float32(1 - 0.9)
    threads = lambda: len(os.listdir("/proc/self/task"))
    x @ x
    fastema.update(a, v, 0.9)
    expected += w * (v - expected)
    before, end = threads(), time.monotonic() + {PATIENCE}
    while _core.calls_by_openmp() < 10 and time.monotonic() < end:
        for _ in range(3):
            x @ x
        fastema.update(a, v, 0.9)
        expected += w * (v - expected)
    assert (a == expected).all()
    assert threads() == before
    child = os.fork()
    if child == 0:  # where OpenMP would hang
        signal.alarm({PATIENCE})
        for _ in range(3):
            fastema.update(a, v, 0.9)
            expected += w * (v - expected)
        os._exit(0 if (a == expected).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    print(_core.calls_by_openmp())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_that_torch_left_spinning_do_the_work():
    skip_without("torch")
    calls = int(output_of(AFTER_TORCH, OMP_NUM_THREADS="2"))
    if len(os.sched_getaffinity(0)) == 2:  # with more of them ours may not have to give way
        assert calls == 10


def test_without_torch_no_thread_of_openmp_is_made():
    code = f"""
        import numpy as np
        import fastema
        from fastema import _core

        a, v = np.zeros({BEYOND}, np.float32), np.ones({BEYOND}, np.float32)
        for _ in range(100):
            fastema.update(a, v, 0.9)
        print(_core.calls_by_openmp())
    """
    assert output_of(code) == "0"
