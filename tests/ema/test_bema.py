"""fastema.BEMA: the averages of the paper, and the verbs of an EMA."""

import itertools
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
import oracle
import tolerances
from fastema import BEMA, EMA, checkpoint
from processes import output_of, skip_without

SETTINGS = {
    "as it is": {"every": 1},
    "every third": {"every": 3},
    "other powers": {"every": 1, "ema_power": 0.3, "bias_power": 0.7, "lag": 0, "multiplier": 2.5},
    "a burn-in": {"every": 2, "start_step": 5},
    "a least weight": {"every": 1, "min_decay": 0.5, "multiplier": 50},
    "no average": {"every": 1, "ema_power": 0},
    "all of the way": {"every": 2, "bias_power": 0},
}
DEFAULTS = {"every": 400, "ema_power": 0.5, "bias_power": 0.2, "lag": 10, "multiplier": 1.0, "min_decay": 0.0}
OWN = {"name": "BEMA", **{key: DEFAULTS[key] for key in DEFAULTS if key != "every"}}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


def paper(values, *, start_step=0, **options):
    """Yield mu of algorithm 1 of Block and Zhang 2025 after each step, in float64; values[0] is theta_0.

    theta_0 and both averages begin anew up to step tau; then at each phi-th step
    beta_t = (rho + gamma t)^-kappa and alpha_t = (rho + gamma t)^-eta.
    """
    o = {**DEFAULTS, **options}
    first = ema = average = np.float64(values[0])
    for t, theta in enumerate(map(np.float64, values[1:]), 1):
        if t <= start_step:
            first = ema = average = theta
        elif (t - start_step) % o["every"] == 0:
            beta = max((o["lag"] + o["multiplier"] * t) ** -o["ema_power"], o["min_decay"])
            alpha = (o["lag"] + o["multiplier"] * t) ** -o["bias_power"]
            ema = (1 - beta) * ema + beta * theta
            average = alpha * (theta - first) + ema
        yield average


def replayed(values, dtype, *, start_step=0, **options):
    """Yield the same with our roundings: an EMA's update in `dtype`, the rest in float64, rounded once."""
    o = {**DEFAULTS, **options}
    first = ema = average = np.asarray(values[0], dtype)
    for t, theta in enumerate((np.asarray(x, dtype) for x in values[1:]), 1):
        if t <= start_step:
            first = ema = average = theta
        elif (t - start_step) % o["every"] == 0:
            age = o["lag"] + o["multiplier"] * t
            ema = oracle.update(ema, theta, 1.0 - max(age ** -o["ema_power"], o["min_decay"]))
            way = theta.astype(np.float64) - first
            average = (ema + age ** -o["bias_power"] * way).astype(dtype)
        yield average


def walk(rng, steps, shape=(3, 5), dtype=np.float32):
    """Return weights that go somewhere, with noise."""
    noise = rng.standard_normal((steps + 1, *shape))
    return (noise + 0.25 * np.arange(steps + 1).reshape(-1, *[1] * len(shape))).astype(dtype)


def shown(bema):
    return np.array(bema.averages["w"])


@every_setting
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.float16])
def test_averages_are_those_of_the_paper(rng, setting, dtype):
    options = SETTINGS[setting]
    values = walk(rng, 40, dtype=dtype)
    kept = np.float64 if dtype is np.float64 else np.float32
    weight = {"w": values[0].copy()}
    bema = BEMA(weight, **options)
    assert oracle.same_bits(shown(bema), values[0].astype(kept))
    expected = zip(paper(values, **options), replayed(values, kept, **options), strict=True)
    for value, (exact, bits) in zip(values[1:], expected, strict=True):
        weight["w"][...] = value
        bema.update()
        assert oracle.same_bits(shown(bema), bits)
        rounding = tolerances.FLOAT64 if kept is np.float64 else tolerances.FRAMEWORK
        tolerances.assert_close(shown(bema), exact, rounding)
    assert bema.step == bema.clock == 40


def test_the_arguments_are_by_default_those_of_the_paper(rng):
    values = walk(rng, 801, (4,))
    weight = {"w": values[0].copy()}
    bema = BEMA(weight)
    for value, expected in zip(values[1:], replayed(values, np.float32), strict=True):
        weight["w"][...] = value
        bema.update()
        assert oracle.same_bits(shown(bema), expected)


@every_setting
def test_averages_are_those_of_trl(torch, rng, setting):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    options = SETTINGS[setting]
    renamed = {"every": "update_freq", "start_step": "update_after", "min_decay": "min_ema_multiplier"}
    values = walk(rng, 30, (5,))

    class Model(torch.nn.Module):
        def __init__(self, config=None):
            super().__init__()
            self.config = config
            self.w = torch.nn.Parameter(torch.zeros(5))

    class State:
        global_step = 0

    model, state = Model(), State()
    callback = trl.BEMACallback(**{renamed.get(key, key): x for key, x in options.items()})
    with torch.no_grad():
        model.w.copy_(torch.from_numpy(values[0]))
    callback.on_train_begin(None, state, None, model)
    bema = BEMA(model, **options)
    for state.global_step, value in enumerate(values[1:], 1):
        with torch.no_grad():
            model.w.copy_(torch.from_numpy(value))
        callback.on_step_end(None, state, None, model)
        bema.update()
        # in its burn-in TRL's model stays what it was, where the paper's averages are the weights
        if state.global_step >= options.get("start_step", 0) + options["every"]:
            theirs = callback.running_model.w.detach().numpy()
            tolerances.assert_close(bema.averages["w"].numpy(), theirs, tolerances.FRAMEWORK)


@given(st.integers(0, 30), st.integers(1, 7), st.integers(0, 2**32))
def test_a_weight_that_never_moves_is_its_average(start, every, seed):
    weight = {"w": np.random.default_rng(seed).standard_normal(4).astype(np.float32)}
    bema = BEMA(weight, every=every, start_step=start)
    for _ in range(40):
        bema.update()
    assert oracle.same_bits(shown(bema), weight["w"])


def test_infinities_and_nan_leave_the_first_values_alone():
    weight = {"w": np.array([1.0, 2.0])}
    bema = BEMA(weight, every=1, ema_power=0, bias_power=0)
    weight["w"][:] = np.inf, np.nan
    bema.update()
    weight["w"][:] = 3.0
    bema.update()
    assert shown(bema).tolist() == [5.0, 4.0]  # the value, and its way since the beginning


def test_a_swap_shows_corrected_averages_and_gives_the_weights_back(rng):
    values = walk(rng, 3)
    weight = {"w": values[0].copy(), "counter": np.array(0)}
    bema = BEMA(weight, every=1)
    for value in values[1:]:
        weight["w"][...] = value
        weight["counter"] += 1
        bema.update()
    needed, state = shown(bema), bema.state_dict()
    with bema.swapped():
        assert oracle.same_bits(weight["w"], needed)
        assert oracle.same_bits(shown(bema), needed)
        for old, new in zip(state["averages"], bema.state_dict()["averages"], strict=True):
            assert oracle.same_bits(old["w"], new["w"])
    assert oracle.same_bits(weight["w"], values[-1])
    other = {"w": np.zeros((3, 5), np.float32), "counter": np.array(0)}
    assert bema.copy_to(other) is not None
    assert oracle.same_bits(other["w"], needed)
    assert other["counter"] == 3
    bema.pull()
    assert oracle.same_bits(weight["w"], needed)


def trained(bema, weight, values):
    for value in values:
        weight["w"][...] = value
        bema.update()
    return bema


@every_setting
@pytest.mark.parametrize("steps", [0, 1, 4, 9])
@pytest.mark.parametrize("by", ["file", "dictionary", "file while swapped"])
def test_a_run_goes_on_to_the_bit(rng, tmp_path, setting, steps, by):
    options, values = SETTINGS[setting], walk(rng, 20)
    weight, others = {"w": values[0].copy()}, {"w": np.zeros((3, 5), np.float32)}
    bema = trained(BEMA(weight, **options), weight, values[1 : steps + 1])
    if by == "dictionary":
        resumed = BEMA(others, **options)
        resumed.load_state_dict(bema.state_dict())
    else:
        path = tmp_path / "bema.safetensors"
        if by == "file":
            bema.save(path)
            assert oracle.same_bits(checkpoint.File(path)["w"], shown(bema))
        else:
            with bema.swapped():
                bema.save(path)
        resumed = BEMA.load(path, others)
        if by != "file":
            assert resumed.is_swapped
            resumed.swap()
            assert oracle.same_bits(others["w"], values[steps])
    assert oracle.same_bits(shown(resumed), shown(bema))
    assert resumed.step == steps
    trained(bema, weight, values[steps + 1 :])
    trained(resumed, others, values[steps + 1 :])
    assert oracle.same_bits(shown(resumed), shown(bema))
    assert str(resumed.state_dict()["config"]) == str(bema.state_dict()["config"])


def test_another_process_goes_on_to_the_bit(tmp_path):
    code = """
        import sys
        import numpy as np
        import fastema

        path, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        weights = {"w": np.random.default_rng(99).standard_normal(100).astype(np.float32)}
        bema = fastema.BEMA.load(path, weights) if start else fastema.BEMA(weights, every=3, bias_power=0.3)
        for step in range(start, stop):
            weights["w"][:] = np.random.default_rng(step).standard_normal(100)
            bema.update()
        bema.save(path)
        print(bema.averages["w"].tobytes().hex())
    """
    path = tmp_path / "bema.safetensors"
    output_of(code, path, 0, 7)
    assert output_of(code, path, 7, 12) == output_of(code, tmp_path / "straight.safetensors", 0, 12)


def test_states_of_an_ema_and_of_others_are_told_apart(tmp_path):
    path, weight = tmp_path / "x.safetensors", {"w": np.zeros(2)}
    bema, ema, window = BEMA(weight), EMA(weight, [0.5, 0.5, 0.5]), fastema.Window(weight, 3)
    for one, other in itertools.permutations([bema, ema, window], 2):
        names = [f"fastema.{type(x).__name__}" for x in (one, other)]
        with pytest.raises(ValueError, match=f"state must be of {names[1]}, got one of {names[0]}"):
            other.load_state_dict(one.state_dict())
        one.save(path)
        with pytest.raises(
            ValueError, match=f"must hold the state of {names[1]}, and holds that of {names[0]}"
        ):
            type(other).load(path, weight)
    bema.save(path)
    with pytest.raises(ValueError, match=r"decay must be None for fastema.BEMA, got 0.5"):
        BEMA.load(path, weight, decay=0.5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (None, r"must be an object"),
        ({}, r"must have 'name'"),
        ({"name": "EMA"}, r"must be 'BEMA' or 'Window'"),
        ({"name": None}, r"must be 'BEMA' or 'Window'"),
        ({"name": "BEMA"}, r"must be BEMA with ema_power"),
        ({"name": "Window", "size": 10**12}, r"must be of 3 lists"),
        ({"name": "Window", "size": 3.0}, r"must be a whole number"),
        ({**OWN, "memory": "victim"}, r"must be BEMA with ema_power"),
        ({**OWN, "lag": "x"}, r"must be a finite number"),
        ({**OWN, "lag": -1.0}, r"lag must be from 0, and finite, got -1\.0"),
    ],
)
def test_a_file_is_believed_in_nothing(tmp_path, method, message):
    path, weight = tmp_path / "x.safetensors", {"w": np.zeros(2)}
    BEMA(weight).save(path)
    file = checkpoint.File(path)
    state = json.loads(file.metadata["fastema"])
    state["config"]["method"] = method
    checkpoint.write(path, file, {"fastema": json.dumps(state)})
    kind = fastema.Window if method and method.get("name") == "Window" else BEMA
    with pytest.raises(ValueError, match=message):
        kind.load(path, weight)


def test_the_arrays_may_lie_in_a_file(rng, tmp_path):
    values, options = walk(rng, 10), {"every": 2}
    weight, others = {"w": values[0].copy()}, {"w": values[0].copy()}
    mapped = trained(BEMA(weight, memory=tmp_path / "arrays", **options), weight, values[1:])
    held = trained(BEMA(others, **options), others, values[1:])
    assert (tmp_path / "arrays").stat().st_size >= 3 * weight["w"].nbytes
    assert oracle.same_bits(shown(mapped), shown(held))
    mapped.save(tmp_path / "saved")
    again = BEMA.load(tmp_path / "saved", weight, memory=tmp_path / "others")
    assert oracle.same_bits(shown(again), shown(held))


def test_reset_begins_again_at_the_weights(rng):
    values = walk(rng, 9)
    weight, others = {"w": values[0].copy()}, {"w": values[5].copy()}
    bema = trained(BEMA(weight, every=1), weight, values[1:6])
    bema.reset()
    assert bema.step == 0
    fresh = trained(BEMA(others, every=1), others, values[6:])
    assert oracle.same_bits(shown(trained(bema, weight, values[6:])), shown(fresh))


def test_arrays_of_jax_are_passed_to_each_update(rng):
    skip_without("jax")
    import jax.numpy as jnp

    values = walk(rng, 7)
    bema = BEMA({"w": jnp.asarray(values[0])}, every=2)
    for value, expected in zip(values[1:], replayed(values, np.float32, every=2), strict=True):
        bema.update({"w": jnp.asarray(value)})
        assert oracle.same_bits(shown(bema), expected)


def test_a_module_of_torch_and_its_buffers(torch, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    bema = BEMA(model, every=1)
    values = [model[0].weight.detach().numpy().copy()]
    for seed in range(4):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape))
            model[1].running_mean.add_(1)
        values.append(model[0].weight.detach().numpy().copy())
        bema.update()
    needed = list(replayed(values, np.float32, every=1))[-1]
    assert oracle.same_bits(bema.averages["0.weight"].numpy(), needed)
    state = bema.model_state_dict()
    assert oracle.same_bits(state["0.weight"].numpy(), needed)
    assert (state["1.running_mean"] == 4).all()
    torch.save(bema.state_dict(), tmp_path / "state.pt")
    other = BEMA(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), every=1)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert oracle.same_bits(other.averages["0.weight"].numpy(), needed)
    with pytest.raises(ValueError, match=r"those of fastema.BEMA are corrected when they are shown"):
        bema.module()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, r"every must be 1 or more, got 0"),
        ({"ema_power": -1}, ValueError, r"ema_power must be from 0, and finite, got -1"),
        ({"bias_power": float("inf")}, ValueError, r"bias_power must be from 0, and finite, got inf"),
        ({"lag": "x"}, TypeError, r"lag must be a number from 0, got 'x'"),
        ({"lag": 0.5, "multiplier": 0.25}, ValueError, r"lag and multiplier must add up to 1 or more"),
        ({"min_decay": 1.5}, ValueError, r"min_decay must be from 0 to 1, got 1\.5"),
        ({"start_step": -1}, ValueError, r"start_step must be 0 or more, got -1"),
        ({"dtype": "bfloat16"}, ValueError, r"dtype must be float32 or float64, .* got bfloat16"),
        ({"device": "gpu"}, ValueError, r"device must be None or 'cpu', got 'gpu'"),
        ({"buffers": "all"}, ValueError, r"buffers must be 'copy' or"),
    ],
)
def test_what_it_cannot_be_made_with_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        BEMA({"w": np.zeros(2)}, **options)


def test_what_has_no_meaning_is_refused_and_nothing_has_changed():
    weight = {"w": np.zeros(2)}
    bema = BEMA(weight, every=1)
    with pytest.raises(ValueError, match=r"span must be 1 for fastema.BEMA, .* got 2"):
        bema.update(span=2)
    with pytest.raises(RuntimeError, match=r"step cannot be set for fastema.BEMA"):
        bema.step = 3
    with pytest.raises(IndexError, match=r"k must be from 0 to 0, got 1"):
        bema.averages_of(1)
    assert bema.step == 0
