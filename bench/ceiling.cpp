// The ceiling: what this machine's memory allows for the same streams. Each loop reads an average
// and a value, does two cheap integer operations that change nothing, and writes the average back;
// a swap writes both. Compiled by the benchmark for this very machine (-O3 -march=native -fopenmp).
// The benchmark takes the best of several chunks and distances. Stores that go around the caches
// are not among them: they take 1.2 to 1.3 times as long, for the lines that they write were read
// into caches just before.
#include <cstddef>
#include <cstdint>

namespace {

volatile std::uint64_t nothing = 0;  // compilers must not know

template <class A, class V>
void stream(A* __restrict a, V* __restrict v, std::size_t size) {
  const V mask = static_cast<V>(nothing);
  for (std::size_t i = 0; i < size; ++i) a[i] = static_cast<A>(a[i] ^ (v[i] & mask));
}

template <class A>
void exchange(A* __restrict a, A* __restrict b, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    const A x = a[i];
    a[i] = b[i];
    b[i] = x;
  }
}

// The same, some lines of each side at a time, asking for what comes `ahead` bytes later.
template <class A, class V, class Loop>
void ahead(A* a, V* v, std::size_t size, std::size_t ahead, const Loop& loop) {
  constexpr std::size_t step = 64 / (sizeof(A) < sizeof(V) ? sizeof(A) : sizeof(V));
  std::size_t i = 0;
  for (; i + step <= size; i += step) {
    for (std::size_t byte = 0; byte < step * sizeof(A); byte += 64) {
      __builtin_prefetch(reinterpret_cast<char*>(a + i) + ahead + byte);
    }
    for (std::size_t byte = 0; byte < step * sizeof(V); byte += 64) {
      __builtin_prefetch(reinterpret_cast<char*>(v + i) + ahead + byte);
    }
    loop(a + i, v + i, step);
  }
  loop(a + i, v + i, size - i);
}

template <class A, class V, class Loop>
void share_out(void* average, void* value, std::size_t size, std::size_t bytes,
               std::size_t distance, const Loop& loop) {
  A* a = static_cast<A*>(average);
  V* v = static_cast<V*>(value);
  const std::size_t chunk = bytes / sizeof(A);
  const auto chunks = static_cast<std::ptrdiff_t>((size + chunk - 1) / chunk);
#pragma omp parallel for schedule(dynamic)
  for (std::ptrdiff_t c = 0; c < chunks; ++c) {
    const std::size_t first = static_cast<std::size_t>(c) * chunk;
    const std::size_t count = size - first < chunk ? size - first : chunk;
    if (distance == 0) {
      loop(a + first, v + first, count);
    } else {
      ahead(a + first, v + first, count, distance, loop);
    }
  }
}

}  // namespace

// `average` and `value`: bytes of an element. `chunk`: bytes of averages that a thread takes at a
// time. `distance`: bytes, 0 for none. Only how many bytes of one go with those of the other
// counts, so that elements are as wide here as they can be.
extern "C" void ceiling_update(void* a, void* v, std::size_t size, int average, int value,
                               std::size_t chunk, std::size_t distance) {
  const std::size_t bytes = size * static_cast<std::size_t>(average);
  const auto go = [&]<class A, class V>(A, V) {
    share_out<A, V>(a, v, bytes / sizeof(A), chunk, distance,
                    [](A* x, V* y, std::size_t n) { stream(x, y, n); });
  };
  if (average == value) go(std::uint64_t{}, std::uint64_t{});
  if (average == 2 * value) go(std::uint64_t{}, std::uint32_t{});
  if (average == 4 * value) go(std::uint64_t{}, std::uint16_t{});
  if (2 * average == value) go(std::uint32_t{}, std::uint64_t{});
}

extern "C" void ceiling_swap(void* a, void* b, std::size_t bytes, std::size_t chunk,
                             std::size_t distance) {
  using U = std::uint64_t;
  share_out<U, U>(a, b, bytes / 8, chunk, distance,
                  [](U* x, U* y, std::size_t n) { exchange(x, y, n); });
}
