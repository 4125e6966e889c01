"""An optimizer that calls update() by its post-step hook: accumulated gradients, and steps skipped."""

import numpy as np
import pytest

import fastema
import oracle

pytestmark = pytest.mark.usefixtures("every_torch_engine")


@pytest.mark.parametrize("bad", [None, 1, 2], ids=["", "first step", "second step"])
def test_averages_move_at_steps_of_the_optimizer_alone_and_not_at_those_that_a_scaler_skips(torch, bad):
    weight = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], 0.5)
    ema = fastema.EMA({"w": weight}, 0.75)
    hook = optimizer.register_step_post_hook(lambda *_: ema.update())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    average, steps = np.zeros(3, np.float32), 0
    for n in range(1, 5):
        for batch in (1.0, 2.0):
            scaler.scale((weight * batch).sum() * (float("inf") if n == bad else 1)).backward()
            assert ema.step == steps
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if n != bad:
            steps += 1
            average = oracle.update(average, weight.detach().numpy(), 0.75)
        assert ema.step == steps
        assert oracle.same_bits(ema.averages["w"].numpy(), average)
    hook.remove()
    optimizer.step()
    assert ema.step == steps
