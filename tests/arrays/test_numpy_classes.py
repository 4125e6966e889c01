"""Arrays of other byte orders, of classes derived from NumPy's, single numbers: right, or refused by name."""

import re

import ml_dtypes
import numpy as np
import pytest

import fastema
import oracle
from fastema import checkpoint, posthoc

FLOATS = list(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))


def numbers(dtype=np.float32, shape=(3, 2)):
    return (np.arange(np.prod(shape, dtype=int)).reshape(shape) + 1.0).astype(dtype)


def like(array):
    """Return what fits an array, where that is offered."""
    native = array.dtype.newbyteorder("=")
    return np.full(array.shape, 7, native if native in FLOATS or native.kind in "iub" else np.float32)


def beside(array):
    """Return what can be averaged, of the array's type where that can."""
    native = array.dtype.newbyteorder("=")
    return np.full(array.shape, 7, native if native in FLOATS else np.float32)


def copied_to(array):
    return fastema.EMA({"w": like(array)}).copy_to({"w": array})


def loaded(array):
    ema = fastema.EMA({"w": like(array)}, dtype=like(array).dtype if array.dtype.kind == "f" else None)
    state = ema.state_dict()
    for group in (state["averages"][0], state["copied"]):
        group.update(dict.fromkeys(group, array))
    ema.load_state_dict(state)
    return ema.averages["w"]


def written(array, folder):
    checkpoint.write(folder / "w.safetensors", {"w": array})
    return checkpoint.File(folder / "w.safetensors")["w"]


def snapshot(array, folder):
    posthoc.Snapshots(folder).add(1, {0.1: {"w": array}})
    posthoc.Snapshots(folder).add(2, {0.1: {"w": array}})
    return posthoc.Snapshots(folder).average(0.1)["w"]


# what takes arrays, and what it calls them
TAKERS = {
    "EMA": ("values['w']", lambda x: fastema.EMA({"w": x})),
    "EMA.update": ("values['w']", lambda x: fastema.EMA({"w": like(x)}).update({"w": x})),
    "EMA.copy_to": ("values['w']", copied_to),
    "averages of update": ("averages", lambda x: fastema.update(x, beside(x), 0.5)),
    "values of update": ("values[0]", lambda x: fastema.update([beside(x)], [x], 0.5)),
    "averages of Pairs": ("averages[0]", lambda x: fastema.Pairs([x], [beside(x)])),
    "values of Pairs": ("values[0]", lambda x: fastema.Pairs([beside(x)], [x])),
    "first of swap": ("a", lambda x: fastema.swap(x, beside(x))),
    "second of swap": ("b[0]", lambda x: fastema.swap([beside(x)], [x])),
    "copies": ("values[0]", lambda x: fastema.copies([x])),
}
KEEPERS = {
    "load_state_dict": (r"state\['(averages'\]\[0|copied)'?\]\['w'\]", lambda x, _: loaded(x)),
    "write": (r"tensors\['w'\]", written),
    "Snapshots": (r"averages\[0.1\]\['w'\]", snapshot),
}
takers = pytest.mark.parametrize(("name", "take"), TAKERS.values(), ids=TAKERS)
keepers = pytest.mark.parametrize(("name", "keep"), KEEPERS.values(), ids=KEEPERS)


def refused(array, name, take):
    """Have an array refused, which stays as it is; return the message."""
    before = array.tobytes()
    with pytest.raises(TypeError, match=name) as info:
        take(array)
    assert array.tobytes() == before
    return str(info.value)


# --- byte orders ------------------------------------------------------------------------------------------


@takers
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", ">i4"])
def test_another_byte_order_is_refused_by_name_with_its_cure(dtype, name, take):
    array = numbers(dtype)
    message = refused(array, "^" + re.escape(name), take)
    assert "in native byte order" in message
    assert f"got {dtype}" in message or f"got dtype('{dtype}')" in message
    cure = re.search(r"give a copy by (\.astype\(.*\))$", message)[1]
    cured = eval("array" + cure)
    assert cured.dtype.isnative
    assert np.array_equal(cured, array)
    if dtype != ">i4":
        take(cured)


@pytest.mark.parametrize("keep", [keep for _, keep in KEEPERS.values()], ids=KEEPERS)
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8"])
def test_what_is_kept_in_another_byte_order_are_the_same_numbers(dtype, keep, tmp_path):
    kept = keep(numbers(dtype), tmp_path)
    assert kept.dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(kept, numbers(dtype))


@pytest.mark.parametrize("dtype", [">i2", ">u8", ">c8"])
def test_integers_and_complex_numbers_are_written_in_any_byte_order(dtype, tmp_path):
    kept = written(numbers(dtype), tmp_path)
    assert kept.dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(kept, numbers(dtype))


# --- masks ------------------------------------------------------------------------------------------------


class Masked(np.ndarray):
    """A class as astropy's, which knows no np.ma."""

    @property
    def mask(self):
        return np.zeros(self.shape, np.bool_)

    def filled(self, number):
        raise NotImplementedError


def masked(dtype=np.float32):
    return np.ma.MaskedArray(numbers(dtype), mask=numbers() > 3, fill_value=5)


@takers
@pytest.mark.parametrize("array", [masked(), masked(int), numbers().view(Masked)], ids=["", "int", "other"])
def test_a_mask_is_refused_by_name_with_its_cure(array, name, take):
    message = refused(array, "^" + re.escape(name), take)
    assert re.search(
        r"without a mask, which .*, got Masked.*; give what its \.filled\(\) returns, or its \.data$", message
    )
    if array.dtype == np.float32 and isinstance(array, np.ma.MaskedArray):
        take(array.filled())
        take(np.array(array.data))


@keepers
def test_no_mask_is_lost_in_a_file(name, keep, tmp_path):
    refused(masked(), f"^{name} must be an array without a mask", lambda x: keep(x, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_mask_that_comes_later_changes_nothing():
    holes = np.zeros((3, 4), np.bool_)[:, ::2]  # copied one by one, as it has gaps
    values = {"w": numbers(), "flags": holes}
    ema = fastema.EMA(values, 0.5)
    for name in values:
        given = {key: x + 1 if key == "w" else ~x for key, x in values.items()}
        given[name] = np.ma.MaskedArray(given[name], mask=True)
        with pytest.raises(TypeError, match=rf"values\['{name}'\] must be an array without a mask"):
            ema.update(given)
        assert ema.step == 0
        assert np.array_equal(ema.averages["w"], numbers())
        assert not ema.averages["flags"].any()


# --- classes derived from NumPy's -------------------------------------------------------------------------


class Stubborn(np.ndarray):
    """A class that has its own idea of every operation, as those of units have."""

    def __array_ufunc__(self, *_, **__):
        raise AssertionError("an operation")

    def __array_function__(self, *_):
        raise AssertionError("a function")


@pytest.fixture(params=[np.matrix, np.recarray, np.memmap, Stubborn], ids=lambda kind: kind.__name__)
def derived(request, tmp_path):
    """Return a function that makes an array of a derived class."""

    def make(array):
        if request.param is np.memmap:
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            path.write_bytes(array.tobytes())
            return np.memmap(path, array.dtype, "r+", shape=array.shape)
        return array.view(request.param)

    return make


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_derived_class_is_averaged_as_the_memory_that_it_has(derived, dtype, rng):
    first, later, kept = (rng.standard_normal((3, 2)).astype(dtype) for _ in range(3))
    plain = first.copy()
    weight, expected = derived(first.copy()), fastema.EMA({"w": plain}, 0.75, dtype=dtype)
    ema = fastema.EMA({"w": weight}, 0.75, dtype=dtype)
    np.asarray(weight)[...] = plain[...] = later
    for each in (ema, expected):
        each.update()
    with ema.swapped():
        assert oracle.same_bits(np.asarray(weight), np.asarray(expected.averages["w"]))
    assert oracle.same_bits(np.asarray(weight), later)
    ema.update({"w": derived(kept.copy())})
    expected.update({"w": kept})
    assert type(ema.averages["w"]) is np.ndarray
    assert oracle.same_bits(ema.averages["w"], expected.averages["w"])
    target = derived(np.zeros((3, 2), dtype))
    assert ema.copy_to({"w": target})["w"] is target
    assert oracle.same_bits(np.asarray(target), expected.averages["w"])
    ema.load_state_dict({**ema.state_dict(), "averages": [{"w": derived(first.copy())}]})
    assert oracle.same_bits(ema.averages["w"], first)


def test_a_derived_class_is_shown_before_the_first_average(derived):
    ema = fastema.EMA({"w": derived(numbers())}, every=3)
    ema.update({"w": derived(numbers() + 1)})
    assert np.array_equal(ema.averages["w"], numbers() + 1)


def test_lists_of_derived_classes(derived, tmp_path):
    average, value = derived(numbers()), derived(numbers() + 2)
    fastema.update([average], [value], 0.5)
    assert np.array_equal(np.asarray(average), numbers() + 1)
    fastema.swap([average], [value])
    assert np.array_equal(np.asarray(average), numbers() + 2)
    (copy,) = fastema.copies([value])
    assert type(copy) is np.ndarray
    assert np.array_equal(copy, numbers() + 1)
    (tmp_path / "files").mkdir()
    assert np.array_equal(written(value, tmp_path / "files"), numbers() + 1)
    assert np.array_equal(snapshot(value, tmp_path / "files"), numbers() + 1)


@takers
@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, [("a", "f4")]),
        np.rec.array(np.zeros(3, [("a", "f4"), ("mask", "f4")])),
        np.array([1.0, None], object),
        np.zeros(3, complex),
        np.zeros(3, "m8[s]"),
        np.array(["a"]),
        np.char.array(["a"]),
        np.zeros(3, ml_dtypes.float8_e5m2),
        pytest.param(
            np.zeros(3, np.longdouble),
            marks=pytest.mark.skipif(np.dtype(np.longdouble) == np.float64, reason="it is float64 here"),
        ),
    ],
    ids=lambda x: f"{type(x).__name__} {x.dtype}",
)
def test_other_types_are_refused_by_name(array, name, take):
    if take is copied_to and array.dtype.kind in "cf":
        pytest.skip("it can hold an average")
    if take is TAKERS["EMA"][1] and array.dtype.name in ("complex128", "float8_e5m2"):
        pytest.skip("it is averaged by its parts, or copied")
    message = refused(array, "^" + re.escape(name), take)
    assert re.search("must be (of )?float16, bfloat16, float32|must be able to hold", message)
    assert str(array.dtype) in message or repr(array.dtype) in message


def test_a_read_only_map_is_averaged_and_not_swapped(tmp_path):
    (tmp_path / "w").write_bytes(numbers().tobytes())
    weight = np.memmap(tmp_path / "w", np.float32, "r", shape=(3, 2))
    ema = fastema.EMA({"w": weight}, 0.5)
    for change in (ema.swap, ema.copy_to):
        with pytest.raises(ValueError, match=r"must change values\['w'\], which is read-only"):
            change()
    ema.update({"w": numbers() + 2})
    assert np.array_equal(ema.averages["w"], numbers() + 1)
    assert np.array_equal(weight, numbers())
    fastema.update(average := np.zeros((3, 2), np.float32), weight, 0.5)
    assert np.array_equal(average, numbers() / 2)
    with pytest.raises(ValueError, match="averages must be writable, and is read-only"):
        fastema.update(weight, average, 0.5)


# --- single numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_array_of_no_axes_is_an_array(dtype, tmp_path):
    value = np.array(1, dtype)
    ema = fastema.EMA({"w": value}, 0.5, dtype=dtype)
    value[()] = 3
    ema.update()
    with ema.swapped():
        assert value == 2
    assert value == 3
    assert written(ema.averages["w"], tmp_path).shape == ()


@pytest.mark.parametrize("name", TAKERS)
def test_a_scalar_is_no_array_and_refused_by_name(name):
    called, take = TAKERS[name]
    argument = re.escape(called.partition("[")[0])
    with pytest.raises(TypeError, match=rf"^{argument}\S* must be .*array.* got float32"):
        take(np.float32(3))


def test_a_scalar_is_kept_as_an_array_of_no_axes(tmp_path):
    assert loaded(np.float32(3)) == 3
    assert written(np.float32(3), tmp_path) == 3
