// What an update computes for one element. Every loop, on every device, includes this and nothing
// else decides a bit. Each function takes a number or a vector of numbers alike: F is float or a
// vector of floats, Word<F> is uint32_t or a vector of as many.
//
// Internal linkage throughout: each instruction set compiles its own copy, and the linker must not
// merge them.
#pragma once

#include <stdint.h>

namespace fastema {
namespace {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// The type in which the average of an element type is computed.
template <class Element>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class Element>
using Compute = typename ComputeOf<Element>::type;

template <class To, class From>
inline To as(From x) {
  return __builtin_bit_cast(To, x);
}

// What a vector type does differently from a number; vectors specialise it (vectors.hpp).
template <class F>
struct Lanes;
template <>
struct Lanes<float> {
  using Word = uint32_t;
  static float to_float(uint32_t x) { return static_cast<float>(x); }
  static uint32_t to_word(float x) { return static_cast<uint32_t>(x); }
};
template <class F>
using Word = typename Lanes<F>::Word;

// A decay of 0 copies: the average becomes the value, rounded to its type, whatever it was.
inline bool copies(double decay) { return decay == 0.0; }

// What any other decay leaves to the value: formed in float64, D, and rounded once to F.
template <class F, class D>
inline F weight_of(D decay) {
  return static_cast<F>(D(1) - decay);
}

// Three operations, each rounded: sub, mul, add. Never fused (-ffp-contract=off), never lerp.
template <class F>
inline F blend(F average, F value, F weight) {
  return average + weight * (value - average);
}

// An average kept as the unevaluated sum high + low (about 48 bits of two floats). Knuth's two-sum
// keeps what rounding would lose, so steps far below half an ulp of the average add up.
template <class F>
inline void blend_compensated(F& high, F& low, F value, F weight) {
  const F step = low + weight * ((value - high) - low);
  const F sum = high + step;
  const F taken = sum - high;
  low = (high - (sum - taken)) + (step - taken);
  high = sum;
}

// --- bfloat16: the upper half of a float ---------------------------------------------------------
// In integers: the hardware's conversion flushes subnormals.

template <class F>
inline F widen_bf16(Word<F> half) {
  return as<F>(half << 16);
}

// The round_ functions return a bfloat16 in the upper half of a word; the lower half is left over.

template <class W>
inline W quiet_nan_bf16(W bits) {
  return bits | (W{} + 0x400000);
}

template <class W>
inline auto is_nan(W bits) {
  return (bits & 0x7fffffff) > 0x7f800000;
}

// To nearest, ties to even; of anything but NaN.
template <class F>
inline Word<F> round_bf16_number(F x) {
  using W = Word<F>;
  const W bits = as<W>(x);
  return bits + 0x7fff + ((bits >> 16) & 1);
}

// NaN stays NaN.
template <class F>
inline Word<F> round_bf16(F x) {
  using W = Word<F>;
  const W bits = as<W>(x);
  return is_nan(bits) ? quiet_nan_bf16(bits) : round_bf16_number(x);
}

// Up with a probability that is the part of an ulp cut off; `random` is uniform below 2^16. What
// bfloat16 can hold, infinities included, stays as it is.
template <class F>
inline Word<F> round_bf16_number_at_random(F x, Word<F> random) {
  return as<Word<F>>(x) + random;
}

template <class F>
inline Word<F> round_bf16_at_random(F x, Word<F> random) {
  using W = Word<F>;
  const W bits = as<W>(x);
  return is_nan(bits) ? quiet_nan_bf16(bits) : round_bf16_number_at_random(x, random);
}

// A float split into a bfloat16 (to nearest, ties up) in the upper half of `high`, and the signed
// difference to it in the lower half of `low`. Nothing is lost but a NaN's payload.
template <class F>
inline void split_bf16(F x, Word<F>& high, Word<F>& low) {
  using W = Word<F>;
  const W bits = as<W>(x);
  const auto nan = is_nan(bits);
  const W rounded = bits + 0x8000;
  high = nan ? quiet_nan_bf16(bits) : rounded;
  low = nan ? W{} : bits;  // modulo 2^16 the difference is just that
}

template <class F>
inline F join_bf16(Word<F> high, Word<F> low) {
  return as<F>((high << 16) + ((low ^ 0x8000) - 0x8000));  // low with its sign extended
}

// --- float16: 5 bits of exponent, 10 of fraction -------------------------------------------------

constexpr uint32_t kF16Normal = (127u - 14u) << 23;    // 2^-14 as a float: the smallest normal one
constexpr uint32_t kF16Largest = 0x477fe000;           // 65504
constexpr uint32_t kF16Infinite = (127u + 16u) << 23;  // 2^16: infinite however it is rounded
constexpr uint32_t kF16Bias = (127u - 15u) << 23;      // between the exponents of both types

template <class F>
inline F widen_f16(Word<F> half) {
  using W = Word<F>;
  const W rest = half & 0x7fff;
  const W normal = (rest << 13) + kF16Bias;
  const W special = (rest << 13) | 0x7f800000;
  const W subnormal = as<W>(Lanes<F>::to_float(rest) * 0x1p-24f);
  const W bits = rest < 0x400 ? subnormal : (rest < 0x7c00 ? normal : special);
  return as<F>(bits | ((half & 0x8000) << 16));
}

template <class W>
inline W join_f16(W bits, W rest, W normal, W subnormal) {
  const W nan = W{} + 0x7e00, infinite = W{} + 0x7c00;
  const W special = rest > 0x7f800000 ? nan : infinite;
  const W half = rest < kF16Normal ? subnormal : (rest < kF16Infinite ? normal : special);
  return half | ((bits >> 16) & 0x8000);
}

// To nearest, ties to even; subnormals kept; NaN stays NaN.
template <class F>
inline Word<F> narrow_f16(F x) {
  using W = Word<F>;
  const W bits = as<W>(x);
  const W rest = bits & 0x7fffffff;
  const W normal = (rest - kF16Bias + 0xfff + ((rest >> 13) & 1)) >> 13;
  // An ulp of .5 is 2^-24, that of the subnormals: the addition rounds to it.
  const W subnormal = as<W>(as<F>(rest) + 0.5f) - (126u << 23);
  return join_f16(bits, rest, normal, subnormal);
}

// As round_bf16_number_at_random, of what rounds to a normal or infinite number: 13 bits are lost.
template <class F>
inline Word<F> narrow_f16_normal_at_random(F x, Word<F> random) {
  using W = Word<F>;
  const W bits = as<W>(x);
  return (((bits & 0x7fffffff) - kF16Bias + (random >> 3)) >> 13) | ((bits >> 16) & 0x8000);
}

// Of subnormals the first 16 bits of what is lost count.
template <class F>
inline Word<F> narrow_f16_at_random(F x, Word<F> random) {
  using W = Word<F>;
  const W bits = as<W>(x);
  const W rest = bits & 0x7fffffff;
  const W normal = (rest - kF16Bias + (random >> 3)) >> 13;
  const W small = rest < kF16Normal ? rest : W{};
  const W subnormal = (Lanes<F>::to_word(as<F>(small) * 0x1p40f) + random) >> 16;
  return join_f16(bits, rest, normal, subnormal);
}

// --- random bits ---------------------------------------------------------------------------------
// Counter-based: a hash of the element's place and a key, so that an element's bits depend on
// nothing else. One hash serves two neighbours: the even element takes its lower half, the odd one
// its upper. (The mixing is the later part of Chris Wellons' lowbias32, with half of the key before
// each multiplication.)

template <class W>
inline W hash(W counter, uint64_t key) {
  W x = (counter ^ static_cast<uint32_t>(key)) * 0x7feb352du;
  x = x ^ static_cast<uint32_t>(key >> 32);
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Sebastiano Vigna's splitmix64.
inline uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The key of an element, by the pair's place in the list and the element's in its array: one key
// serves 2^32 elements, from one multiple of that to the next.
inline uint64_t key_of(uint64_t seed, uint64_t step, uint64_t pair, uint64_t element) {
  const uint64_t call = splitmix64(splitmix64(seed) ^ step);
  return splitmix64(splitmix64(call ^ pair) ^ (element >> 32));
}

}  // namespace
}  // namespace fastema
