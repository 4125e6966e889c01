// One instruction set's loops, as a table of function pointers. Included by code compiled for every
// instruction set: nothing here may have inline functions of external linkage.
#pragma once

#include <stddef.h>

namespace fastema {

constexpr size_t kLine = 64;  // bytes: a cache line, and the widest vector

// `weight` is 1 - decay; it is rounded once to the compute type.
using Update = void (*)(void* average, const void* value, size_t size, double weight) noexcept;
using Copy = void (*)(void* average, const void* value, size_t size) noexcept;
using Swap = void (*)(void* a, void* b, size_t bytes) noexcept;

struct Mix {
  Update update;
  Copy copy;  // what a decay of 0 means: the average becomes the value, exactly
};

struct Kernels {
  const char* name;
  Mix f32;
  Mix f64;
  Swap swap;
};

}  // namespace fastema
