"""EMA.save and EMA.load: a run that was stopped goes on as if it never was, and others read its averages."""

import errno
import json
import os
import re
import shutil
import tracemalloc
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import golden
import oracle
from fastema import EMA, checkpoint, schedules
from processes import output_of, skip_without

CONFIGURATIONS = {
    "fixed": {"decay": 0.9},
    "schedule": {"decay": schedules.dynamic(0.99, start_step=2)},
    "width": {"decay": schedules.dynamic(0.99, width=4)},
    "growing without a limit": {"decay": [schedules.growing(0.1), schedules.growing(0.2, 7)]},
    "ways": {"decay": [schedules.ramp(0.99), schedules.cosine(0.5, 1, 9), schedules.linear(0.5, 0.9, 9)]},
    "several": {"decay": [0.5, schedules.constant(0.9), schedules.dynamic(0.99)]},
    "one of several": {"decay": [0.5]},
    "every third": {"decay": schedules.dynamic(0.99), "every": 3},
    "from a step on": {"decay": 0.9, "start_step": 4},
    "zeros": {"decay": 0.9, "initial": "zeros"},
    "several from zeros": {"decay": [0.0, 0.9], "initial": "zeros", "every": 2},
    "stochastic": {"decay": 0.99, "rounding": "stochastic", "dtype": "bfloat16", "seed": 7, "every": 2},
    "compensated": {"decay": [0.999, 0.9], "rounding": "compensated"},
    "wide": {"decay": 0.9, "dtype": "float64"},
}


def weights_at(step, dtype=None):
    """Return the weights after a step of training, the same in every run: those that `dtype` can average."""
    rng = np.random.default_rng(step)
    weights = {
        "dense.kernel": np.asfortranarray(rng.standard_normal((3, 4)), np.float32),
        "dense.bias": rng.standard_normal(4).astype(ml_dtypes.bfloat16),
        "scale": np.array(rng.standard_normal(), np.float32),
        "steps": np.array(step),
        "mask": rng.integers(0, 2, 3).astype(np.bool_),
        "nothing": np.zeros((0, 2), np.float32),
    }
    unfit = {"bfloat16": np.float32, "float64": ml_dtypes.bfloat16}.get(dtype)
    return {name: weight for name, weight in weights.items() if weight.dtype != unfit}


def train(ema, weights, steps):
    golden.train(ema, weights, steps, weights_at)


def bits_of(state):
    """Return a state with arrays as types, shapes and bytes, to be compared."""
    if isinstance(state, dict):
        return {key: bits_of(x) for key, x in state.items()}
    if isinstance(state, list):
        return [bits_of(x) for x in state]
    state = state.numpy() if hasattr(state, "numpy") else state  # torch's
    is_array = isinstance(state, np.ndarray | np.generic)
    return (state.dtype, state.shape, state.tobytes()) if is_array else state


def all_of(ema):
    return bits_of([ema.state_dict(), ema.step, ema.decay, ema.is_swapped])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ema.safetensors"


# --- going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_run_that_is_stopped_anywhere_goes_on_with_the_bits_of_one_that_is_not(path, options, swapped):
    last, dtype = 7, options.get("dtype")
    straight_weights = weights_at(0, dtype)
    straight = EMA(straight_weights, **options)
    train(straight, straight_weights, range(1, last + 1))
    for stop in range(last + 1):
        weights = weights_at(0, dtype)
        ema = EMA(weights, **options)
        train(ema, weights, range(1, stop + 1))
        if swapped:
            ema.swap()
        ema.save(path)

        others = weights_at(99, dtype)  # the model of a new process
        resumed = EMA.load(path, others)
        assert all_of(resumed) == all_of(ema)
        if swapped:
            assert bits_of(others) == bits_of(weights)
            ema.swap()
            resumed.swap()
            assert bits_of(others) == bits_of(weights)
            assert all_of(resumed) == all_of(ema)
        train(resumed, others, range(stop + 1, last + 1))
        assert all_of(resumed) == all_of(straight)


def test_another_process_goes_on_with_the_same_bits(path):
    weights = {"w": np.zeros(1000, np.float32), "half": np.zeros(10, np.float16)}
    code = """
        import sys, hashlib
        import numpy as np
        import fastema

        path, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        weights = {"w": np.zeros(1000, np.float32), "half": np.zeros(10, np.float16)}
        schedule = fastema.schedules.dynamic(0.99)
        if start:
            ema = fastema.EMA.load(path, weights)
            ema.swap()  # it was saved while swapped
        else:
            ema = fastema.EMA(weights, [schedule, 0.5], every=3, rounding="compensated")
        for step in range(start, stop):
            for x in weights.values():
                x[...] = np.random.default_rng(step).standard_normal(x.shape)
            ema.update()
        digest = hashlib.sha256(b"".join(x.tobytes() for k in (0, 1) for x in ema.averages_of(k).values()))
        ema.swap()
        ema.save(path)
        print(digest.hexdigest())
    """
    output_of(code, path, 0, 4)
    assert EMA.load(path, weights).step == 4
    assert output_of(code, path, 4, 10) == output_of(code, path.with_name("straight"), 0, 10)


def test_what_a_load_may_change(path):
    weights = weights_at(0)
    EMA(weights, schedules.dynamic(0.9), every=4).save(path)
    ema = EMA.load(path, weights, decay=0.5, every=1, threads=1, memory=path.with_name("mapped"))
    train(ema, weights, [1])
    assert ema.decay == 0.5


def test_a_schedule_of_ones_own_is_given_again(path):
    def falling(step):
        return 1.0 / (step + 1)

    weights = weights_at(0)
    ema = EMA(weights, [0.9, falling])
    train(ema, weights, [1, 2])
    ema.save(path)
    name = re.escape(f"{__name__}.{falling.__qualname__}")
    with pytest.raises(ValueError, match=f"decay must be given: of the schedule {name} "):
        EMA.load(path, weights)
    resumed = EMA.load(path, weights, decay=[0.9, falling])
    assert all_of(resumed) == all_of(ema)
    train(resumed, weights, [3])
    assert resumed.decay == (0.9, 0.25)


def test_a_module_of_torch_and_its_buffers(path):
    skip_without("torch")
    import torch
    from safetensors.torch import load_file

    def model(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))

    def step(net, number):
        torch.manual_seed(number)
        net(torch.randn(5, 3)).square().sum().backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(0.01 * parameter.grad)
                parameter.grad = None

    for buffers in ("copy", "average", "ignore"):
        net = model(0)
        ema = EMA(net, 0.9, buffers=buffers)
        step(net, 1)
        ema.update()
        ema.save(path)
        averaged = model(2)
        averaged.load_state_dict(load_file(path), strict=buffers != "ignore")  # no name but the module's own
        assert all(torch.equal(averaged.state_dict()[name], x) for name, x in ema.averages.items())
        other = model(1)
        other.load_state_dict(net.state_dict())
        resumed = EMA.load(path, other)
        for training, average in ((net, ema), (other, resumed)):
            step(training, 2)
            average.update()
        assert all_of(resumed) == all_of(ema)


def test_values_that_never_change(path):
    skip_without("jax")
    import jax.numpy as jnp

    values = {"w": jnp.zeros(3)}
    ema = EMA(values, 0.5)
    ema.update({"w": jnp.ones(3)})
    ema.save(path)
    resumed = EMA.load(path, values)
    for average in (ema, resumed):
        average.update({"w": jnp.full(3, 7.0)})
    assert all_of(resumed) == all_of(ema)


def test_an_update_in_the_background_is_in_the_file(path):
    skip_without("jax")
    import jax.numpy as jnp

    ema = EMA([jnp.zeros(1000)], 0.5, background=True)
    ema.update([jnp.ones(1000)])
    ema.save(path)
    assert (checkpoint.File(path)["0"] == 0.5).all()


# --- what others read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_every_reader_finds_the_averages_under_the_names_of_the_values(path, options, swapped):
    weights = weights_at(0, options.get("dtype"))
    ema = EMA(weights, **options)
    for step in range(1, 4):
        train(ema, weights, [step])
        if swapped:
            ema.swap()
        ema.save(path)
        loaded = safetensors.numpy.load_file(path)
        assert bits_of({name: loaded[name] for name in weights}) == bits_of(ema.averages)
        for k in range(1, len(ema.decay) if isinstance(ema.decay, tuple) else 1):
            averaged = {name: x for name, x in ema.averages_of(k).items() if name not in ("steps", "mask")}
            found = {name: loaded[f"fastema.averages.{k}.{name}"] for name in averaged}
            assert bits_of(found) == bits_of(averaged)
        if swapped:
            ema.swap()


def test_a_plain_average_is_a_plain_file(path):
    weights = weights_at(0)
    EMA(weights, 0.9).save(path)
    file = checkpoint.File(path)
    assert set(file) == set(weights)
    assert file.metadata["format"] == "pt"


def test_the_mean_of_such_files_is_of_their_averages(path):
    weights = weights_at(0)
    ema = EMA(weights, [0.9, 0.5], initial="zeros", rounding="compensated")
    paths = [path.with_name(f"{step}.safetensors") for step in (1, 2)]
    for step in (1, 2):
        train(ema, weights, [step])
        if step == 2:
            ema.swap()
        ema.save(paths[step - 1])
    checkpoint.average(paths, path)
    file = checkpoint.File(path)
    assert set(file) == set(weights)
    first, second = (checkpoint.File(x)["dense.kernel"].astype(np.float64) for x in paths)
    assert (file["dense.kernel"] == ((first + second) / 2).astype(np.float32)).all()
    assert file.metadata == {"format": "pt"}
    checkpoint.average(paths[:1], path)  # all its metadata are those of all files
    with pytest.raises(ValueError, match=r"ema.safetensors holds no state of an EMA"):
        EMA.load(path, weights)


def test_saving_makes_no_copies(path):
    weights = [np.zeros(1 << 20, np.float32) for _ in range(4)]
    ema = EMA(weights, [0.9, 0.99], rounding="compensated")
    ema.save(path)
    tracemalloc.start()
    try:
        ema.save(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20, "one of twenty arrays has 4 MiB"


# --- averages alone, in another type ------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_file_in_another_type_holds_what_is_shown_rounded_once_and_nothing_else(
    path, options, dtype, swapped
):
    weights = weights_at(0, options.get("dtype"))
    ema = EMA(weights, **options)
    several = isinstance(ema.decay or options["decay"], list | tuple)
    for step in range(1, 4):
        train(ema, weights, [step])
        if swapped:
            ema.swap()
        ema.save(path, dtype=dtype)
        file = checkpoint.File(path)
        prefixes = {
            k: f"fastema.averages.{k}." if k else "" for k in range(len(options["decay"]) if several else 1)
        }
        needed = {}
        for k, prefix in prefixes.items():
            shown = ema.averages_of(k)
            for name, x in shown.items():
                if name not in ("steps", "mask"):
                    needed[prefix + name] = x.astype(np.float64)
                elif not k:
                    assert bits_of(file[name]) == bits_of(x)
        assert set(file) == {*needed, *({"steps", "mask"} & set(weights))}
        for name, x in needed.items():
            assert file[name].dtype == dtype
            exact = [oracle.nearest(Fraction(number), dtype) for number in x.flat]
            assert file[name].ravel().tolist() == np.array(exact, dtype).tolist()
            assert file[name].shape == x.shape
        if swapped:
            ema.swap()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_a_float64_average_beside_the_middle_of_two_numbers_is_rounded_once(path, dtype):
    one, other = np.dtype(dtype).type(1), np.nextafter(np.dtype(dtype).type(1), np.dtype(dtype).type(2))
    middle = (float(one) + float(other)) / 2
    values = np.array([middle - 1e-12, middle, middle + 1e-12, -middle - 1e-12])
    EMA([values]).save(path, dtype=dtype)
    assert checkpoint.File(path)["0"].tolist() == [one, one, other, -other]


def test_a_file_in_half_the_type_has_half_the_size(path):
    weights = [np.zeros(1 << 16, np.float32) for _ in range(4)]
    ema = EMA(weights, 0.9, rounding="compensated")
    ema.save(path, "bfloat16")
    assert (1 << 19) < path.stat().st_size < (1 << 19) + 2000


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
def test_nothing_goes_on_from_rounded_averages(path, swapped):
    ema = EMA({"w": np.ones(2)}, 0.5)
    if swapped:
        ema.swap()
    for dtype in ("bfloat16", "float64"):
        ema.save(path, dtype=dtype)
        refusal = f"ema.safetensors holds averages rounded to {dtype} by .* load a file that .* without dtype"
        with pytest.raises(ValueError, match=refusal):
            EMA.load(path, {"w": np.zeros(2)})
    assert ema.is_swapped == swapped


@pytest.mark.parametrize(
    ("dtype", "value", "error", "message"),
    [
        ("int8", 1.0, TypeError, "dtype must be float16, bfloat16, float32 or float64, got int8"),
        (
            "float16",
            65520.0,
            ValueError,
            r"dtype must hold the average of values\['w'\], and it is beyond float16",
        ),
    ],
)
def test_a_type_that_cannot_be_saved_is_refused_and_the_old_file_stays(path, dtype, value, error, message):
    ema = EMA({"w": np.full(2, value, np.float32)})
    ema.save(path)
    old = path.read_bytes()
    with pytest.raises(error, match=message):
        ema.save(path, dtype=dtype)
    assert path.read_bytes() == old


def test_numbers_that_are_not_finite_stay_so_in_another_type(path):
    values = np.array([np.inf, -np.inf, np.nan, -0.0, 65519.0])
    EMA([values]).save(path, dtype="float16")
    assert checkpoint.File(path)["0"].tobytes() == values.astype(np.float16).tobytes()


def test_a_file_in_another_type_is_averaged_as_others_are(path):
    paths = [path.with_name(f"{k}.safetensors") for k in range(2)]
    for k, name in enumerate(paths):
        EMA({"w": np.full(2, 1.0 + k)}).save(name, dtype="bfloat16")
    checkpoint.average(paths, path)
    assert checkpoint.File(path)["w"].tolist() == [1.5, 1.5]


# --- what does not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "refusal"),
    [
        ({"scale": None}, {}, (ValueError, r"ema.safetensors does not fit: .*unknown: \['scale'\]")),
        ({"more": np.zeros(2)}, {}, (ValueError, r"ema.safetensors does not fit: .*missing: \['more'\]")),
        (
            {"dense.kernel": np.zeros((4, 3), np.float32)},
            {},
            (ValueError, r"does not fit: .*\['dense.kernel'\] must have shape \(4, 3\), got \(3, 4\)"),
        ),
        ({"steps": np.zeros((), np.int32)}, {}, (TypeError, r"\['steps'\] must be int32, got int64")),
        ({"scale": np.zeros(())}, {}, (TypeError, r"\['scale'\] must be float64, got float32")),
        ({}, {"decay": [0.5, 0.9]}, (ValueError, r"state must be of 2 decays, got 1")),
        ({}, {"rounding": "compensated"}, (ValueError, r"state\['carries'\] must hold 1 dict.* got 0")),
    ],
    ids=["lacks", "more", "shape", "type", "dtype", "decays", "carries"],
)
@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
def test_a_file_that_does_not_fit_is_refused_by_name_and_nothing_changes(
    path, change, options, refusal, swapped
):
    weights = weights_at(0)
    ema = EMA(weights, 0.9)
    if swapped:
        ema.swap()
    ema.save(path)
    others = {name: x for name, x in {**weights_at(1), **change}.items() if x is not None}
    before = bits_of(others)
    error, message = refusal
    with pytest.raises(error, match=message):
        EMA.load(path, others, **options)
    assert bits_of(others) == before


def test_a_value_that_cannot_be_changed_refuses_a_state_saved_while_swapped(path):
    weights = weights_at(0)
    ema = EMA(weights, 0.9)
    ema.swap()
    ema.save(path)
    others = weights_at(1)
    others["scale"].flags.writeable = False
    before = bits_of(others)
    with pytest.raises(ValueError, match=r"values\['scale'\]"):
        EMA.load(path, others)
    assert bits_of(others) == before


def test_a_file_of_a_later_version_or_with_a_later_schedule_is_refused(path):
    weights = weights_at(0)
    EMA(weights, schedules.dynamic(0.9)).save(path)
    file = checkpoint.File(path)
    config = json.loads(file.metadata["fastema"])["config"]
    for change, message in (
        ({"version": 2}, r"ema.safetensors was written by a later fastema"),
        (
            {"config": {**config, "decay": {"schedule": "spiral"}}},
            r"of the schedule spiral .* only",
        ),
    ):
        state = {**json.loads(file.metadata["fastema"]), **change}
        checkpoint.write(path, file, {"fastema": json.dumps(state)})
        with pytest.raises(ValueError, match=message):
            EMA.load(path, weights)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', '{"version": 1, "products": 3}'])
def test_a_file_whose_state_is_damaged_is_refused_by_name(path, text):
    checkpoint.write(path, {"w": np.ones(2)}, {"fastema": text})
    with pytest.raises(ValueError, match=r"ema.safetensors holds a state that EMA.save\(\) did not write"):
        EMA.load(path, {"w": np.ones(2)})


def test_names_that_are_taken_for_the_state_are_refused_and_the_old_file_stays(path):
    EMA(weights_at(0), 0.9).save(path)
    before = path.read_bytes()
    for name in ("fastema.w", "__metadata__"):
        for value in (np.zeros(2), np.arange(2)):
            with pytest.raises(ValueError, match=name):
                EMA({name: value}, 0.9).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


# --- averages in a mapped file ------------------------------------------------------------------------------


LOADED_FROM = r"memory must .* got '.*': the averages are loaded from it, as '.*'; give another path"


def ways_to(path):
    """Return paths that lead to a file: itself, and through every kind of link."""
    symbolic, hard = path.with_name("symbolic"), path.with_name("hard")
    symbolic.symlink_to(path.name)
    hard.hardlink_to(path)
    return [path, str(path), os.path.relpath(path), path.parent / "." / path.name, symbolic, hard]


def contents_of(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_averages_are_not_mapped_over_the_file_that_they_are_loaded_from(path):
    EMA(weights_at(0), 0.9).save(path)
    for way in ways_to(path):
        before = contents_of(path.parent)
        with pytest.raises(
            ValueError, match=r"memory must .* got '.*': the averages are loaded from it, as '.*'"
        ):
            EMA.load(path, weights_at(0), memory=way)
        assert contents_of(path.parent) == before


@pytest.mark.parametrize("given", ["shards", "shards-00002-of-00004"])
@pytest.mark.parametrize("memory", ["shards", "shards-00001-of-00004", "shards-00004-of-00004"])
def test_averages_are_not_mapped_over_a_set_that_they_are_loaded_from(tmp_path, given, memory):
    for file in (golden.FOLDER / "0.1.0").glob("shards-*"):
        shutil.copy(file, tmp_path)
    weights = {name: golden.weights_at(0)[name] for name in golden.averageable(golden.SHARDED)}
    assert EMA.load(tmp_path / f"{given}.safetensors", weights).step > 0
    before = contents_of(tmp_path)
    with pytest.raises(ValueError, match=LOADED_FROM):
        EMA.load(tmp_path / f"{given}.safetensors", weights, memory=tmp_path / f"{memory}.safetensors")
    assert contents_of(tmp_path) == before


def test_averages_loaded_are_mapped_from_any_other_file(path):
    EMA(weights_at(0), 0.9).save(path)
    memory, other = path.with_name("memory"), path.with_name("linked")
    memory.write_bytes(b"what was there")
    other.hardlink_to(memory)
    before, expected = path.read_bytes(), EMA.load(path, weights_at(0))
    ema = EMA.load(path, weights_at(0), memory=memory)
    assert all_of(ema) == all_of(expected)
    assert path.read_bytes() == before
    assert other.read_bytes() == b"what was there"


def mapped_by_numpy(path):
    return np.memmap(path, np.float32, "r+")


def mapped_as_a_part(path):
    return np.asarray(np.memmap(path, np.float32, "r+"))[64:].reshape(2, -1)


def mapped_as_a_checkpoint(path):
    checkpoint.write(path, {"w": np.ones(1000, np.float32)})
    return checkpoint.File(path)["w"]


def mapped_by_torch(path):
    torch = pytest.importorskip("torch")
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("this system does not tell what a process maps")
    return torch.from_file(str(path), shared=True, size=1000)


@pytest.mark.parametrize(
    "mapped", [mapped_by_numpy, mapped_as_a_part, mapped_as_a_checkpoint, mapped_by_torch]
)
@pytest.mark.parametrize("told", [True, False], ids=["", "the system does not tell"])
def test_averages_are_not_mapped_over_the_file_of_the_values(tmp_path, mapped, told, monkeypatch):
    if not told and mapped is mapped_by_torch:
        pytest.skip("only the system knows what torch maps")
    if not told:
        monkeypatch.setattr("fastema._ema.mapping._places_of", lambda _: ())
    path = tmp_path / "weights"
    path.write_bytes(np.ones(1000, np.float32).tobytes())
    values = {"other": np.ones(3), "w": mapped(path)}
    for way in ways_to(path):
        before = contents_of(tmp_path)
        with pytest.raises(ValueError, match=r"memory must .* got '.*': values\['w'\] is mapped from it"):
            EMA(values, 0.9, memory=way)
        assert contents_of(tmp_path) == before
    EMA(values, 0.9, memory=tmp_path / "averages")


def test_a_file_that_averages_are_mapped_from_may_be_saved_over(path):
    weights, others = weights_at(0), weights_at(0)
    ema, expected = EMA(weights, 0.9, memory=path), EMA(others, 0.9)
    train(ema, weights, [1])
    train(expected, others, [1])
    ema.save(path)
    assert all_of(EMA.load(path, weights_at(1))) == all_of(expected)
    before = path.read_bytes()
    train(ema, weights, [2, 3])
    train(expected, others, [2, 3])
    assert all_of(ema) == all_of(expected)
    assert path.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot be asked for room")
def test_a_disk_without_room_for_the_averages_is_an_error_when_they_are_made(path, monkeypatch):
    """A mapped file with holes takes the room when it is written to: without any left that is a bus error."""
    asked = []

    def full(descriptor, begin, length):
        asked.append((os.fstat(descriptor).st_ino, path.stat().st_ino, begin, length))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    weights = {"w": np.ones(1000), "b": np.ones(3)}
    with pytest.raises(OSError, match=r"No space left on device: '.*ema.safetensors'"):
        EMA(weights, 0.9, memory=path)
    ((asked_of, file, begin, length),) = asked
    assert asked_of == file
    assert begin == 0
    assert length >= 8 * 1003
    assert not path.exists()
    monkeypatch.undo()
    ema = EMA(weights, 0.9, memory=path)
    assert path.stat().st_size == length
    assert ema.averages["w"].sum() == 1000


def test_loading_leaves_the_file_alone(path):
    weights = weights_at(0)
    EMA(weights, 0.9).save(path)
    before = path.read_bytes()
    ema = EMA.load(path, weights)
    train(ema, weights, [1, 2])
    assert path.read_bytes() == before
    assert ema.step == 2
