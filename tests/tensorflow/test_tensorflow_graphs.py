"""Updates and swaps within other TensorFlow code: order, loops, branches, gradients, compilers."""

import numpy as np
import pytest
import tensorflow as tf

import fastema.tensorflow as engines
import oracle
from modes import run
from processes import output_of

MODES = ["eager", "graph"]


def update(averages, values, decay, **options):
    """Return nothing, as a tf.function may."""
    engines.update(averages, values, decay, **options)


def after(updates, average=0.0, value=1.0, decay=0.5):
    """Return a float32 average after so many updates."""
    average, value = np.float32(average), np.float32(value)
    for _ in range(updates):
        average = oracle.update(average, value, decay)
    return float(average)


@pytest.fixture(params=[5, 300_000])  # the second is XLA's, where nothing native is in place
def pair(request):
    return tf.Variable(tf.zeros(request.param)), tf.Variable(tf.ones(request.param))


def contents(tensor):
    [content] = np.unique(tensor.numpy())
    return float(content)


def test_reads_and_writes_keep_their_order_in_a_thousand_runs():
    """Of several variables, in nested functions, by program order and by control dependencies."""
    sizes = [3, 200_000]
    averages, values = ([tf.Variable(tf.zeros(n)) for n in sizes] for _ in range(2))

    @tf.function
    def nested(decay):
        update(averages, values, decay)

    def ends(variables):
        return [tf.stack([x[0], x[-1]]) for x in (v.read_value() for v in variables)]

    @tf.function
    def chain():
        seen = ends(averages)
        for value in values:
            value.assign_add(tf.ones_like(value))
        nested(tf.constant(0.75, tf.float64))
        seen += ends(averages)
        negated = [value.assign(-value) for value in values]
        with tf.control_dependencies(negated):
            update(averages, values, 0.5)
            seen += ends(averages)
        update(averages[:1], values[:1], 0.25)
        engines.swap(averages, values)
        seen += ends(averages + values)
        with tf.control_dependencies([averages[0].read_value()]):
            update(averages[1:], values[1:], 0.5)
            averages[0].assign(values[0] * 0.125)
        nested(tf.constant(0.875, tf.float64))
        return tf.stack(seen + ends(averages + values))

    a, v = np.zeros(2, np.float32), np.zeros(2, np.float32)
    for _ in range(1000):
        expected = [*a]
        v += 1
        a = oracle.update(a, v, 0.75)
        expected += [*a]
        v = -v
        a = oracle.update(a, v, 0.5)
        expected += [*a]
        a[0] = oracle.update(a[0], v[0], 0.25)
        a, v = v, a
        expected += [*a, *v]
        a[1] = oracle.update(a[1], v[1], 0.5)
        a[0] = v[0] * np.float32(0.125)
        a = oracle.update(a, v, 0.875)
        expected += [*a, *v]
        assert chain().numpy().tolist() == [[x, x] for x in expected]


@pytest.mark.parametrize("mode", MODES)
def test_an_update_within_tf_while_loop(pair, mode):
    average, value = pair

    def body(i):
        update([average], [value], 0.5)
        value.assign_add(tf.ones_like(value))
        engines.swap([average], [value])
        engines.swap([average], [value])
        return [i + 1]

    run(mode, lambda: tf.while_loop(lambda i: i < 10, body, [tf.constant(0)]))
    a, v = 0.0, 1.0
    for _ in range(10):
        a, v = after(1, a, v), v + 1
    assert (contents(average), contents(value)) == (a, v)


def test_an_update_within_an_autograph_loop_and_branch(pair):
    average, value = pair

    @tf.function
    def train(steps):
        read = tf.TensorArray(tf.float32, steps)
        for step in tf.range(steps):
            if step % 3 != 0:
                update([average], [value], 0.5)
            read = read.write(step, average.read_value()[2])
        return read.stack()

    assert train(7).numpy().tolist() == [after(n) for n in (0, 1, 2, 2, 3, 4, 4)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("branch", [True, False])
def test_an_update_within_tf_cond_or_tf_switch_case(pair, mode, branch):
    average, value = pair

    def step():
        tf.cond(
            tf.constant(branch),
            lambda: update([average], [value], 0.5),
            lambda: engines.swap([average], [value]),
        )
        cases = [lambda: None, lambda: update([average], [value], 0.75)]
        tf.switch_case(tf.constant(int(branch)), cases)

    run(mode, step)
    assert contents(average) == (after(1, 0.5, 1.0, 0.75) if branch else 1.0)
    assert contents(value) == (1.0 if branch else 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_when_decides_at_each_step_of_a_loop(pair, mode):
    average, value = pair

    def body(i):
        update([average], [value], 0.5, when=i % 2 == 0)
        return [i + 1]

    run(mode, lambda: tf.while_loop(lambda i: i < 7, body, [tf.constant(0)]))
    assert contents(average) == after(4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("when", [True, False])
def test_when_may_be_a_tensor_of_an_argument(pair, mode, when):
    average, value = pair

    def step(when):
        update([average], [value], 0.5, when=when)

    (tf.function(step) if mode == "graph" else step)(tf.constant(when))
    assert contents(average) == (0.5 if when else 0.0)


@pytest.fixture(params=[1, 300_000])
def size(request):
    return request.param


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_sees_the_values_that_were_read(mode, size):
    average, value = tf.Variable(tf.fill([size], 2.0)), tf.Variable(tf.fill([size], 100.0))

    def gradients():
        with tf.GradientTape(persistent=True) as around:
            y = average * average + value
            update([average], [value], 0.0)
            z = average * average * value
        return around.gradient(y, [average, value]) + around.gradient(z, [average, value])

    assert [contents(x) for x in run(mode, gradients)] == [4.0, 1.0, 20_000.0, 10_000.0]


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_gradients_pass_an_update_by(mode, size):
    average, weight = tf.Variable(tf.zeros(size)), tf.Variable(tf.fill([size], 3.0))

    def gradients():
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                loss = weight**3
                update([average], [weight], 0.5)
            slope = inner.gradient(loss, weight)
            update([average], [weight], 0.5)
        return slope, outer.gradient(slope, weight)

    assert [contents(x) for x in run(mode, gradients)] == [27.0, 18.0]
    assert contents(average) == after(2, 0.0, 3.0)


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_derivative_passes_an_update_by(mode, size):
    average, weight = tf.Variable(tf.zeros(size)), tf.Variable(tf.fill([size], 3.0))

    def derivative():
        with tf.autodiff.ForwardAccumulator(weight, tf.ones(size)) as forward:
            loss = weight**3
            update([average], [weight], 0.5)
        return forward.jvp(loss)

    assert contents(run(mode, derivative)) == 27.0
    assert contents(average) == 1.5


def test_a_gradient_through_a_loop_that_averages(size):
    average, weight = tf.Variable(tf.zeros(size)), tf.Variable(tf.fill([size], 3.0))

    @tf.function
    def gradient():
        with tf.GradientTape() as tape:
            y = tf.ones(size)
            for _ in tf.range(4):
                y = y * weight
                update([average], [weight], 0.5)
        return tape.gradient(y, weight)

    assert contents(gradient()) == 4 * 27.0
    assert contents(average) == after(4, 0.0, 3.0)


def test_an_update_within_recompute_grad(size):
    average, weight = tf.Variable(tf.zeros(size)), tf.Variable(tf.fill([size], 3.0))

    @tf.function
    def gradient():
        with tf.GradientTape() as tape:
            y = tf.recompute_grad(lambda x: x * x)(weight)
            update([average], [weight], 0.5)
        return tape.gradient(y, weight)

    assert contents(gradient()) == 6.0
    assert contents(average) == 1.5


def test_a_signature_without_sizes(rng):
    average = tf.Variable(tf.zeros(6))

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32), tf.TensorSpec([], tf.float64)])
    def step(value, decay):
        update([average], [value], decay)
        return average.read_value()

    v = rng.standard_normal(6).astype(np.float32)
    a = np.zeros(6, np.float32)
    for decay in (0.0, 0.9, 1.0):
        a = oracle.update(a, v, decay)
        assert oracle.same_bits(step(tf.constant(v), tf.constant(decay, tf.float64)).numpy(), a)
    assert step.experimental_get_tracing_count() == 1


def test_what_a_graph_finds_wrong_when_it_runs_changes_nothing(pair):
    """Also not the averages before the wrong one."""
    average, other = pair[0], tf.Variable(tf.zeros([2, 3]))

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32), tf.TensorSpec([], tf.float64)])
    def step(value, decay):
        update([average, other], [pair[1], value], decay)

    with pytest.raises(tf.errors.InvalidArgumentError, match="averages and values must have one"):
        step(tf.ones(5), tf.constant(0.5, tf.float64))
    for decay in (-0.1, 1.5, float("nan")):
        with pytest.raises(tf.errors.InvalidArgumentError, match="decay must be from 0 to 1"):
            step(tf.ones([2, 3]), tf.constant(decay, tf.float64))
    assert contents(average) == contents(other) == 0.0


def test_another_shape_of_the_same_size_is_refused_when_a_graph_runs():
    average = tf.Variable(tf.zeros([2, 3]))

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32)])
    def step(value):
        update([average], [value], 0.5)

    with pytest.raises(tf.errors.InvalidArgumentError, match="averages and values must have one"):
        step(tf.ones([3, 2]))
    assert contents(average) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_an_average_of_unknown_shape(rng, mode):
    a, v = (rng.standard_normal((2, 3)).astype(np.float32) for _ in range(2))
    average, value = (tf.Variable(x, shape=tf.TensorShape(None)) for x in (a, v))
    run(mode, lambda: update([average], [value], 0.9))
    run(mode, lambda: engines.swap([average], [value]))
    assert oracle.same_bits(value.numpy(), oracle.update(a, v, 0.9))
    assert oracle.same_bits(average.numpy(), v)


def test_an_average_that_only_its_updates_read_is_not_folded_away():
    """Grappler sees constant values, averages without readers and two updates that look alike."""
    averages = [tf.Variable(tf.zeros(n)) for n in (1, 5)]
    value, nothing = tf.constant([1.0]), tf.Variable(tf.zeros([0]))

    @tf.function
    def twice():
        for _ in range(2):
            update([averages[0], nothing, averages[1]], [value, tf.zeros([0]), tf.ones(5)], 0.5)

    @tf.function
    def train():
        for _ in tf.range(10):
            twice()

    for _ in range(3):
        twice()
    train()
    assert [contents(average) for average in averages] == [after(26)] * 2


def test_functions_and_loops_within_a_compiled_one_are_left_to_the_framework(pair):
    average, value = pair
    said = []

    @tf.function
    def nested():
        said.append(engines.update([average], [value], 0.5))

    def body(i):
        nested()
        said.append(engines.update([average], [value], 0.5))
        return [i + 1]

    @tf.function(jit_compile=True)
    def compiled():
        nested()
        tf.while_loop(lambda i: i < 2, body, [tf.constant(0)])

    @tf.function
    def outer():
        compiled()
        said.append(engines.update([average], [value], 0.5, engine="native"))

    outer()
    assert said == ["graph", "graph", "native"]
    assert contents(average) == after(6)


def test_autoclustering_leaves_updates_in_place_and_order():
    code = """
        import numpy as np
        import tensorflow as tf
        import fastema.tensorflow as engines

        rng = np.random.default_rng(0)
        w, x = (rng.standard_normal(s).astype(np.float32) for s in ((30, 30), (8, 30)))
        weight, average = tf.Variable(w), tf.Variable(tf.zeros([30, 30]))

        @tf.function
        def step(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.tanh(tf.matmul(tf.tanh(tf.matmul(x, weight)), weight)) ** 2)
            weight.assign_sub(0.01 * tape.gradient(loss, weight))
            engines.update([average], [weight], 0.9, engine="native")
            trained = weight.read_value()
            engines.swap([average], [weight])
            scored = tf.reduce_sum(tf.tanh(tf.matmul(x, weight)))
            engines.swap([average], [weight])
            return trained, average.read_value(), scored

        a = np.zeros((30, 30), np.float32)
        for _ in range(20):
            trained, averaged, scored = step(tf.constant(x))
            a += np.float32(1 - 0.9) * (trained.numpy() - a)
            assert (averaged.numpy() == a).all()
            assert (weight.numpy() == trained.numpy()).all()
            assert abs(scored - np.tanh(x @ a).sum()) < 1e-2  # of the averages, not of the weights
        print("fine")
    """
    flags = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit --tf_xla_min_cluster_size=1"
    assert output_of(code, TF_XLA_FLAGS=flags) == "fine"
