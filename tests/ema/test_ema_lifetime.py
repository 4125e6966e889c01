"""How long an EMA and its memory live, and who has it: `del`, other processes, arrays that go away."""

import gc
import time
import weakref

import numpy as np
import pytest

import fastema


@pytest.fixture
def no_collector():
    """Have only counts of references free things."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def memory_of(ema):
    """Return what tells if the averages' own memory is alive."""
    array = ema._parts.averages.by_decay[0][0][0]
    while isinstance(array.base, np.ndarray):
        array = array.base
    assert array.base is None or not isinstance(array.base, np.ndarray)
    return weakref.ref(array)


def parts_of(ema):
    return [weakref.ref(x) for x in (ema, *ema._parts[:4], *ema._parts.values.leaves)]


KINDS = [
    {},
    {"decay": [0.9, 0.99], "initial": "zeros"},
    {"decay": lambda _: 0.5, "every": 2, "start_step": 3},
    {"dtype": "bfloat16", "rounding": "compensated"},
    {"memory": "averages"},
]


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("arguments", KINDS, ids=lambda x: "-".join(x) or "plain")
def test_del_frees_an_ema_at_once(tmp_path, arguments, library):
    """Gigabytes must not wait for the cyclic collector, which knows nothing of their size."""
    if "memory" in arguments:
        arguments = {**arguments, "memory": tmp_path / arguments["memory"]}
    weights = [np.ones(1000, np.float32), np.ones((2, 3), np.float32)]
    if library == "torch":
        weights = [*map(pytest.importorskip("torch").from_numpy, weights)]
    ema = fastema.EMA(weights, **arguments)
    alive = [memory_of(ema), *parts_of(ema)]
    ema.update()
    ema.update(non_finite="skip")
    with ema.swapped():
        pass
    with pytest.raises(ValueError, match="values"):
        ema.update([weights[0]])
    ema.save(tmp_path / "saved.safetensors")
    ema.load_state_dict(ema.state_dict())
    ema.copy_to()
    ema.update([x + 1 for x in weights])
    ema.update()
    ema.swap()
    del ema
    assert [x for x in alive if x() is not None] == []


@pytest.mark.usefixtures("no_collector")
def test_del_frees_an_ema_in_the_background():
    weights = [pytest.importorskip("jax").numpy.ones(n) for n in (1000, 3)]
    ema = fastema.EMA(weights, background=True)
    alive = [memory_of(ema), *parts_of(ema)]
    for _ in range(3):
        ema.update(weights)
    ema.wait()
    del ema
    end = time.monotonic() + 60  # the thread may be about to forget what it has done
    while any(x() is not None for x in alive) and time.monotonic() < end:
        time.sleep(0.01)
    assert [x for x in alive if x() is not None] == []
