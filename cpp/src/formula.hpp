// What an update computes for one element. Every loop, on every device, includes this and nothing
// else decides a bit. Internal linkage throughout: each instruction set compiles its own copy, and
// the linker must not merge them.
#pragma once

namespace fastema {
namespace {

// The type in which the average of an element type is computed.
template <class Element>
struct ComputeOf {
  using type = Element;
};

template <class Element>
using Compute = typename ComputeOf<Element>::type;

// Three operations, each rounded: sub, mul, add. Never fused (-ffp-contract=off), never lerp.
template <class T>
inline T blend(T average, T value, T weight) {
  return average + weight * (value - average);
}

}  // namespace
}  // namespace fastema
