"""EMA.update(non_finite=...): what a step of infinities or NaN does to averages, and what it need not do."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
import oracle
import tolerances
from fastema import schedules
from ids import shown
from processes import output_of, skip_without
from torch_ranks import run

BAD = [np.nan, np.inf, -np.inf]
every_bad_number = pytest.mark.parametrize("bad", BAD)


def weights():
    return {
        "half": np.ones((2, 3), ml_dtypes.bfloat16),
        "single": np.ones(70_000, np.float32),
        "nothing": np.zeros((0, 3)),
        "count": np.arange(3),
        "double": np.array(1.0),
    }


def bits_of(ema):
    state = ema.state_dict()
    arrays = {f"{key}.{k}": x for key in ("averages", "carries") for k, x in enumerate(state[key])}
    arrays |= {"copied": state["copied"]}
    numbers = [state.get(key) for key in ("step", "clock", "averaged", "decay", "products", "swapped")]
    return numbers, {key: {name: x.tobytes() for name, x in group.items()} for key, group in arrays.items()}


FORMS = {
    "plain": {"decay": 0.9},
    "schedule": {"decay": schedules.dynamic(0.99)},
    "several": {"decay": [0.9, 0.5]},
    "zeros": {"decay": 0.9, "initial": "zeros"},
    "before the start": {"decay": 0.9, "start_step": 9},
    "wide": {"decay": 0.9, "dtype": np.float64},
}
every_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


def made(options):
    values = weights()
    if options.get("dtype") is np.float64:  # which has no mix with 16 bits
        del values["half"]
    return values, fastema.EMA(values, **options)


# --- average ----------------------------------------------------------------------------------------------


@every_bad_number
def test_unless_asked_otherwise_one_step_stays_in_the_average_for_ever(bad):
    weight = np.ones(3)
    ema, asked = fastema.EMA(weight, 0.5), fastema.EMA(weight, 0.5)
    for number in (bad, *[1.0] * 20):
        weight[1] = number
        ema.update()
        asked.update(non_finite="average")
    for averages in (ema.averages, asked.averages):
        assert np.isfinite(averages).tolist() == [True, False, True]


# --- raise ------------------------------------------------------------------------------------------------


@every_form
@every_bad_number
@pytest.mark.parametrize("name", ["half", "single", "double"])
def test_an_error_names_the_value_and_nothing_has_changed(options, bad, name):
    values, ema = made(options)
    if name not in values:
        pytest.skip("this form has no such value")
    for steps in range(3):  # the first, and later ones
        before = bits_of(ema)
        last = tuple(n - 1 for n in values[name].shape)
        good = values[name][last]
        values[name][last] = bad
        values["count"] += 1
        message = rf"values\['{name}'\] must be finite, got {bad} at {re.escape(str(last))}; .*='skip'"
        with pytest.raises(FloatingPointError, match=message):
            ema.update(non_finite="raise")
        assert bits_of(ema) == before
        assert ema.step == steps
        values[name][last] = good
        ema.update(non_finite="raise")


@pytest.mark.parametrize("non_finite", ["raise", "skip"])
@every_form
def test_where_all_are_finite_a_look_changes_no_bit(options, non_finite, rng):
    (values, ema), (others, expected) = made(options), made(options)
    for _ in range(4):
        for name, x in values.items():
            x[...] = others[name][...] = rng.integers(-99, 99, x.shape)
        ema.update(non_finite=non_finite)
        expected.update()
        assert bits_of(ema) == bits_of(expected)


def test_what_is_copied_is_not_looked_at(torch):
    model = torch.nn.BatchNorm1d(2)
    ema = fastema.EMA(model, 0.5)
    model.running_mean[0] = float("nan")
    ema.update(non_finite="raise")
    assert torch.isnan(ema.averages["running_mean"]).tolist() == [True, False]
    model.running_mean[0] = 1.0
    ema.update(non_finite="raise")
    assert ema.averages["running_mean"].tolist() == [1.0, 0.0]


def test_where_no_average_moves_nothing_is_looked_at():
    weight = np.ones(2)
    ema = fastema.EMA(weight, 0.5, every=3)
    weight[:] = np.nan
    for _ in range(2):
        ema.update(non_finite="raise")
    with pytest.raises(FloatingPointError, match=r"^values.* must be finite, got nan"):
        ema.update(non_finite="raise")
    assert ema.step == 2


# --- skip -------------------------------------------------------------------------------------------------


def replayed(start, values, decay, every=1, first=0):
    """Return averages by the definition: the next average takes the time of a step that is not finite."""
    average, taken, shown = start, 0, []
    for step, value in enumerate(values, start=1):
        if (step % every == 0 or step < first) and np.isfinite(value):
            product = 1.0
            for t in range(taken + 1, step + 1):
                product *= 0.0 if t < first else decay(t) if callable(decay) else decay
            average, taken = product * average + (1 - product) * value, step
        shown.append(average)
    return shown


DECAYS = [
    0.9,
    schedules.dynamic(0.95),
    schedules.power(0.1),
    schedules.equal_weights(),
    lambda t: 1 - 0.5 / t,
]


@pytest.mark.parametrize("decay", DECAYS, ids=shown)
@given(
    every=st.integers(1, 3),
    first=st.integers(0, 6),
    bad=st.lists(st.sampled_from([0.0, 0.0, *BAD]), min_size=1, max_size=15),
    seed=st.integers(0, 99),
)
def test_the_next_update_has_the_decay_of_all_the_time_since_the_last(decay, every, first, bad, seed):
    values = np.random.default_rng(seed).standard_normal(len(bad)) + bad
    weight = np.array(3.0)
    ema = fastema.EMA({"w": weight}, decay, every=every, start_step=first)
    expected = replayed(3.0, values, decay, every, first)
    for step, (value, average) in enumerate(zip(values, expected, strict=True), start=1):
        weight[()] = value
        ema.update(non_finite="skip")
        tolerances.assert_close(ema.state_dict()["averages"][0]["w"], average, tolerances.CLOCK)
        assert ema.step == ema.clock == step


def test_a_skipped_step_takes_its_span():
    weight = np.array(0.0)
    ema = fastema.EMA(weight, 0.5)
    for value, span in ((np.nan, 2), (8.0, 1), (np.inf, 0.5), (8.0, 1.5)):
        weight[()] = value
        ema.update(span=span, non_finite="skip")
    assert ema.clock == 5
    assert ema.step == 4
    assert ema.averages == 8.0 - 8.0 * 0.5**5


@every_form
def test_a_skipped_step_moves_and_copies_nothing(options):
    values, ema = made(options)
    ema.update()
    before = bits_of(ema)
    values["count"] += 5
    values["single"][-1] = np.inf
    ema.update(non_finite="skip")
    assert bits_of(ema)[1] == before[1]
    assert ema.step == ema.clock == 2
    values["single"][-1] = 1.0
    ema.update(non_finite="skip")
    assert ema.averages["count"].tolist() == values["count"].tolist()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("initial", ["values", "zeros"])
def test_a_first_average_that_is_skipped_shows_where_averages_started(every, initial, tmp_path):
    weight = np.ones(2)
    ema = fastema.EMA({"w": weight}, 0.5, every=every, initial=initial)
    weight[:] = np.nan
    for _ in range(every):
        ema.update(non_finite="skip")
    assert ema.averages["w"].tolist() == [1.0, 1.0]
    assert ema.decay == 1.0
    ema.save(tmp_path / "ema.safetensors")
    other = np.zeros(2)
    again = fastema.EMA.load(tmp_path / "ema.safetensors", {"w": other})
    assert bits_of(again) == bits_of(ema)
    with ema.swapped():
        assert weight.tolist() == [1.0, 1.0]
    assert np.isnan(weight).all()
    weight[:] = other[:] = 5.0
    for _ in range(every):
        ema.update(non_finite="skip")
        again.update(non_finite="skip")
    part = 0.5 ** (2 * every)
    assert ema.averages["w"].tolist() == [part * 1.0 + (1 - part) * 5.0 if initial == "values" else 5.0] * 2
    assert bits_of(again) == bits_of(ema)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_every_rounding_can_skip(rounding, rng):
    steps = [rng.standard_normal(100).astype(ml_dtypes.bfloat16) for _ in range(3)]
    poisoned = steps[1].copy()
    poisoned[50] = np.nan
    weight = np.ones(100, ml_dtypes.bfloat16)
    options = {"dtype": ml_dtypes.bfloat16, "rounding": rounding}
    ema = fastema.EMA(weight.copy(), 0.9, **options)
    expected = fastema.EMA(weight.copy(), 0.9, **options)
    ema.update(steps[0])
    expected.update(steps[0])
    ema.update(poisoned, non_finite="skip")
    assert bits_of(ema)[1] == bits_of(expected)[1]
    ema.update(steps[2], non_finite="skip")
    assert np.isfinite(ema.averages.astype(np.float32)).all()


# --- libraries --------------------------------------------------------------------------------------------


def test_a_module_of_torch(torch):
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    ema = fastema.EMA(model, 0.5)
    before = {name: x.clone() for name, x in ema.averages.items()}
    with torch.no_grad():
        model.bias[1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"values\['bias'\] must be finite, got inf at \(1,\)"):
        ema.update(non_finite="raise")
    ema.update(non_finite="skip")
    assert all(torch.equal(x, before[name]) for name, x in ema.averages.items())
    model.bias.data = torch.zeros(2, dtype=torch.bfloat16)
    ema.update(non_finite="skip")  # which looks where it is now
    assert torch.equal(ema.averages["bias"], 0.25 * before["bias"])  # of both steps that were counted


@pytest.mark.parametrize("background", [False, True])
def test_arrays_of_jax(background):
    jnp = pytest.importorskip("jax").numpy
    values = {"w": jnp.ones(3), "b": jnp.zeros(())}
    ema = fastema.EMA(values, 0.5, background=background)
    expected = fastema.EMA(values, 0.5)
    bad = {"w": values["w"].at[2].set(jnp.nan), "b": values["b"]}
    ema.update({"w": values["w"] + 2, "b": values["b"]}, non_finite="skip")
    ema.update(bad, non_finite="skip")
    ema.update(bad, span=2, non_finite="skip")
    if background:
        ema.update(bad, non_finite="raise")
        with pytest.raises(FloatingPointError, match=r"values\['w'\] must be finite, got nan at \(2,\)"):
            ema.wait()
    else:
        with pytest.raises(FloatingPointError, match=r"values\['w'\] must be finite, got nan at \(2,\)"):
            ema.update(bad, non_finite="raise")
    assert (ema.step, ema.clock) == (3, 4)
    assert np.asarray(ema.averages["w"]).tolist() == [2.0] * 3
    ema.update(values, non_finite="skip")
    expected.update({"w": values["w"] + 2, "b": values["b"]})
    expected.update(values, span=4)
    assert oracle.same_bits(np.asarray(ema.averages["w"]), np.asarray(expected.averages["w"]))
    assert (ema.step, ema.clock, ema.decay) == (4, 5, 0.5**4)


def test_variables_of_tensorflow():
    tf = pytest.importorskip("tensorflow")
    variables = [tf.Variable([1.0, 2.0]), tf.Variable(tf.cast([1, 2], tf.bfloat16))]
    ema = fastema.EMA(variables, 0.5)
    variables[1].assign(tf.cast([1.0, float("nan")], tf.bfloat16))
    with pytest.raises(FloatingPointError, match=r"values\['1'\] must be finite, got nan at \(1,\)"):
        ema.update(non_finite="raise")
    ema.update(non_finite="skip")
    assert [average.numpy().tolist() for average in ema.averages] == [[1.0, 2.0], [1.0, 2.0]]


def test_shards_of_jax_in_one_process():
    skip_without("jax")
    program = """
        import os
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
        import jax, numpy as np
        import fastema
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        mesh = Mesh(np.array(jax.devices()), ("x",))
        rows = NamedSharding(mesh, PartitionSpec("x"))
        values = {"w": jax.device_put(np.ones((8, 2), np.float32), rows)}
        ema = fastema.EMA(values, 0.5)
        bad = np.full((8, 2), 3, np.float32)
        bad[5, 1] = np.inf
        ema.update({"w": jax.device_put(bad, rows)}, non_finite="skip")
        print(ema.step, (np.asarray(ema.averages["w"]) == 1).all())
        try:
            ema.update({"w": jax.device_put(bad, rows)}, non_finite="raise")
        except FloatingPointError as error:
            print("values['w'] must be finite, got inf" in str(error))
    """
    assert output_of(program) == "1 True\nTrue"


def test_shards_of_several_processes_are_refused_by_name_and_nothing_changes(tmp_path):
    run(
        2,
        tmp_path,
        """
line = init_device_mesh("cpu", (2,))
weight = distribute_tensor(torch.ones(4, 2), line, [Shard(0)])
ema = fastema.EMA({"w": weight}, 0.5)
for how in ("raise", "skip"):
    try:
        ema.update(non_finite=how)
    except ValueError as error:
        assert "non_finite must be 'average' where each process" in str(error) and "values['w']" in str(error)
    else:
        raise AssertionError("each process would decide alone")
assert ema.step == 0
copies = distribute_tensor(torch.ones(4, 2), line, [Replicate()])
ema = fastema.EMA({"w": copies}, 0.5)
ema.update(non_finite="raise")
assert ema.step == 1
""",
    )


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("non_finite", ["ignore", None, True])
def test_another_choice_is_refused_and_nothing_changes(non_finite):
    weight = np.ones(2)
    ema = fastema.EMA(weight, 0.5)
    weight += 1
    with pytest.raises(ValueError, match="non_finite must be 'average' or 'raise' or 'skip', got"):
        ema.update(non_finite=non_finite)
    assert ema.step == 0
    assert ema.averages.tolist() == [1.0, 1.0]


def test_while_swapped_no_step_is_skipped():
    weight = np.full(2, np.nan)
    ema = fastema.EMA(weight, 0.5)
    with ema.swapped(), pytest.raises(RuntimeError, match=r"update\(\) needs the weights"):
        ema.update(non_finite="skip")
    assert ema.step == 0
