"""An EMA in torch.distributed.checkpoint, which takes it as a model: torchtitan's Stateful, resharded."""

import sys

import pytest

from torch_ranks import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the loopback device is lo there")

PROGRAM = """
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful
from torch import nn

ARGUMENTS = {arguments}

def made(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    if {sharded}:
        mesh = init_device_mesh("cpu", (ranks,))
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
    return model

def step(model, n):
    rng = np.random.default_rng(n)
    with torch.no_grad():
        for x in [*model.parameters(), *model.buffers()]:
            new = torch.from_numpy(np.asarray(rng.uniform(1, 2, x.shape))).to(x.dtype)
            if isinstance(x, DTensor):
                new = distribute_tensor(new, x.device_mesh, x.placements, src_data_rank=None).to_local()
                x = x.to_local()
            x.copy_(new)

def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().numpy()

def state_of(ema):
    state = ema.state_dict()
    named = [*state["averages"], *state["carries"], state["copied"]]
    arrays = [{{name: whole(x).tobytes() for name, x in each.items()}} for each in named]
    return arrays, ema.step, ema.clock, ema.decay, state["products"]

def replayed():
    model = made(0)
    ema = fastema.EMA(model, **ARGUMENTS)
    yield model, ema
    for n in range(1, 4):
        step(model, n)
        ema.update(span={span})
    yield model, ema
"""

SETTINGS = [
    ({"decay": 0.75, "rounding": "compensated"}, 2.5),
    ({"decay": 0.75, "only": ["*.weight"]}, 1),
    ({"decay": [0.5, 0.75], "initial": "zeros", "every": 2}, 1),
]


@pytest.mark.parametrize(("arguments", "span"), SETTINGS, ids=str)
def test_an_ema_is_saved_beside_its_model_by_two_and_loaded_by_one(tmp_path, arguments, span):
    program = PROGRAM.format(arguments=arguments, sharded=True, span=span)
    run(
        2,
        tmp_path,
        program
        + """
_, (model, ema) = replayed()
assert isinstance(ema, Stateful)
assert any(isinstance(x, DTensor) for x in ema.state_dict()["averages"][0].values())
dcp.save({"ema": ema, "model": model.state_dict()}, checkpoint_id=str(folder / "checkpoint"))

other = made(7)
again = fastema.EMA(other, **ARGUMENTS)
dcp.load({"ema": again}, checkpoint_id=str(folder / "checkpoint"))
assert state_of(again) == state_of(ema)
for n in range(4, 7):
    step(model, n)
    step(other, n)
    ema.update()
    again.update()
    assert state_of(again) == state_of(ema)
""",
    )
    program = PROGRAM.format(arguments=arguments, sharded=False, span=span)
    run(
        1,
        tmp_path,
        program
        + """
other = made(7)
again = fastema.EMA(other, **ARGUMENTS)
dcp.load({"ema": again}, checkpoint_id=str(folder / "checkpoint"))
_, (model, ema) = replayed()
assert state_of(again) == state_of(ema)
step(model, 4)
step(other, 4)
ema.update()
again.update()
assert state_of(again) == state_of(ema)
""",
    )
