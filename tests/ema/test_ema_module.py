"""ema.module(): a teacher that computes in the averages' memory; nothing is copied, and nothing is stale."""

import copy
import gc
import pickle
import sys
import tracemalloc

import numpy as np
import pytest

import fastema
import oracle

pytestmark = pytest.mark.usefixtures("every_torch_engine")


@pytest.fixture
def model(torch):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.5), torch.nn.Linear(5, 4)
    )


def step(torch, model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.train()
    model(torch.randn(8, 4).to(next(model.parameters()).dtype))


def with_averages(torch, model, ema, x):
    """Return what another copy of the model computes with the averages."""
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        return torch.func.functional_call(other, dict(ema.averages), (x,))


def test_a_teacher_computes_with_the_averages_after_each_update_reset_and_load(torch, model):
    ema, x = fastema.EMA(model, 0.5), torch.randn(3, 4)
    teacher = ema.module()
    assert type(teacher).__name__ == "Sequential"
    assert isinstance(teacher, torch.nn.Sequential)
    memory = [tensor.data_ptr() for tensor in teacher.state_dict().values()]
    state = ema.state_dict()

    def check():
        assert [tensor.data_ptr() for tensor in teacher.state_dict().values()] == memory
        assert teacher.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(teacher(x), with_averages(torch, model, ema, x))

    for _ in range(3):
        step(torch, model)
        ema.update()
        check()
    ema.load_state_dict(state)
    check()
    step(torch, model)
    ema.reset()
    check()
    assert torch.equal(teacher(x), model.eval()(x))


def test_a_distilled_student_is_what_numpy_has_of_it(torch):
    """DINO's loop with one linear layer: the teacher's targets, a gradient, a step, an average."""
    rng = np.random.default_rng(0)
    student = torch.nn.Linear(3, 2, bias=False)
    weight = student.weight.detach().numpy().copy()
    ema = fastema.EMA(student, fastema.schedules.dynamic(0.9))
    teacher, average = ema.module(), weight.copy()
    optimizer = torch.optim.SGD(student.parameters(), 0.125)
    for n in range(1, 6):
        batch = rng.integers(-2, 3, (4, 3)).astype(np.float32)
        with torch.no_grad():
            targets = teacher(torch.from_numpy(batch))
        loss = ((student(torch.from_numpy(batch)) - targets - 1) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        gradient = student.weight.grad.numpy().copy()
        optimizer.step()
        ema.update()
        np.testing.assert_allclose(  # sums of products: torch adds them in another order
            gradient, 2 * (batch @ (weight - average).T - 1).T @ batch, rtol=1e-4, atol=1e-4
        )
        weight = student.weight.detach().numpy().copy()
        average = oracle.update(average, weight, min(0.9, (1 + n) / (10 + n)))
        assert oracle.same_bits(teacher.weight.numpy(), average)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("way", ["swapped", "swap"])
def test_a_teacher_computes_with_averages_while_these_are_in_the_place_of_the_weights(torch, model, way):
    ema, x = fastema.EMA(model, 0.5), torch.randn(3, 4)
    teacher = ema.module()
    step(torch, model)
    ema.update()
    model.eval()
    needed, raw = teacher(x), model(x)
    contents = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    if way == "swapped":
        with ema.swapped():
            assert torch.equal(teacher(x), needed)
            assert torch.equal(model(x), needed)
    else:
        ema.swap()
        assert all(torch.equal(x, contents[name]) for name, x in teacher.state_dict().items())
        ema.swap()
    assert torch.equal(teacher(x), needed)
    assert torch.equal(model(x), raw)


def test_after_a_teacher_is_gone_swaps_exchange_again(torch, model):
    ema = fastema.EMA(model, 0.5)
    teacher = ema.module()
    part = teacher[0]
    step(torch, model)
    ema.update()
    needed = part.weight.clone()
    del teacher
    gc.collect()
    with ema.swapped():
        assert len(ema._parts.exchange.swapped.saved_weights) == len(model.state_dict())
        assert torch.equal(part.weight, needed), "a part of a teacher is one"
    del part
    gc.collect()
    with ema.swapped():
        assert not ema._parts.exchange.swapped.saved_weights


def test_a_teacher_stays_in_evaluation_mode_and_where_it_is(torch, model):
    ema, x = fastema.EMA(model.train(), 0.5), torch.randn(3, 4)
    holder = torch.nn.ModuleDict({"student": model, "teacher": ema.module()})
    assert model.training
    holder.train()
    assert model.training
    assert not any(part.training for part in holder["teacher"].modules())
    holder.to(torch.float32)
    holder.float().cpu()
    needed = holder["teacher"](x)
    for move in (holder.double, holder.share_memory, lambda: holder["teacher"].to("meta")):
        with pytest.raises(RuntimeError, match=r"ema.module\(\) returned .* cannot be moved or cast"):
            move()
    assert holder["teacher"](x).tolist() == needed.tolist()
    with pytest.raises(RuntimeError, match=r"never trains: copy\.deepcopy"):
        holder["teacher"].requires_grad_()
    holder["teacher"].requires_grad_(False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_teacher_is_a_module_of_its_own(torch, model, copied):
    ema, x = fastema.EMA(model, 0.5), torch.randn(3, 4)
    teacher = ema.module()
    other = copied(teacher)
    assert type(other) is torch.nn.Sequential
    needed = teacher(x)
    step(torch, model)
    ema.update()
    assert torch.equal(other(x), needed)
    assert not torch.equal(teacher(x), needed)
    other.double().train().requires_grad_()


def test_what_is_loaded_into_a_teacher_is_loaded_into_the_averages(torch, model):
    ema = fastema.EMA(model, 0.5)
    step(torch, model)
    ema.module().load_state_dict(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(ema.averages[name], tensor)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_a_teacher_of_a_16_bit_model_computes_in_the_averages_type(torch, kind):
    kind = getattr(torch, kind)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
            self.register_buffer("scale", torch.tensor([1.1]), persistent=False)

        def forward(self, x, *, add):
            return {"y": self.norm(self.inner(x) * self.scale + add[0])}

    model = Model().to(kind)
    ema = fastema.EMA(model, 0.5)
    teacher = ema.module()
    x, add = torch.randn(3, 4).to(kind), torch.randn(3, 4).to(kind)
    with torch.no_grad():
        model.inner.weight.mul_(3)
    ema.update()
    y = teacher(x, add=[add])["y"]
    assert y.dtype == torch.float32
    other = copy.deepcopy(model).float()
    other.load_state_dict(ema.averages)
    assert torch.equal(y, other(x.float(), add=[add.float()])["y"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(x, add=[add])["y"], other(x.float(), add=[add.float()])["y"])


def test_tied_weights_are_one_in_a_teacher(torch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    teacher = fastema.EMA(model, 0.5).module()
    assert teacher[1].weight is teacher[0].weight


def test_what_is_left_out_is_the_models_own_where_it_is_not_trained_and_refused_where_it_is(torch, model):
    ema = fastema.EMA(model, 0.5, only=["3.*"])
    with pytest.raises(
        ValueError, match=r"values\['0.weight'\] must be averaged for module\(\), .* is trained"
    ):
        ema.module()
    model[:2].requires_grad_(False)
    teacher, x = ema.module(), torch.randn(3, 4)
    assert teacher[0].weight is model[0].weight
    assert teacher[3].weight is not model[3].weight
    step(torch, model)
    ema.update()
    assert torch.equal(teacher(x), with_averages(torch, model, ema, x))


@pytest.mark.parametrize("wrapped", ["compiled", "DDP", "checkpointed", "parametrized"])
def test_wrappers_are_looked_through(torch, model, wrapped, tmp_path):
    given = model
    if wrapped == "compiled":
        given = torch.compile(model, backend="eager")
    elif wrapped == "DDP":
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        given = torch.nn.parallel.DistributedDataParallel(model)
    elif wrapped == "checkpointed":
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

        model[3] = checkpoint_wrapper.checkpoint_wrapper(model[3])
    else:
        torch.nn.utils.parametrizations.weight_norm(model[3])
    try:
        ema, x = fastema.EMA(given, 0.5), torch.randn(3, 4)
        teacher = ema.module()
        assert isinstance(teacher, torch.nn.Sequential)
        step(torch, model)
        ema.update()
        other = copy.deepcopy(model).eval()
        other.load_state_dict(dict(ema.averages))
        assert torch.equal(teacher(x), other(x))
    finally:
        if wrapped == "DDP":
            torch.distributed.destroy_process_group()


def test_a_teacher_follows_averages_that_are_made_anew(torch, model):
    ema, x = fastema.EMA(model, 0.5), torch.randn(3, 4)
    teacher = ema.module()
    model[1].running_mean = torch.ones(5)
    model[0].weight = torch.nn.Parameter(torch.ones(4, 5).T)  # another order in memory
    ema.update()
    assert torch.equal(teacher(x), with_averages(torch, model, ema, x))
    model[1].running_mean = torch.zeros(5, 1)[:, 0]
    later = ema.module()
    ema.update()
    assert torch.equal(teacher(x), later(x))
    other = copy.deepcopy(model)
    step(torch, other)
    ema.rebind(other)
    ema.update()
    assert torch.equal(teacher(x), with_averages(torch, other, ema, x))


def test_a_backward_pass_through_a_teacher_notices_an_update(torch, model):
    ema = fastema.EMA(model, 0.5)
    x = torch.randn(3, 4, requires_grad=True)
    y = ema.module()(x).sum()
    step(torch, model)
    ema.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_of_several_averages_each_has_its_teacher(torch, model):
    ema = fastema.EMA(model, [0.5, 0.9])
    teachers = [ema.module(k) for k in range(2)]
    step(torch, model)
    ema.update()
    for k, teacher in enumerate(teachers):
        for name, average in ema.averages_of(k).items():
            assert torch.equal(teacher.state_dict()[name], average)
    with pytest.raises(IndexError):
        ema.module(2)


def test_what_has_no_teacher_is_refused_and_says_why(torch, model):
    with pytest.raises(TypeError, match="values must be a torch module, got list"):
        fastema.EMA([np.zeros(2)]).module()
    with pytest.raises(ValueError, match=r"initial must be 'values' for module\(\)"):
        fastema.EMA(model, initial="zeros").module()
    ema = fastema.EMA(model)
    with ema.swapped(), pytest.raises(RuntimeError, match=r"module\(\) needs the weights"):
        ema.module()
    model.graph = (model[0].weight * 2).sum()
    with pytest.raises(TypeError, match=r"a module that copy\.deepcopy\(\) takes .* Sequential: "):
        ema.module()

    class Copies(torch.nn.Linear):
        def __deepcopy__(self, memo):
            return Copies(2, 2)

    with pytest.raises(TypeError, match=r"Copies copies 'weight': use ema\.copy_to"):
        fastema.EMA(Copies(2, 2)).module()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is resident there")
def test_a_teacher_takes_no_memory_of_the_averages_size(torch):
    model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(25)))  # 100 MB
    ema = fastema.EMA(model, 0.5)
    before = resident()
    tracemalloc.start()
    teacher = ema.module()
    ema.update()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6
    assert resident() - before < 20e6
    assert teacher[0].weight.data_ptr() == ema.averages["0.weight"].data_ptr()


def resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
