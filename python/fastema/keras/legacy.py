"""The module path by which earlier files name the wrappers of tf_keras' optimizers."""

from .tf_keras import ExponentialMovingAverage, LegacyExponentialMovingAverage

__all__ = ["ExponentialMovingAverage", "LegacyExponentialMovingAverage"]
