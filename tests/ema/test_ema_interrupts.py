"""An interrupt at any instruction: all of a call has happened or nothing, and averages and step agree."""

import asyncio
import contextlib
import itertools
import signal
import threading

import ml_dtypes
import numpy as np
import pytest

import fastema
from interrupts import Interrupt
from other_devices import cpu_is_elsewhere
from processes import output_of, skip_without

SETTINGS = {
    "plain": {},
    "several": {"decay": [0.5, 0.9]},
    "zeros": {"initial": "zeros"},
    "stochastic": {"dtype": "bfloat16", "rounding": "stochastic"},
    "compensated": {"dtype": "bfloat16", "rounding": "compensated"},
    "every second": {"every": 2},
    "late": {"start_step": 3},
    "BEMA": {"of": fastema.BEMA, "every": 2, "lag": 1},
    "BEMA from a step on": {"of": fastema.BEMA, "every": 1, "start_step": 2},
    "Window": {"of": fastema.Window, "size": 2},
}


def made(values, *, of=fastema.EMA, **arguments):
    return of(values, **({"decay": 0.75} | arguments if of is fastema.EMA else arguments))


def weights(seed):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(3, 5)).astype(np.float32),
        "half": rng.normal(size=7).astype(ml_dtypes.bfloat16),
        "counter": np.array(seed),
        "strided": np.arange(8)[::2] + seed,
    }


def train(values, seed):
    for name, new in weights(seed).items():
        values[name][...] = new


def snapshot(ema, values):
    """Return all that can be told of an EMA and the weights, as bytes where it is arrays."""
    state = ema.state_dict()
    arrays = {key: state[key] for key in ("averages", "carries", "copied", "values")}
    flat = [*itertools.chain(*([x] if isinstance(x, dict) else x for x in arrays.values()))]
    held = [{name: bytes_of(x) for name, x in named.items()} for named in flat if isinstance(named, dict)]
    now = {name: x.tobytes() for name, x in values.items()}
    return state["step"], state["decay"], state["products"], state["swapped"], ema.is_swapped, held, now


def bytes_of(array):
    if isinstance(array, np.ndarray):
        return array.tobytes()
    return array.contiguous().view(-1).view(array.new_empty(0).byte().dtype).numpy().tobytes()


def as_they_are(values):
    return values


def as_tensors(values):
    """Return torch's tensors in the memory of arrays."""
    from fastema._arrays.torch import tensor_of

    return {name: tensor_of(x) for name, x in values.items()}


def set_up(arguments, updates, given):
    values = weights(0)
    ema = made(given(values), **arguments)
    for seed in range(1, updates + 1):
        train(values, seed)
        ema.update()
    train(values, updates + 1)
    return ema, values


def evaluate(ema):
    with ema.swapped():
        pass


CALLS = {
    "update": lambda ema, *_: ema.update(),
    "update with other values": lambda ema, _, others: ema.update(others),
    "update that skips what is not finite": lambda ema, *_: ema.update(non_finite="skip"),
    "swap": lambda ema, *_: ema.swap(),
    "swapped": lambda ema, *_: evaluate(ema),
    "copy_to": lambda ema, *_: ema.copy_to(),
    "state_dict": lambda ema, *_: ema.state_dict(),
    "pull": lambda ema, *_: ema.pull(0.25),
    "reset": lambda ema, *_: ema.reset(),
    "reset to other values": lambda ema, _, others: ema.reset(others),
    "setting the step": lambda ema, *_: setattr(ema, "step", 7),
    "load_state_dict": lambda ema, state, _: ema.load_state_dict(state),
}
ERRORS = KeyboardInterrupt, TimeoutError  # of Ctrl-C, and of a handler of one's own


def check_everywhere(setting, call, every, given=as_they_are):
    """Interrupt a call at each so manieth instruction, and compare what is found with before and after."""
    arguments, act = SETTINGS[setting], CALLS[call]
    for updates in (0, 1, 2):
        other = made(given(weights(4)), **arguments)
        other.update(given(weights(5)))
        state = other.state_dict()
        ema, values = set_up(arguments, updates, given)
        before = snapshot(ema, values)
        act(ema, state, given(weights(9)))
        after = snapshot(ema, values)
        for moment in itertools.count(1 + updates, every):
            ema, values = set_up(arguments, updates, given)
            interrupt, others = Interrupt(ERRORS[moment % 2], moment), given(weights(9))
            with interrupt.within():
                act(ema, state, others)
            step = ema.step
            found = snapshot(ema, values)
            assert found in (before, after), moment
            assert step == found[0], moment
            if ema.is_swapped:
                ema.swap()
            ema.update()  # nothing is in the way of what comes
            evaluate(ema)
            if not interrupt.came:
                break
        assert moment > 20


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_of_a_call_that_is_interrupted_all_has_happened_or_nothing(setting, call):
    if call == "setting the step" and "of" in SETTINGS[setting]:
        pytest.skip(f"{setting} has a step that cannot be set")
    check_everywhere(setting, call, 67)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("call", [x for x in CALLS if x != "update that skips what is not finite"])
@pytest.mark.parametrize("setting", ["plain", "stochastic"])
def test_nor_does_a_call_happen_in_part_where_torch_moves_averages(setting, call):
    with cpu_is_elsewhere():
        check_everywhere(setting, call, 401, as_tensors)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_of_a_call_that_is_interrupted_anywhere_all_has_happened_or_nothing(call):
    check_everywhere("plain", call, 1)


@pytest.mark.parametrize("error", ERRORS)
def test_weights_come_back_out_of_nested_evaluations_wherever_they_are_interrupted(error):
    for moment in itertools.count(1, 31):
        values = weights(0)
        slow, fast = (fastema.EMA(values, decay) for decay in (0.9, 0.5))
        train(values, 1)
        slow.update()
        fast.update()
        raw = {name: x.tobytes() for name, x in values.items()}
        interrupt = Interrupt(error, moment)
        with interrupt.within(), slow.swapped(), fast.swapped():
            pass
        assert {name: x.tobytes() for name, x in values.items()} == raw, moment
        assert not slow.is_swapped
        assert not fast.is_swapped
        if not interrupt.came:
            break


@pytest.mark.parametrize("error", ERRORS)
def test_an_interrupt_in_an_evaluation_within_an_evaluation_leaves_the_outer_one_as_it_is(error):
    for moment in itertools.count(1, 17):
        values = weights(0)
        ema = fastema.EMA(values, 0.75)
        train(values, 1)
        ema.update()
        raw = {name: x.tobytes() for name, x in values.items()}
        interrupt = Interrupt(error, moment)
        with ema.swapped():
            seen = {name: x.tobytes() for name, x in values.items()}
            with interrupt.within(), ema.swapped(), ema.swapped():
                pass
            assert ema.is_swapped
            assert {name: x.tobytes() for name, x in values.items()} == seen, moment
        assert not ema.is_swapped
        assert {name: x.tobytes() for name, x in values.items()} == raw, moment
        if not interrupt.came:
            break


@pytest.mark.parametrize("error", ERRORS)
def test_real_signals_come_between_averages_and_step_nowhere(error):
    def handler(*_):
        raise error

    size, rng = 30_000, np.random.default_rng(0)  # let go of Python's lock
    values = {"w": np.zeros(size, np.float32), "counter": np.array(0)}
    ema = fastema.EMA(values, 0.5)
    expected, came = np.zeros(size, np.float32), 0
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for n in range(1, 300):
            values["w"][...] = n
            values["counter"][...] = n
            step = ema.step
            with contextlib.suppress(error):
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 2e-4))
                try:
                    ema.update()
                    with ema.swapped():
                        pass
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                came -= 1
            came += 1
            assert ema.step in (step, step + 1)
            if ema.step > step:
                expected += np.float32(0.5) * (np.float32(n) - expected)
            assert not ema.is_swapped
            assert (values["w"] == n).all()
            assert ema.averages["w"].tobytes() == expected.tobytes()
            assert ema.averages["counter"] == (n if ema.step > step else ema.averages["counter"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came > 20  # or nothing was tried


def test_of_evaluations_in_several_threads_each_sees_its_own_averages_or_an_error():
    values = [np.zeros(200_000, np.float32)]
    averages = [fastema.EMA(values, decay) for decay in (0.0, 0.25, 0.5, 0.75)]
    values[0] += 1
    for ema in averages:
        ema.update()
    values[0] += 1
    wrong, done, refused = [], [], []

    def evaluate_often(ema, shown):
        for _ in range(50):
            try:
                with ema.swapped():
                    if not (values[0] == shown).all():
                        wrong.append(shown)
                done.append(shown)
            except RuntimeError as error:
                refused.append(str(error))

    threads = [
        threading.Thread(target=evaluate_often, args=(ema, shown))
        for ema, shown in zip(averages, (1.0, 0.75, 0.5, 0.25), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert done
    assert all("another thread" in text for text in refused)
    assert (values[0] == 2).all()
    assert not any(ema.is_swapped for ema in averages)


def test_evaluations_of_two_tasks_that_overlap_are_refused_before_weights_are_mixed_up():
    values = [np.zeros(3)]
    slow, fast = (fastema.EMA(values, decay) for decay in (0.75, 0.5))
    values[0] += 1
    slow.update()
    fast.update()

    async def evaluate_for(ema, turns):
        with ema.swapped():
            for _ in range(turns):
                await asyncio.sleep(0)

    async def both():
        return await asyncio.gather(evaluate_for(slow, 1), evaluate_for(fast, 3), return_exceptions=True)

    first, second = asyncio.run(both())
    assert "another EMA's averages" in str(first)
    assert second is None
    assert slow.is_swapped
    np.testing.assert_array_equal(values[0], np.full(3, 0.25))
    slow.swap()
    np.testing.assert_array_equal(values[0], np.ones(3))


def test_an_evaluation_can_decorate_a_function_that_calls_itself_no_more_than_once():
    values = [np.zeros(2)]
    ema = fastema.EMA(values, 0.5)
    values[0] += 1
    ema.update()

    @ema.swapped()
    def mean():
        return float(values[0].mean())

    assert [mean(), mean()] == [0.5, 0.5]
    assert values[0].mean() == 1.0


FORKED = """
import os, warnings
import jax.numpy as jnp, numpy as np, fastema

warnings.simplefilter("ignore")  # JAX's own, of any fork
ema = fastema.EMA([jnp.zeros(300_000)], 0.5, background=True)
for n in range(1, 4):
    ema.update([jnp.full(300_000, 2.0**n)])
    if (child := os.fork()) == 0:
        # JAX itself waits for ever in a child
        shown = ema.state_dict()["averages"][0]["0"]
        ema.update([np.zeros(300_000, np.float32)])
        halved = ema.state_dict()["averages"][0]["0"]
        whole = (shown == shown[0]).all() and shown[0] > 0
        os._exit(0 if whole and (halved == shown / 2).all() else 1)
    print(os.waitpid(child, 0)[1])
"""


def test_a_child_of_a_process_that_averages_in_the_background_has_whole_averages_and_goes_on():
    skip_without("jax")
    assert output_of(FORKED).split() == ["0", "0", "0"]
