// update() and swap(): the kernels applied to the pieces of a list.
#include "fastema/core.hpp"

#include <algorithm>

#include "dispatch.hpp"
#include "kernels.hpp"
#include "parallel.hpp"

namespace fastema {
namespace {

constexpr std::size_t kPiece = std::size_t{256} << 10;  // bytes of averages; see bench/

const Mix* mix_of(const Kernels& kernels, DType average, DType value) noexcept {
  if (average != value) return nullptr;
  switch (average) {
    case DType::f32:
      return &kernels.f32;
    case DType::f64:
      return &kernels.f64;
  }
  return nullptr;
}

std::size_t bytes_of(const Span& span) noexcept { return span.size * size_of(span.dtype); }

// All averages lie end to end in one imaginary line of memory, each beginning on a cache line; it
// is cut every kPiece bytes. So many small arrays make one piece, and a large one makes many.
std::size_t extent_of(const Pair& pair) noexcept {
  return (bytes_of(pair.average) + kLine - 1) / kLine * kLine;
}

// Calls body(pair, first, size) for every part of every pair that lies in the pieces it takes.
template <class Body>
void for_each_part(std::span<const Pair> pairs, Pieces& pieces, const Body& body) noexcept {
  std::size_t index = 0;  // the pair being walked, and where it begins
  std::size_t begin = 0;
  for (std::size_t piece; pieces.take(piece);) {
    const std::size_t from = piece * kPiece;
    const std::size_t to = from + kPiece;
    while (index < pairs.size() && begin + extent_of(pairs[index]) <= from) {
      begin += extent_of(pairs[index++]);
    }
    while (index < pairs.size()) {
      const Pair& pair = pairs[index];
      const std::size_t end = begin + bytes_of(pair.average);
      const std::size_t first = std::max(from, begin);
      const std::size_t last = std::min(to, end);
      if (first < last) {
        const std::size_t element = size_of(pair.average.dtype);
        body(pair, (first - begin) / element, (last - first) / element);
      }
      if (begin + extent_of(pair) > to) break;  // the next piece continues here
      begin += extent_of(pair);
      ++index;
    }
  }
}

std::size_t count_pieces(std::span<const Pair> pairs) noexcept {
  std::size_t total = 0;
  for (const Pair& pair : pairs) total += extent_of(pair);
  return (total + kPiece - 1) / kPiece;
}

void* at(const Span& span, std::size_t first) noexcept {
  return static_cast<std::byte*>(span.data) + first * size_of(span.dtype);
}

template <class Body>
struct Job {
  std::span<const Pair> pairs;
  Body body;

  static void work(Pieces& pieces, const void* job) noexcept {
    const auto& self = *static_cast<const Job*>(job);
    for_each_part(self.pairs, pieces, self.body);
  }
};

template <class Body>
void run(std::span<const Pair> pairs, int threads, Body body) noexcept {
  const Job<Body> job{pairs, body};
  run_pieces(count_pieces(pairs), threads, Job<Body>::work, &job);
}

}  // namespace

std::size_t size_of(DType dtype) noexcept { return dtype == DType::f32 ? 4 : 8; }

bool offered(DType average, DType value) noexcept {
  return mix_of(active(), average, value) != nullptr;
}

void update(std::span<const Pair> pairs, double decay, int threads) noexcept {
  const Kernels& kernels = active();
  const double weight = 1.0 - decay;
  run(pairs, threads, [&](const Pair& pair, std::size_t first, std::size_t size) noexcept {
    const Mix& mix = *mix_of(kernels, pair.average.dtype, pair.value.dtype);
    void* average = at(pair.average, first);
    const void* value = at(pair.value, first);
    if (decay == 0.0) {
      mix.copy(average, value, size);
    } else {
      mix.update(average, value, size, weight);
    }
  });
}

void swap(std::span<const Pair> pairs, int threads) noexcept {
  const Swap exchange = active().swap;
  run(pairs, threads, [&](const Pair& pair, std::size_t first, std::size_t size) noexcept {
    exchange(at(pair.average, first), at(pair.value, first), size * size_of(pair.average.dtype));
  });
}

}  // namespace fastema
