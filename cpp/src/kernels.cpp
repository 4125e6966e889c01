// The kernels, written once and compiled once per instruction set (CMakeLists.txt). It includes no
// header with inline functions of external linkage: the linker keeps one copy of such a function,
// and were it the AVX-512 one, an older machine would die far from here. A test reads the objects'
// symbols: each exports its table and nothing else.
#include "kernels.hpp"

#include <stdint.h>

#include "formula.hpp"

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

template <class T>
void blend_run(T* __restrict a, const T* __restrict v, size_t size, Compute<T> w) {
#pragma omp simd
  for (size_t i = 0; i < size; ++i) a[i] = blend(a[i], v[i], w);
}

template <class T>
void update(void* average, const void* value, size_t size, double weight) noexcept {
  T* a = static_cast<T*>(average);
  const T* v = static_cast<const T*>(value);
  const auto w = static_cast<Compute<T>>(weight);
  const size_t head = head_of(a, size);
  blend_run(a, v, head, w);
  if (head == size) return;
  blend_run(static_cast<T*>(__builtin_assume_aligned(a + head, kLine)), v + head, size - head, w);
}

template <class T>
void copy(void* average, const void* value, size_t size) noexcept {
  __builtin_memcpy(average, value, size * sizeof(T));
}

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

}  // namespace

#define FASTEMA_JOIN_(a, b) a##b
#define FASTEMA_JOIN(a, b) FASTEMA_JOIN_(a, b)
#define FASTEMA_TEXT_(a) #a
#define FASTEMA_TEXT(a) FASTEMA_TEXT_(a)

extern const Kernels FASTEMA_JOIN(kernels_, FASTEMA_KERNELS);
const Kernels FASTEMA_JOIN(kernels_, FASTEMA_KERNELS) = {
    FASTEMA_TEXT(FASTEMA_KERNELS),
    {update<float>, copy<float>},
    {update<double>, copy<double>},
    swap,
};

}  // namespace fastema
