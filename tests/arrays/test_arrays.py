"""Arrays of other libraries: viewed where they lie, never copied, or refused by name."""

import re

import ml_dtypes
import numpy as np
import pytest

import fastema
import oracle


class Exporter:
    """Anything with __dlpack__: here, NumPy's own export."""

    def __init__(self, array, device=None):
        self.array, self.device = array, device

    def __dlpack__(self, **arguments):
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.device or self.array.__dlpack_device__()


def test_anything_with_dlpack_is_averaged_where_it_lies(rng):
    average, value = rng.standard_normal((4, 5)), rng.standard_normal((4, 5))
    expected = oracle.update(average, value, 0.9)
    fastema.update([Exporter(average)], Exporter(value), 0.9)
    assert oracle.same_bits(average, expected)


def test_averages_that_only_speak_dlpack_are_written_with_numpy_before_2_2_too(monkeypatch, rng):
    """It takes all for read-only that does not tell, as nothing could before DLPack 1.0."""
    view = np.from_dlpack
    monkeypatch.setattr(np, "from_dlpack", lambda array: sealed(view(array)))
    average, value = rng.standard_normal((2, 4, 5))
    expected = oracle.update(average, value, 0.9)
    fastema.update([Exporter(average.T), Exporter(np.zeros((0, 3)))], [value.T, np.zeros((0, 3))], 0.9)
    assert oracle.same_bits(average, expected)


def test_averages_that_are_exported_as_read_only_are_refused():
    # NumPy's own export of such an array fails before its version 2.1
    with pytest.raises((TypeError, ValueError), match=re.escape("averages[0] must be")):
        fastema.update([Exporter(sealed(np.zeros(3)))], [np.zeros(3)], 0.9)


def sealed(array):
    array.flags.writeable = False
    return array


def test_what_lies_on_a_device_is_refused_by_name():
    with pytest.raises(TypeError, match=re.escape("values[1] must be an array whose CPU memory")):
        fastema.update([np.zeros(3)] * 2, [np.zeros(3), Exporter(np.zeros(3), device=(2, 0))], 0.9)


torch_dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])


@pytest.fixture
def jax():
    return pytest.importorskip("jax", reason="jax is not installed")


def numpy_of(tensor):
    """Return a copy of a torch tensor as NumPy's, also of bfloat16."""
    tensor = tensor.detach().clone()
    if "bfloat16" in str(tensor.dtype):
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy()


@torch_dtypes
def test_torch_tensors_are_averaged_and_swapped_in_place(torch, dtype):
    average = torch.randn(33, 5).to(getattr(torch, dtype))
    value = torch.nn.Parameter(torch.randn(33, 5).to(getattr(torch, dtype)))
    before, address = [numpy_of(average), numpy_of(value)], average.data_ptr()
    fastema.update([average], [value], 0.9)
    expected = oracle.update(*before, 0.9)
    assert average.data_ptr() == address
    assert oracle.same_bits(numpy_of(average), expected)
    assert value.requires_grad
    pairs = fastema.Pairs(average, value)
    pairs.swap()
    assert oracle.same_bits(numpy_of(value), expected)
    assert oracle.same_bits(numpy_of(average), before[1])


def test_torch_channels_last(torch):
    average, value = (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(2))
    expected = oracle.update(numpy_of(average), numpy_of(value), 0.9)
    fastema.update(average, value, 0.9)
    assert average.is_contiguous(memory_format=torch.channels_last)
    assert oracle.same_bits(numpy_of(average), expected)
    with pytest.raises(ValueError, match="averages and values must have one order in memory"):
        fastema.update(average, value.contiguous(), 0.9)


def test_torch_mixes_with_numpy(torch):
    average, value = np.zeros(10, np.float32), torch.ones(10, dtype=torch.bfloat16)
    fastema.update(average, value, 0.5)
    assert (average == 0.5).all()


def test_torch_views_with_holes_and_tensors_elsewhere_are_refused(torch):
    with pytest.raises(ValueError, match="values must be dense"):
        fastema.update(torch.zeros(3), torch.zeros(6)[::2], 0.9)
    with pytest.raises(TypeError, match=r"averages must be an array whose CPU memory .* lies on meta"):
        fastema.update(torch.zeros(3, device="meta"), torch.zeros(3), 0.9)
    with pytest.raises(TypeError, match=r"averages must be an array whose CPU memory .*, got Tensor"):
        fastema.update(torch.zeros(3).to_sparse(), torch.zeros(3), 0.9)


def test_a_torch_tensor_given_other_memory_is_noticed(torch):
    average, value = torch.zeros(10), torch.nn.Parameter(torch.ones(10))
    pairs = fastema.Pairs([average], [value])
    pairs.update(0.5)
    value.data = torch.full((10,), 3.0)
    with pytest.raises(ValueError, match="a tensor was given other memory, shape or strides after"):
        pairs.update(0.5)
    with pytest.raises(ValueError, match="a tensor was given other memory, shape or strides after"):
        pairs.swap()
    assert (average == 0.5).all()


def _transpose(tensor):
    tensor.data = tensor.data.t()


def _shorten(tensor):
    tensor.data = tensor.data[:2]


def _flatten(tensor):
    tensor.data = tensor.data.reshape(-1)


@pytest.mark.parametrize("is_readable", [True, False], ids=["in C", "in Python"])
@pytest.mark.parametrize("change", [_transpose, _shorten, _flatten])
def test_a_torch_tensor_of_another_layout_in_the_same_memory_is_noticed(
    torch, monkeypatch, change, is_readable
):
    if not is_readable:  # as before torch 2.10
        monkeypatch.setattr(fastema._core.Layouts, "is_readable", lambda _: False)
    average, value = torch.zeros(3, 3), torch.nn.Parameter(torch.ones(3, 3))
    pairs = fastema.Pairs([average], [value])
    change(value)
    with pytest.raises(
        ValueError, match="other memory, shape or strides after it was paired; make the pairs anew"
    ):
        pairs.update(0.5)
    assert (average == 0).all()


def test_layouts_take_what_tensors_are_now_for_right(torch):
    tensors = [torch.zeros(3, 3), torch.zeros(()), torch.zeros(0)]
    layouts = fastema._core.Layouts(tensors)
    assert len(layouts) == 3
    assert not layouts.changed()
    tensors[0].t_()  # of strides alone
    tensors[2].resize_(2)
    assert layouts.changed()
    layouts.accept()
    assert not layouts.changed()


def test_layouts_need_tensors_that_say_where_they_are():
    with pytest.raises(TypeError, match="tensors must have DLPack's exchange API, got int"):
        fastema._core.Layouts([1])
    assert not fastema._core.Layouts.is_readable(1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jax_arrays_are_values_without_a_copy(jax, dtype):
    value = jax.numpy.asarray(np.random.default_rng(1).standard_normal((33, 5)), dtype)
    view = fastema._arrays.as_view(value, "values")
    assert view.ctypes.data == value.unsafe_buffer_pointer()
    average = np.ones((33, 5), np.float32)
    expected = oracle.update(average, np.asarray(value), 0.9)
    fastema.update(average, value, 0.9)
    assert oracle.same_bits(average, expected)


def test_jax_arrays_are_no_averages(jax):
    with pytest.raises(ValueError, match=re.escape("averages[0] must be writable, and is read-only")):
        fastema.update([jax.numpy.zeros(3)], [np.zeros(3, np.float32)], 0.9)


def test_copies_are_averages_that_start_at_the_values(rng):
    values = [
        rng.standard_normal((3, 5)).astype(np.float32),
        np.asfortranarray(rng.standard_normal((4, 7))),
        rng.standard_normal(9).astype(ml_dtypes.bfloat16),
        np.zeros((0, 2), np.float32),
        np.array(3, np.float32),
        np.moveaxis(rng.standard_normal((2, 3, 4, 5)), 1, -1),
    ]
    averages = fastema.copies(values)
    assert [a.dtype for a in averages] == ["f4", "f8", "f4", "f4", "f4", "f8"]
    for average, value in zip(averages, values, strict=True):
        assert np.array_equal(average, value.astype(average.dtype))
        assert average.ctypes.data % 64 == 0 or average.size == 0
    fastema.Pairs(averages, values).update(0.5)  # of the same order in memory, and they do not overlap
    assert oracle.same_bits(fastema.copies(values[0], np.float64), values[0].astype(np.float64))
    assert fastema.copies([]) == []
    with pytest.raises(TypeError, match="Cannot cast"):
        fastema.copies(values, np.int32)
