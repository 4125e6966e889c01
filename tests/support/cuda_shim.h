// What CUDA offers the kernels, for a C++ compiler. Threads run one after another, so it serves
// kernels without shared memory, barriers and atomics; ours have none.
#pragma once

#include <math.h>
#include <stdint.h>

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx;

// Accesses of several words must be aligned on a device; the sanitizers see it here.
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <class T>
inline T __ldcs(const T* from) {
  return *from;
}
template <class T>
inline T __ldg(const T* from) {
  return *from;
}
template <class T>
inline void __stcs(T* to, T x) {
  *to = x;
}

#include "kernels.cu"
