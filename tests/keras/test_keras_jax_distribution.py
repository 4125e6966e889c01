"""keras.distribution on JAX: averages are sharded as their weights are, and stay so."""

import pytest

from distributed import output_of
from processes import skip_without

FOUR_CPUS = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "KERAS_BACKEND": "jax"}

PROGRAM = """
    import sys
    import jax
    import keras
    import numpy as np
    import oracle
    from fastema.keras import ExponentialMovingAverage

    devices = keras.distribution.list_devices()
    assert len(devices) == 4
    if sys.argv[1] == "data":
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    else:
        mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
        layout = keras.distribution.LayoutMap(mesh)
        layout[".*dense.*kernel"] = (None, "model")
        layout[".*dense.*bias"] = ("model",)
        keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout))

    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    optimizer = ExponentialMovingAverage(keras.optimizers.Adam(0.01))
    weights = model.trainable_variables
    optimizer.build(weights)
    averages = optimizer.variables[-4:]

    def parts(variables):  # which part of each lies on which device
        return [v.value.sharding.devices_indices_map(v.shape) for v in variables]

    before = parts(weights)
    assert parts(averages) == before
    shapes = [v.value.addressable_shards[0].data.shape for v in averages]
    assert shapes == ([(4, 8), (8,), (8, 2), (2,)] if sys.argv[1] == "data" else [(4, 4), (4,), (8, 1), (1,)])

    rng = np.random.default_rng(7)
    expected = [np.zeros(a.shape, a.dtype) for a in averages]
    for step in range(1, 5):
        optimizer.apply([rng.standard_normal(v.shape).astype(np.float32) for v in weights], weights)
        decay = oracle.decay_at(step)
        expected = [oracle.update(a, np.asarray(v.value), decay) for a, v in zip(expected, weights)]
        assert parts(weights) == parts(averages) == before
    for average, exact in zip(averages, expected):
        assert oracle.same_bits(np.asarray(average.value), exact)

    raw = [np.asarray(v.value) for v in weights]
    with optimizer.averaged_weights():
        assert parts(weights) == parts(averages) == before
        assert all(oracle.same_bits(np.asarray(v.value), e) for v, e in zip(weights, expected))
    assert parts(weights) == parts(averages) == before
    assert all(oracle.same_bits(np.asarray(v.value), r) for v, r in zip(weights, raw))
    assert all(oracle.same_bits(np.asarray(a.value), e) for a, e in zip(averages, expected))
"""


@pytest.mark.parametrize("kind", ["data", "model"])
def test_averages_are_sharded_as_their_weights_are(kind):
    skip_without("jax")
    output_of(PROGRAM, kind, **FOUR_CPUS)
