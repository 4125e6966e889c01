"""Averaged weights for Keras: an optimizer wrapper with TensorFlow Model Garden's documented API."""

from .optimizer import ExponentialMovingAverage

__all__ = ["ExponentialMovingAverage"]
