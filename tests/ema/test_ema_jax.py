"""fastema.EMA with JAX arrays, which never change: new ones at each update, also in the background."""

import gc
import threading
import weakref

import ml_dtypes
import numpy as np
import pytest

import fastema
import oracle
import tolerances


@pytest.fixture
def jnp():
    pytest.importorskip("jax")
    import jax.numpy

    return jax.numpy


def jax_values(jnp, seed, size=5):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.standard_normal((size, 3)), jnp.float32),
        "half": [jnp.asarray(rng.standard_normal(size), jnp.bfloat16)],
        "steps": jnp.asarray(seed),
    }


def test_jax_arrays_are_given_to_each_update(jnp):
    import jax

    values = jax_values(jnp, 0)
    ema = fastema.EMA(values, 0.9)
    expected = np.array(values["w"])
    for seed in (1, 2, 3):
        values = jax.jit(lambda x: x)(jax_values(jnp, seed))  # whose dictionaries are sorted
        ema.update(values)
        expected = oracle.update(expected, np.asarray(values["w"]), 0.9)
    assert isinstance(ema.averages["w"], jax.Array)
    assert oracle.same_bits(np.asarray(ema.averages["w"]), expected)
    assert ema.averages["half"][0].dtype == jnp.float32
    assert ema.averages["steps"] == 3
    written = ema.copy_to()
    assert written["half"][0].dtype == jnp.bfloat16
    assert jax.tree.structure(written) == jax.tree.structure(values)
    with pytest.raises(ValueError, match=r"values must be given: values\['w'\] is a JAX array"):
        ema.update()
    with pytest.raises(TypeError, match=r"swap\(\) must change values\['w'\], which is a JAX array"):
        ema.swap()


def test_averages_of_numpy_s_arrays_may_be_given_jax_arrays(jnp):
    first, given = (
        {k: np.asarray(v) for k, v in jax_values(jnp, 0).items() if k != "half"} for _ in range(2)
    )
    ema = fastema.EMA(given, 0.9)
    values = {k: v for k, v in jax_values(jnp, 1).items() if k != "half"}
    ema.update(values)
    assert oracle.same_bits(ema.averages["w"], oracle.update(first["w"], np.asarray(values["w"]), 0.9))
    assert ema.averages["steps"] == 1
    with pytest.raises(RuntimeError, match="of another library"):
        ema.swap()


def test_complex_averages_of_numpy_s_arrays_may_be_given_jax_arrays(jnp):
    ema = fastema.EMA([np.array([1 + 2j], np.complex64)], 0.5)
    ema.update([jnp.array([3 - 2j])])
    assert ema.averages[0] == 2
    with pytest.raises(TypeError, match=r"values\['0'\] must be complex, as it was at first, got float32"):
        ema.update([jnp.ones(1)])


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "w"), ("float16", "w"), ("float64", "half")])
def test_averages_of_jax_arrays_may_have_fewer_bits_or_twice_more(jnp, dtype, name):
    def values(seed):
        made = jax_values(jnp, seed)[name]
        return made if isinstance(made, list) else [made]

    first = values(0)
    ema = fastema.EMA(first, 0.9, dtype=dtype)
    expected = np.asarray(first[0]).astype(getattr(ml_dtypes, dtype, dtype))
    for seed in (1, 2, 3):
        ema.update(values(seed))
        expected = oracle.update(expected, np.asarray(values(seed)[0]), 0.9)
    kept = ema.state_dict()["averages"][0]["0"]
    assert oracle.same_bits(np.asarray(kept), expected)
    assert ema.copy_to()[0].dtype == first[0].dtype


def test_shown_jax_averages_never_change(jnp):
    """JAX keeps aligned memory of NumPy arrays that it is given, and takes it for unchanging."""
    for size in (1, 16, 1000):
        ema = fastema.EMA(jax_values(jnp, 0, size), 0.5)
        shown, written = ema.averages, ema.copy_to()
        before = np.array(shown["w"]), np.array(written["w"])
        ema.update(jax_values(jnp, 1, size))
        assert oracle.same_bits(np.asarray(shown["w"]), before[0])
        assert oracle.same_bits(np.asarray(written["w"]), before[1])


def test_the_arrays_of_past_steps_are_let_go(jnp):
    values = jax_values(jnp, 0)
    ema = fastema.EMA(values, 0.5)
    later = jax_values(jnp, 1)
    held = [weakref.ref(values["w"]), weakref.ref(later["w"])]
    ema.update(later)
    del values, later
    gc.collect()
    assert [reference() for reference in held] == [None, None]


@pytest.mark.parametrize("background", [False, True])
def test_equal_to_optax(jnp, background):
    optax = pytest.importorskip("optax")
    values = {"w": jax_values(jnp, 0)["w"]}
    ema, rival = fastema.EMA(values, 0.9, background=background), values
    for seed in range(1, 20):
        values = {"w": jax_values(jnp, seed)["w"]}
        ema.update(values)
        rival = optax.incremental_update(values, rival, step_size=0.1)
    tolerances.assert_close(np.asarray(ema.averages["w"]), np.asarray(rival["w"]), tolerances.FRAMEWORK)


@pytest.mark.parametrize("arguments", [{}, {"initial": "zeros"}, {"decay": [0.9, 0.99], "every": 2}], ids=str)
def test_averages_in_the_background_have_the_bits_of_those_in_the_foreground(jnp, arguments):
    import jax

    front = fastema.EMA(jax_values(jnp, 0, 100_000), **arguments)
    back = fastema.EMA(jax_values(jnp, 0, 100_000), background=True, **arguments)
    train = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf - leaf // 3, x))
    values = jax_values(jnp, 1, 100_000)
    for _ in range(8):
        values = train(values)
        back.update(values)  # while the next step runs
        front.update(values)
    assert back.step == 8
    assert back.decay == front.decay
    assert oracle.same_bits(np.asarray(back.averages["w"]), np.asarray(front.averages["w"]))
    a, b = back.state_dict(), front.state_dict()
    assert all(oracle.same_bits(a["averages"][-1][name], b["averages"][-1][name]) for name in ("w", "half.0"))
    assert a["products"] == b["products"]


def test_an_update_returns_before_the_average_is_done_and_readers_wait(jnp, monkeypatch):
    values = jax_values(jnp, 0)
    ema = fastema.EMA(values, 0.5, background=True)
    go, average = threading.Event(), ema._parts.passes.average

    def held(*work, **how):
        go.wait()
        average(*work, **how)

    monkeypatch.setattr(ema._parts.passes, "average", held)
    new = jax_values(jnp, 1)
    ema.update(new)  # would wait for ever, were it not in the background
    threading.Timer(0.05, go.set).start()
    expected = oracle.update(np.asarray(values["w"]), np.asarray(new["w"]), 0.5)
    assert oracle.same_bits(np.asarray(ema.averages["w"]), expected)


@pytest.mark.parametrize("reader", ["wait", "update", "averages", "state_dict", "copy_to"])
def test_an_error_in_the_background_is_raised_by_the_next_call_and_not_counted(jnp, reader):
    values = jax_values(jnp, 0)
    ema = fastema.EMA(values, 0.5, background=True)
    ema.update(values)
    ema.wait()
    ema.update({**values, "w": jnp.zeros((9, 3))})
    calls = {
        "wait": ema.wait,
        "update": lambda: ema.update(values),
        "averages": lambda: ema.averages,
        "state_dict": ema.state_dict,
        "copy_to": ema.copy_to,
    }
    with pytest.raises(ValueError, match=r"averages\['w'\] and values\['w'\] must have one size"):
        calls[reader]()
    assert ema.step == 1
    ema.update(values)
    ema.wait()
    assert ema.step == 2


def test_values_donated_to_a_step_are_refused_and_never_read(jnp):
    import jax

    values = {"w": jnp.ones(1000)}
    ema = fastema.EMA(values, 0.5)
    jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)(values)
    with pytest.raises(RuntimeError, match="values must outlive their averaging, and one was donated"):
        ema.update(values)
    assert ema.averages["w"][0] == 1


def test_a_step_may_donate_what_was_averaged_before(jnp):
    import jax

    train = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    values = {"w": jnp.ones(1000)}
    ema = fastema.EMA(values, 0.5)
    for _ in range(3):
        values = train(values)
        ema.update(values)
    assert ema.averages["w"][0] == 3.125


def test_values_within_jit_are_refused_and_no_step_is_counted(jnp):
    import jax

    ema = fastema.EMA([jnp.zeros(3)])
    with pytest.raises(RuntimeError, match=r"can be read only outside of jax.jit"):
        jax.jit(lambda x: ema.update([x]))(jnp.ones(3))
    assert ema.step == 0
