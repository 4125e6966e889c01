"""Ways to run TensorFlow code: eagerly, in a graph, compiled by XLA."""

import tensorflow as tf


def ready(mode, function):
    """Return a function as it runs in ``"eager"``, ``"graph"`` or ``"xla"`` mode."""
    return function if mode == "eager" else tf.function(function, jit_compile=mode == "xla")


def run(mode, function):
    """Run a function without arguments once in a mode; return its result."""
    return ready(mode, function)()
