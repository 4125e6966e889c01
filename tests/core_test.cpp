// The core without Python, for the sanitizers: every instruction set, sizes around every vector
// width and piece, any number of threads, each against the plain formula.
#include "fastema/core.hpp"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "dispatch.hpp"

namespace {

int failures = 0;

void expect(bool holds, const char* what, std::size_t size, int threads) {
  if (holds) return;
  std::printf("%s: %s differs at size %zu, %d threads\n", fastema::active().name, what, size,
              threads);
  ++failures;
}

// Values of many magnitudes, subnormals among them, by a fixed generator.
template <class T>
std::vector<T> noise(std::size_t size, std::uint64_t seed) {
  std::vector<T> out(size);
  for (T& x : out) {
    seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
    const auto mantissa = static_cast<T>(static_cast<std::int32_t>(seed >> 32));
    x = mantissa * static_cast<T>((seed >> 20 & 1) != 0 ? 1e-9 : 3e-44);
  }
  return out;
}

template <class T>
bool same(const std::vector<T>& x, const std::vector<T>& y) {
  return x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
}

template <class T>
void check(fastema::DType dtype, std::size_t size, std::size_t offset, int threads) {
  const double decay = 0.99;
  auto a = noise<T>(size + offset, 1), v = noise<T>(size + offset, 2);
  auto small = noise<T>(3, 3), other = noise<T>(3, 4);
  auto expected = a;
  const T w = static_cast<T>(1.0 - decay);
  for (std::size_t i = offset; i < size + offset; ++i) {
    const T difference = v[i] - expected[i];
    const T step = w * difference;
    expected[i] = expected[i] + step;
  }
  const std::vector<fastema::Pair> pairs{
      {{small.data(), 3, dtype}, {other.data(), 3, dtype}},
      {{a.data(), 0, dtype}, {v.data(), 0, dtype}},
      {{a.data() + offset, size, dtype}, {v.data() + offset, size, dtype}},
  };
  fastema::update(pairs, decay, threads);
  expect(same(a, expected), "update", size, threads);

  const auto a0 = a, v0 = v;
  fastema::swap(pairs, threads);
  if (size > 0) {
    expect(std::memcmp(a.data() + offset, v0.data() + offset, size * sizeof(T)) == 0, "swap", size,
           threads);
  }
  fastema::swap(pairs, threads);
  expect(same(a, a0) && same(v, v0), "swap twice", size, threads);

  fastema::update(pairs, 0.0, threads);
  if (size > 0) {
    expect(std::memcmp(a.data() + offset, v.data() + offset, size * sizeof(T)) == 0, "copy", size,
           threads);
  }
}

}  // namespace

int main() {
  for (const fastema::Kernels* kernels : fastema::available()) {
    fastema::activate(kernels->name);
    for (const std::size_t size :
         {0, 1, 3, 7, 15, 16, 17, 63, 64, 65, 1000, 65535, 65536, 65537, 131072, 300001}) {
      for (const std::size_t offset : {0, 1, 5}) {
        for (const int threads : {0, 1, 2, 5}) {
          check<float>(fastema::DType::f32, size, offset, threads);
          check<double>(fastema::DType::f64, size, offset, threads);
        }
      }
    }
  }
  if (failures == 0) std::puts("every kernel agrees with the formula");
  return failures == 0 ? 0 : 1;
}
