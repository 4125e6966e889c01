"""Averages of what frameworks for JAX train: a run that is resumed ends with the bits of one that is not."""

import numpy as np
import pytest

import fastema
from processes import output_of, skip_without

jax = pytest.importorskip("jax")

PRELUDE = """
    import hashlib
    import sys
    import warnings

    import numpy as np

    warnings.simplefilter("ignore")
    import jax
    import jax.numpy as jnp
    import optax

    import fastema
    import fastema.jax
    import oracle

    X = jax.random.normal(jax.random.key(0), (64, 4))
    Y = X.sum(axis=1, keepdims=True)
    DECAY = fastema.schedules.dynamic(0.9)
    AVERAGE = fastema.jax.ema(DECAY)

    def arrays_of(tree):
        return [np.asarray(x) for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]

    def digest(tree):
        parts = [(x.dtype, x.shape, x.tobytes()) for x in arrays_of(tree)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def put_back(tree, arrays):
        leaves, structure = jax.tree.flatten(tree)
        for name, array in arrays.items():
            leaves[int(name)] = jnp.asarray(array)
        return structure.unflatten(leaves)
"""

# Each defines `made`, a tree of all that trains; `train(made)`, the next one; and `values(made)`.
FRAMEWORKS = {
    "nnx": """
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.last = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x))))

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, average):
        optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model))
        return AVERAGE.update(average, nnx.state(model, nnx.Param))

    def train(made):
        return (nnx.state(model), nnx.state(optimizer), step(model, optimizer, made[2]))

    def restore(made):
        nnx.update(model, made[0])
        nnx.update(optimizer, made[1])

    values = lambda made: nnx.state(model, nnx.Param)
    made = (nnx.state(model), nnx.state(optimizer), AVERAGE.init(values(None)))
    pure = lambda made: AVERAGE.averages(made[2])
    """,
    "linen": """
    import flax.linen as nn
    from flax.training.train_state import TrainState

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.relu(nn.Dense(8)(x)))

    net = Net()
    made = TrainState.create(
        apply_fn=net.apply,
        params=net.init(jax.random.key(1), X)["params"],
        tx=optax.chain(optax.adam(1e-2), AVERAGE.as_optax()),
    )

    @jax.jit
    def train(state):
        loss = lambda params: jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    restore = lambda made: None
    values = lambda made: made.params
    pure = lambda made: AVERAGE.averages(made.opt_state)
    """,
    "equinox": """
    import equinox as eqx

    model = eqx.nn.MLP(4, 1, 8, 1, key=jax.random.key(1))
    optimizer = optax.adam(1e-2)
    made = (model, optimizer.init(eqx.filter(model, eqx.is_array)), AVERAGE.init(model))

    @eqx.filter_jit
    def train(made):
        model, state, average = made
        gradients = eqx.filter_grad(lambda m: jnp.mean((jax.vmap(m)(X) - Y) ** 2))(model)
        updates, state = optimizer.update(gradients, state)
        model = eqx.apply_updates(model, updates)
        return model, state, AVERAGE.update(average, model)

    restore = lambda made: None
    values = lambda made: made[0]
    pure = lambda made: AVERAGE.averages(made[2])
    """,
    "pure": """
    class Layer:
        def __init__(self, w, b):
            self.w, self.b = w, b

    jax.tree_util.register_pytree_node(Layer, lambda x: ((x.w, x.b), None), lambda _, x: Layer(*x))
    made = (Layer(jnp.full((4, 1), 0.5), jnp.zeros(1)),)
    made = (made[0], AVERAGE.init(made[0]))

    @jax.jit
    def train(made):
        gradients = jax.grad(lambda m: jnp.mean((X @ m.w + m.b - Y) ** 2))(made[0])
        model = jax.tree.map(lambda p, g: p - 0.1 * g, made[0], gradients)
        return model, AVERAGE.update(made[1], model)

    restore = lambda made: None
    values = lambda made: made[0]
    pure = lambda made: AVERAGE.averages(made[1])
    """,
}

RUN = """
    folder, resumed = sys.argv[1], sys.argv[2] == "resumed"
    if resumed:
        with np.load(folder + "/made.npz") as file:
            made = put_back(made, file)
        restore(made)
        ema = fastema.EMA.load(folder + "/averages.safetensors", values(made))
    else:
        ema = fastema.EMA(values(made), DECAY)
        expected = arrays_of(values(made))
    for number in range(4 if resumed else 1, 8):
        made = train(made)
        ema.update(values(made))
        if not resumed:
            decay = oracle.decay_at(number, 0.9)
            now = arrays_of(values(made))
            expected = [oracle.update(a, v, decay) for a, v in zip(expected, now, strict=True)]
            if number == 3:
                leaves = enumerate(jax.tree.leaves(made))
                np.savez(folder + "/made.npz", **{str(i): x for i, x in leaves if isinstance(x, jax.Array)})
                ema.save(folder + "/averages.safetensors")
    found = arrays_of(ema.averages)
    if not resumed:
        assert all(map(oracle.same_bits, found, expected)), "a replay by NumPy"
    assert digest(pure(made)) == digest(ema.averages), "the averages of both"
    assert jax.tree.structure(ema.averages) == jax.tree.structure(values(made))
    print(digest((made, ema.averages)))
"""


def test_averages_of_a_module_of_nnx_have_its_keys_of_random_numbers_as_they_are_now():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    ema = fastema.EMA(model, 0.5)
    model(np.ones((1, 3), np.float32))
    model.layers[1].rngs.key[...] = jax.random.key(7)
    ema.update()
    state, averages = nnx.state(model), ema.averages
    assert jax.tree.structure(averages) == jax.tree.structure(state)
    shown = averages["layers"][1]["rngs"]["key"]
    assert shown is not model.layers[1].rngs.key
    assert (jax.random.key_data(shown.get_raw_value()) == jax.random.key_data(jax.random.key(7))).all()
    nnx.merge(nnx.graphdef(model), averages)(np.ones((1, 3), np.float32))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_that_is_resumed_ends_with_the_bits_of_one_that_is_not(framework, tmp_path):
    for package in (
        "jax",
        "optax",
        {"nnx": "flax", "linen": "flax", "pure": "jax"}.get(framework, framework),
    ):
        skip_without(package)
    code = PRELUDE + FRAMEWORKS[framework] + RUN
    whole = output_of(code, tmp_path, "whole")
    assert output_of(code, tmp_path, "resumed") == whole
