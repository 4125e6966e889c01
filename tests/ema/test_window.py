"""fastema.Window: the mean of the last snapshots, exact whatever came before."""

import functools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from fastema import Window, checkpoint
from fastema._types import narrowed
from processes import output_of, skip_without

KINDS = {
    np.float16: np.float32,
    ml_dtypes.bfloat16: np.float32,
    np.float32: np.float32,
    np.float64: np.float64,
}


def mean(snapshots, dtype):
    """Return the mean in float64, one addition at a time from the oldest on, rounded once."""
    total = np.zeros(snapshots[0].shape)
    for snapshot in snapshots:
        total = total + snapshot.astype(np.float64)
    return narrowed(total / len(snapshots), np.dtype(dtype))


def shown(window):
    return np.array(window.averages["w"])


def trained(window, weight, values):
    for value in values:
        weight["w"][...] = value
        window.update()
    return window


@pytest.mark.parametrize(("size", "every", "start"), [(1, 1, 0), (3, 1, 0), (3, 4, 0), (5, 2, 9), (10, 1, 0)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda x: x.__name__)
def test_the_mean_is_that_of_the_last_snapshots(rng, size, every, start, kind):
    values = (10 ** rng.uniform(-3, 3, (30, 3, 5)) * rng.standard_normal((30, 3, 5))).astype(kind)
    weight = {"w": values[0].copy(), "counter": np.array(0)}
    window, taken = Window(weight, size, every=every, start_step=start), []
    for step, value in enumerate(values, 1):
        weight["w"][...] = value
        weight["counter"][...] = step
        window.update()
        if step % every == 0 and step >= start:
            taken.append(value)
        needed = mean(taken[-size:], KINDS[kind]) if taken else value.astype(KINDS[kind])
        assert oracle.same_bits(shown(window), needed)
        assert window.averages["counter"] == (step // every * every if taken else step)
    assert window.step == window.clock == 30
    assert window.decay is None


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12))
def test_a_mean_is_added_up_in_float64_from_the_oldest_on_and_rounded_once(values):
    weight = {"w": np.zeros((), np.float32)}
    window = trained(Window(weight, 4), weight, values)
    last = np.float32(values[-4:]).astype(np.float64)
    assert oracle.same_bits(shown(window), np.float32(functools.reduce(np.add, last) / len(last)))


def test_nothing_is_left_of_what_went_out_of_it():
    """A sum in which weights come and go would keep what rounding lost of 1e30, and NaN for ever."""
    weight = {"w": np.zeros(2, np.float32)}
    window = trained(Window(weight, 3), weight, [[1e30, np.nan], [np.inf, -np.inf], [1, 1], [2, 2], [6, 6]])
    assert shown(window).tolist() == [3, 3]


def test_a_mean_does_not_overflow():
    weight = {"w": np.zeros(1, np.float16)}
    window = trained(Window(weight, 3), weight, [[6e4], [6e4], [6e4]])
    assert shown(window).tolist() == [np.float32(np.float16(6e4))]


def test_a_swap_shows_the_mean_and_gives_the_weights_back(rng):
    values = rng.standard_normal((4, 3, 5)).astype(ml_dtypes.bfloat16)
    weight = {"w": values[0].copy()}
    window = trained(Window(weight, 3), weight, values)
    needed = shown(window).astype(ml_dtypes.bfloat16)
    with window.swapped():
        assert oracle.same_bits(weight["w"], needed)
        with pytest.raises(RuntimeError, match="update"):
            window.update()
    assert oracle.same_bits(weight["w"], values[-1])
    other = {"w": np.zeros((3, 5), np.float64)}
    window.copy_to(other)
    assert oracle.same_bits(other["w"], shown(window).astype(np.float64))
    window.pull()
    assert oracle.same_bits(weight["w"], needed)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 6, 13])
@pytest.mark.parametrize("by", ["file", "dictionary", "file while swapped"])
def test_a_run_goes_on_to_the_bit(rng, tmp_path, steps, by):
    values = rng.standard_normal((20, 3, 5)).astype(np.float32)
    weight, others = {"w": values[0].copy()}, {"w": np.zeros((3, 5), np.float32)}
    window = trained(Window(weight, 4, every=2), weight, values[:steps])
    if by == "dictionary":
        resumed = Window(others, 4, every=2)
        resumed.load_state_dict(window.state_dict())
    else:
        path = tmp_path / "window.safetensors"
        if by == "file":
            window.save(path)
            assert oracle.same_bits(checkpoint.File(path)["w"], shown(window))
        else:
            with window.swapped():
                window.save(path)
        resumed = Window.load(path, others)
        if by != "file":
            resumed.swap()
    if steps != 1:  # before the first snapshot the weights of now are shown
        assert oracle.same_bits(shown(resumed), shown(window))
    for value in values[steps:]:
        trained(window, weight, [value])
        trained(resumed, others, [value])
        assert oracle.same_bits(shown(resumed), shown(window))
    assert oracle.same_bits(shown(window), mean(values[13::2], np.float32))


def test_another_process_goes_on_to_the_bit(tmp_path):
    code = """
        import sys
        import numpy as np
        import fastema

        path, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        weights = {"w": np.zeros(100, np.float32)}
        window = fastema.Window.load(path, weights) if start else fastema.Window(weights, 3, every=2)
        for step in range(start, stop):
            weights["w"][:] = np.random.default_rng(step).standard_normal(100)
            window.update()
        window.save(path)
        print(window.averages["w"].tobytes().hex())
    """
    path = tmp_path / "window.safetensors"
    output_of(code, path, 0, 9)
    assert output_of(code, path, 9, 15) == output_of(code, tmp_path / "straight.safetensors", 0, 15)


def test_snapshots_may_lie_in_a_file(rng, tmp_path):
    values = rng.standard_normal((9, 3, 5)).astype(np.float32)
    weight = {"w": values[0].copy()}
    window = trained(Window(weight, 4, memory=tmp_path / "snapshots"), weight, values)
    assert (tmp_path / "snapshots").stat().st_size >= 4 * weight["w"].nbytes
    assert oracle.same_bits(shown(window), mean(values[-4:], np.float32))


def test_snapshots_may_be_files(rng, tmp_path):
    """Saved by whatever saves weights, and averaged piece by piece."""
    values = rng.standard_normal((6, 3, 5)).astype(np.float32)
    paths = [tmp_path / f"{step}.safetensors" for step in range(6)]
    weight = {"w": values[0].copy()}
    window = trained(Window(weight, 4), weight, values)
    for path, value in zip(paths, values, strict=True):
        checkpoint.write(path, {"w": value})
    checkpoint.average(paths[-4:], tmp_path / "mean.safetensors")
    assert oracle.same_bits(checkpoint.File(tmp_path / "mean.safetensors")["w"], shown(window))


def test_a_step_that_is_skipped_takes_no_snapshot():
    weight = {"w": np.zeros(1)}
    window = Window(weight, 2)
    for value in (1.0, np.nan, 3.0, np.inf, 5.0):
        weight["w"][:] = value
        window.update(non_finite="skip")
    assert window.step == 5
    assert shown(window).tolist() == [4.0]


def test_reset_forgets_all_snapshots():
    weight = {"w": np.zeros(1)}
    window = trained(Window(weight, 3), weight, [1.0, 2.0])
    weight["w"][:] = 7.0
    window.reset()
    assert (window.step, shown(window).tolist()) == (0, [7.0])
    assert shown(trained(window, weight, [8.0])).tolist() == [8.0]


def test_values_of_several_libraries_and_types(rng):
    skip_without("jax")
    import jax.numpy as jnp

    values = rng.standard_normal((5, 4))
    window = Window({"w": jnp.asarray(values[0], jnp.bfloat16), "c": jnp.zeros(2, jnp.complex64)}, 3)
    for value in values:
        window.update(
            {"w": jnp.asarray(value, jnp.bfloat16), "c": jnp.asarray(value[:2] * 1j, jnp.complex64)}
        )
    taken = values.astype(ml_dtypes.bfloat16)
    assert oracle.same_bits(shown(window), mean(taken[-3:], np.float32))
    complexes = mean(values[-3:, :2].astype(np.float32), np.float32)
    assert oracle.same_bits(np.asarray(window.averages["c"]).imag, complexes)


def test_many_snapshots_of_a_module(torch):
    model = torch.nn.Linear(3, 2)
    window, taken = Window(model, 12), []
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        window.update()
        taken.append(model.weight.detach().numpy().copy())
    assert oracle.same_bits(window.averages["weight"].numpy(), mean(taken[-12:], np.float32))
    with pytest.raises(ValueError, match=r"those of fastema.Window are made of its snapshots"):
        window.module()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, r"size must be 1 or more, got 0"),
        ({"size": 2.5}, TypeError, r"size must be a whole number, got 2\.5"),
        ({"size": 2, "every": 0}, ValueError, r"every must be 1 or more, got 0"),
    ],
)
def test_what_it_cannot_be_made_with_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Window({"w": np.zeros(2)}, **arguments)


def test_what_has_no_meaning_is_refused_and_nothing_has_changed():
    weight = {"w": np.zeros(2)}
    window = Window(weight, 2)
    other = Window(weight, 3)
    with pytest.raises(ValueError, match=r"span must be 1 for fastema.Window, .* got 0\.5"):
        window.update(span=0.5)
    with pytest.raises(RuntimeError, match=r"step cannot be set for fastema.Window"):
        window.step = 3
    with pytest.raises(ValueError, match=r"state"):
        window.load_state_dict(other.state_dict())
    assert window.step == 0
