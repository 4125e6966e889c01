"""tf.distribute: all replicas and workers hold the same averages, those that one process computes."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from distributed import output_of
from keras_replay import assert_same_bits, replay
from processes import free_ports

pytestmark = pytest.mark.slow  # a process for each, or several

# --- MirroredStrategy: two replicas in a process ------------------------------------------------------


def test_fit_under_mirrored_strategy_averages_the_same_in_all_replicas():
    output_of("""
        from distributed import assert_replicas_agree, mirrored
        import tensorflow as tf
        from keras_replay import *

        with mirrored().scope():
            model, optimizer = small_model(), wrap()
            steps = fit(model, optimizer)
        assert optimizer.engine == "graph"
        assert_replicas_agree(optimizer._averages)
        assert_same_bits(averages_of(optimizer), replay(steps))
    """)


@pytest.mark.parametrize("graph", [True, False])
def test_a_custom_loop_under_mirrored_strategy_averages_the_same_in_all_replicas(graph):
    """With update_every, which asks a condition: in a replica it must not wait for the others."""
    output_of(f"""
        from distributed import assert_replicas_agree, mirrored, step_of, train
        import tensorflow as tf
        from keras_replay import *

        strategy = mirrored()
        with strategy.scope():
            model, optimizer = small_model(), wrap(update_every=3, start_step=4)
        steps = train(strategy, step_of(model, optimizer), model.trainable_variables, graph={graph})
        assert optimizer.iterations.numpy() == len(steps) == 8
        assert_replicas_agree(optimizer._averages)
        assert_same_bits(averages_of(optimizer), replay(steps, every=3, start_step=4))
    """)


def test_mirrored_weights_and_averages_change_places_outside_of_the_scope_and_are_saved(tmp_path):
    """The original raises outside of the scope."""
    output_of(
        """
        import sys
        from distributed import assert_replicas_agree, mirrored, replicas_of, step_of, train
        import tensorflow as tf
        from keras_replay import *

        path = sys.argv[1]
        strategy = mirrored()
        with strategy.scope():
            model, optimizer = small_model(), wrap()
            model.compile(optimizer, loss="mse")
        train(strategy, step_of(model, optimizer), model.trainable_variables)
        variables = [*model.trainable_variables, *optimizer._averages]
        before = [part for v in variables for part in replicas_of(v)]
        averages = averages_of(optimizer)

        with optimizer.averaged_weights():
            assert_same_bits([v.numpy() for v in model.trainable_variables], averages)
            assert_replicas_agree(variables)
            model.evaluate(*problem(), verbose=0)
        assert_same_bits([part for v in variables for part in replicas_of(v)], before)
        tf.function(optimizer.swap_weights)()
        assert_same_bits([v.numpy() for v in model.trainable_variables], averages)
        optimizer.swap_weights()

        model.save(path)
        alone = keras.models.load_model(path)
        assert_same_bits(averages_of(alone.optimizer), averages)
        with strategy.scope():
            loaded = keras.models.load_model(path)
        assert_same_bits(averages_of(loaded.optimizer), averages)
        for m in (model, loaded):
            train(strategy, step_of(m, m.optimizer), m.trainable_variables, epochs=1)
        assert_replicas_agree(loaded.optimizer._averages)
        assert_same_bits(averages_of(loaded.optimizer), averages_of(optimizer))

        optimizer.assign_average_vars(model.trainable_variables)
        assert_same_bits([v.numpy() for v in model.trainable_variables], averages_of(optimizer))
        assert_replicas_agree(model.trainable_variables)
    """,
        tmp_path / "model.keras",
    )


def test_statistics_that_differ_between_replicas_are_averaged_from_their_mean():
    """Each replica normalises its own part of a batch; the original's averages of these drift apart."""
    output_of("""
        from distributed import as_averaged, assert_replicas_agree, differ, mirrored, replicas_of
        from distributed import step_of, train
        import tensorflow as tf
        from keras_replay import *

        class Mean:  # of a variable's replicas
            def __init__(self, variable):
                self.variable = variable
            def numpy(self):
                first, second = replicas_of(self.variable)
                return (first + second) / np.float32(2)

        strategy = mirrored()
        with strategy.scope():
            model, optimizer = small_model(), wrap(trainable_weights_only=False)
            optimizer.shadow_copy(model)
        weights = [v for v in as_averaged(model) if v.dtype == "float32"]
        assert len(weights) == 8
        steps = train(strategy, step_of(model, optimizer), [Mean(v) for v in weights])
        assert sum(differ(v) for v in weights) == 2
        assert_replicas_agree(optimizer._averages)
        expected = replay(steps)
        assert_same_bits(averages_of(optimizer), expected)

        # the same in eager code, outside of the scope and in it
        def again(averages):
            return [oracle.update(a, w, oracle.decay_at(8)) for a, w in zip(averages, steps[-1])]

        optimizer.update_average()
        assert_same_bits(averages_of(optimizer), again(expected))
        with strategy.scope():
            optimizer.update_average()
        assert_replicas_agree(optimizer._averages)
        assert_same_bits(averages_of(optimizer), again(again(expected)))
    """)


def test_swap_twice_is_nothing_for_statistics_that_differ_between_replicas():
    """Also where the raw weights are kept aside, as averages of another type cannot hold them."""
    output_of("""
        from distributed import assert_replicas_agree, differ, mirrored, replicas_of, step_of, train
        import tensorflow as tf
        from keras_replay import *

        strategy = mirrored()
        for dtype in (None, "float64"):
            with strategy.scope():
                model, optimizer = small_model(), wrap(trainable_weights_only=False, average_dtype=dtype)
                optimizer.shadow_copy(model)
            train(strategy, step_of(model, optimizer), [], epochs=1)
            weights = [v for v in model.variables if v.dtype == "float32"]
            assert any(differ(v) for v in weights)
            everything = [*weights, *optimizer._averages]
            before = [part for v in everything for part in replicas_of(v)]
            with optimizer.averaged_weights():
                assert_replicas_agree(weights)
            assert_same_bits([part for v in everything for part in replicas_of(v)], before)
    """)


def test_gradients_that_are_summed_already_are_not_summed_again():
    output_of("""
        import pytest
        from distributed import assert_replicas_agree, gradients_of, mirrored, step_of, train
        import tensorflow as tf
        from keras_replay import *

        strategy = mirrored()

        def trained(graph, summed):
            with strategy.scope():
                model = small_model()
                optimizer = wrap(keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.01))
            variables = model.trainable_variables

            def step(x, y):
                gradients = gradients_of(model, optimizer, x, y)
                sums = tf.distribute.get_replica_context().all_reduce("sum", gradients)
                optimizer.apply_gradients(zip(sums, variables), experimental_aggregate_gradients=False)

            train(strategy, step if summed else step_of(model, optimizer), variables, graph, epochs=1)
            if not graph:  # the next ones are summed again
                train(strategy, step_of(model, optimizer), variables, graph, epochs=1)
            assert_replicas_agree([*variables, *optimizer._averages])
            return [v.numpy() for v in [*variables, *optimizer.variables]]

        for graph in (True, False):
            assert_same_bits(trained(graph, summed=True), trained(graph, summed=False))

        with strategy.scope():
            weight = keras.Variable(1.0)
            optimizer = wrap(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
        with pytest.raises(NotImplementedError, match="LossScaleOptimizer hands them on to another one"):
            strategy.run(lambda: optimizer.apply_gradients([(1.0, weight)], None, False))
        assert weight.numpy() == 1 and not optimizer.built
    """)


def test_loss_scaling_in_both_orders_and_skipped_steps_under_mirrored_strategy():
    output_of("""
        from distributed import assert_replicas_agree, batches, gradients_of, mirrored
        import tensorflow as tf
        from keras_replay import *

        strategy = mirrored()
        scaling = keras.optimizers.LossScaleOptimizer
        for outside in (True, False):
            with strategy.scope():
                model = small_model()
                inner = keras.optimizers.Adam(0.01)
                wrapper = wrap(inner) if outside else wrap(scaling(inner))
                optimizer = scaling(wrapper) if outside else wrapper
                optimizer.build(model.trainable_variables)
                factor = tf.Variable(1.0)

            def step(x, y):
                gradients = [g * factor for g in gradients_of(model, optimizer, x, y)]
                optimizer.apply(gradients, model.trainable_variables)

            run = tf.function(lambda x, y: strategy.run(step, args=(x, y)))
            steps = []
            for i, (x, y) in enumerate(batches(strategy)):
                factor.assign(float("inf") if i in (2, 3, 6) else 1.0)
                run(x, y)
                if i not in (2, 3, 6):
                    steps.append([v.numpy() for v in model.trainable_variables])
            assert wrapper.iterations.numpy() == len(steps) == 5
            assert_replicas_agree(wrapper._averages)
            assert_same_bits(averages_of(wrapper), replay(steps))
    """)


def test_gradient_accumulation_under_mirrored_strategy_averages_real_updates():
    """In eager code: in a graph plain Keras fails, as it waits for other replicas in a condition."""
    output_of("""
        from distributed import assert_replicas_agree, mirrored, step_of, train
        import tensorflow as tf
        from keras_replay import *

        strategy = mirrored()
        with strategy.scope():
            model = small_model()
            optimizer = wrap(keras.optimizers.Adam(0.01, gradient_accumulation_steps=2))
        steps = train(strategy, step_of(model, optimizer), model.trainable_variables, graph=False)
        assert optimizer.iterations.numpy() == 4
        assert_replicas_agree(optimizer._averages)
        assert_same_bits(averages_of(optimizer), replay(steps[1::2]))
    """)


# --- several processes --------------------------------------------------------------------------------


def test_workers_of_multi_worker_mirrored_strategy_hold_the_same_averages(tmp_path):
    program = """
        import sys
        import tensorflow as tf
        strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before any operation
        from distributed import as_averaged, replicas_of, step_of, train
        import tensorflow as tf
        from keras_replay import *

        with strategy.scope():
            model, optimizer = small_model(), wrap(trainable_weights_only=False)
            optimizer.shadow_copy(model)
            optimizer.build(model.trainable_variables)
        weights = [v for v in as_averaged(model) if v.dtype == "float32"]
        steps = train(strategy, step_of(model, optimizer), weights)
        averages = averages_of(optimizer)
        assert len(averages) == len(weights) == 8
        with optimizer.averaged_weights():
            assert_same_bits([v.numpy() for v in weights], averages)
        assert_same_bits([v.numpy() for v in weights], steps[-1])
        np.save(sys.argv[1], np.array([np.concatenate([w.ravel() for w in step]) for step in steps]))
        np.save(sys.argv[2], np.concatenate([a.ravel() for a in averages]))
    """
    cluster = {"worker": [f"localhost:{port}" for port in free_ports(2)]}

    def work(index):
        files = tmp_path / f"weights{index}.npy", tmp_path / f"averages{index}.npy"
        task = {"type": "worker", "index": index}
        output_of(program, *files, TF_CONFIG=json.dumps({"cluster": cluster, "task": task}))
        return [np.load(file) for file in files]

    with ThreadPoolExecutor() as workers:
        (weights, averages), (other_weights, other_averages) = workers.map(work, range(2))
    assert_same_bits([averages], [other_averages])
    assert np.any(weights != other_weights)  # the statistics of each worker's own part of the batches
    means = np.where(weights == other_weights, weights, (weights + other_weights) / np.float32(2))
    assert_same_bits([averages], replay([[mean] for mean in means]))


def test_averages_on_a_parameter_server_equal_the_replay():
    worker, server = free_ports(2)
    output_of(
        """
        import sys
        import tensorflow as tf
        cluster = tf.train.ClusterSpec({"worker": [sys.argv[1]], "ps": [sys.argv[2]]})
        servers = [tf.distribute.Server(cluster, job_name=job, task_index=0) for job in ("worker", "ps")]
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
        strategy = tf.distribute.ParameterServerStrategy(resolver)
        from distributed import step_of
        import tensorflow as tf
        from keras_replay import *

        with strategy.scope():
            model, optimizer = small_model(), wrap(update_every=2)
            optimizer.build(model.trainable_variables)
        coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
        step = step_of(model, optimizer)
        x, y = problem()

        @tf.function
        def run():
            strategy.run(step, args=(x, y))

        steps = []
        for _ in range(6):
            coordinator.schedule(run)
            coordinator.join()
            steps.append([v.numpy() for v in model.trainable_variables])
        assert optimizer.iterations.numpy() == 6
        assert all("/job:ps" in a._value.device for a in optimizer._averages)
        expected = replay(steps, every=2)
        assert_same_bits(averages_of(optimizer), expected)

        with optimizer.averaged_weights():
            assert_same_bits([v.numpy() for v in model.trainable_variables], expected)
        assert_same_bits([v.numpy() for v in model.trainable_variables], steps[-1])
        optimizer.update_average()
        assert optimizer.engine == "graph"  # native code of this process does not run on the server
        with strategy.scope():
            optimizer.update_average()
        decay = oracle.decay_at(6, every=2)
        for _ in range(2):
            expected = [oracle.update(a, w, decay) for a, w in zip(expected, steps[-1])]
        assert_same_bits(averages_of(optimizer), expected)
    """,
        f"localhost:{worker}",
        f"localhost:{server}",
    )
