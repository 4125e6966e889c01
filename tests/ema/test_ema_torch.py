"""fastema.EMA with torch's tensors and modules, and beside what torch's own averages are."""

import pytest

import fastema
import oracle
import tolerances

pytestmark = pytest.mark.usefixtures("every_torch_engine")


@pytest.fixture
def model(torch):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 5),
        torch.nn.BatchNorm1d(5),
        torch.nn.Linear(5, 2),
        torch.nn.Linear(2, 2).bfloat16(),
    )


def step(torch, model):
    """Do a step of training, near enough."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model[:3](torch.randn(8, 4))  # statistics of batch normalisation


def contents(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(torch, a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_modules_averages_are_tensors_by_name_in_the_formulas_bits(torch, model):
    ema = fastema.EMA(model, 0.9)
    expected = {name: value.detach().float().numpy().copy() for name, value in model.named_parameters()}
    for _ in range(3):
        step(torch, model)
        ema.update()
        for name, value in model.named_parameters():
            expected[name] = oracle.update(expected[name], value.detach().float().numpy(), 0.9)
    averages = ema.averages
    assert averages.keys() == model.state_dict().keys()
    for name, average in expected.items():
        assert averages[name].dtype == torch.float32
        assert not averages[name].requires_grad
        assert oracle.same_bits(averages[name].numpy(), average)


def test_buffers_are_copied_averaged_or_ignored(torch, model):
    emas = {policy: fastema.EMA(model, 0.5, buffers=policy) for policy in ("copy", "average", "ignore")}
    before = contents(model)
    step(torch, model)
    for ema in emas.values():
        ema.update()
    after = contents(model)
    mean, count = "1.running_mean", "1.num_batches_tracked"
    assert torch.equal(emas["copy"].averages[mean], after[mean])
    assert torch.equal(emas["average"].averages[mean], (before[mean] + after[mean]) / 2)
    assert mean not in emas["ignore"].averages
    assert emas["copy"].averages[count] == emas["average"].averages[count] == 1
    for policy, ema in emas.items():
        raw = contents(model)
        with ema.swapped():
            expected = raw[mean] if policy == "ignore" else ema.averages[mean]
            assert torch.equal(model[1].running_mean, expected)
        assert equal(torch, contents(model), raw)


def test_buffers_that_checkpoints_leave_out_are_left_out(torch):
    module = torch.nn.Module()
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("cache", torch.ones(2), persistent=False)
    module.register_buffer("none", None)
    assert fastema.EMA(module).averages.keys() == {"kept"}


def test_averages_of_a_module_load_into_a_module(torch, model):
    ema = fastema.EMA(model, 0.5)
    step(torch, model)
    ema.update()
    other = torch.nn.Sequential(*(type(part)(*size) for part, size in zip(model, SIZES, strict=True)))
    other[3].bfloat16()
    ema.copy_to(other)
    with ema.swapped():
        assert equal(torch, contents(model), contents(other))
    other.load_state_dict(ema.averages)
    raw = contents(model)
    ema.copy_to()
    assert not equal(torch, contents(model), raw)
    assert equal(torch, contents(model), contents(other))


SIZES = [(4, 5), (5,), (5, 2), (2, 2)]


def test_tied_weights_are_averaged_once_and_swapped_once(torch):
    module = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5)})
    module["head"].weight = module["embedding"].weight
    ema = fastema.EMA(list(module["embedding"].parameters()) + list(module["head"].parameters()), 0.5)
    assert ema.averages[0].data_ptr() == ema.averages[1].data_ptr()
    average = ema.averages[0].clone()
    with torch.no_grad():
        module["head"].weight += 1
    raw = contents(module)
    ema.update()
    average += 0.5 * (raw["head.weight"] - average)
    with ema.swapped():
        assert torch.equal(module["embedding"].weight, average)
    assert equal(torch, contents(module), raw)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_averages_of_16_bits_are_tensors_of_16_bits_and_exchanged(torch, dtype):
    dtype = getattr(torch, dtype)
    weight = torch.arange(6, dtype=dtype, requires_grad=True)
    ema = fastema.EMA([weight], 0.5, dtype=dtype)
    with torch.no_grad():
        weight += 2
    ema.update()
    assert torch.equal(ema.averages[0], torch.arange(1, 7, dtype=dtype))
    memory = weight.data_ptr()
    with ema.swapped():
        assert torch.equal(weight, torch.arange(1, 7, dtype=dtype))
        assert weight.data_ptr() == memory
    assert torch.equal(weight, torch.arange(2, 8, dtype=dtype))
    assert weight.requires_grad


def test_the_average_of_a_single_number_is_a_tensor(torch):
    ema = fastema.EMA([torch.tensor(3.0)], 0.5, initial="zeros")
    ema.update()
    assert torch.equal(ema.averages[0], torch.tensor(3.0))


def test_values_may_be_given_again_as_other_libraries_ask_for(torch, model):
    again, plain = fastema.EMA(model.parameters(), 0.9), fastema.EMA(model.parameters(), 0.9)
    step(torch, model)
    again.update(model.parameters())
    plain.update()
    assert all(map(torch.equal, again.averages, plain.averages))
    again.update(parameter.detach().clone() for parameter in model.parameters())
    plain.update()
    assert all(map(torch.equal, again.averages, plain.averages))


def test_a_tensor_that_moved_is_followed(torch, model):
    for part in ("0.weight", "1.running_mean"):
        ema = fastema.EMA(model, 0.5)
        before = contents(model)
        tensor = model.get_parameter(part) if part == "0.weight" else model.get_buffer(part)
        tensor.data = tensor.data + 1
        ema.update()
        moved = 0.5 if part == "0.weight" else 1.0  # a buffer is copied
        assert torch.equal(ema.averages[part], before[part] + moved * (tensor.detach() - before[part]))


def test_memory_that_moves_while_swapped_still_gets_its_weights_back(torch, model):
    ema = fastema.EMA(model, 0.5)
    step(torch, model)
    ema.update()
    raw = contents(model)
    with ema.swapped():
        model[0].weight.data = model[0].weight.data.clone()
    assert equal(torch, contents(model), raw)


def test_a_backward_pass_through_weights_that_were_swapped_is_an_error(torch, model):
    ema = fastema.EMA(model, 0.5)
    loss = model[:3](torch.randn(8, 4, requires_grad=True)).sum()
    ema.swap()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_equal_to_torchs_averaged_model(torch, model):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = model[:3]
    rival = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ema = fastema.EMA(model, 0.9, start_step=2)  # its first update copies
    for _ in range(20):
        step(torch, model)
        rival.update_parameters(model)
        ema.update()
    for name, value in rival.module.state_dict().items():
        tolerances.assert_close(ema.averages[name].numpy(), value.numpy(), tolerances.FRAMEWORK)


@pytest.mark.parametrize("use_num_updates", [False, True])
def test_equal_to_torch_ema(torch, model, use_num_updates):
    torch_ema = pytest.importorskip("torch_ema")
    parameters = list(model[:3].parameters())
    rival = torch_ema.ExponentialMovingAverage(parameters, 0.99, use_num_updates)
    decay = fastema.schedules.dynamic(0.99) if use_num_updates else 0.99
    ema = fastema.EMA(parameters, decay)
    for _ in range(20):
        step(torch, model)
        rival.update()
        ema.update()
    for ours, theirs in zip(ema.averages, rival.shadow_params, strict=True):
        tolerances.assert_close(ours.numpy(), theirs.numpy(), tolerances.FRAMEWORK)


def test_an_ema_is_made_by_one_view_of_each_tensor(model, monkeypatch, every_torch_engine):
    from fastema._arrays import torch as library

    if every_torch_engine == "torch":
        pytest.skip("NumPy views no tensors there")
    views, view = [], library.array_of
    monkeypatch.setattr(library, "array_of", lambda tensor: views.append(1) or view(tensor))
    fastema.EMA(model)
    assert len(views) == len(model.state_dict())


@pytest.mark.parametrize("is_readable", [True, False], ids=["in C", "in Python"])
def test_a_weight_transposed_in_its_memory_is_averaged_as_it_is_read(torch, monkeypatch, is_readable):
    if not is_readable:  # as before torch 2.10
        monkeypatch.setattr(fastema._core.Layouts, "is_readable", lambda _: False)
    weight = torch.nn.Parameter(torch.arange(9.0).reshape(3, 3))
    ema = fastema.EMA([weight], 0.5)
    weight.data = weight.data.t()
    ema.update()
    assert ema.averages[0].tolist() == [[0, 2, 4], [2, 4, 6], [4, 6, 8]]


def test_a_model_put_into_another_order_of_memory_is_followed(torch):
    model = torch.nn.Conv2d(3, 4, 3)
    ema = fastema.EMA(model, 0.5)
    expected = {name: value.clone() for name, value in ema.averages.items()}
    model.to(memory_format=torch.channels_last)
    for _ in range(2):
        with torch.no_grad():
            model.weight.add_(0.25)
        expected["weight"] += 0.5 * (model.weight.detach() - expected["weight"])
        ema.update()
    assert ema.averages["weight"].is_contiguous(memory_format=torch.channels_last)
    with ema.swapped():
        assert torch.equal(model.weight, expected["weight"])
