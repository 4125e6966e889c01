// The kernels, written once and compiled once per instruction set (CMakeLists.txt). It includes no
// header with inline functions of external linkage: the linker keeps one copy of such a function,
// and were it the AVX-512 one, an older machine would die far from here. A test reads the objects'
// symbols: each exports its table and nothing else.
#include "kernels.hpp"

#include "formula.hpp"
#include "vectors.hpp"

namespace fastema {
namespace {

// How many elements stand before the first 64-byte boundary. Without this head, loops over NumPy's
// large arrays (they start at a page + 16) straddle lines and run up to 1.4 times slower.
template <class T>
size_t head_of(const T* data, size_t size) {
  const size_t misaligned = reinterpret_cast<uintptr_t>(data) % kLine;
  const size_t head = misaligned == 0 ? 0 : (kLine - misaligned) / sizeof(T);
  return head < size ? head : size;
}

// Asks for memory so many bytes ahead. Hardware stops at pages; this does not.
template <size_t kBytes, class T>
inline void ask_for(const T* data, size_t ahead) {
  for (size_t byte = 0; byte < kBytes; byte += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(data) + ahead + byte);
  }
}

// So many elements that whole lines of both are asked for, each once, when blocks of kBlock are.
template <size_t kBlock, class A, class V>
constexpr size_t group_of() {
  constexpr size_t kNarrow = sizeof(A) < sizeof(V) ? sizeof(A) : sizeof(V);
  return 2 * (kBlock * kNarrow < kLine ? kLine / kNarrow : kBlock);
}

// Calls step(a, v, i) for blocks of kBlock elements from the i-th on, while there are whole ones;
// returns where it stopped.
template <size_t kBlock, class A, class V, class Step>
inline size_t whole_blocks(A* a, const V* v, size_t i, size_t size, size_t ahead,
                           const Step& step) {
  if (ahead > 0) {
    constexpr size_t kGroup = group_of<kBlock, A, V>();
    for (; size - i >= kGroup; i += kGroup) {
      ask_for<kGroup * sizeof(A)>(a + i, ahead);
      ask_for<kGroup * sizeof(V)>(v + i, ahead);
#pragma GCC unroll 8
      for (size_t j = 0; j < kGroup; j += kBlock) step(a + i + j, v + i + j, i + j);
    }
  }
  for (; size - i >= kBlock; i += kBlock) step(a + i, v + i, i);
  return i;
}

// The same, but the new averages go to `output`: each block is copied, changed and then written.
template <size_t kBlock, class A, class V, class Step>
inline size_t whole_blocks_beside(A* output, const A* a, const V* v, size_t i, const Run& run,
                                  const Step& step) {
  const size_t size = run.size;
  const auto one_block = [&] {
    alignas(kLine) A block[kBlock];
    __builtin_memcpy(block, a + i, sizeof block);
    step(block, v + i, i);
    __builtin_memcpy(output + i, block, sizeof block);
    i += kBlock;
  };
  if (run.beyond_caches) {
    while (size - i >= kBlock && head_of(output + i, kLine) > 0) one_block();
    constexpr size_t kGroup = group_of<kBlock, A, V>();
    for (; size - i >= kGroup; i += kGroup) {
      if (run.ahead > 0) {
        ask_for<kGroup * sizeof(A)>(a + i, run.ahead);
        ask_for<kGroup * sizeof(V)>(v + i, run.ahead);
      }
      alignas(kLine) A group[kGroup];
      __builtin_memcpy(group, a + i, sizeof group);
#pragma GCC unroll 8
      for (size_t j = 0; j < kGroup; j += kBlock) step(group + j, v + i + j, i + j);
      stream_lines<sizeof group>(output + i, group);
    }
    end_streaming();
  }
  while (size - i >= kBlock) one_block();
  return i;
}

// --- 32 and 64 bits ------------------------------------------------------------------------------

template <class A, class V>
void update_all(A* __restrict a, const V* __restrict v, size_t size, A w) {
#pragma omp simd
  for (size_t i = 0; i < size; ++i) a[i] = blend(a[i], static_cast<A>(v[i]), w);
}

template <class A, class V>
void update_beside(A* __restrict output, const A* a, const V* v, size_t size, A w) {
#pragma omp simd
  for (size_t i = 0; i < size; ++i) output[i] = blend(a[i], static_cast<A>(v[i]), w);
}

template <class A, class V>
void update(const Run& run) noexcept {
  A* a = static_cast<A*>(run.average);
  const V* v = static_cast<const V*>(run.value);
  const A w = weight_of<A>(run.decay);
  constexpr size_t kBlock = kLine / sizeof(V);
  const auto step = [w](A* to, const V* from, size_t) { update_all(to, from, kBlock, w); };
  if (run.output != nullptr) {
    A* output = static_cast<A*>(run.output);
    size_t i = head_of(output, run.size);
    update_beside(output, a, v, i, w);
    i = whole_blocks_beside<kBlock>(output, a, v, i, run, step);
    return update_beside(output + i, a + i, v + i, run.size - i, w);
  }
  size_t i = head_of(a, run.size);
  update_all(a, v, i, w);
  if (run.ahead > 0) i = whole_blocks<kBlock>(a, v, i, run.size, run.ahead, step);
  update_all(a + i, v + i, run.size - i, w);
}

// Where a copy of the values goes.
void* target_of(const Run& run) { return run.output == nullptr ? run.average : run.output; }

template <class T>
void copy(const Run& run) noexcept {
  __builtin_memcpy(target_of(run), run.value, run.size * sizeof(T));
}

void copy_f64_from_f32(const Run& run) noexcept {
  double* a = static_cast<double*>(target_of(run));
  const float* v = static_cast<const float*>(run.value);
#pragma omp simd
  for (size_t i = 0; i < run.size; ++i) a[i] = v[i];
}

// --- 16 bits: the ends go through a buffer, so that no element is computed by other code ---------

// Calls step(a, v, i) for every block of kBlock elements, i being the place of its first element;
// the ends of both arrays are copied into whole blocks and back. With `odd` of 0 or 1, blocks begin
// at even places of a tensor in which an even or odd number of elements stands before this run.
constexpr size_t kAnyPlace = 2;

template <size_t kBlock, class A, class V, class Step>
inline void all_blocks(const Run& run, size_t odd, const Step& step) {
  A* a = static_cast<A*>(run.average);
  const V* v = static_cast<const V*>(run.value);
  A* output = static_cast<A*>(target_of(run));
  const auto partial = [&](size_t from, size_t count, size_t before) {
    alignas(kLine) A a_block[kBlock] = {};
    alignas(kLine) V v_block[kBlock] = {};
    __builtin_memcpy(a_block + before, a + from, count * sizeof(A));
    __builtin_memcpy(v_block + before, v + from, count * sizeof(V));
    step(a_block, v_block, from - before);
    __builtin_memcpy(output + from, a_block + before, count * sizeof(A));
  };
  size_t i = head_of(output, run.size) % kBlock;
  if (odd != kAnyPlace && i % 2 != odd) i = odd < run.size ? odd : run.size;
  if (i > 0) partial(0, i, odd == kAnyPlace ? 0 : odd);
  i = run.output == nullptr ? whole_blocks<kBlock>(a, v, i, run.size, run.ahead, step)
                            : whole_blocks_beside<kBlock>(output, a, v, i, run, step);
  if (i < run.size) partial(i, run.size - i, 0);
}

inline Floats weights_of(const Run& run) { return Floats{} + weight_of<float>(run.decay); }

template <class A, class V>
void update_wide(const Run& run) noexcept {
  const Floats w = weights_of(run);
  all_blocks<kLanes, A, V>(run, kAnyPlace,
                           [w](A* a, const V* v, size_t) { store(a, blend(load(a), load(v), w)); });
}

template <class A, class V>
void copy_wide(const Run& run) noexcept {
  all_blocks<kLanes, A, V>(run, kAnyPlace, [](A* a, const V* v, size_t) { store(a, load(v)); });
}

template <class V>
void update_f64(const Run& run) noexcept {
  const Doubles w = Doubles{} + weight_of<double>(run.decay);
  all_blocks<kLanes, double, V>(run, kAnyPlace, [w](double* a, const V* v, size_t) {
    Doubles lower, upper;
    widen(load(v), lower, upper);
    write(a, blend(read<Doubles>(a), lower, w));
    write(a + kLanes / 2, blend(read<Doubles>(a + kLanes / 2), upper, w));
  });
}

template <class V>
void copy_f64(const Run& run) noexcept {
  all_blocks<kLanes, double, V>(run, kAnyPlace, [](double* a, const V* v, size_t) {
    Doubles lower, upper;
    widen(load(v), lower, upper);
    write(a, lower);
    write(a + kLanes / 2, upper);
  });
}

// What an average becomes where its values are wider, so that also a copy of them is rounded.
struct Blend {
  Floats weight;
  Floats operator()(Floats average, Floats value) const { return blend(average, value, weight); }
};
struct Copy {
  Floats operator()(Floats, Floats value) const { return value; }
};

// Calls update(next), next(average, value) being one of these.
template <class Update>
inline void blend_or_copy(const Run& run, const Update& update) {
  if (copies(run.decay)) {
    update(Copy{});
  } else {
    update(Blend{weights_of(run)});
  }
}

// Two vectors in a row, rounded to nearest.
inline void store_nearest(bf16* to, Floats x, Floats y) {
  if (any_nan(x, y)) {
    store_upper(to, round_bf16(x), round_bf16(y));
  } else {
    store_upper(to, round_bf16_number(x), round_bf16_number(y));
  }
}

inline void store_nearest(f16* to, Floats x, Floats y) {
  store(to, x);
  store(to + kLanes, y);
}

// Updates and copies: averages of 16 bits, values of 32.
template <class A>
void update_narrow(const Run& run) noexcept {
  blend_or_copy(run, [&run](auto next) {
    all_blocks<2 * kLanes, A, float>(run, kAnyPlace, [next](A* a, const float* v, size_t) {
      store_nearest(a, next(load(a), load(v)), next(load(a + kLanes), load(v + kLanes)));
    });
  });
}

// Two bfloat16 in each word: the even one below, the odd one above.
inline Floats even_bf16(Words pair) { return as<Floats>(pair << 16); }
inline Floats odd_bf16(Words pair) { return as<Floats>(pair & 0xffff0000); }

// From words whose upper halves hold the numbers.
inline Words pair_up(Words even, Words odd) { return (odd & 0xffff0000) | (even >> 16); }

// From words whose lower halves do.
inline Words pair_up_lower(Words even, Words odd) { return (odd << 16) | (even & 0xffff); }

void update_bf16(const Run& run) noexcept {
  const Floats w = weights_of(run);
  all_blocks<2 * kLanes, bf16, bf16>(run, kAnyPlace, [w](bf16* to, const bf16* from, size_t) {
    const Words a = read<Words>(to), v = read<Words>(from);
    const Floats even = blend(even_bf16(a), even_bf16(v), w);
    const Floats odd = blend(odd_bf16(a), odd_bf16(v), w);
    if (any_nan(even, odd)) {
      write(to, pair_up(round_bf16(even), round_bf16(odd)));
    } else {
      write(to, pair_up(round_bf16_number(even), round_bf16_number(odd)));
    }
  });
}

// --- stochastic rounding -------------------------------------------------------------------------

inline Words counters() {
  Words lanes{};
  for (uint32_t i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// Calls step(a, v, random words) for blocks of 2 kLanes elements.
template <class A, class V, class Step>
inline void all_blocks_stochastic(const Run& run, const Step& step) {
  const Noise noise = run.noise;
  const Words lanes = counters();
  all_blocks<2 * kLanes, A, V>(run, noise.first % 2, [&](A* a, const V* v, size_t i) {
    const uint32_t pair = (noise.first + static_cast<uint32_t>(i)) / 2;
    step(a, v, hash(lanes + pair, noise.key));
  });
}

void update_bf16_stochastic(const Run& run) noexcept {
  const Floats w = weights_of(run);
  all_blocks_stochastic<bf16, bf16>(run, [w](bf16* to, const bf16* from, Words random) {
    const Words a = read<Words>(to), v = read<Words>(from);
    const Words below = random & 0xffff, above = random >> 16;
    const Floats even = blend(even_bf16(a), even_bf16(v), w);
    const Floats odd = blend(odd_bf16(a), odd_bf16(v), w);
    if (any_nan(even, odd)) {
      write(to, pair_up(round_bf16_at_random(even, below), round_bf16_at_random(odd, above)));
    } else {
      write(to, pair_up(round_bf16_number_at_random(even, below),
                        round_bf16_number_at_random(odd, above)));
    }
  });
}

// Two vectors in a row, with 16 random bits in each word.
inline void store_at_random(bf16* to, Floats x, Floats y, Words x_random, Words y_random) {
  if (any_nan(x, y)) {
    store_upper(to, round_bf16_at_random(x, x_random), round_bf16_at_random(y, y_random));
  } else {
    store_upper(to, round_bf16_number_at_random(x, x_random),
                round_bf16_number_at_random(y, y_random));
  }
}

inline void store_at_random(f16* to, Floats x, Floats y, Words x_random, Words y_random) {
  if (all_normal_f16(x, y)) {
    store_normal_stochastic(to, x, x_random);
    store_normal_stochastic(to + kLanes, y, y_random);
  } else {
    store_bits(to, narrow_f16_at_random(x, x_random));
    store_bits(to + kLanes, narrow_f16_at_random(y, y_random));
  }
}

template <class A, class V, class Next>
void update_at_random(const Run& run, const Next& next) {
  all_blocks_stochastic<A, V>(run, [next](A* a, const V* v, Words random) {
    store_at_random(a, next(load(a), load(v)), next(load(a + kLanes), load(v + kLanes)),
                    widen(lower_of(random)), widen(upper_of(random)));
  });
}

void update_f16_stochastic(const Run& run) noexcept {
  update_at_random<f16, f16>(run, Blend{weights_of(run)});
}

template <class A>
void update_narrow_stochastic(const Run& run) noexcept {
  blend_or_copy(run, [&run](auto next) { update_at_random<A, float>(run, next); });
}

// --- compensated averages ------------------------------------------------------------------------

// Calls step(a, carry, v) for blocks of kBlock elements, the last one in a buffer.
template <size_t kBlock, class A, class C, class V, class Step>
inline void all_blocks_with_carry(const Run& run, const Step& step) {
  A* a = static_cast<A*>(run.average);
  C* c = static_cast<C*>(run.carry);
  const V* v = static_cast<const V*>(run.value);
  const size_t i =
      whole_blocks<kBlock>(a, v, 0, run.size, run.ahead,
                           [&](A* to, const V* from, size_t at) { step(to, c + at, from); });
  if (i == run.size) return;
  A a_block[kBlock] = {};
  C c_block[kBlock] = {};
  V v_block[kBlock] = {};
  const size_t rest = run.size - i;
  __builtin_memcpy(a_block, a + i, rest * sizeof(A));
  __builtin_memcpy(c_block, c + i, rest * sizeof(C));
  __builtin_memcpy(v_block, v + i, rest * sizeof(V));
  step(a_block, c_block, v_block);
  __builtin_memcpy(a + i, a_block, rest * sizeof(A));
  __builtin_memcpy(c + i, c_block, rest * sizeof(C));
}

template <class V>
void update_f32_compensated(const Run& run) noexcept {
  const Floats w = weights_of(run);
  all_blocks_with_carry<kLanes, float, float, V>(run, [w](float* a, float* carry, const V* v) {
    Floats high = load(a), low = load(carry);
    blend_compensated(high, low, load(v), w);
    store(a, high);
    store(carry, low);
  });
}

void update_bf16_compensated(const Run& run) noexcept {
  const Floats w = weights_of(run);
  all_blocks_with_carry<2 * kLanes, bf16, uint16_t, bf16>(
      run, [w](bf16* a, uint16_t* carry, const bf16* from) {
        const Words h = read<Words>(a), l = read<Words>(carry), v = read<Words>(from);
        const Floats even = blend(join_bf16<Floats>(h & 0xffff, l & 0xffff), even_bf16(v), w);
        const Floats odd = blend(join_bf16<Floats>(h >> 16, l >> 16), odd_bf16(v), w);
        Words even_high, even_low, odd_high, odd_low;
        split_bf16(even, even_high, even_low);
        split_bf16(odd, odd_high, odd_low);
        write(a, pair_up(even_high, odd_high));
        write(carry, pair_up_lower(even_low, odd_low));
      });
}

void update_bf16_from_f32_compensated(const Run& run) noexcept {
  blend_or_copy(run, [&run](auto next) {
    all_blocks_with_carry<2 * kLanes, bf16, uint16_t, float>(
        run, [next](bf16* a, uint16_t* carry, const float* v) {
          const auto one_half = [&](size_t i, Words& high, Words& low) {
            const Words h = widen(read<Halves>(a + i)), l = widen(read<Halves>(carry + i));
            split_bf16(next(join_bf16<Floats>(h, l), load(v + i)), high, low);
          };
          Words x_high, x_low, y_high, y_low;
          one_half(0, x_high, x_low);
          one_half(kLanes, y_high, y_low);
          store_upper(a, x_high, y_high);
          write(carry, pack(as<Ints>(x_low << 16) >> 16, as<Ints>(y_low << 16) >> 16));
        });
  });
}

// --- swap ----------------------------------------------------------------------------------------

void swap_run(unsigned char* __restrict a, unsigned char* __restrict b, size_t bytes) {
#pragma omp simd
  for (size_t i = 0; i < bytes; ++i) {
    const unsigned char t = a[i];
    a[i] = b[i];
    b[i] = t;
  }
}

void swap(void* a, void* b, size_t bytes) noexcept {
  auto* x = static_cast<unsigned char*>(a);
  auto* y = static_cast<unsigned char*>(b);
  const size_t head = head_of(x, bytes);
  swap_run(x, y, head);
  swap_run(x + head, y + head, bytes - head);
}

// --- finite numbers ------------------------------------------------------------------------------

// Adding one to an exponent of ones alone, as infinities and NaN have, carries into the sign.
template <class Bits, int kMantissa>
bool all_finite(const void* data, size_t size) noexcept {
  constexpr Bits kSign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  constexpr Bits kOne = static_cast<Bits>(Bits{1} << kMantissa);
  constexpr Bits kExponent = static_cast<Bits>(kSign - kOne);
  typedef Bits Vector __attribute__((vector_size(kVector)));
  constexpr size_t kEach = 4;  // vectors, so that none waits for the one before
  constexpr size_t kBlock = kEach * kVector / sizeof(Bits);
  const Bits* x = static_cast<const Bits*>(data);
  Vector seen[kEach] = {};
  const auto look = [&](const Bits* from) {
#pragma GCC unroll 4
    for (size_t j = 0; j < kEach; ++j) {
      const Vector bits = read<Vector>(from + j * (kBlock / kEach));
      seen[j] |= (bits & kExponent) + kOne;
    }
  };
  size_t i = 0;
  for (; size - i >= kBlock; i += kBlock) look(x + i);  // hardware asks ahead well where one reads
  Bits rest[kBlock] = {};
  __builtin_memcpy(rest, x + i, (size - i) * sizeof(Bits));
  look(rest);
  const Vector all = (seen[0] | seen[1]) | (seen[2] | seen[3]);
  Bits any = 0;
  for (size_t j = 0; j < kBlock / kEach; ++j) any = static_cast<Bits>(any | all[j]);
  return (any & kSign) == 0;
}

}  // namespace

#define FASTEMA_JOIN_(a, b) a##b
#define FASTEMA_JOIN(a, b) FASTEMA_JOIN_(a, b)
#define FASTEMA_TEXT_(a) #a
#define FASTEMA_TEXT(a) FASTEMA_TEXT_(a)

extern const Kernels FASTEMA_JOIN(kernels_, FASTEMA_KERNELS);
const Kernels FASTEMA_JOIN(kernels_, FASTEMA_KERNELS) = {
    .name = FASTEMA_TEXT(FASTEMA_KERNELS),
    .loops =
        {
            {{update_wide<f16, f16>, copy<f16>, update_f16_stochastic, nullptr},
             {},
             {update_narrow<f16>, update_narrow<f16>, update_narrow_stochastic<f16>, nullptr},
             {}},
            {{},
             {update_bf16, copy<bf16>, update_bf16_stochastic, update_bf16_compensated},
             {update_narrow<bf16>, update_narrow<bf16>, update_narrow_stochastic<bf16>,
              update_bf16_from_f32_compensated},
             {}},
            {{update_wide<float, f16>, copy_wide<float, f16>, nullptr, update_f32_compensated<f16>},
             {update_wide<float, bf16>, copy_wide<float, bf16>, nullptr,
              update_f32_compensated<bf16>},
             {update<float, float>, copy<float>, nullptr, update_f32_compensated<float>},
             {}},
            {{update_f64<f16>, copy_f64<f16>, nullptr, nullptr},
             {update_f64<bf16>, copy_f64<bf16>, nullptr, nullptr},
             {update<double, float>, copy_f64_from_f32, nullptr, nullptr},
             {update<double, double>, copy<double>, nullptr, nullptr}},
        },
    .swap = swap,
    .all_finite = {all_finite<uint16_t, 10>, all_finite<uint16_t, 7>, all_finite<uint32_t, 23>,
                   all_finite<uint64_t, 52>},
};

}  // namespace fastema
