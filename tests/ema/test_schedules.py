"""The decay of each step, and the averages of other libraries that our schedules give."""

import math
import pickle
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
import installed
import oracle
import tolerances
from fastema import schedules
from ids import shown


@given(st.integers(1, 2**40), st.floats(0, 1), st.integers(0, 2**20))
def test_dynamic_is_the_documented_schedule(step, decay, start):
    assert schedules.dynamic(decay, start)(step) == oracle.decay_at(step, decay, start)
    assert schedules.constant(decay, start)(step) == oracle.decay_at(step, decay, start, dynamic=False)


@pytest.mark.parametrize(("decay", "reached"), [(0.99, 890), (0.999, 8990), (0.9999, 89_990)])
def test_dynamic_reaches_its_limit_when_the_original_does(decay, reached):
    schedule = schedules.dynamic(decay)
    assert schedule(reached - 1) < decay
    assert schedule(reached + 1) == decay


def test_dynamic_is_right_where_float32_cannot_count():
    step = 2**24 + 1
    assert schedules.dynamic(1.0)(step) == (1 + step) / (10 + step) != schedules.dynamic(1.0)(step - 1)


STEPS = [1, 2, 3, 4, 5, 100, 8992, 8993, 10**9]


@pytest.mark.parametrize(
    "schedule", [schedules.dynamic(0.999, 3), schedules.constant(0.999, 3), schedules.equal_weights(3)]
)
def test_a_tensor_gives_the_bits_of_a_number(tf, schedule):
    @tf.function
    def at(step):
        return schedules.compound(schedule.at(tf.cast(step, tf.float64), tf), 7)

    for step in STEPS:
        assert at(tf.constant(step)).numpy() == schedules.compound(schedule(step), 7)


RAISED_TO_A_POWER = [
    schedules.warmup(0.9999, 2.0, 0.75, start_step=2, min_decay=0.1),
    schedules.power(0.05),
    schedules.power(0.1),
    schedules.ramp(0.9999),
    schedules.cosine(0.996, 1.0, 9000),
    schedules.linear(0.996, 0.9999, 9000),
    schedules.growing(0.05, 300.0),
    schedules.growing(0.05),
]


@given(st.integers(0, 2**50))
def test_a_number_gives_the_bits_of_numpys(step):
    for kind in KINDS:
        assert kind()(step) == float(kind().at(np.float64(step), np))


@pytest.mark.parametrize("schedule", RAISED_TO_A_POWER)
def test_a_tensor_gives_the_decay_of_a_number(tf, schedule):
    at = tf.function(lambda step: schedule.at(tf.cast(step, tf.float64), tf))
    for step in STEPS:
        tolerances.assert_close(at(tf.constant(step)).numpy(), schedule(step), tolerances.POWERS)


@pytest.mark.parametrize("schedule", [*RAISED_TO_A_POWER, schedules.equal_weights(3)])
def test_jax_gives_the_decay_of_a_number(schedule):
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        at = jax.jit(lambda step: schedule.at(step.astype(np.float64), jax.numpy))
        for step in STEPS:
            tolerances.assert_close(float(at(jax.numpy.asarray(step))), schedule(step), tolerances.POWERS)


@pytest.mark.parametrize("updates", range(1, 20))
def test_compound_is_a_power(updates):
    assert np.isclose(schedules.compound(0.99, updates), 0.99**updates, rtol=1e-15, atol=0)


KINDS = [
    lambda: schedules.constant(0.9, start_step=2),
    lambda: schedules.dynamic(0.9, start_step=2),
    lambda: schedules.warmup(0.9, 2.0, power=0.75, start_step=3, min_decay=0.5),
    lambda: schedules.equal_weights(7),
    lambda: schedules.half_life(100),
    lambda: schedules.power(0.05),
    lambda: schedules.dynamic(0.9, start_step=2, width=4.5),
    lambda: schedules.ramp(0.99, 30),
    lambda: schedules.cosine(0.5, 0.98, 300),
    lambda: schedules.linear(0.3, 0.98, 300),
    lambda: schedules.growing(0.3, half_life=90),
    lambda: schedules.growing(2.5),
]


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_are_values(kind):
    schedule = kind()
    assert pickle.loads(pickle.dumps(schedule)) == schedule == kind()
    assert len({schedule, kind(), schedules.constant(0.123)}) == 2
    assert [schedule(step) for step in STEPS] == [kind()(step) for step in STEPS]
    assert type(schedule(10)) is float


@pytest.mark.parametrize("kind", KINDS)
def test_decays_rise_and_stay_below_one(kind):
    decays = [kind()(step) for step in range(5000)]
    assert all(0.0 <= d < 1.0 for d in decays)
    assert decays == sorted(decays)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if hasattr(kind(), "start_step")])
def test_before_its_start_a_schedule_copies(kind):
    schedule = kind()
    assert [schedule(step) for step in range(schedule.start_step)] == [0.0] * schedule.start_step


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.constant(1.5), r"decay must be from 0 to 1, got 1\.5"),
        (lambda: schedules.dynamic(math.nan), r"decay must be from 0 to 1, got nan"),
        (lambda: schedules.warmup(-0.1), r"decay must be from 0 to 1, got -0\.1"),
        (lambda: schedules.warmup(0.9, gamma=0.0), r"gamma must be above 0 and finite, got 0\.0"),
        (lambda: schedules.warmup(0.9, power=-1.0), r"power must be above 0 and finite, got -1\.0"),
        (
            lambda: schedules.warmup(0.9, min_decay=0.95),
            r"min_decay must be from 0 to decay, got 0\.95 and 0\.9",
        ),
        (lambda: schedules.equal_weights(0), r"start_step must be at least 1, the first step, got 0"),
        (lambda: schedules.half_life(0), r"updates must be above 0 and finite, got 0"),
        (lambda: schedules.half_life(math.inf), r"updates must be above 0 and finite, got inf"),
        (lambda: schedules.dynamic(0.9, width=0.5), r"width must be at least 1 and finite, got 0\.5"),
        (lambda: schedules.dynamic(0.9, width=math.inf), r"width must be at least 1 and finite, got inf"),
        (lambda: schedules.ramp(1.5), r"decay must be from 0 to 1, got 1\.5"),
        (lambda: schedules.ramp(0.9, 0), r"updates must be above 0 and finite, got 0"),
        (lambda: schedules.cosine(-0.1, 1.0, 10), r"start must be from 0 to 1, got -0\.1"),
        (lambda: schedules.cosine(0.9, 1.1, 10), r"end must be from 0 to 1, got 1\.1"),
        (lambda: schedules.cosine(0.9, 1.0, math.inf), r"updates must be above 0 and finite, got inf"),
        (lambda: schedules.linear(0.9, 1.0, -1), r"updates must be above 0 and finite, got -1"),
        (lambda: schedules.growing(0.0), r"fraction must be above 0 and finite, got 0\.0"),
        (lambda: schedules.growing(0.1, 0), r"half_life must be above 0, got 0"),
        (lambda: schedules.growing(0.1, math.nan), r"half_life must be above 0, got nan"),
        (lambda: schedules.power(0.0), r"sigma_rel must be above 0 and at most 0\.288675 .*, got 0\.0"),
        (lambda: schedules.power(0.29), r"sigma_rel must be above 0 and at most 0\.288675 .*, got 0\.29"),
        (lambda: schedules.power(math.nan), r"sigma_rel must be above 0 .*, got nan"),
    ],
)
def test_what_is_no_schedule_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Each average in use, by our update with our schedule.


@pytest.fixture
def trained(rng):
    """Return the weights after each of 60 steps, in float64; the first row was there before them."""
    return rng.standard_normal((61, 8)).cumsum(axis=0)


def averaged(trained, schedule, start=None):
    """Return our average after each step, from the weights that were there before or from a start."""
    average = np.array(trained[0] if start is None else start)
    history = []
    for step in range(1, len(trained)):
        fastema.update(average, trained[step], schedule(step))
        history.append(average.copy())
    return np.array(history)


def test_keras_use_ema_copies_at_its_first_step(trained):
    pytest.importorskip("tensorflow", reason="tensorflow is not installed")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    variable = keras.Variable(trained[0], dtype="float64")
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.9)
    optimizer.build([variable])
    history = []
    for before, after in pairwise(trained):
        variable.assign(before)
        optimizer.apply([keras.ops.convert_to_tensor(before - after)], [variable])
        history.append(keras.ops.convert_to_numpy(optimizer._model_variables_moving_average[0]).copy())
    ours = averaged(trained, schedules.constant(0.9, start_step=2), start=np.zeros(8))
    tolerances.assert_close(history, ours, tolerances.FLOAT64)


def module_of(torch, values):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.tensor(values))
    return module


@pytest.mark.parametrize("kind", ["constant", "equal_weights"])
def test_torchs_averaged_model(torch, trained, kind):
    from torch.optim import swa_utils

    module = module_of(torch, trained[0])
    theirs = swa_utils.AveragedModel(
        module, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9) if kind == "constant" else None
    )
    history = []
    for values in trained[1:]:
        module.weight.data = torch.tensor(values)
        theirs.update_parameters(module)
        history.append(theirs.module.weight.detach().numpy().copy())
    ours = schedules.constant(0.9, start_step=2) if kind == "constant" else schedules.equal_weights()
    tolerances.assert_close(history, averaged(trained, ours), tolerances.FLOAT64)


def test_equal_weights_are_the_mean_from_the_start_on(trained):
    history = averaged(trained, schedules.equal_weights(5))
    for step in range(5, 61):
        tolerances.assert_close(history[step - 1], trained[5 : step + 1].mean(axis=0), tolerances.FLOAT64)
    assert oracle.same_bits(history[:5], trained[1:6])


@pytest.mark.parametrize("dynamic", [True, False])
def test_tensorflow_addons_starts_one_step_later(trained, dynamic):
    def decay(iterations, start_step=4, average_decay=0.9):
        """`MovingAverage._get_decay` of TensorFlow Addons 0.23, where the present step is not yet counted."""
        if iterations < start_step:
            return 0.0
        k = iterations - start_step
        return min(average_decay, (1 + k) / (10 + k)) if dynamic else average_decay

    theirs = averaged(trained, lambda step: decay(step - 1))
    kind = schedules.dynamic if dynamic else schedules.constant
    assert oracle.same_bits(theirs, averaged(trained, kind(0.9, start_step=4 + 1)))


def test_torch_ema_is_dynamic(torch, trained):
    torch_ema = pytest.importorskip("torch_ema")
    parameter = torch.nn.Parameter(torch.tensor(trained[0]))
    theirs = torch_ema.ExponentialMovingAverage([parameter], decay=0.8, use_num_updates=True)
    history = []
    for values in trained[1:]:
        parameter.data = torch.tensor(values)
        theirs.update()
        history.append(theirs.shadow_params[0].numpy().copy())
    # in float64 they subtract w * (average - value): ours but for the sign of a zero
    assert oracle.same_bits(history, averaged(trained, schedules.dynamic(0.8)))


def decay_of(module, name):
    """Return `get_decay` of a class, which is called on instances without a model."""
    if module is None:
        pytest.skip(f"what defines {name} is not installed")
    return getattr(module, name).get_decay


def decay_of_timm(ours):
    theirs = {"use_warmup": True, "warmup_gamma": ours.gamma, "warmup_power": ours.power}
    return decay_of(installed.timm_utils(), "ModelEmaV3"), theirs


def decay_of_diffusers(ours):
    theirs = {"use_ema_warmup": True, "inv_gamma": ours.gamma, "power": ours.power}
    return decay_of(installed.diffusers_training_utils(), "EMAModel"), theirs


def decay_in_writing(ours):
    """The formula that all of them have."""

    def get_decay(ema, step):
        s = max(0, step - ema.update_after_step - 1)
        decay = 1 - (1 + s / ours.gamma) ** -ours.power
        return 0.0 if s <= 0 else max(min(decay, ema.decay), ema.min_decay)

    return get_decay, {}


@pytest.mark.parametrize("source", [decay_of_timm, decay_of_diffusers, decay_in_writing])
@pytest.mark.parametrize(
    "ours",
    [
        schedules.warmup(0.9999),
        schedules.warmup(0.99, gamma=5.0, power=0.75, start_step=10),
        schedules.warmup(0.9, power=1.0, start_step=3, min_decay=0.7),
    ],
)
def test_warmup_is_that_of_timm_and_diffusers(source, ours):
    get_decay, theirs = source(ours)
    common = {"decay": ours.decay, "update_after_step": ours.start_step, "min_decay": ours.min_decay}
    for step in [*range(1, 300), 31_600, 10**6, 10**7]:
        decay = get_decay(SimpleNamespace(**common, **theirs), step)
        tolerances.assert_close(ours(step), decay, tolerances.POWERS)


def test_warmup_is_that_of_lucidrains(torch, trained):
    ema_pytorch = pytest.importorskip("ema_pytorch")
    module = module_of(torch, trained[0])
    theirs = ema_pytorch.EMA(
        module, beta=0.9, update_after_step=5, update_every=1, inv_gamma=2.0, power=0.75, min_value=0.3
    )
    history = []
    for values in trained[1:]:
        module.weight.data = torch.tensor(values)
        theirs.update()
        history.append(theirs.ema_model.weight.detach().numpy().copy())
    ours = schedules.warmup(0.9, gamma=2.0, power=0.75, start_step=5, min_decay=0.3)
    tolerances.assert_close(history, averaged(trained, ours), tolerances.DECAY_IN_FLOAT32)


# Schedules of which the papers and the code of others give the formula. Here it is written again, by `math`.


def exponential_ramp(step, decay, tau):
    """`ModelEMA` of YOLOv5 and its descendants."""
    return decay * (1 - math.exp(-step / tau))


def byol(step, base, steps):
    """Grill et al. 2020: tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2."""
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


def dino(step, base, final, steps):
    """The cosine that DINO makes in advance, of its step `step`."""
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * step / steps))


def i_jepa(step, first, last, steps):
    """The momentum of I-JEPA's step `step`."""
    return first + step * (last - first) / steps


def stylegan(images, kimg, rampup):
    """StyleGAN2-ADA's decay of a single image, where so many were seen."""
    return 0.5 ** (1 / max(min(kimg * 1000, images * rampup), 1e-8))


@pytest.mark.parametrize(
    ("ours", "theirs", "steps"),
    [
        (schedules.ramp(0.9999), lambda t: exponential_ramp(t, 0.9999, 2000), 20_000),
        (schedules.ramp(0.95, 10), lambda t: exponential_ramp(t, 0.95, 10), 500),
        (schedules.cosine(0.996, 1.0, 1000), lambda t: byol(t, 0.996, 1000), 1000),
        (schedules.cosine(0.9, 0.999, 777), lambda t: dino(t, 0.9, 0.999, 777), 777),
        (schedules.cosine(0.9, 0.2, 50), lambda t: dino(t, 0.9, 0.2, 50), 50),
        (schedules.linear(0.996, 1.0, 1000), lambda t: i_jepa(t, 0.996, 1.0, 1000), 1000),
        (schedules.linear(0.9, 0.1, 7), lambda t: i_jepa(t, 0.9, 0.1, 7), 7),
        (schedules.growing(0.05, 10_000), lambda t: stylegan(t, 10, 0.05), 300_000),
        (schedules.growing(0.3), lambda t: stylegan(t, 1e9, 0.3), 10_000),
        (schedules.dynamic(0.999, width=30), lambda t: min(0.999, (1 + t) / (30 + t)), 40_000),
    ],
    ids=shown,
)
def test_a_schedule_is_the_formula_of_its_source(ours, theirs, steps):
    for step in [*range(1, min(steps, 300)), *range(300, steps, 101), steps]:
        tolerances.assert_close(ours(step), theirs(step), tolerances.POWERS)


@pytest.mark.parametrize("kind", [schedules.cosine, schedules.linear])
@given(start=st.floats(0, 1), end=st.floats(0, 1), updates=st.integers(1, 2**40), later=st.integers(0, 2**50))
def test_what_goes_towards_a_decay_arrives_and_stays_there(kind, start, end, updates, later):
    schedule = kind(start, end, updates)
    assert schedule(updates) == schedule(updates + later) == end
    least, most = sorted((start, end))
    for step in range(1, min(updates, 50)):
        assert 0.0 <= schedule(step) <= 1.0
        tolerances.assert_close(np.clip(schedule(step), least, most), schedule(step), tolerances.POWERS)


@pytest.mark.parametrize("half_life", [math.inf, 9000.0, 40_000.0])
def test_a_growing_half_life_has_the_product_of_millions_of_steps_at_once(half_life):
    schedule = schedules.growing(0.05, half_life)
    steps = np.arange(20_001, 3_000_001, dtype=np.float64)
    halvings = math.fsum(1 / np.minimum(half_life, 0.05 * steps))
    needed = math.log(0.5) * halvings
    tolerances.assert_close(math.log(schedule.over(20_000, 3_000_000)), needed, tolerances.SPANS)


@pytest.mark.parametrize("updates", [1, 3, 1000])
def test_after_a_half_life_half_of_the_start_is_left(updates):
    decay = schedules.half_life(updates)
    left = math.prod(decay(step) for step in range(1, updates + 1))
    tolerances.assert_close(left, 0.5, tolerances.FLOAT64)


@pytest.mark.parametrize("every", [2, 5, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_every_few_steps_is_an_update_at_each_where_weights_stand_still(trained, kind, every):
    schedule = kind()
    blocks = np.repeat(trained[1:9], every, axis=0)
    each = averaged(np.vstack([trained[:1], blocks]), schedule)
    few = averaged(trained[:9], lambda block: schedule.over((block - 1) * every, block * every))
    tolerances.assert_close(few, each[every - 1 :: every], tolerances.FLOAT64)


# --- spans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(t0=st.integers(0, 300), steps=st.integers(0, 500))
def test_over_a_span_the_decay_is_the_product_of_those_in_it(kind, t0, steps):
    needed = math.prod(kind()(t) for t in range(t0 + 1, t0 + steps + 1))
    tolerances.assert_close(kind().over(t0, t0 + steps), needed, tolerances.PRODUCT)
    tolerances.assert_close(schedules.over(kind().__call__, t0, t0 + steps), needed, tolerances.PRODUCT)


@pytest.mark.parametrize("kind", KINDS)
@given(times=st.lists(st.floats(0, 1e4), min_size=3, max_size=3))
def test_spans_add_up(kind, times):
    a, b, c = sorted(times)
    both = kind().over(a, b) * kind().over(b, c)
    tolerances.assert_close(both, kind().over(a, c), tolerances.SPANS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_span_is_many_short_ones(kind):
    times = [0, 3, 20_000, 50_000, 10**6]
    needed = math.prod(kind().over(a, b) for a, b in pairwise(times[1:]))
    tolerances.assert_close(kind().over(times[1], times[-1]), needed, tolerances.SPANS)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_gives_the_decay_over_a_span(tf, kind, steps):
    jax = pytest.importorskip("jax")
    traced = tf.function(lambda step: kind().at_once(tf.cast(step, tf.float64), steps, tf))
    for step in (steps, 2 * steps, 50 * steps):
        needed = kind().over(step - steps, step)
        tolerances.assert_close(traced(tf.constant(step)).numpy(), needed, tolerances.SPANS)
        with jax.enable_x64(True):
            at_once = jax.jit(lambda x: kind().at_once(x.astype(np.float64), steps, jax.numpy))
            got = float(at_once(jax.numpy.asarray(step)))
        tolerances.assert_close(got, needed, tolerances.SPANS)


@pytest.mark.parametrize(("t0", "t1"), [(-1, 2), (3, 2), (0, math.inf), (math.nan, 1)])
def test_a_span_runs_from_nothing_upwards(t0, t1):
    with pytest.raises(ValueError, match="t0 and t1 must be finite and 0 <= t0 <= t1, got "):
        schedules.dynamic(0.9).over(t0, t1)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25, 12**-0.5])
def test_power_weighs_steps_with_its_relative_standard_deviation(sigma_rel):
    schedule, last = schedules.power(sigma_rel), 20_000
    decays = np.array([schedule(step) for step in range(1, last + 1)])
    later = np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)
    shares = (1 - decays) * later
    steps = np.arange(1, last + 1) - 0.5
    mean = shares @ steps
    spread = math.sqrt(shares @ (steps - mean) ** 2) / last
    tolerances.assert_close(spread, sigma_rel, tolerances.STEPS)


def test_powers_exponent_is_the_papers_root():
    post_hoc_ema = pytest.importorskip("ema_pytorch.post_hoc_ema")
    for sigma_rel in np.linspace(0.001, 0.288, 50):
        gamma = schedules.power(sigma_rel).gamma
        tolerances.assert_close(gamma, post_hoc_ema.sigma_rel_to_gamma(sigma_rel), tolerances.FLOAT64)
    tolerances.assert_close(schedules.power(12**-0.5)(10), schedules.equal_weights()(10), tolerances.FLOAT64)


@pytest.mark.parametrize(
    "schedule",
    [schedules.constant(0.9), schedules.dynamic(0.9), schedules.half_life(20), schedules.constant(0.0)],
)
def test_the_bias_of_a_zero_start_is_the_product_of_all_decays(schedule):
    history = averaged(np.ones((61, 3)), schedule, start=np.zeros(3))
    left = np.cumprod([schedule(step) for step in range(1, 61)])
    tolerances.assert_close(history, np.repeat(1 - left[:, None], 3, axis=1), tolerances.FLOAT64)


def test_optax_debiases_by_that_product(trained):
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    with jax.enable_x64(True):
        theirs = optax.ema(0.9, debias=True)
        state = theirs.init(jax.numpy.asarray(trained[0]))
        history = []
        for values in trained[1:]:
            debiased, state = theirs.update(jax.numpy.asarray(values), state)
            history.append(np.asarray(debiased))
    ours = averaged(trained, schedules.constant(0.9), start=np.zeros(8))
    left = np.cumprod([schedules.constant(0.9)(step) for step in range(1, 61)])
    tolerances.assert_close(history, ours / (1 - left[:, None]), tolerances.FLOAT64)
