"""What Python's lock kept apart holds without it. With it these tests hold as well."""

import sysconfig
import threading

import numpy as np
import pytest

import fastema
from fastema import _core
from processes import output_of

FREE = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
THREADS = 8


def run_in_threads(work):
    """Have so many threads begin at once; raise what one of them raised."""
    barrier, raised = threading.Barrier(THREADS), []

    def run(number):
        barrier.wait()
        try:
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


@pytest.mark.skipif(not FREE, reason="this Python has a lock")
def test_the_import_does_not_bring_the_lock_back():
    assert output_of("import sys, fastema; print(sys._is_gil_enabled())") == "False"


def test_calls_of_small_lists_come_one_after_the_other():
    """They are too brief to let go of the lock."""
    average, value = np.zeros(100), np.ones(100)
    pairs = fastema.Pairs(average, value)
    expected = average.copy()
    for _ in range(THREADS * 200):
        expected += (1 - 0.999) * (value - expected)

    def update(_):
        for _ in range(200):
            pairs.update(0.999)

    run_in_threads(update)
    assert (average == expected).all()


def test_swaps_of_small_lists_come_one_after_the_other():
    a, b = np.zeros(100), np.ones(100)
    pairs = fastema.Pairs(a, b)

    def swap(_):
        for _ in range(201):
            pairs.swap()

    run_in_threads(swap)
    assert {a.sum(), b.sum()} == {0.0, 100.0}


def test_a_list_may_change_while_it_is_paired():
    averages, values = [np.zeros(3) for _ in range(50)], [np.ones(3) for _ in range(50)]

    def change_or_pair(number):
        for _ in range(200):
            if number % 2:
                averages[number] = np.zeros(3)
            else:
                _core.Pairs(averages, values, verb="update")

    run_in_threads(change_or_pair)


def test_a_watched_dictionary_may_change_while_it_is_looked_at():
    held = {number: object() for number in range(100)}
    contents = _core.Contents([held])

    def change_or_look(number):
        for step in range(200):
            if number % 2:
                held[number] = step
            else:
                contents.changed()
                contents.accept()

    run_in_threads(change_or_look)
    contents.accept()
    assert not contents.changed()


def test_a_scope_is_entered_once():
    scope, entered = _core.Scope(lambda: None, lambda: None), []

    def enter(_):
        try:
            scope.__enter__()
        except RuntimeError:
            return
        entered.append(True)

    run_in_threads(enter)
    assert entered == [True]
