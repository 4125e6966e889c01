// The kernels of a CUDA device: what a block does with a part of a list. What one element becomes
// is decided by formula.hpp, the core's own, so the bits are the core's.
//
// NVRTC compiles it (through CuPy), and a C++ compiler through tests/cuda_shim.h. CuPy appends
// -ftz=true to any options, so no arithmetic of floats is left to the compiler on a device: it is
// in PTX, each operation rounded and none fused or flushed.
//
// All tables lie in device memory, little endian.
#if defined(__CUDACC_RTC__)  // NVRTC has no headers
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#if __CUDACC_VER_MAJOR__ < 13  // nor has every NVRTC of CUDA 12 what formula.hpp takes bits with
template <class To, class From>
inline To bits_as(const From& from) {
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
#define __builtin_bit_cast(To, from) bits_as<To>(from)
#endif
#endif

#include "formula.hpp"

namespace fastema {

// A pair: the average, or with several lists of averages one row for each, in a row. Both addresses
// are multiples of their elements' sizes.
struct Tensor {
  void* average;
  const void* value;  // read alone, but by swap()
  uint64_t size;      // elements
  uint32_t mix;       // 0 f32, 1 f64, 2 bf16, 3 f16, 4 f32 <- bf16, 5 f32 <- f16, 6 f64 <- f32
  uint32_t id;        // the row's place in the list: random bits depend on it
};

// What a block does: elements from index * chunk on, at most `chunk`, of all rows of a group.
struct Chunk {
  uint32_t group;
  uint32_t index;
};

constexpr int kLists = 8;  // the most lists of averages that one pass over the values serves

// What changes from step to step, where it is computed on the device by advance().
struct State {
  uint64_t step;
  double decay[kLists];
};

// The decays of an update. A negative one leaves its averages as they are.
struct Decays {
  const State* device;  // not null: decays and step come from there
  double value[kLists];
};

// A decay for each step. k = step - start_step.
struct Schedule {
  uint32_t kind;       // 0 constant: decay; 1 dynamic: min(decay, (1 + k) / (10 + k));
                       // 2 warmup: 1 - (1 + (k - 1) / scale)^-power between least and decay, but
                       // 0 while k <= 1; 3 power: (1 - 1 / step)^power; 4 equal weights: k / (k + 1)
  uint32_t every;      // averages after every so many steps, with decay^every; 1 or more
  int64_t start_step;  // before it, the decay is 0: a copy
  double decay;
  double scale;
  double power;
  double least;
};

struct Schedules {
  Schedule of[kLists];
};

namespace {

constexpr uint32_t kThreads = 256;

enum Rounding { kNearest, kStochastic, kCompensated };

// --- numbers: each operation rounded, none fused, nothing flushed to zero ------------------------

#if defined(__CUDA_ARCH__)
#define FASTEMA_ROUNDED(name, op, type, ptx, reg)                            \
  inline type name(type a, type b) {                                         \
    type result;                                                             \
    asm(#name ".rn." ptx " %0, %1, %2;" : "=" reg(result) : reg(a), reg(b)); \
    return result;                                                           \
  }
#else
#define FASTEMA_ROUNDED(name, op, type, ptx, reg) \
  inline type name(type a, type b) { return a op b; }
#endif
FASTEMA_ROUNDED(add, +, float, "f32", "f")
FASTEMA_ROUNDED(sub, -, float, "f32", "f")
FASTEMA_ROUNDED(mul, *, float, "f32", "f")
FASTEMA_ROUNDED(add, +, double, "f64", "d")
FASTEMA_ROUNDED(sub, -, double, "f64", "d")
FASTEMA_ROUNDED(mul, *, double, "f64", "d")
#undef FASTEMA_ROUNDED

inline float narrow(double from) {
#if defined(__CUDA_ARCH__)
  float to;
  asm("cvt.rn.f32.f64 %0, %1;" : "=f"(to) : "d"(from));
  return to;
#else
  return static_cast<float>(from);
#endif
}

// What formula.hpp computes with.
template <class T>
struct Number {
  T x;
  Number() = default;
  Number(T y) : x(y) {}
  explicit operator Number<float>() const { return narrow(x); }
  friend Number operator+(Number a, Number b) { return add(a.x, b.x); }
  friend Number operator-(Number a, Number b) { return sub(a.x, b.x); }
  friend Number operator*(Number a, Number b) { return mul(a.x, b.x); }
};
using Single = Number<float>;
using Double = Number<double>;

inline Double widen(Single from) {
#if defined(__CUDA_ARCH__)
  double to;
  asm("cvt.f64.f32 %0, %1;" : "=d"(to) : "f"(from.x));
  return to;
#else
  return static_cast<double>(from.x);
#endif
}

template <>
struct Lanes<Single> {
  using Word = uint32_t;
  static Single to_float(uint32_t from) {
#if defined(__CUDA_ARCH__)
    float to;
    asm("cvt.rn.f32.u32 %0, %1;" : "=f"(to) : "r"(from));
    return to;
#else
    return static_cast<float>(from);
#endif
  }
  static uint32_t to_word(Single from) {
#if defined(__CUDA_ARCH__)
    uint32_t to;
    asm("cvt.rzi.u32.f32 %0, %1;" : "=r"(to) : "f"(from.x));
    return to;
#else
    return static_cast<uint32_t>(from.x);
#endif
  }
};

template <class Element>
using NumberOf = Number<Compute<Element>>;

// --- words: what lies in memory ------------------------------------------------------------------

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
  static uint32_t round(Single even, Single odd, uint32_t random) {
    return narrow_f16_at_random(odd, random >> 16) << 16 |
           narrow_f16_at_random(even, random & 0xffff);
  }
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

// --- a part of a row -----------------------------------------------------------------------------

// N neighbours of a row, in registers.
template <class A, class V, int N>
struct Some {
  Words<A, N> average, carry;
  Words<V, N> value;
};

template <class A, class V, Rounding kRounding>
struct Row {
  A* average;
  A* carry;  // of the average's element size: float, or a bfloat16's lower half
  const V* value;
  Compute<A> weight;
  bool copy;
  uint32_t place;  // of random bits: the first element's place, and the key
  uint64_t key;

  // kBoth: value and carry can be accessed as widely as the average.
  template <bool kBoth, int N>
  void read(uint32_t at, Some<A, V, N>& some) const {
    load<false, kBoth>(value + at, some.value);
    load<true, (N > 1)>(average + at, some.average);
    if constexpr (kRounding == kCompensated) load<true, kBoth>(carry + at, some.carry);
  }

  template <bool kBoth, int N>
  void write(uint32_t at, const Some<A, V, N>& some) const {
    store<(N > 1)>(average + at, some.average);
    if constexpr (kRounding == kCompensated) store<kBoth>(carry + at, some.carry);
  }

  // The random bits of neighbours, a word for two.
  template <int kCount>
  void draw(uint32_t at, uint32_t* random) const {
    const uint32_t first = place + at;
    uint32_t one = hash(first / 2, key);
    for (uint32_t i = 0; i < kCount; ++i) {
      const uint32_t next = hash(first / 2 + i + 1, key);
      random[i] = first % 2 == 0 ? one : next << 16 | one >> 16;
      one = next;
    }
  }

  template <int N>
  void compute(uint32_t at, Some<A, V, N>& some) const {
    constexpr int kNumbers = Words<A, N>::kNumbers;
    using F = NumberOf<A>;
    NumberOf<V> narrow_values[Words<V, N>::kNumbers];
    F values[kNumbers], averages[kNumbers];
    unpack(some.value, narrow_values);
    for (int i = 0; i < kNumbers; ++i) {
      if constexpr (sizeof(Compute<A>) == sizeof(Compute<V>)) {
        values[i] = narrow_values[i];
      } else {
        values[i] = widen(narrow_values[i]);
      }
    }
    if (copy) {
      if constexpr (sizeof(A) == sizeof(V)) {  // also a NaN's payload
        for (int i = 0; i < some.value.kCount; ++i) some.average.word[i] = some.value.word[i];
      } else {
        pack(values, some.average);
      }
      if constexpr (kRounding == kCompensated) some.carry = {};
    } else if constexpr (kRounding == kCompensated && sizeof(A) == 2) {
      for (int i = 0; i < some.average.kCount; ++i) {
        const uint32_t high = some.average.word[i], low = some.carry.word[i];
        const F even = join_bf16<F>(high & 0xffff, low & 0xffff);
        const F odd = join_bf16<F>(high >> 16, low >> 16);
        uint32_t even_high, even_low, odd_high, odd_low;
        split_bf16(blend(even, values[2 * i], F(weight)), even_high, even_low);
        split_bf16(blend(odd, values[2 * i + 1], F(weight)), odd_high, odd_low);
        some.average.word[i] = Two<A>::upper(even_high, odd_high);
        some.carry.word[i] = odd_low << 16 | (even_low & 0xffff);
      }
    } else if constexpr (kRounding == kCompensated) {
      F carries[kNumbers];
      unpack(some.average, averages);
      unpack(some.carry, carries);
      for (int i = 0; i < kNumbers; ++i) {
        blend_compensated(averages[i], carries[i], values[i], F(weight));
      }
      pack(averages, some.average);
      pack(carries, some.carry);
    } else {
      unpack(some.average, averages);
      for (int i = 0; i < kNumbers; ++i) averages[i] = blend(averages[i], values[i], F(weight));
      if constexpr (kRounding == kStochastic) {
        uint32_t random[Words<A, N>::kCount];
        draw<Words<A, N>::kCount>(at, random);
        pack(averages, some.average, random);
      } else {
        pack(averages, some.average);
      }
    }
  }

  void update_one(uint32_t at) const {
    Some<A, V, 1> some;
    read<true>(at, some);
    compute(at, some);
    write<true>(at, some);
  }

  // `count` accesses to the average from element `first` on; two of each thread are under way
  // before the first is used.
  template <bool kBoth>
  void update_wide(uint32_t first, uint32_t count) const {
    constexpr uint32_t kWide = 16 / sizeof(A);
    uint32_t i = threadIdx.x;
#pragma unroll 1
    for (; i + kThreads < count; i += 2 * kThreads) {
      const uint32_t at = first + i * kWide, then = at + kThreads * kWide;
      Some<A, V, kWide> one, two;
      read<kBoth>(at, one);
      read<kBoth>(then, two);
      compute(at, one);
      write<kBoth>(at, one);
      compute(then, two);
      write<kBoth>(then, two);
    }
    if (i < count) {
      const uint32_t at = first + i * kWide;
      Some<A, V, kWide> one;
      read<kBoth>(at, one);
      compute(at, one);
      write<kBoth>(at, one);
    }
  }

  void update(uint32_t size) const {
    constexpr uint32_t kWide = 16 / sizeof(A);
    const uint32_t misaligned = reinterpret_cast<uintptr_t>(average) % 16 / sizeof(A);
    uint32_t head = (kWide - misaligned) % kWide;
    if (head > size) head = size;
    const uint32_t count = (size - head) / kWide;
    bool both = aligned(value + head, kWide * sizeof(V));
    if constexpr (kRounding == kCompensated) both = both && aligned(carry + head, 16);
    if (both) {
      update_wide<true>(head, count);
    } else {
      update_wide<false>(head, count);
    }
    const uint32_t ends = size - count * kWide;
    if (threadIdx.x < ends) {
      update_one(threadIdx.x < head ? threadIdx.x : threadIdx.x + count * kWide);
    }
  }
};

// What an update is asked for, beside the tables.
struct Asked {
  double decay;
  uint64_t seed, step;
};

template <class A, class V, Rounding kRounding>
inline void update_row(const Tensor& tensor, void* carry, uint64_t first, uint64_t last,
                       const Asked& asked) {
  Row<A, V, kRounding> row;
  row.copy = copies(asked.decay);
  row.weight = weight_of<NumberOf<A>>(Double(asked.decay)).x;
  while (first < last) {
    uint64_t end = last;
    row.average = static_cast<A*>(tensor.average) + first;
    row.value = static_cast<const V*>(tensor.value) + first;
    if constexpr (kRounding == kCompensated) row.carry = static_cast<A*>(carry) + first;
    if constexpr (kRounding == kStochastic) {  // the key changes every 2^32 elements
      row.key = key_of(asked.seed, asked.step, tensor.id, first);
      row.place = static_cast<uint32_t>(first);
      const uint64_t next = ((first >> 32) + 1) << 32;
      if (end > next) end = next;
    }
    row.update(static_cast<uint32_t>(end - first));
    first = end;
  }
}

template <uint32_t kMix>
struct Mix;
template <>
struct Mix<0> {
  using Average = float;
  using Value = float;
};
template <>
struct Mix<1> {
  using Average = double;
  using Value = double;
};
template <>
struct Mix<2> {
  using Average = bf16;
  using Value = bf16;
};
template <>
struct Mix<3> {
  using Average = f16;
  using Value = f16;
};
template <>
struct Mix<4> {
  using Average = float;
  using Value = bf16;
};
template <>
struct Mix<5> {
  using Average = float;
  using Value = f16;
};
template <>
struct Mix<6> {
  using Average = double;
  using Value = float;
};
constexpr uint32_t kMixes = 7;

// What the rounding that a list is updated with means for a mix.
constexpr Rounding rounding_of(uint32_t mix, int rounding) {
  const bool half = mix == 2 || mix == 3;
  const bool carried = mix == 0 || mix == 2 || mix == 4 || mix == 5;
  return rounding == kStochastic && half       ? kStochastic
         : rounding == kCompensated && carried ? kCompensated
                                               : kNearest;
}

// The mixes of a list are known when it is compiled: the others' code would take registers.
template <uint32_t kPresent, int kRounding, uint32_t kMix = 0>
inline void update_any(const Tensor& tensor, void* carry, uint64_t first, uint64_t last,
                       const Asked& asked) {
  if constexpr (kMix < kMixes) {
    if constexpr (((kPresent >> kMix) & 1) != 0) {
      if (tensor.mix == kMix) {
        using Types = Mix<kMix>;
        update_row<typename Types::Average, typename Types::Value, rounding_of(kMix, kRounding)>(
            tensor, carry, first, last, asked);
        return;
      }
    }
    update_any<kPresent, kRounding, kMix + 1>(tensor, carry, first, last, asked);
  }
}

// The elements of a tensor that a chunk covers.
inline void part_of(const Tensor& tensor, const Chunk& chunk, uint32_t elements, uint64_t& first,
                    uint64_t& last) {
  first = static_cast<uint64_t>(chunk.index) * elements;
  last = first + elements < tensor.size ? first + elements : tensor.size;
}

// --- swap ----------------------------------------------------------------------------------------

template <int kBytes>
inline void exchange(unsigned char* a, unsigned char* b, uint32_t count) {
  uint32_t x[4], y[4], x_then[4], y_then[4];
  uint32_t i = threadIdx.x;
#pragma unroll 1
  for (; i + kThreads < count; i += 2 * kThreads) {
    unsigned char *at = a + i * kBytes, *bt = b + i * kBytes;
    load_bytes<true, kBytes>(at, x);
    load_bytes<true, kBytes>(bt, y);
    load_bytes<true, kBytes>(at + kThreads * kBytes, x_then);
    load_bytes<true, kBytes>(bt + kThreads * kBytes, y_then);
    store_bytes<kBytes>(at, y);
    store_bytes<kBytes>(bt, x);
    store_bytes<kBytes>(at + kThreads * kBytes, y_then);
    store_bytes<kBytes>(bt + kThreads * kBytes, x_then);
  }
  if (i < count) {
    load_bytes<true, kBytes>(a + i * kBytes, x);
    load_bytes<true, kBytes>(b + i * kBytes, y);
    store_bytes<kBytes>(a + i * kBytes, y);
    store_bytes<kBytes>(b + i * kBytes, x);
  }
}

// With the widest access that suits both: where their addresses differ by a multiple of kBytes. No
// element is narrower than kLeast.
template <int kBytes = 16>
inline void exchange_widest(unsigned char* a, unsigned char* b, uint32_t bytes) {
  constexpr int kLeast = 2;
  if constexpr (kBytes > kLeast) {
    if (reinterpret_cast<uintptr_t>(a) % kBytes != reinterpret_cast<uintptr_t>(b) % kBytes) {
      return exchange_widest<kBytes / 2>(a, b, bytes);
    }
  }
  uint32_t head = static_cast<uint32_t>(-reinterpret_cast<uintptr_t>(a) % kBytes);
  if (head > bytes) head = bytes;
  const uint32_t count = (bytes - head) / kBytes;
  const uint32_t tail = head + count * kBytes;
  exchange<kBytes>(a + head, b + head, count);
  if constexpr (kBytes > kLeast) {  // fewer than kBytes at each end
    exchange<kLeast>(a, b, head / kLeast);
    exchange<kLeast>(a + tail, b + tail, (bytes - tail) / kLeast);
  }
}

// --- schedules -----------------------------------------------------------------------------------

// By multiplications alone, as fastema.schedules.compound.
inline Double compound(Double decay, uint32_t updates) {
  uint32_t bit = 1;
  while (bit <= updates / 2) bit *= 2;
  Double result = decay;
  while (bit > 1) {
    bit /= 2;
    result = result * result;
    if ((updates & bit) != 0) result = result * decay;
  }
  return result;
}

inline double decay_at(const Schedule& schedule, uint64_t step) {
  const int64_t k = static_cast<int64_t>(step) - schedule.start_step;
  if (k < 0) return 0;
  double limit = schedule.decay;
  const double after = static_cast<double>(k);
  if (schedule.kind == 1) {
    const double rising = (1 + after) / (10 + after);
    return rising < limit ? rising : limit;
  }
  if (schedule.kind == 2) {
    if (k <= 1) return 0;
    const double falling = pow(1 + (after - 1) / schedule.scale, -schedule.power);
    const double rising = 1 - falling, limited = rising < limit ? rising : limit;
    return limited > schedule.least ? limited : schedule.least;
  }
  if (schedule.kind == 3) {
    return pow(1 - 1 / static_cast<double>(step), schedule.power);
  }
  if (schedule.kind == 4) return after / (after + 1);
  return limit;
}

}  // namespace

// Updates the rows of a list: a block for each chunk. Bit i of kPresent: mix i is in the list.
// kRounding: 0 to nearest; 1 at random where averages have 16 bits; 2 with carries, one for each
// row (float32 averages of all but float64: float32; bfloat16 ones: int16), where the mix has one.
template <uint32_t kPresent, int kRounding>
__global__ void __launch_bounds__(kThreads)
    update(const Tensor* tensors, void* const* carries, const Chunk* chunks, uint32_t chunk,
           uint32_t lists, const __grid_constant__ Decays decays, uint64_t seed, uint64_t step) {
  const Chunk part = chunks[blockIdx.x];
  if (decays.device != nullptr) step = decays.device->step;
  for (uint32_t k = 0; k < lists; ++k) {
    const uint64_t row = static_cast<uint64_t>(part.group) * lists + k;
    const double decay = decays.device != nullptr ? decays.device->decay[k] : decays.value[k];
    if (decay < 0) continue;
    const Tensor tensor = tensors[row];
    uint64_t first, last;
    part_of(tensor, part, chunk, first, last);
    void* carry = kRounding == kCompensated ? carries[row] : nullptr;
    update_any<kPresent, kRounding>(tensor, carry, first, last, Asked{decay, seed, step});
  }
}

// Exchanges averages and values, of one type each: a block for each chunk, whose group is a row.
__global__ void __launch_bounds__(kThreads)
    swap(const Tensor* tensors, const Chunk* chunks, uint32_t chunk) {
  const Chunk part = chunks[blockIdx.x];
  const Tensor tensor = tensors[part.group];
  uint64_t first, last;
  part_of(tensor, part, chunk, first, last);
  const uint32_t element = tensor.mix == 1 ? 8 : tensor.mix == 0 ? 4 : 2;
  exchange_widest(static_cast<unsigned char*>(tensor.average) + first * element,
                  static_cast<unsigned char*>(const_cast<void*>(tensor.value)) + first * element,
                  static_cast<uint32_t>(last - first) * element);
}

// Counts a step and computes its decays, one for each list: one thread of one block. A step that is
// not due has a decay of -1.
__global__ void advance(State* state, const __grid_constant__ Schedules schedules, uint32_t lists) {
  if (threadIdx.x != 0) return;
  const uint64_t step = state->step + 1;
  state->step = step;
  for (uint32_t k = 0; k < lists; ++k) {
    const Schedule& schedule = schedules.of[k];
    const bool due = step % schedule.every == 0;
    state->decay[k] = due ? compound(decay_at(schedule, step), schedule.every).x : -1;
  }
}

}  // namespace fastema
