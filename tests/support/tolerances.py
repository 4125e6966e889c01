"""Every tolerance of the tests, with its reason; all else is compared bit for bit."""

import numpy as np

# The original (TensorFlow Model Garden) forms 1 - decay in float32: 1 - .99 = .00999999046. We form it in
# float64. Over ten steps of the golden cases the averages differ by this much, relative.
GOLDEN = {"rtol": 2e-6, "atol": 0}

# The same, seen in one weight 1 - decay: the original's decay is rounded to half a unit in the last place of
# a float32 below 1.
GOLDEN_WEIGHT = {"rtol": 0, "atol": 2.0**-24}

# The golden run around Adam was the legacy optimizer's; Keras 3's rounds differently.
GOLDEN_ADAM = {"rtol": 4e-6, "atol": 0}

# Other libraries form 1 - decay in float32 or write the formula otherwise: a few units in the last place of
# float32 after twenty updates of weights that are about 1.
FRAMEWORK = {"rtol": 1e-6, "atol": 1e-6}

# Libraries round a power differently, by a unit or two in the last place of a float64 near 1, as decays are.
POWERS = {"rtol": 0, "atol": 2.0**-51}

# A product of up to a thousand decays in another order: a rounding of each factor.
PRODUCT = {"rtol": 1e-13, "atol": 1e-300}

# The same, where powers of numbers are taken to exponents of up to ten thousand.
SPANS = {"rtol": 1e-11, "atol": 1e-300}

# The same average in float64 with decays of a hundred steps taken at once, of values up to a million.
CLOCK = {"rtol": 1e-11, "atol": 1e-11}

# The same average in float64 by another order of the operations, over at most a thousand steps of weights of
# about 10.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}

# ema_pytorch forms its decay in float32, half a unit in the last place below 1, over 60 steps of weights of
# about 10.
DECAY_IN_FLOAT32 = {"rtol": 0, "atol": 60 * 10 * 2.0**-24}

# A power function's spread is that of an integral; of 20,000 steps, each weighs as its middle.
STEPS = {"rtol": 1e-4, "atol": 0}

# The test's own solution of least squares, by one system of nearly parallel profiles: its condition is about
# 1e6, as is that of two power functions between two of a thousand snapshots; weights are up to 20.
LEAST_SQUARES = {"rtol": 0, "atol": 1e-8}

# A float64 rounded once to float32.
IN_FLOAT32 = {"rtol": 2.0**-24, "atol": 0}

# The loss of float32 averages, and of those that a replay computes in float64 of the same weights.
LOSS = {"rtol": 1e-4, "atol": 0}


def assert_close(actual, expected, tolerance):
    """Assert within one of the tolerances above."""
    np.testing.assert_allclose(actual, expected, **tolerance)
