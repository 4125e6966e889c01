// One instruction set's loops, as a table of function pointers. Included by code compiled for every
// instruction set: nothing here may have inline functions of external linkage.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fastema {

constexpr size_t kLine = 64;  // bytes: a cache line, and the widest vector

// Where a run's random bits come from; see formula.hpp.
struct Noise {
  uint64_t key;    // of all its elements
  uint32_t first;  // the place of the first element within its tensor, modulo 2^32
};

// What one call of a kernel works on: a run of elements of one pair.
struct Run {
  void* average;
  void* output;  // where the new average goes, and the old one stays; null: in place
  void* carry;   // of compensated averages
  const void* value;
  size_t size;
  double decay;
  Noise noise;         // of stochastic rounding
  bool beyond_caches;  // the list is larger: `output` is written past them
  size_t ahead;        // bytes by which memory is asked for before its use; 0: not at all
};

using Kernel = void (*)(const Run& run) noexcept;
using Swap = void (*)(void* a, void* b, size_t bytes) noexcept;

using Finite = bool (*)(const void* data, size_t size) noexcept;

// What can be done with averages of one type and values of another; null: not offered.
struct Loops {
  Kernel update;
  Kernel copy;  // what a decay of 0 means: the average becomes the value, rounded to nearest
  // A decay of 0 is theirs only where the value is wider: its copy is then rounded their way.
  Kernel stochastic;
  Kernel compensated;
};

struct Kernels {
  const char* name;
  Loops loops[4][4];  // of averages, of values: f16, bf16, f32, f64, as in DType
  Swap swap;
  Finite all_finite[4];  // of f16, bf16, f32, f64
};

}  // namespace fastema
