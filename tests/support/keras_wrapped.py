"""A pytest plugin (-p keras_wrapped) for Keras' own tests: the optimizers they make are wrapped.

Keras is imported first, so that its own modules keep the classes they hold; what is imported later, the test
modules, finds stand-ins that make an optimizer and wrap it. FASTEMA_WRAP says which: "plain", "holders"
(those that hold other optimizers) or "all".
"""

import os
import sys
import types

import keras
from keras.src.trainers import trainer

from fastema.keras import ExponentialMovingAverage

WRAPPED = os.environ["FASTEMA_WRAP"]
HOLDERS = ("LossScaleOptimizer", "MultiOptimizer")
optimizers = keras.src.optimizers


def wrap(optimizer):
    if isinstance(optimizer, ExponentialMovingAverage) or not isinstance(optimizer, optimizers.Optimizer):
        return optimizer  # wrapped already, or None
    kind = "holders" if type(optimizer).__name__ in HOLDERS else "plain"
    return ExponentialMovingAverage(optimizer) if WRAPPED in (kind, "all") else optimizer


def within(optimizer):
    return optimizer._optimizer if isinstance(optimizer, ExponentialMovingAverage) else optimizer


class StandIn(type):
    """The type of the stand-ins: calling one gives a wrapped optimizer, which is an instance of it."""

    def __call__(cls, *args, **kwargs):
        return wrap(cls.real(*args, **kwargs))

    def __instancecheck__(cls, instance):
        return isinstance(within(instance), cls.real)

    def __getattr__(cls, name):
        return getattr(cls.real, name)


class Optimizers(types.ModuleType):
    """keras.optimizers with stand-ins."""

    def __getattr__(self, name):
        return getattr(optimizers, name)

    def get(self, identifier):
        return wrap(optimizers.get(identifier))


stand_ins = Optimizers(optimizers.__name__)
for name, real in vars(optimizers).items():
    if isinstance(real, type) and issubclass(real, optimizers.Optimizer) and real is not optimizers.Optimizer:
        if name not in HOLDERS:
            real()  # Keras imports what torch needs of it now, not after the stand-ins are there
        stand_in = StandIn(name, (), {"real": real})
        setattr(stand_ins, name, stand_in)
        setattr(sys.modules[real.__module__], name, stand_in)

keras.src.optimizers = stand_ins  # for `from keras.src import optimizers`
trainer.optimizers = stand_ins  # for compile(optimizer="sgd")
