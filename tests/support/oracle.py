"""The formulas in NumPy, one element-wise operation at a time: what every result must equal, bit for bit."""

import math
from fractions import Fraction

import numpy as np


def compute_type(dtype):
    """Return the type in which averages of a type are computed."""
    return np.float64 if dtype == np.float64 else np.float32


def update(average, value, decay):
    """Return the average after one update; the arrays are left alone."""
    average, value = np.asarray(average), np.asarray(value)
    compute = compute_type(average.dtype)
    w = compute(1.0 - decay)
    with np.errstate(all="ignore"):  # infinities, and signalling NaN that are widened
        if decay == 0.0:
            return value.astype(average.dtype)
        old, new = average.astype(compute), value.astype(compute)
        return (old + w * (new - old)).astype(average.dtype)


def nearest(exact, dtype):
    """Return the value of a type that is nearest to a fraction, of two the even one."""
    kind = np.dtype(dtype).type
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    guess = np.array(float(exact), dtype)
    around = [np.nextafter(guess, kind(-np.inf)), guess, np.nextafter(guess, kind(np.inf))]
    finite = [x for x in around if np.isfinite(x)]
    return min(finite, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(bits)) % 2))


def decay_at(step, decay=0.99, start_step=0, dynamic=True, every=1):
    """Return the documented decay of a step, or of so many steps up to it that are taken at once."""
    decays = []
    for s in range(step - every + 1, step + 1):
        k = s - start_step
        decays.append(0.0 if k < 0 else min(decay, (1 + k) / (10 + k)) if dynamic else decay)
    return math.prod(decays)


def same_bits(x, y):
    """Tell whether two arrays hold the same bits, but for the payloads of NaN."""
    x, y = np.asarray(x), np.asarray(y)
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    bits = np.dtype(f"u{x.itemsize}")
    equal = np.ascontiguousarray(x).view(bits) == np.ascontiguousarray(y).view(bits)
    with np.errstate(all="ignore"):  # NumPy calls a signalling NaN invalid when it is widened
        both_nan = np.isnan(x.astype(np.float64)) & np.isnan(y.astype(np.float64))
    return bool(np.all(equal | both_nan))


def random_bits(size, seed, step, pair, first=0):
    """Return the 16 random bits of elements of the pair-th array, from `first` on, as the core has them."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mixed(x):  # splitmix64
        x = (x + golden) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    if first % 2**32 + size > 2**32:  # the keys change there
        below = 2**32 - first % 2**32
        parts = (below, first), (size - below, first + below)
        return np.concatenate([random_bits(n, seed, step, pair, place) for n, place in parts])
    key = mixed(mixed(mixed(mixed(seed) ^ step) ^ pair) ^ (first >> 32))
    place = np.arange(first % 2**32, first % 2**32 + size).astype(np.uint32)
    x = ((place >> 1) ^ np.uint32(key & 0xFFFFFFFF)) * np.uint32(0x7FEB352D)
    x ^= np.uint32(key >> 32)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    x ^= x >> 16
    return np.where(place % 2 == 0, x & 0xFFFF, x >> 16).astype(np.uint32)


def round_bf16_at_random(x, random):
    """Return the bits of a float32 array rounded to bfloat16 with 16 random bits each; no NaN."""
    return ((x.view(np.uint32) + random) >> 16).astype(np.uint16)


def round_f16_at_random(x, random):
    """Return the bits of a float32 array rounded to float16 with 16 random bits each; finite."""
    magnitude = np.abs(x).astype(np.float64)
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, -14)
    ulp = np.ldexp(1.0, exponent - 10)
    # 13 random bits decide of normal numbers, 16 of subnormals
    kept = np.where(magnitude < 2.0**-14, np.floor(magnitude / ulp * 2**16) / 2**16, magnitude / ulp)
    share = np.where(magnitude < 2.0**-14, random / 2**16, (random >> 3) / 2**13)
    rounded = np.floor(kept + share) * ulp
    with np.errstate(over="ignore"):
        return np.copysign(rounded, x).astype(np.float16).view(np.uint16)
