// Vectors as wide as the instruction set's, with the element types they are loaded from and stored
// to. Optional speed, same bits: the arithmetic is formula.hpp's.
#pragma once

#include "formula.hpp"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastema {
namespace {

#if defined(__AVX512F__)
constexpr size_t kVector = 64;  // bytes
#elif defined(__AVX2__)
constexpr size_t kVector = 32;
#else
constexpr size_t kVector = 16;  // SSE2, NEON
#endif
constexpr size_t kLanes = kVector / sizeof(float);

using Floats = float __attribute__((vector_size(kVector)));
using Doubles = double __attribute__((vector_size(kVector)));  // half as many
using Words = uint32_t __attribute__((vector_size(kVector)));
using Ints = int32_t __attribute__((vector_size(kVector)));
using Halves = uint16_t __attribute__((vector_size(kVector / 2)));

template <>
struct Lanes<Floats> {
  using Word = Words;
  static Floats to_float(Words x) { return __builtin_convertvector(as<Ints>(x), Floats); }
  static Words to_word(Floats x) { return as<Words>(__builtin_convertvector(x, Ints)); }
};

template <class V, class T>
inline V read(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
inline void write(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// Lines that are written without having been read, past the caches: otherwise memory moves a third
// more. `to` begins on a line; other threads see them after end_streaming().
template <size_t kBytes>
inline void stream_lines(void* to, const void* from) {
  auto* out = static_cast<unsigned char*>(to);
  const auto* in = static_cast<const unsigned char*>(from);
#if defined(__AVX512F__)
  for (size_t byte = 0; byte < kBytes; byte += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + byte), read<__m512i>(in + byte));
  }
#elif defined(__SSE2__)
  for (size_t byte = 0; byte < kBytes; byte += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + byte), read<__m128i>(in + byte));
  }
#else
  __builtin_memcpy(out, in, kBytes);
#endif
}

inline void end_streaming() noexcept {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// 16-bit halves to words and back, in their order. GCC 12 takes __builtin_convertvector apart, and
// warns of the intrinsics without a mask.
inline Words widen(Halves x) {
#if defined(__AVX512F__)
  return as<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, as<__m256i>(x)));
#elif defined(__AVX2__)
  return as<Words>(_mm256_cvtepu16_epi32(as<__m128i>(x)));
#elif defined(__aarch64__)
  return as<Words>(vmovl_u16(as<uint16x4_t>(x)));
#else
  return __builtin_convertvector(x, Words);
#endif
}

inline Halves narrow(Words x) {
#if defined(__AVX512F__)
  return as<Halves>(_mm512_maskz_cvtepi32_epi16(0xffff, as<__m512i>(x)));
#elif defined(__aarch64__)
  return as<Halves>(vmovn_u32(as<uint32x4_t>(x)));
#else
  return __builtin_convertvector(x, Halves);
#endif
}

// The lower or the upper half of a vector of words, in the order of memory.
inline Halves lower_of(Words x) {
#if defined(__AVX512F__)
  return as<Halves>(_mm512_maskz_extracti64x4_epi64(0xff, as<__m512i>(x), 0));
#elif defined(__AVX2__)
  return as<Halves>(_mm256_castsi256_si128(as<__m256i>(x)));
#else
  Halves halves[2];
  write(halves, x);
  return halves[0];
#endif
}

inline Halves upper_of(Words x) {
#if defined(__AVX512F__)
  return as<Halves>(_mm512_maskz_extracti64x4_epi64(0xff, as<__m512i>(x), 1));
#elif defined(__AVX2__)
  return as<Halves>(_mm256_extracti128_si256(as<__m256i>(x), 1));
#else
  Halves halves[2];
  write(halves, x);
  return halves[1];
#endif
}

// The lower halves of two vectors of words one after the other; of numbers that fit into them.
inline Words pack(Ints x, Ints y) {
#if defined(__AVX512F__)
  const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
  return as<Words>(_mm512_maskz_permutexvar_epi64(
      0xff, order, _mm512_packs_epi32(as<__m512i>(x), as<__m512i>(y))));
#elif defined(__AVX2__)
  return as<Words>(
      _mm256_permute4x64_epi64(_mm256_packs_epi32(as<__m256i>(x), as<__m256i>(y)), 0xd8));
#elif defined(__SSE2__)
  return as<Words>(_mm_packs_epi32(as<__m128i>(x), as<__m128i>(y)));
#elif defined(__aarch64__)
  return as<Words>(vuzp1q_u16(as<uint16x8_t>(x), as<uint16x8_t>(y)));
#else
  const Halves halves[2] = {narrow(as<Words>(x)), narrow(as<Words>(y))};
  return read<Words>(halves);
#endif
}

// Elements in their order, widened to floats.
inline Floats load(const float* from) { return read<Floats>(from); }
inline Floats load(const bf16* from) { return widen_bf16<Floats>(widen(read<Halves>(from))); }
inline Floats load(const f16* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, read<__m256i>(from));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(read<__m128i>(from));
#elif defined(__aarch64__)
  return as<Floats>(vcvt_f32_f16(read<float16x4_t>(from)));
#else
  return widen_f16<Floats>(widen(read<Halves>(from)));
#endif
}

// Floats to doubles, in their order.
inline void widen(Floats x, Doubles& lower, Doubles& upper) {
#if defined(__AVX512F__)
  lower = _mm512_maskz_cvtps_pd(0xff, as<__m256>(lower_of(as<Words>(x))));
  upper = _mm512_maskz_cvtps_pd(0xff, as<__m256>(upper_of(as<Words>(x))));
#elif defined(__AVX2__)
  lower = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
  upper = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#elif defined(__SSE2__)
  lower = _mm_cvtps_pd(x);
  upper = _mm_cvtps_pd(_mm_movehl_ps(x, x));
#elif defined(__aarch64__)
  lower = as<Doubles>(vcvt_f64_f32(vget_low_f32(as<float32x4_t>(x))));
  upper = as<Doubles>(vcvt_high_f64_f32(as<float32x4_t>(x)));
#else
  using Half = float __attribute__((vector_size(kVector / 2)));
  Half halves[2];
  write(halves, x);
  lower = __builtin_convertvector(halves[0], Doubles);
  upper = __builtin_convertvector(halves[1], Doubles);
#endif
}

// Narrowed to nearest.
inline void store(float* to, Floats x) { write(to, x); }
inline void store(f16* to, Floats x) {
#if defined(__AVX512F__)
  write(to, _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  write(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  write(to, vcvt_f16_f32(as<float32x4_t>(x)));
#else
  write(to, narrow(narrow_f16(x)));
#endif
}

// Whether either holds a NaN. Where there is no cheap way to tell: it may.
inline bool any_nan([[maybe_unused]] Floats x, [[maybe_unused]] Floats y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_UNORD_Q)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpunord_ps(x, y)) != 0;
#elif defined(__aarch64__)
  return vminvq_u32(as<uint32x4_t>((x == x) & (y == y))) == 0;
#else
  return true;
#endif
}

// Whether all stay normal float16 numbers however they are rounded. Where there is no cheap way to
// tell: not.
inline bool all_normal_f16([[maybe_unused]] Floats x, [[maybe_unused]] Floats y) {
#if defined(__F16C__) || defined(__aarch64__)
  const Words x_above = (as<Words>(x) & 0x7fffffff) - kF16Normal;
  const Words y_above = (as<Words>(y) & 0x7fffffff) - kF16Normal;
  const Words above = x_above > y_above ? x_above : y_above;
  const Words limit = Words{} + (kF16Largest - kF16Normal);
#if defined(__AVX512F__)
  return _mm512_cmpgt_epu32_mask(as<__m512i>(above), as<__m512i>(limit)) == 0;
#elif defined(__aarch64__)
  return vminvq_u32(as<uint32x4_t>(above <= limit)) != 0;
#else
  return _mm256_movemask_ps(as<__m256>(above > limit)) == 0;
#endif
#else
  return false;
#endif
}

// Words whose upper halves are bfloat16 numbers, of neighbours one after the other.
inline void store_upper(bf16* to, Words x, Words y) {
  write(to, pack(as<Ints>(x) >> 16, as<Ints>(y) >> 16));
}

inline void store_bits(f16* to, Words bits) { write(to, narrow(bits)); }

// narrow_f16_normal_at_random, and stored: what is added in random bits, truncation carries over.
inline void store_normal_stochastic(f16* to, Floats x, Words random) {
#if defined(__F16C__)
  constexpr int kTruncate = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  const Floats carried = as<Floats>(as<Words>(x) + (random >> 3));
#endif
#if defined(__AVX512F__)
  write(to, _mm512_maskz_cvtps_ph(0xffff, carried, kTruncate));
#elif defined(__F16C__)
  write(to, _mm256_cvtps_ph(carried, kTruncate));
#else
  store_bits(to, narrow_f16_normal_at_random(x, random));
#endif
}

}  // namespace
}  // namespace fastema
