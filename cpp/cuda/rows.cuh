// The rows of a list's tables, and what a block does with its part of one.
//
// All tables lie in device memory, little endian.
#pragma once

#include "words.cuh"

namespace fastema {

// Types of elements, in the order of the core's DType; and those of an average and its value.
enum Type : uint32_t { kF16, kBf16, kF32, kF64, kTypes };
constexpr uint32_t mix_of(Type average, Type value) { return average * kTypes + value; }

// A pair: the average, or with several lists of averages one row for each, in a row. Both addresses
// are multiples of their elements' sizes.
struct Tensor {
  void* average;
  const void* value;  // read alone, but by swap()
  uint64_t size;      // elements
  uint32_t mix;       // mix_of() both
  uint32_t id;        // the row's place in the list: random bits depend on it
};

// What a block does: elements from index * chunk on, at most `chunk`, of all rows of a group.
struct Chunk {
  uint32_t group;
  uint32_t index;
};

namespace {

constexpr uint32_t kThreads = 256;

enum Rounding { kNearest, kStochastic, kCompensated };

// N neighbours of a row, in registers.
template <class A, class V, int N>
struct Some {
  Words<A, N> average, carry;
  Words<V, N> value;
};

template <class A, class V, Rounding kRounding, bool kCopy>
struct Row {
  // Elements of an access: 16 bytes of the wider type.
  static constexpr uint32_t kWide = 16 / (sizeof(A) > sizeof(V) ? sizeof(A) : sizeof(V));

  A* average;
  A* carry;  // of the average's element size: float, or a bfloat16's lower half
  const V* value;
  Compute<A> weight;
  uint32_t place;  // of random bits: the first element's place, and the key
  uint64_t key;

  // kBoth: value and carry can be accessed as widely as the average.
  template <bool kBoth, int N>
  void read(uint32_t at, Some<A, V, N>& some) const {
    load<false, kBoth>(value + at, some.value);
    if constexpr (kCopy) {
      some.average = {}, some.carry = {};
    } else {
      load<true, (N > 1)>(average + at, some.average);
      if constexpr (kRounding == kCompensated) load<true, kBoth>(carry + at, some.carry);
    }
  }

  template <bool kBoth, int N>
  void write(uint32_t at, const Some<A, V, N>& some) const {
    store<(N > 1)>(average + at, some.average);
    if constexpr (kRounding == kCompensated) store<kBoth>(carry + at, some.carry);
  }

  // The random bits of neighbours, a word for two.
  template <int kCount>
  void draw(uint32_t at, uint32_t* random) const {
    const uint32_t first = place + at, shift = first % 2 * 16;
    uint32_t one = hash(first / 2, key);
    for (uint32_t i = 0; i < kCount; ++i) {
      const uint32_t next = hash(first / 2 + i + 1, key);
      random[i] = static_cast<uint32_t>((static_cast<uint64_t>(next) << 32 | one) >> shift);
      one = next;
    }
  }

  template <int N>
  void compute(uint32_t at, Some<A, V, N>& some) const {
    constexpr int kNumbers = Words<A, N>::kNumbers;
    using F = NumberOf<A>;
    constexpr int kValues = Words<V, N>::kNumbers;
    NumberOf<V> narrow_values[kValues];
    F values[kNumbers], averages[kNumbers];
    unpack(some.value, narrow_values);
    for (int i = 0; i < kNumbers; ++i) {
      if constexpr (kValues < kNumbers) {  // one value beside half a word
        values[i] = i < kValues ? narrow_values[i % kValues] : F(0);
      } else if constexpr (sizeof(Compute<A>) == sizeof(Compute<V>)) {
        values[i] = narrow_values[i];
      } else {
        values[i] = widen(narrow_values[i]);
      }
    }
    // a copy that loses bits is rounded as an update is
    constexpr bool kLossy = sizeof(A) < sizeof(V);
    const auto moved = [this](F average, F value) {
      if constexpr (kCopy) {
        return value;
      } else {
        return blend(average, value, F(weight));
      }
    };
    if constexpr (kCopy && (!kLossy || kRounding == kNearest)) {
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
        split_bf16(moved(even, values[2 * i]), even_high, even_low);
        split_bf16(moved(odd, values[2 * i + 1]), odd_high, odd_low);
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
      for (int i = 0; i < kNumbers; ++i) averages[i] = moved(averages[i], values[i]);
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
    const uint32_t misaligned = reinterpret_cast<uintptr_t>(average) / sizeof(A) % kWide;
    uint32_t head = (kWide - misaligned) % kWide;
    if (head > size) head = size;
    const uint32_t count = (size - head) / kWide;
    bool both = aligned(value + head, kWide * sizeof(V));
    if constexpr (kRounding == kCompensated) {
      both = both && aligned(carry + head, kWide * sizeof(A));
    }
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

template <class A, class V, Rounding kRounding, bool kCopy>
inline void update_row(const Tensor& tensor, void* carry, uint64_t first, uint64_t last,
                       const Asked& asked) {
  Row<A, V, kRounding, kCopy> row;
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

template <Type kType>
struct ElementOf;
template <>
struct ElementOf<kF16> {
  using type = f16;
};
template <>
struct ElementOf<kBf16> {
  using type = bf16;
};
template <>
struct ElementOf<kF32> {
  using type = float;
};
template <>
struct ElementOf<kF64> {
  using type = double;
};

// What the rounding that a list is updated with means for a mix.
constexpr Rounding rounding_of(Type average, int rounding) {
  const bool half = average == kF16 || average == kBf16;
  const bool carried = average == kF32 || average == kBf16;
  return rounding == kStochastic && half       ? kStochastic
         : rounding == kCompensated && carried ? kCompensated
                                               : kNearest;
}

// The mixes of a list are known when it is compiled: the others' code would take registers.
template <uint32_t kPresent, int kRounding, uint32_t kMix = 0>
inline void update_any(const Tensor& tensor, void* carry, uint64_t first, uint64_t last,
                       const Asked& asked) {
  if constexpr ((kPresent >> kMix) != 0) {
    if constexpr (((kPresent >> kMix) & 1) != 0) {
      if (tensor.mix == kMix) {
        constexpr Type kAverage = static_cast<Type>(kMix / kTypes);
        constexpr Type kValue = static_cast<Type>(kMix % kTypes);
        using A = typename ElementOf<kAverage>::type;
        using V = typename ElementOf<kValue>::type;
        constexpr Rounding kOwn = rounding_of(kAverage, kRounding);
        if (copies(asked.decay)) {
          update_row<A, V, kOwn, true>(tensor, carry, first, last, asked);
        } else {
          update_row<A, V, kOwn, false>(tensor, carry, first, last, asked);
        }
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

}  // namespace
}  // namespace fastema
