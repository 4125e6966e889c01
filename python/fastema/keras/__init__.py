"""Averaged weights for Keras: an optimizer wrapper with TensorFlow Model Garden's documented API.

Every member of the documented ``tfm.optimization.ExponentialMovingAverage``, and what it does here. "The
wrapped optimizer" is the one that trains, below a ``LossScaleOptimizer`` too.

======================= ==========================================================================
``clipnorm``            the wrapped optimizer's; as a keyword, set on it
``clipvalue``           the same
``global_clipnorm``     the same
``has_shadow_copy``     whether averages exist; False for a model that is not built yet
``iterations``          the wrapped optimizer's counter of steps
``learning_rate``       the wrapped optimizer's; can be set
``lr``                  the same; as a keyword, sets it, with a DeprecationWarning
``decay``               keyword only: the rate becomes ``lr / (1 + decay * iterations)``
``weights``             the wrapped optimizer's variables, the averages, then slots and weights added
``variables``           the same; a list, and a method that returns it
``add_slot``            a variable of another one's shape; the existing one on a second call; saved
``add_weight``          a variable of the optimizer; saved; never trainable
``apply_gradients``     trains with the wrapped optimizer, then averages; returns ``iterations``
``assign_average_vars`` assigns variables their averages; warns of those that have none
``from_config``         makes an optimizer from a config, with ``custom_objects``; the config stays
``get_config``          every argument, as plain values
``get_gradients``       in TensorFlow's graph mode; else RuntimeError
``get_slot``            of those added, ``"average"``, or of the wrapped optimizer (``"m"`` too)
``get_slot_names``      the names that ``get_slot`` knows
``get_updates``         in TensorFlow's graph mode; else RuntimeError
``get_weights``         iterations, state, averages, slots and weights added; no learning rate
``minimize``            computes gradients and applies them, with TensorFlow and torch
``set_weights``         takes that list, also with the learning rate, or without the averages
``shadow_copy``         averages this model, or these variables, from now on; need not be called
``swap_weights``        exchanges weights and averages, bit for bit; twice is nothing
``update_average``      averages once, at the current ``iterations``
======================= ==========================================================================
"""

from .callbacks import AverageModelCheckpoint, SwapEMAWeights
from .optimizer import ExponentialMovingAverage

__all__ = ["AverageModelCheckpoint", "ExponentialMovingAverage", "SwapEMAWeights"]
