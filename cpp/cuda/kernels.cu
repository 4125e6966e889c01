// The kernels of a CUDA device. What one element becomes is decided by formula.hpp, the core's own,
// so the bits are the core's.
//
// NVRTC compiles it (through CuPy), and a C++ compiler through tests/support/cuda_shim.h.
#include "rows.cuh"
#include "schedules.cuh"
#include "words.cuh"

namespace fastema {
namespace {

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

// How many blocks a multiprocessor is to have room for, 0: as the compiler sees fit. Among many
// mixes it may see a fit that spills.
constexpr int blocks_for(uint32_t present) {
  int mixes = 0;
  for (; present != 0; present &= present - 1) ++mixes;
  return mixes > 4 ? 3 : 0;
}

}  // namespace

// Updates the rows of a list: a block for each chunk. Bit i of kPresent: mix i is in the list.
// kRounding: 0 to nearest; 1 at random where averages have 16 bits; 2 with carries, one for each
// row (float32 averages of all but float64: float32; bfloat16 ones: int16), where the mix has one.
template <uint32_t kPresent, int kRounding>
inline void update(const Tensor* tensors, void* const* carries, const Chunk* chunks, uint32_t chunk,
                   uint32_t lists, const Decays& decays, uint64_t seed, uint64_t step) {
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
inline void swap(const Tensor* tensors, const Chunk* chunks, uint32_t chunk) {
  const Chunk part = chunks[blockIdx.x];
  const Tensor tensor = tensors[part.group];
  uint64_t first, last;
  part_of(tensor, part, chunk, first, last);
  const uint32_t element = tensor.mix == mix_of(kF64, kF64)   ? 8
                           : tensor.mix == mix_of(kF32, kF32) ? 4
                                                              : 2;
  exchange_widest(static_cast<unsigned char*>(tensor.average) + first * element,
                  static_cast<unsigned char*>(const_cast<void*>(tensor.value)) + first * element,
                  static_cast<uint32_t>(last - first) * element);
}

}  // namespace fastema

// The entry points. A host has one compiled at a time, by a line that it appends (_source.py): what
// it does not launch would take as long. By names that are not mangled: CuPy before 14.2 keeps on
// the disk only what it is not asked for by an expression of C++.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 700
#define FASTEMA_CONSTANT const  // a copy in local memory
#else
#define FASTEMA_CONSTANT const __grid_constant__
#endif
#define FASTEMA_UPDATE(present, rounding)                                                       \
  extern "C" __global__ void __launch_bounds__(fastema::kThreads, fastema::blocks_for(present)) \
      fastema_update(const fastema::Tensor* tensors, void* const* carries,                      \
                     const fastema::Chunk* chunks, uint32_t chunk, uint32_t lists,              \
                     FASTEMA_CONSTANT fastema::Decays decays, uint64_t seed, uint64_t step) {   \
    fastema::update<present, rounding>(tensors, carries, chunks, chunk, lists, decays, seed,    \
                                       step);                                                   \
  }
#define FASTEMA_SWAP                                                                               \
  extern "C" __global__ void __launch_bounds__(fastema::kThreads)                                  \
      fastema_swap(const fastema::Tensor* tensors, const fastema::Chunk* chunks, uint32_t chunk) { \
    fastema::swap(tensors, chunks, chunk);                                                         \
  }
#define FASTEMA_ADVANCE                                                                       \
  extern "C" __global__ void fastema_advance(                                                 \
      fastema::State* state, FASTEMA_CONSTANT fastema::Schedules schedules, uint32_t lists) { \
    fastema::advance(state, schedules, lists);                                                \
  }
