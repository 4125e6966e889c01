"""fastema.EMA with DTensors, FSDP2 and DDP: each process averages and saves the shard that it has."""

import sys

import pytest

from torch_ranks import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the loopback device is lo there")

# the same weights in every run, however they are spread
MODEL = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)  # odd sizes: shards differ, and of one row some processes have nothing
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))

def set_to(model, step):
    rng = np.random.default_rng(step)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            new = rng.standard_normal(x.shape) if "running" not in name else rng.uniform(1, 2, x.shape)
            new = torch.from_numpy(np.asarray(new if x.is_floating_point() else step)).to(x.dtype)
            if isinstance(x, DTensor):
                new = distribute_tensor(new, x.device_mesh, x.placements, src_data_rank=None).to_local()
                x = x.to_local()
            x.copy_(new)

def plain(dtype=None):
    torch.manual_seed(0)
    model = Net().to(dtype)
    set_to(model, 0)
    return model

def sharded(mesh=None, dtype=None):
    model = plain(dtype)
    mesh = mesh or init_device_mesh("cpu", (ranks,))
    for part in (model.first, model.last, model):
        fully_shard(part, mesh=mesh)
    return model

def train(ema, model, steps):
    for step in steps:
        set_to(model, step)
        ema.update()

def whole(x):
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return x.detach().float().numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()

def same(a, b):
    return all(oracle.same_bits(whole(a[name]), whole(b[name])) for name in a)

def bits(model):
    return {
        name: (x.to_local() if isinstance(x, DTensor) else x).detach().clone()
        for name, x in [*model.named_parameters(), *model.named_buffers()]
    }

def refused(error, message, call):
    try:
        call()
    except error as reason:
        assert message in str(reason), reason
    else:
        raise AssertionError(f"not refused: {message}")
"""


def test_averages_of_shards_have_the_bits_of_whole_ones_and_nothing_is_gathered(tmp_path):
    run(
        2,
        tmp_path,
        MODEL
        + """
for options in (
    {},
    {"decay": [0.9, 0.99], "every": 2},
    {"initial": "zeros"},
    {"decay": [0.5, 0.9], "rounding": "compensated"},
):
    lists = len(options["decay"]) if "decay" in options else 1
    for dtype in (torch.float32, torch.bfloat16):
        reference = plain(dtype)
        expected = fastema.EMA(reference, **options)
        train(expected, reference, range(1, 6))
        model = sharded(dtype=dtype)
        with CommDebugMode() as made:
            ema = fastema.EMA(model, **options)
        assert made.get_total_counts() == 0
        for step in range(1, 6):
            set_to(model, step)
            with CommDebugMode() as made:
                ema.update()
                shown = [ema.averages_of(k) for k in range(lists)]
                ema.state_dict()
                with ema.swapped():
                    pass
                ema.save(folder / "ema.safetensors")
            assert made.get_total_counts() == 0, made.get_comm_counts()
        for k in range(lists):
            assert list(shown[k]) == list(expected.averages_of(k))
            assert same(shown[k], expected.averages_of(k)), (options, dtype, k)
            for name, parameter in model.named_parameters():
                assert shown[k][name].placements == parameter.placements
                assert shown[k][name].shape == parameter.shape
                assert shown[k][name].to_local().shape == parameter.to_local().shape
""",
    )


def test_a_swap_exchanges_shards_and_twice_is_nothing(tmp_path):
    run(
        2,
        tmp_path,
        MODEL
        + """
x = torch.ones(4, 3)
for dtype, initial in ((torch.float32, "values"), (torch.bfloat16, "values"), (torch.float32, "zeros")):
    model, reference = sharded(dtype=dtype), plain(dtype)
    ema, expected = (fastema.EMA(m, 0.5, initial=initial) for m in (model, reference))
    for e, m in ((ema, model), (expected, reference)):
        train(e, m, [1, 2])
        m.eval()
    raw, averages = bits(model), {name: whole(a).copy() for name, a in ema.averages.items()}
    identities = [id(p) for p in model.parameters()]
    expected.swap()
    with ema.swapped():
        assert [id(p) for p in model.parameters()] == identities
        with torch.no_grad():
            # FSDP gathers what it computes with from the shards: it sees the averages
            assert torch.equal(model(x.to(dtype)), reference(x.to(dtype)))
        model.reshard()
        assert same(dict(model.named_parameters()), dict(reference.named_parameters()))
    assert all(oracle.same_bits(a.float().numpy(), raw[n].float().numpy()) for n, a in bits(model).items())
    assert all(oracle.same_bits(whole(a), averages[n]) for n, a in ema.averages.items())
    expected.swap()

    target = sharded(dtype=dtype)
    ema.copy_to(target)
    other = plain(dtype)
    expected.copy_to(other)
    assert same(dict(target.named_parameters()), dict(other.named_parameters()))
    refused(ValueError, "values['first.weight'] must be sharded, or whole,", lambda: ema.copy_to(other))
""",
    )


def test_training_under_fsdp_goes_as_it_does_without_averages(tmp_path):
    run(
        2,
        tmp_path,
        MODEL
        + """
def trained(average):
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ema = fastema.EMA(model, 0.5) if average else None
    averages = {name: x.to_local().detach().clone() for name, x in model.named_parameters()}
    for step in range(4):
        torch.manual_seed(10 * step + rank)
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.update()
            for name, x in model.named_parameters():
                averages[name] = oracle.update(np.asarray(averages[name]), x.to_local().detach().numpy(), 0.5)
            with ema.swapped(), torch.no_grad():
                model.eval()
                model(torch.ones(2, 3))
                model.train()
    if ema:
        for name, average in averages.items():
            assert oracle.same_bits(ema.averages[name].to_local().numpy(), average), name
    return bits(model)

with_averages, without = trained(True), trained(False)
assert all(torch.equal(with_averages[name], without[name]) for name in without)
assert all(x.isfinite().all() for x in without.values())
""",
    )


def test_gathered_parameters_are_refused_and_updates_read_the_shards(tmp_path):
    run(
        2,
        tmp_path,
        MODEL
        + """
model = plain()
fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
ema = fastema.EMA(model, 0.5)
set_to(model, 1)
before = bits(model)
model.eval()
with torch.no_grad():
    model(torch.ones(2, 3))  # after which the outermost module stays gathered
assert not isinstance(model.first.weight, DTensor)
ema.update()  # the shards are what an optimizer changes
for call in (lambda: fastema.EMA(model), ema.swap, lambda: ema.copy_to(model), ema.copy_to):
    refused(RuntimeError, "must be sharded, and FSDP holds them gathered", call)
assert ema.step == 1 and not ema.is_swapped
model.reshard()
assert all(torch.equal(x, before[name]) for name, x in bits(model).items())
expected = plain()
reference = fastema.EMA(expected, 0.5)
train(reference, expected, [1])
assert same(ema.averages, reference.averages)
ema.swap()
ema.swap()
""",
    )


def test_gathered_copies_do_not_outlive_a_swap(tmp_path):
    """After an evaluation inside of it the outermost module holds its parameters gathered: the averages."""
    run(
        2,
        tmp_path,
        MODEL
        + """
x = torch.from_numpy(np.random.default_rng(9).standard_normal((2, 3))).float()
for given in (lambda model: model, lambda model: list(model.parameters()),
              lambda model: dict(model.named_parameters())):
    reference = plain()
    model = plain()
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    for each in (reference, model):
        each.eval()
    ema = fastema.EMA(given(model), 0.5)
    for each in (reference, model):
        set_to(each, 1)
    ema.update()
    with ema.swapped(), torch.no_grad():
        evaluated = model(x)
        assert not torch.allclose(evaluated, reference(x))
    for each in (reference, model):
        each(x).sum().backward()  # the next step of training, on the weights
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert torch.allclose(grad, q.grad), name
    with torch.no_grad():
        assert torch.allclose(model(x), reference(x))
    refused(RuntimeError, "FSDP holds them gathered", ema.swap)
    assert not ema.is_swapped
    model.reshard()
""",
    )


def test_a_shard_that_was_given_other_memory_is_followed(tmp_path):
    run(
        2,
        tmp_path,
        MODEL
        + """
mesh = init_device_mesh("cpu", (ranks,))
tensor = distribute_tensor(torch.zeros(6), mesh, [Shard(0)])
ema = fastema.EMA([tensor], 0.5)
tensor._local_tensor = torch.ones(3)  # as FSDP does when it lays parameters out anew
ema.update()
assert ema.averages[0].to_local().tolist() == [0.5] * 3
ema.swap()
assert tensor.to_local().tolist() == [0.5] * 3
ema.swap()
assert tensor.to_local().tolist() == [1.0] * 3
tensor._local_tensor = torch.full((3,), 2.5)
ema.swap()  # which looks where it is, too
ema.swap()
ema.update()
assert ema.averages[0].to_local().tolist() == [1.5] * 3
tensor._local_tensor = torch.ones(2)
refused(RuntimeError, "values['0'] must be float32 of shape (3,), as it was at first", ema.update)
tensor._local_tensor = torch.ones(3)
assert ema.averages[0].to_local().tolist() == [1.5] * 3
""",
    )


def test_tensors_sharded_otherwise_are_refused_and_never_gathered(tmp_path):
    run(
        2,
        tmp_path,
        MODEL
        + """
mesh = init_device_mesh("cpu", (ranks,))
value = torch.arange(16.0).reshape(4, 4)
rows = distribute_tensor(value, mesh, [Shard(0)])
ema = fastema.EMA([rows], 0.5)
with CommDebugMode() as made:
    for other in (*(distribute_tensor(value, mesh, [p]) for p in (Shard(1), Replicate())), value):
        message = "values must be sharded as at first, by (Shard(dim=0),)"
        refused(ValueError, message, lambda: ema.update([other]))
        refused(ValueError, "values['0'] must be sharded, or whole,", lambda: ema.copy_to([other]))
assert ema.step == 0
term = DTensor.from_local(value, mesh, [Partial()])
refused(TypeError, "values['0'] must be whole or sharded, and it is a sum", lambda: fastema.EMA([term]))
ema.update([distribute_tensor(value + 2, mesh, [Shard(0)])])
assert torch.equal(ema.averages[0].full_tensor(), value + 1)
""",
    )


def test_shards_are_pulled_and_reset_where_they_are_and_have_no_teacher(tmp_path):
    run(
        2,
        tmp_path,
        MODEL
        + """
model, alone = sharded(), plain()
ema, whole_ema = fastema.EMA(model, 0.75), fastema.EMA(alone, 0.75)
with CommDebugMode() as comm:
    for each, averages in ((model, ema), (alone, whole_ema)):
        train(averages, each, range(1, 4))
        averages.pull(0.25)
assert comm.get_total_counts() == 0
assert same(dict(model.named_parameters()), dict(alone.named_parameters()))
for averages in (ema, whole_ema):
    averages.reset()
    averages.step = 3
    averages.update()
assert same(ema.averages, whole_ema.averages)
assert same(ema.averages, {**dict(alone.named_parameters()), **dict(alone.named_buffers())})
try:
    ema.module()
except ValueError as error:
    assert "must be whole for module(), and is sharded" in str(error)
else:
    raise AssertionError
""",
    )


def test_a_backward_pass_notices_a_swap_of_shards(tmp_path):
    run(
        2,
        tmp_path,
        MODEL
        + """
mesh = init_device_mesh("cpu", (ranks,))
weight = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
ema = fastema.EMA([weight], 0.5)
loss = (weight * weight).sum()
ema.swap()
refused(RuntimeError, "modified by an inplace operation", loss.backward)
""",
    )


def test_ddp_is_averaged_by_the_names_of_its_module(tmp_path):
    run(
        2,
        tmp_path,
        MODEL
        + """
reference = plain()
expected = fastema.EMA(reference, 0.5)
train(expected, reference, [1, 2])
ddp = torch.nn.parallel.DistributedDataParallel(plain())
outer, inner = fastema.EMA(ddp, 0.5), fastema.EMA(ddp.module, 0.5)
for step in (1, 2):
    set_to(ddp, step)
    outer.update()
    inner.update()
assert list(inner.averages) == list(expected.averages)
assert list(outer.averages) == list(expected.averages)
assert same(inner.averages, expected.averages)
assert same(outer.averages, expected.averages)
raw = bits(ddp)
with inner.swapped():
    assert torch.equal(ddp.module.first.weight, expected.averages["first.weight"])
assert all(torch.equal(x, raw[name]) for name, x in bits(ddp).items())
path = folder / "ddp.safetensors"
if rank == 0:
    inner.save(path)
dist.barrier()
resumed = fastema.EMA.load(path, plain())
assert same(resumed.averages, expected.averages)
""",
    )


# --- files ------------------------------------------------------------------------------------------------

SAVED = (
    MODEL
    + """
OPTIONS = (
    {"decay": 0.9},
    {"decay": [0.9, 0.5], "rounding": "compensated", "every": 2},
    {"decay": 0.9, "initial": "zeros"},
)
"""
)


def test_a_set_of_two_is_loaded_by_one_and_by_four_and_goes_on_to_the_bit(tmp_path):
    save = (
        SAVED
        + """
model = sharded() if ranks > 1 else plain()
for i, options in enumerate(OPTIONS):
    for swapped in (False, True):
        set_to(model, 0)
        ema = fastema.EMA(model, **options)
        train(ema, model, range(1, 4))
        if swapped:
            ema.swap()
        ema.save(folder / f"{ranks}-{i}-{swapped}.safetensors")
        if swapped:
            ema.swap()
"""
    )
    load = (
        SAVED
        + """
model, other = (sharded() if ranks > 1 else plain()), plain()
for i, options in enumerate(OPTIONS):
    lists = len(options["decay"]) if isinstance(options["decay"], list) else 1
    for saved in (1, 2):
        for swapped in (False, True):
            set_to(other, 0)
            expected = fastema.EMA(other, **options)
            train(expected, other, range(1, 4))
            set_to(model, 9)
            with CommDebugMode() as made:
                resumed = fastema.EMA.load(folder / f"{saved}-{i}-{swapped}.safetensors", model)
            assert made.get_total_counts() == 0
            assert resumed.is_swapped == swapped
            for k in range(lists):
                assert same(resumed.averages_of(k), expected.averages_of(k)), (saved, i, swapped)
            if swapped:
                resumed.swap()
                assert same(dict(model.named_parameters()), dict(other.named_parameters()))
            train(resumed, model, range(4, 7))
            train(expected, other, range(4, 7))
            for k in range(lists):
                assert same(resumed.averages_of(k), expected.averages_of(k)), (saved, i, swapped)
"""
    )
    for ranks in (1, 2):
        run(ranks, tmp_path, save)
    for ranks in (1, 2, 4):
        run(ranks, tmp_path, load)


def test_any_placements_are_saved_and_loaded_into_any_others(tmp_path):
    run(
        4,
        tmp_path,
        MODEL
        + """
value = torch.arange(7.0 * 6).reshape(7, 6)
line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
spread = {
    "rows": lambda x: distribute_tensor(x, line, [Shard(0)]),
    "columns": lambda x: distribute_tensor(x, line, [Shard(1)]),
    "hybrid": lambda x: distribute_tensor(x, square, [Replicate(), Shard(0)]),
    "both": lambda x: distribute_tensor(x, square, [Shard(1), Shard(0)]),
    "twice": lambda x: distribute_tensor(x, square, [Shard(0), Shard(0)]),
    "replicated": lambda x: distribute_tensor(x, line, [Replicate()]),
    "whole": lambda x: x.clone(),
}
for saved, spread_as in spread.items():
    ema = fastema.EMA({"w": spread_as(value)}, 0.5)
    ema.update({"w": spread_as(value + 2)})
    ema.save(folder / f"{saved}.safetensors")
dist.barrier()
names = [f.name for f in folder.glob("hybrid*")]
assert sorted(names) == [f"hybrid-{k:05}-of-00004.safetensors" for k in (1, 2, 3, 4)], names
sizes = [checkpoint.File(folder / name).get("w", np.zeros(0)).size for name in sorted(names)]
assert sizes == [24, 18, 0, 0], "of replicas the first is saved"
for saved in spread:
    for loaded, spread_as in spread.items():
        ema = fastema.EMA.load(folder / f"{saved}.safetensors", {"w": spread_as(torch.zeros(7, 6))})
        assert torch.equal(torch.from_numpy(whole(ema.averages["w"])), value + 1), (saved, loaded)
""",
    )


def test_tensor_parallel_layers_under_fsdp(tmp_path):
    run(
        4,
        tmp_path,
        MODEL
        + """
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))

def spread():
    model = parallelize_module(made(), mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])

model, reference = spread(), made()
ema, expected = fastema.EMA(model, 0.5), fastema.EMA(reference, 0.5)
with torch.no_grad():
    for m in (model, reference):
        for parameter in m.parameters():
            parameter.mul_(3.0)
for each in (ema, expected):
    each.update()
assert same(ema.averages, expected.averages)
ema.save(folder / "ema.safetensors")
dist.barrier()
assert same(fastema.EMA.load(folder / "ema.safetensors", made()).averages, expected.averages)
assert same(fastema.EMA.load(folder / "ema.safetensors", spread()).averages, expected.averages)
""",
    )


def test_torch_reads_a_set_as_its_own_checkpoints(tmp_path):
    run(
        2,
        tmp_path,
        MODEL
        + """
import torch.distributed.checkpoint as dcp

model = sharded()
ema = fastema.EMA(model, 0.5, rounding="compensated")
train(ema, model, [1, 2])
(folder / "set").mkdir(exist_ok=True)
ema.save(folder / "set/ema.safetensors")
dist.barrier()
found = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in ema.averages.items()}
dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "set")))
assert same(found, ema.averages)
""",
    )


def test_a_load_reads_only_what_it_needs(tmp_path):
    run(
        2,
        tmp_path,
        MODEL
        + """
import tracemalloc

mesh, size = init_device_mesh("cpu", (ranks,)), 1 << 20
values = [distribute_tensor(torch.ones(2 * size), mesh, [Shard(0)])]
path = folder / "ema.safetensors"
fastema.EMA(values, 0.5).save(path)
dist.barrier()
tracemalloc.start()
fastema.EMA.load(path, values)
assert tracemalloc.get_traced_memory()[1] < 1.1 * 4 * size, "bytes: its own average"
""",
    )


def test_sets_that_are_not_whole_or_of_two_saves_are_refused_by_name(tmp_path):
    run(
        2,
        tmp_path,
        MODEL
        + """
model = sharded()
ema = fastema.EMA(model, 0.5)
for step in (1, 2):
    train(ema, model, [step])
    for name in ("whole", "mixed", "missing", "renamed", "several"):
        if step == 1 or name != "mixed" or rank == 0:  # a crash before the second had saved
            ema.save(folder / f"{name}.safetensors")
dist.barrier()
if rank == 0:
    (folder / "missing-00002-of-00002.safetensors").unlink()
    first, second = (folder / f"renamed-0000{k}-of-00002.safetensors" for k in (1, 2))
    second.write_bytes(first.read_bytes())
    (folder / "alone.safetensors").write_bytes(first.read_bytes())
    fastema.EMA(plain(), 0.5).save(folder / "several.safetensors")
dist.barrier()
before = bits(model)
for name, error, message in (
    ("mixed", ValueError, "mixed-00002-of-00002.safetensors must be of one save, and their step is 2 and 1"),
    ("missing", FileNotFoundError, "missing-00002-of-00002.safetensors is not there"),
    ("missing-00001-of-00002", FileNotFoundError, "missing-00002-of-00002.safetensors is not there"),
    ("renamed", ValueError, "renamed-00002-of-00002.safetensors must have the name that it was saved under"),
    ("alone", ValueError, "alone.safetensors must have the name that it was saved under"),
    ("several", ValueError, "several.safetensors is there as a set of 2 files and as a file"),
    ("nothing", FileNotFoundError, "nothing.safetensors"),
):
    refused(error, message, lambda: fastema.EMA.load(folder / f"{name}.safetensors", model))
    refused(error, message, lambda: fastema.EMA.load(folder / f"{name}.safetensors", plain()))
for given in ("whole", "whole-00002-of-00002", "several-00001-of-00002"):
    assert same(fastema.EMA.load(folder / f"{given}.safetensors", model).averages, ema.averages)
larger = plain()
larger.first.weight = nn.Parameter(torch.zeros(6, 3))
refused(ValueError, "['first.weight'] must have shape (6, 3), got (5, 3)",
        lambda: fastema.EMA.load(folder / "whole.safetensors", larger))
for part in (larger.first, larger):
    fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
refused(ValueError, "'first.weight' must have shape (6, 3) in all, got (5, 3)",
        lambda: fastema.EMA.load(folder / "whole.safetensors", larger))
assert all(torch.equal(x, before[name]) for name, x in bits(model).items())
""",
    )


def test_a_set_of_two_runs_of_one_step_is_refused_and_those_of_each_are_not(tmp_path):
    """The second run began anew, and was stopped when one of its processes had saved."""
    for begin in (0, 7):
        run(
            2,
            tmp_path,
            MODEL
            + f"""
model = sharded()
ema = fastema.EMA(model, 0.5)
for _ in range(2):  # over and over at one step
    train(ema, model, [{begin} + 1])
    path = folder / "run-{begin}.safetensors"
    ema.save(path)
    dist.barrier()
    assert same(fastema.EMA.load(path, model).averages, ema.averages)
    dist.barrier()
if {begin} and rank == 0:
    for mixed, first, second in (("a", 0, 7), ("b", 7, 0)):
        for k, number in ((1, first), (2, second)):
            source = folder / f"run-{{number}}-0000{{k}}-of-00002.safetensors"
            (folder / f"{{mixed}}-0000{{k}}-of-00002.safetensors").write_bytes(source.read_bytes())
        refused(ValueError, f"{{mixed}}-00002-of-00002.safetensors must be of one save, and their save is ",
                lambda: fastema.EMA.load(folder / f"{{mixed}}.safetensors", plain()))
""",
        )


def test_values_that_never_move_are_paired_once(tmp_path):
    run(
        1,
        tmp_path,
        MODEL
        + """
model = sharded()
ema = fastema.EMA(model, 0.5)
paired = ema._parts.passes._stable
train(ema, model, [1, 2])
ema.swap()
ema.swap()
train(ema, model, [3])
assert ema._parts.passes._stable is paired
""",
    )
