"""How long an EMA and its memory live, and who has it: `del`, other processes, arrays that go away."""

import gc
import os
import re
import time
import weakref

import numpy as np
import pytest

import fastema
from processes import PATIENCE, output_of


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
    end = time.monotonic() + PATIENCE  # the thread may be about to forget what it has done
    while any(x() is not None for x in alive) and time.monotonic() < end:
        time.sleep(0.01)
    assert [x for x in alive if x() is not None] == []


CALLS = [
    "update()",
    "update([weight + 1])",
    "update(non_finite='skip')",
    "swap()",
    "rebind([weight])",
    "load_state_dict(state)",
    "copy_to()",
    "state_dict()",
    "averages",
]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_does_not_change_its_parents_averages(tmp_path, swapped):
    """A mapped file is shared over a fork: what a child averaged, its parent's averages were."""
    code = f"""
        import os
        import numpy as np
        import fastema

        weight = np.zeros(1000)
        ema = fastema.EMA([weight], 0.5, memory={str(tmp_path / "averages")!r})
        weight += 1
        ema.update()
        state = ema.state_dict()
        if {swapped}:
            ema.swap()
        before = open({str(tmp_path / "averages")!r}, "rb").read()
        child = os.fork()
        if child == 0:
            weight += 1
            for call in {CALLS}:
                try:
                    exec("ema." + call)
                except RuntimeError as error:
                    said = str(error)
                    if {swapped} and "call swap() first" in said:
                        continue
                    assert "forked" in said and "load() them here" in said and str(os.getppid()) in said, said
                else:
                    assert False, call
            if not {swapped}:
                own = fastema.EMA([weight], 0.5, memory={str(tmp_path / "averages")!r})  # anew
                weight += 1
                own.update()
                assert (own.averages[0] == 2.5).all()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        if {swapped}:
            assert (weight == 0.5).all()
            ema.swap()
        assert (weight == 1).all() and (ema.averages[0] == 0.5).all()
        ema.update()
        assert (ema.averages[0] == 0.75).all()
        print("fine")
    """
    assert output_of(code) == "fine"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_averages_of_its_own_in_memory():
    """Without a file a child goes on by itself, as with everything else that it inherits."""
    code = """
        import os
        import numpy as np
        import fastema

        weight = np.ones(1000)
        ema = fastema.EMA([weight], 0.5)
        weight += 1
        child = os.fork()
        if child == 0:
            ema.update()
            os._exit(0 if (ema.averages[0] == 1.5).all() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert (ema.averages[0] == 1).all()
        print("fine")
    """
    assert output_of(code) == "fine"


# --- arrays that go away ------------------------------------------------------------------------------


class Derived(np.ndarray):
    pass


RESIZED = {
    "float": np.ones(1000, np.float32),
    "integer": np.ones(1000, np.int64),
    "boolean": np.ones(1000, bool),
    "complex": np.ones(1000, np.complex64),
    "of a derived class": np.ones(1000, np.float32).view(Derived).copy(),
    "integer of a derived class": np.ones(1000, np.int64).view(Derived).copy(),
}


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000])
@pytest.mark.parametrize("kind", RESIZED)
def test_a_value_that_was_resized_is_noticed_before_anything_moves(kind, size):
    """Its memory was given back: complex values, and those of classes, were read from there."""
    resized, plain = RESIZED[kind].copy(order="K"), np.zeros(3)
    ema = fastema.EMA({"plain": plain, "resized": resized}, 0.5)
    ema.update()
    plain += 1
    resized.resize(100_000, refcheck=False)  # moves it
    resized.resize(size, refcheck=False)
    words = re.escape("values['resized']")
    with pytest.raises((ValueError, RuntimeError), match=words):
        ema.update()
    if size != 1000:
        with pytest.raises((ValueError, RuntimeError), match=words):
            ema.swap()
    assert (ema.step, ema.is_swapped) == (1, False)
    assert (ema.averages["plain"] == 0).all()
    assert (plain == 1).all()


def test_a_view_of_an_array_that_was_resized_is_noticed():
    whole, average = np.ones(1000), np.zeros(900)
    pairs = fastema.Pairs(average, whole[100:])
    whole.resize(1_000_000, refcheck=False)
    with pytest.raises(ValueError, match="values was resized after it was paired"):
        pairs.update(0.5)
    assert (average == 0).all()


# --- arrays that may not be written any more ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
@pytest.mark.parametrize("verb", ["update", "swap"])
def test_an_average_that_was_made_read_only_is_not_written(verb, dtype):
    """It was written all the same: the flags were asked for when it was paired, and never again."""
    weights = {"a": np.zeros(3), "b": np.zeros(3, dtype)}
    ema = fastema.EMA(weights, 0.5)
    ema.update()
    kept = ema.averages
    for weight in weights.values():
        np.copyto(weight, 2)
    kept["b"].flags.writeable = False
    with pytest.raises(ValueError, match=re.escape("averages['b'] must be writable, and is read-only")):
        getattr(ema, verb)()
    assert [x.tolist() for x in (*kept.values(), *weights.values())] == [[0] * 3] * 2 + [[2] * 3] * 2
    assert (ema.step, ema.is_swapped) == (1, False)
    kept["b"].flags.writeable = True
    ema.update()
    assert kept["a"].tolist() == [1.0] * 3


@pytest.mark.parametrize("which", ["averages", "carries", "values"])
def test_what_is_written_and_was_made_read_only_is_refused_by_name(which):
    average, value, carry = (np.full(3, x, np.float32) for x in (0, 4, 0))
    pairs = fastema.Pairs([average], [value], carries=[carry])
    {"averages": average, "carries": carry, "values": value}[which].flags.writeable = False
    if which == "values":
        pairs.update(0.5)  # reads it
        assert average.tolist() == [2] * 3
        pairs = fastema.Pairs([average], [value])
        with pytest.raises(ValueError, match=re.escape("values[0] must be writable, and is read-only")):
            pairs.swap()
        assert value.tolist() == [4] * 3
        return
    with pytest.raises(ValueError, match=re.escape(f"{which}[0] must be writable, and is read-only")):
        pairs.update(0.5)
    assert average.tolist() == carry.tolist() == [0] * 3


# --- masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.complex64])
@pytest.mark.parametrize("way", ["rebound in a dictionary", "given", "rebind", "copy_to", "of JAX"])
def test_an_array_with_a_mask_never_loses_it(way, dtype):
    masked = np.ma.array([1, 2], dtype, mask=[False, True])
    weights = {"a": np.zeros(2, np.float32), "b": np.zeros(2, dtype)}
    given = {"a": weights["a"] + 1, "b": masked}
    if way == "of JAX":
        weights = {name: pytest.importorskip("jax").numpy.asarray(x) for name, x in weights.items()}
    ema = fastema.EMA(weights, 0.5)
    before = {name: np.array(x) for name, x in ema.averages.items()}
    calls = {"rebind": lambda: ema.rebind(given), "copy_to": lambda: ema.copy_to(given)}
    if way == "rebound in a dictionary":
        weights["b"] = masked
        calls[way] = ema.update
    with pytest.raises(TypeError, match="must be an array without a mask, which would be dropped"):
        calls.get(way, lambda: ema.update(given))()
    assert ema.step == 0
    assert given["a"].tolist() == [1.0, 1.0]
    weights["b"] = before["b"]
    ema.rebind(weights)
    assert all((np.asarray(ema.averages[name]) == before[name]).all() for name in before)
