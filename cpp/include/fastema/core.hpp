// The core's whole face: what can be averaged, swapped and copied, and where that runs, without a
// word about who asks. It knows no Python and no TensorFlow; the bindings check, this trusts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace fastema {

enum class DType : std::uint8_t {
  f16,
  bf16,
  f32,
  f64,
  byte,  // of whatever swap() and copy() move: they ask for no more
};

std::size_t size_of(DType dtype) noexcept;  // bytes of one element
const char* name_of(DType dtype) noexcept;  // as NumPy calls it

// A dense run of elements, in any order that both sides of a pair share.
struct Span {
  void* data;
  std::size_t size;  // elements
  DType dtype;
};

// update() and copy() write the average (an update may write `into` instead) and only read the
// value; swap() writes both. Both have one size, and nothing that is written overlaps anything else
// in the list.
struct Pair {
  Span average;
  Span value;
  void* carry = nullptr;  // what a compensated average keeps beside it; as many elements
  void* into = nullptr;   // where the new average is written, and the old one stays; null: in place
};

// The types of an average and its value.
struct Mix {
  DType average, value;
};

// What update() knows.
std::span<const Mix> mixes() noexcept;
bool offered(DType average, DType value) noexcept;

// The bytes of one element of a compensated average's carry, 0 where there is none for this mix: 4,
// a float, for float32 averages; 2, the lower half of a float, for bfloat16 averages.
std::size_t carry_size(DType average, DType value) noexcept;

struct Options {
  int threads = 0;          // 0: by the size of the list; more than there is work for is not used
  bool stochastic = false;  // round 16-bit averages at random, up or down, without a bias
  std::uint64_t seed = 0;   // random bits depend on seed, step, the pair's place in the list
  std::uint64_t step = 0;   //   and the element's in its array, and on nothing else
};

// average += w * (value - average), w = 1 - decay rounded once to the compute type; a decay of 0
// copies, and what the average cannot hold is rounded as in any other update. Every element gets
// the same bits on any instruction set and any number of threads.
//
// With K decays, every K pairs in a row share one value, which is read from memory once.
void update(std::span<const Pair> pairs, std::span<const double> decays,
            const Options& options) noexcept;

// Exchange the contents of both sides, or make averages what their values are, bit for bit. Both
// sides have one type.
void swap(std::span<const Pair> pairs, int threads) noexcept;
void copy(std::span<const Pair> pairs, int threads) noexcept;

// The number of the first value, of those that every so many pairs in a row share, that holds an
// infinity or a NaN; as many as there are values, where all are finite.
std::size_t first_non_finite(std::span<const Pair> pairs, std::size_t pairs_per_value,
                             int threads) noexcept;

// How far ahead update() asks for memory, once a list is larger than caches, which changes no bit:
// it finds out by the speed of its own calls (tuning.hpp). Of loops that have been looked at:
struct Tuned {
  Mix mix;
  const char* rounding;  // "nearest", "stochastic" or "compensated"
  bool together;         // on several threads
  int ahead;             // bytes
};
std::vector<Tuned> tuned();

// Has it ask so far ahead, in bytes, in all loops; < 0: as it finds out, from the start.
void tune(int ahead) noexcept;

constexpr int kUsualAhead = 2048;  // before anything is found out

// The instruction sets that this build holds and this machine runs, best first; the last is
// "baseline". The best is used unless another is chosen, for all threads; false, and nothing
// changes, where there is none of that name.
std::span<const char* const> instruction_sets() noexcept;
const char* instruction_set() noexcept;
bool use_instruction_set(std::string_view name) noexcept;

// What 0 threads means: as many as the OpenMP that is loaded would take here and now, torch's where
// there are several; without one, OMP_NUM_THREADS, or as many as there are processors for.
int default_threads() noexcept;

// How many calls were carried out by another library's threads, as they spun anyway (openmp.hpp).
unsigned long calls_by_openmp() noexcept;

// The path of that OpenMP, "" where none is loaded.
const char* openmp_library() noexcept;

}  // namespace fastema
