"""What things are called here whose libraries share no classes, and mostly have no types to check."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

Variable = Any  # a keras.Variable, or the library's own: a tf.Variable, a torch.Tensor
Tensor = Any  # a value of the library, or what it takes for one: a tf.Tensor, a jax.Array, a number
Gradient = tuple[Tensor, Variable]  # None where a variable has none
Operation = Any  # of a graph of TensorFlow; None in eager code
Optimizer = Any  # of Keras 3 or of tf_keras
Model = Any  # of Keras 3 or of tf_keras
Store = Any  # where Keras keeps an optimizer's arrays in a file, by their names
Key = Any  # identifies a variable, also across the replicas of a strategy
Initializer = Any  # a name, a function of shape and dtype, or a tensor with the first value
VariableList = Sequence[Variable] | Callable[[], Sequence[Variable]]  # or what returns it
Context = AbstractContextManager[Any]

Engine = Literal["auto", "native", "graph"]
Carrier = Literal["native", "graph", "cuda"]  # what carries averaging out
