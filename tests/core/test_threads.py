"""Threads, processes and the interpreter's lock."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastema
import oracle
from processes import output_of, skip_without

LARGE = 3_000_000
PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
TWO = min(2, PROCESSORS)  # threads, where there are processors for them


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("parent_uses_threads", [True, False])
def test_a_forked_child_has_threads_of_its_own_and_does_not_hang(parent_uses_threads):
    """Threads do not survive fork: a child that waits for its parent's waits for ever."""
    code = f"""
        import os, signal
        import numpy as np
        import fastema

        a, v = np.zeros({LARGE}, np.float32), np.ones({LARGE}, np.float32)
        if {parent_uses_threads}:
            fastema.update(a, v, 0.5, threads=2)
        before = a[0]
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            fastema.update(a, v, 0.5, threads=2)
            fastema.swap(a, v)
            right = (v == before + np.float32(0.5) * (1 - before)).all() and (a == 1).all()
            os._exit(0 if right and len(os.listdir("/proc/self/task")) == {TWO} else 1)
        status = os.waitpid(child, 0)[1]
        assert status == 0, status
        fastema.update(a, v, 0.5, threads=2)  # the parent still has its threads
        print("fine")
    """
    assert output_of(code, OMP_NUM_THREADS="2") == "fine"


def test_omp_num_threads_is_respected():
    code = "import fastema; print(fastema.build_config()['threads'])"
    assert [output_of(code, OMP_NUM_THREADS=n) for n in ("1", "3", "3,2")] == ["1", "3", "3"]
    for nonsense in ("", "-1", "many"):
        assert output_of(code, OMP_NUM_THREADS=nonsense) == str(PROCESSORS)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_no_library_of_openmp_is_brought():
    """A wheel would have one of its own, which torch does not know."""
    code = """
        from pathlib import Path
        import fastema

        found = fastema.build_config()["openmp"]
        print(found, "omp" in Path("/proc/self/maps").read_text())
    """
    assert output_of(code) == "None False"


@pytest.mark.parametrize(
    "order",
    [
        "torch fastema",
        "fastema torch",
        "sklearn fastema torch",
        "fastema sklearn torch",
        "torch sklearn fastema",
    ],
)
def test_torch_says_how_many_threads_whatever_is_imported_first(order):
    """With a wheel it did only where it had been imported before fastema."""
    for package in ("torch", *(["sklearn"] if "sklearn" in order else [])):
        skip_without(package)
    code = f"""
        import importlib
        import numpy as np

        a, v = np.zeros({LARGE}), np.ones({LARGE})
        expected, updates = a.copy(), 0
        for name in {order.split()}:
            importlib.import_module(name)
            if name == "sklearn":
                from sklearn.cluster import KMeans
                KMeans(2, n_init=1).fit(np.random.default_rng(0).standard_normal((5000, 3)))
            if name == "fastema":
                import fastema
            if "fastema" in globals():
                fastema.update(a, v, 0.5)
                updates += 1
        import torch

        seen = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            seen.append(fastema.build_config()["threads"])
            torch.ones(400, 400) @ torch.ones(400, 400)
            fastema.update(a, v, 0.5)
            updates += 1
        assert (a == 1 - 0.5**updates).all()
        print(*seen)
    """
    assert output_of(code, OMP_NUM_THREADS="2") == "1 3"


def test_one_thread_equals_many(rng):
    a, v = rng.standard_normal(1_000_003), rng.standard_normal(1_000_003)
    results = []
    for threads in (1, 2, 3, 7):
        average = a.copy()
        fastema.update(average, v, 0.999, threads=threads)
        results.append(average)
    assert all(oracle.same_bits(results[0], result) for result in results[1:])


def test_calls_from_many_python_threads_at_once(rng):
    values = rng.standard_normal(200_000)
    start = rng.standard_normal(200_000)

    def average(_):
        mine = start.copy()
        for _ in range(20):
            fastema.update(mine, values, 0.9)
        return mine

    expected = start
    for _ in range(20):
        expected = oracle.update(expected, values, 0.9)
    with ThreadPoolExecutor(8) as pool:
        assert all(oracle.same_bits(expected, result) for result in pool.map(average, range(32)))


def test_other_python_threads_run_during_a_call():
    """The interpreter's lock is released: another thread goes on while averages are computed."""
    a = np.zeros(20_000_000, np.float32)
    pairs = fastema.Pairs([a], [np.ones_like(a)])
    counted, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1
            time.sleep(1e-4)  # gives the lock back

    counter = threading.Thread(target=count)
    switch = sys.getswitchinterval()
    counter.start()
    sys.setswitchinterval(60.0)  # nobody is interrupted: the lock changes hands only where it is released
    before = counted[0]
    try:
        for _ in range(5):
            pairs.update(0.9, threads=1)
        after = counted[0]
    finally:
        sys.setswitchinterval(switch)
        stop.set()
        counter.join()
    assert after > before


@pytest.mark.parametrize("call", ["update(0.5)", "swap()", "first_non_finite()"])
def test_a_daemon_thread_within_a_call_lets_the_interpreter_end(call):
    """Python ends such threads when they want its lock back: every such process was aborted."""
    code = f"""
        import threading, time
        import numpy as np
        import fastema

        pairs = fastema.Pairs(np.zeros(50_000), np.ones(50_000))
        begun = threading.Event()

        def go_on():
            while True:
                pairs.{call}
                begun.set()

        threading.Thread(target=go_on, daemon=True).start()
        begun.wait()
        print("fine")
    """
    assert [output_of(code) for _ in range(4)] == ["fine"] * 4


def test_threadpoolctl_is_respected():
    """Of an OpenMP that another library has loaded."""
    skip_without("sklearn")  # which needs threadpoolctl
    code = """
        import fastema
        import sklearn.cluster
        import threadpoolctl

        with threadpoolctl.threadpool_limits(1):
            print(fastema.build_config()["threads"])
    """
    assert output_of(code, OMP_NUM_THREADS="2") == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("processors", sorted({1, PROCESSORS}))
@pytest.mark.parametrize(("threads", "default"), [(10**6, "1"), (10**30, "1"), (0, "1000")])
def test_a_million_threads_are_no_more_than_the_processors(threads, default, processors):
    """They were 764, which lay about until the process ended."""
    code = f"""
        import os
        import numpy as np
        import fastema

        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{processors}])
        before = len(os.listdir("/proc/self/task"))
        a, v = np.zeros(80 * {LARGE}, np.uint8).view(np.float32), np.ones(20 * {LARGE}, np.float32)
        fastema.update(a, v, 0.5, threads={threads})
        assert (a == 0.5).all()
        print(len(os.listdir("/proc/self/task")) - before)
    """
    assert int(output_of(code, OMP_NUM_THREADS=default)) == processors - 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_threads_stay_on_the_processors_of_their_caller():
    """They keep off the one the caller is on, but never go where the caller may not."""
    code = f"""
        import os, threading
        import numpy as np
        import fastema

        def update():
            fastema.update(np.zeros({LARGE}), np.ones({LARGE}), 0.5, threads=2)

        before = set(os.listdir("/proc/self/task"))
        update()
        helpers = set(os.listdir("/proc/self/task")) - before
        assert len(helpers) == {TWO} - 1, helpers
        for processor in sorted(os.sched_getaffinity(0))[:2]:
            os.sched_setaffinity(0, {{processor}})
            update()
        assert all(os.sched_getaffinity(int(helper)) == {{processor}} for helper in helpers)
        print("fine")
    """
    assert output_of(code) == "fine"
