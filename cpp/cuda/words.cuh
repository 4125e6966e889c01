// Neighbours of an array as words of 32 bits: between memory and registers, words and numbers.
#pragma once

#include "numbers.cuh"

namespace fastema {
namespace {

// N neighbours, and zeros where the last word has room for more.
template <class Element, int N>
struct Words {
  static constexpr int kCount = (N * sizeof(Element) + 3) / 4;
  static constexpr int kNumbers = kCount * 4 / sizeof(Element);
  uint32_t word[kCount];
};

// Two 16-bit numbers in a word: the even one below, the odd one above.
template <class Element>
struct Two;

template <>
struct Two<bf16> {
  static Single below(uint32_t word) { return as<Single>(word << 16); }
  static Single above(uint32_t word) { return as<Single>(word & 0xffff0000); }
  static uint32_t round(Single even, Single odd) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t word;  // its first operand goes above
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(odd.x), "f"(even.x));
    return word;
#else
    return upper(round_bf16(even), round_bf16(odd));
#endif
  }
  static uint32_t round(Single even, Single odd, uint32_t random) {
    return upper(round_bf16_at_random(even, random & 0xffff),
                 round_bf16_at_random(odd, random >> 16));
  }
  static uint32_t upper(uint32_t even, uint32_t odd) { return (odd & 0xffff0000) | (even >> 16); }
};

template <>
struct Two<f16> {
  static Single widen(uint16_t half) {
#if defined(__CUDA_ARCH__)
    float to;
    asm("cvt.f32.f16 %0, %1;" : "=f"(to) : "h"(half));
    return to;
#else
    return widen_f16<Single>(half);
#endif
  }
  static Single below(uint32_t word) { return widen(static_cast<uint16_t>(word)); }
  static Single above(uint32_t word) { return widen(static_cast<uint16_t>(word >> 16)); }
  static uint32_t round(Single even, Single odd) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t word;  // its first operand goes above
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(odd.x), "f"(even.x));
    return word;
#elif defined(__CUDA_ARCH__)
    uint16_t lower, upper;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(lower) : "f"(even.x));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(upper) : "f"(odd.x));
    return static_cast<uint32_t>(upper) << 16 | lower;
#else
    return narrow_f16(odd) << 16 | narrow_f16(even);
#endif
  }
#if defined(__CUDA_ARCH__)
  // Gives what narrow_f16_at_random() gives, with half of its operations, and some of them floats'.
  static uint32_t round(Single even, Single odd, uint32_t random) {
    return round(at_random(even, random & 0xffff), at_random(odd, random >> 16));
  }

 private:
  // What a number is rounded to.
  static Single at_random(Single x, uint32_t random) {
    const Single size = magnitude(x);
    // Subnormals are multiples of 2^-24, the last place of .5; random bits of 2^-40, that of 2^-17.
    const Single up = as<Single>(random | (127u - 17u) << 23);
    const Single sum = add_towards_zero(add_towards_zero(size, up), 0.5f - 0x1p-17f);
    const uint32_t sign = as<uint32_t>(x) & 0x80000000;
    const uint32_t subnormal = as<uint32_t>(sum - Single(0.5f)) | sign;
    const uint32_t normal = as<uint32_t>(x) + (random >> 3);
    // NaN is not normal, and stays NaN.
    return as<Single>(select_ge(size, 0x1p-14f, normal, subnormal) & ~0x1fffu);
  }
#else
  static uint32_t round(Single even, Single odd, uint32_t random) {
    return narrow_f16_at_random(odd, random >> 16) << 16 |
           narrow_f16_at_random(even, random & 0xffff);
  }
#endif
};

template <class Element, int N>
inline void unpack(const Words<Element, N>& words, NumberOf<Element>* numbers) {
  for (int i = 0; i < words.kCount; ++i) {
    const uint32_t word = words.word[i];
    if constexpr (sizeof(Element) == 2) {
      numbers[2 * i] = Two<Element>::below(word);
      numbers[2 * i + 1] = Two<Element>::above(word);
    } else if constexpr (sizeof(Element) == 4) {
      numbers[i] = as<Single>(word);
    } else if (i % 2 == 1) {
      numbers[i / 2] = as<Double>(static_cast<uint64_t>(word) << 32 | words.word[i - 1]);
    }
  }
}

// To nearest; given random bits (a word for two neighbours), at random.
template <class Element, int N, class... Random>
inline void pack(const NumberOf<Element>* numbers, Words<Element, N>& words,
                 const Random*... random) {
  for (int i = 0; i < words.kCount; ++i) {
    if constexpr (sizeof(Element) == 2) {
      words.word[i] = Two<Element>::round(numbers[2 * i], numbers[2 * i + 1], random[i]...);
    } else if constexpr (sizeof(Element) == 4) {
      words.word[i] = as<uint32_t>(numbers[i]);
    } else {
      words.word[i] = static_cast<uint32_t>(as<uint64_t>(numbers[i / 2]) >> (i % 2 * 32));
    }
  }
}

// --- memory --------------------------------------------------------------------------------------
// Averages and carries are not read again before the next update: .cs. Values are, by the averages
// that share them and by the training that goes on: they stay in the cache.

template <int kBytes>
struct AccessOf;
template <>
struct AccessOf<2> {
  using type = unsigned short;
};
template <>
struct AccessOf<4> {
  using type = unsigned int;
};
template <>
struct AccessOf<8> {
  using type = uint2;
};
template <>
struct AccessOf<16> {
  using type = uint4;
};

template <bool kStreamed, int kBytes>
inline void load_bytes(const void* from, uint32_t* words) {
  using Access = typename AccessOf<kBytes>::type;
  const Access* at = static_cast<const Access*>(from);
  Access x;
  if constexpr (kStreamed) {
    x = __ldcs(at);
  } else {
    x = __ldg(at);
  }
  if constexpr (kBytes <= 4) {
    words[0] = x;
  } else {
    words[0] = x.x, words[1] = x.y;
    if constexpr (kBytes == 16) words[2] = x.z, words[3] = x.w;
  }
}

template <int kBytes>
inline void store_bytes(void* to, const uint32_t* words) {
  using Access = typename AccessOf<kBytes>::type;
  Access x;
  if constexpr (kBytes <= 4) {
    x = static_cast<Access>(words[0]);
  } else {
    x.x = words[0], x.y = words[1];
    if constexpr (kBytes == 16) x.z = words[2], x.w = words[3];
  }
  __stcs(static_cast<Access*>(to), x);
}

// N neighbours in one access if `kWide`, which the address must allow, or one by one.
template <bool kStreamed, bool kWide, class Element, int N>
inline void load(const Element* from, Words<Element, N>& words) {
  constexpr int kBytes = sizeof(Element);
  if constexpr (kWide) {
    load_bytes<kStreamed, N * kBytes>(from, words.word);
  } else {
    for (int i = 0; i < N; ++i) {
      uint32_t* word = words.word + i * kBytes / 4;
      if (kBytes == 2 && i % 2 == 1) {
        uint32_t above;
        load_bytes<kStreamed, kBytes>(from + i, &above);
        *word |= above << 16;
      } else {
        load_bytes<kStreamed, kBytes>(from + i, word);
      }
    }
  }
}

template <bool kWide, class Element, int N>
inline void store(Element* to, const Words<Element, N>& words) {
  constexpr int kBytes = sizeof(Element);
  if constexpr (kWide) {
    store_bytes<N * kBytes>(to, words.word);
  } else {
    for (int i = 0; i < N; ++i) {
      const uint32_t* word = words.word + i * kBytes / 4;
      if (kBytes == 2 && i % 2 == 1) {
        const uint32_t above = *word >> 16;
        store_bytes<kBytes>(to + i, &above);
      } else {
        store_bytes<kBytes>(to + i, word);
      }
    }
  }
}

inline bool aligned(const void* address, uint32_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

}  // namespace
}  // namespace fastema
