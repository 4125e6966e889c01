// The core's public face: what can be averaged and swapped, without a word about who asks.
// It knows no Python and no TensorFlow; the bindings check, this trusts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace fastema {

enum class DType : std::uint8_t { f32, f64 };

std::size_t size_of(DType dtype) noexcept;  // bytes of one element

// A dense run of elements, in any order that both sides of a pair share.
struct Span {
  void* data;
  std::size_t size;  // elements
  DType dtype;
};

// update() writes the average and only reads the value; swap() writes both.
// Both have one size, and no average overlaps anything else in the list.
struct Pair {
  Span average;
  Span value;
};

// Whether update() knows this mix of types.
bool offered(DType average, DType value) noexcept;

// average += w * (value - average), w = 1 - decay rounded once to the compute type; a decay of 0
// copies. Every element gets the same bits on any instruction set and any number of threads.
// `threads`: 0 leaves it to OpenMP; more than there is work for is not used.
void update(std::span<const Pair> pairs, double decay, int threads) noexcept;

// Exchanges the contents of both sides bit for bit. Both have one type.
void swap(std::span<const Pair> pairs, int threads) noexcept;

}  // namespace fastema
