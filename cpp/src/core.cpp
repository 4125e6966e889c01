// update(), swap(), copy() and first_non_finite(): the kernels applied to the pieces of a list.
#include "fastema/core.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <iterator>

#include "dispatch.hpp"
#include "formula.hpp"
#include "kernels.hpp"
#include "team.hpp"
#include "tuning.hpp"

namespace fastema {
namespace {

// Both measured by bench/bench_update.py, in bytes of averages.
constexpr std::size_t kPiece = std::size_t{512} << 10;
constexpr std::size_t kCached = std::size_t{8} << 20;  // smaller lists may well lie in caches

// In the order of DType, which is that of Kernels::loops.
struct Type {
  std::size_t size;
  const char* name;
};
constexpr Type kTypes[] = {
    {2, "float16"}, {2, "bfloat16"}, {4, "float32"}, {8, "float64"}, {1, "byte"}};
constexpr DType kFloats[] = {DType::f16, DType::bf16, DType::f32, DType::f64};
constexpr std::size_t index_of(DType dtype) noexcept { return static_cast<std::size_t>(dtype); }

const Loops& loops_of(const Kernels& kernels, DType average, DType value) noexcept {
  return kernels.loops[index_of(average)][index_of(value)];
}

std::size_t bytes_of(const Span& span) noexcept { return span.size * size_of(span.dtype); }

// All averages lie end to end in one imaginary line of memory, each beginning on a cache line; it
// is cut every kPiece bytes. So many small arrays make one piece, and a large one makes many.
std::size_t extent_of(const Pair& pair) noexcept {
  return (bytes_of(pair.average) + kLine - 1) / kLine * kLine;
}

// A list in groups of so many pairs that share a value; its first pair stands for a group.
struct Groups {
  std::span<const Pair> pairs;
  std::size_t each;

  std::size_t size() const noexcept { return pairs.size() / each; }
  const Pair& operator[](std::size_t i) const noexcept { return pairs[i * each]; }
};

// What of a group lies in one piece.
struct Part {
  std::size_t group;
  std::size_t first, size;  // elements
  std::size_t turn;         // the thread took so many pieces before
};

// Calls body(part) for every part of every group that lies in the pieces it takes.
template <class Body>
void for_each_part(const Groups& groups, Pieces::Walk& walk, const Body& body) noexcept {
  std::size_t index = 0;  // the group being walked, and where it begins
  std::size_t begin = 0;
  for (std::size_t piece; walk.take(piece);) {
    const std::size_t from = piece * kPiece;
    const std::size_t to = from + kPiece;
    if (from < begin) index = begin = 0;
    for (; index < groups.size(); ++index) {
      const Span& average = groups[index].average;
      const std::size_t end = begin + bytes_of(average);
      const std::size_t next = begin + extent_of(groups[index]);
      const std::size_t first = std::max(from, begin);
      const std::size_t last = std::min(to, end);
      if (first < last) {
        const std::size_t element = size_of(average.dtype);
        body(Part{index, (first - begin) / element, (last - first) / element, walk.taken() - 1});
      }
      if (next > to) break;  // the next piece continues here
      begin = next;
    }
  }
}

std::size_t count_pieces(const Groups& groups) noexcept {
  std::size_t total = 0;
  for (std::size_t i = 0; i < groups.size(); ++i) total += extent_of(groups[i]);
  return (total + kPiece - 1) / kPiece;
}

template <class Body>
struct Job {
  Groups groups;
  Body body;

  static void work(Pieces::Walk& walk, const void* job) noexcept {
    const auto& self = *static_cast<const Job*>(job);
    for_each_part(self.groups, walk, self.body);
  }
};

template <class Body>
void run(const Groups& groups, int threads, Body body) noexcept {
  const Job<Body> job{groups, body};
  run_pieces(count_pieces(groups), threads, Job<Body>::work, &job);
}

void* at(const Span& span, std::size_t first) noexcept {
  return static_cast<std::byte*>(span.data) + first * size_of(span.dtype);
}

// What a loop does to a pair, beside copying: each waits for memory in its own way.
enum class Way : std::uint8_t { nearest, stochastic, compensated };
constexpr const char* kWays[] = {"nearest", "stochastic", "compensated"};

// A tuner for each loop that runs beyond the caches, alone or on several threads.
struct Tuners {
  using ByThreads = std::array<Tuner, 2>;
  using ByWay = std::array<ByThreads, std::size(kWays)>;
  std::array<std::array<ByWay, std::size(kFloats)>, std::size(kFloats)> by_mix;

  Tuner& of(const Pair& pair, Way way, bool together) noexcept {
    ByWay& ways = by_mix[index_of(pair.average.dtype)][index_of(pair.value.dtype)];
    return ways[static_cast<std::size_t>(way)][together ? 1 : 0];
  }
};
Tuners tuners;

struct Updater {
  const Kernels& kernels;
  std::span<const Pair> pairs;
  std::span<const double> decays;
  const Options& options;
  bool beyond_caches;
  bool together;
  std::uint32_t call;

  void operator()(const Part& part) const noexcept {
    for (std::size_t k = 0; k < decays.size(); ++k) {
      update_one(part.group * decays.size() + k, decays[k], part);
    }
  }

  void update_one(std::size_t index, double decay, const Part& part) const noexcept {
    const std::size_t first = part.first, size = part.size;
    const Pair& pair = pairs[index];
    const Loops& loops = loops_of(kernels, pair.average.dtype, pair.value.dtype);
    Run run{.average = at(pair.average, first),
            .output = nullptr,
            .carry = nullptr,
            .value = at(pair.value, first),
            .size = size,
            .decay = decay,
            .noise = {},
            .beyond_caches = beyond_caches,
            .ahead = 0};
    if (pair.into != nullptr) {
      run.output = static_cast<std::byte*>(pair.into) + first * size_of(pair.average.dtype);
    }
    // what copies without a loss needs neither random bits nor a carry
    const bool exact = copies(decay) && size_of(pair.average.dtype) >= size_of(pair.value.dtype);
    if (pair.carry != nullptr) {
      const std::size_t element = carry_size(pair.average.dtype, pair.value.dtype);
      run.carry = static_cast<std::byte*>(pair.carry) + first * element;
      if (!exact) return run_tuned(loops.compensated, run, Way::compensated, pair, part.turn);
      std::memset(run.carry, 0, size * element);
    }
    if (exact || !options.stochastic || loops.stochastic == nullptr) {
      return copies(decay) ? loops.copy(run)
                           : run_tuned(loops.update, run, Way::nearest, pair, part.turn);
    }
    // a piece never crosses a multiple of 2^32 elements, so one key serves all of a part
    run.noise = {key_of(options.seed, options.step, index, first),
                 static_cast<std::uint32_t>(first)};
    run_tuned(loops.stochastic, run, Way::stochastic, pair, part.turn);
  }

  void run_tuned(Kernel loop, Run& run, Way way, const Pair& pair,
                 std::size_t turn) const noexcept {
    if (!beyond_caches) return loop(run);
    Tuner& tuner = tuners.of(pair, way, together);
    const std::size_t bytes = run.size * size_of(pair.average.dtype);
    const Tuner::Trial trial = tuner.trial(call, turn, bytes);
    run.ahead = trial.ahead;
    if (!trial.timed) return loop(run);
    const auto begun = std::chrono::steady_clock::now();
    loop(run);
    tuner.took(trial, bytes, std::chrono::steady_clock::now() - begun);
  }
};

}  // namespace

std::size_t size_of(DType dtype) noexcept { return kTypes[index_of(dtype)].size; }
const char* name_of(DType dtype) noexcept { return kTypes[index_of(dtype)].name; }

std::span<const Mix> mixes() noexcept {
  struct Found {
    std::array<Mix, 16> mixes{};
    std::size_t count = 0;

    Found() noexcept {
      for (const DType average : kFloats) {
        for (const DType value : kFloats) {
          if (offered(average, value)) mixes[count++] = {average, value};
        }
      }
    }
  };
  static const Found found;
  return {found.mixes.data(), found.count};
}

bool offered(DType average, DType value) noexcept {
  return average != DType::byte && value != DType::byte &&
         loops_of(active(), average, value).update != nullptr;
}

std::size_t carry_size(DType average, DType value) noexcept {
  const bool compensated =
      offered(average, value) && loops_of(active(), average, value).compensated != nullptr;
  return compensated ? size_of(average) : 0;
}

void update(std::span<const Pair> pairs, std::span<const double> decays,
            const Options& options) noexcept {
  const Groups groups{pairs, decays.size()};
  const bool beyond_caches = count_pieces(groups) > kCached / kPiece;
  const bool together =
      beyond_caches && (options.threads > 0 ? options.threads : default_threads()) > 1;
  const std::uint32_t call = beyond_caches ? next_call() : 0;
  run(groups, options.threads,
      Updater{active(), pairs, decays, options, beyond_caches, together, call});
}

std::vector<Tuned> tuned() {
  std::vector<Tuned> all;
  for (const Mix& mix : mixes()) {
    const auto& ways = tuners.by_mix[index_of(mix.average)][index_of(mix.value)];
    for (std::size_t way = 0; way < std::size(kWays); ++way) {
      for (const bool together : {false, true}) {
        const int found = ways[way][together ? 1 : 0].found();
        if (found >= 0) all.push_back({mix, kWays[way], together, found});
      }
    }
  }
  return all;
}

void tune(int ahead) noexcept {
  fix_distance(ahead);
  if (ahead >= 0) return;
  for (auto& by_value : tuners.by_mix) {
    for (auto& ways : by_value) {
      for (auto& by_threads : ways) {
        for (Tuner& tuner : by_threads) tuner.forget();
      }
    }
  }
}

void swap(std::span<const Pair> pairs, int threads) noexcept {
  const Swap exchange = active().swap;
  run({pairs, 1}, threads, [&](const Part& part) noexcept {
    const auto& [average, value, carry, into] = pairs[part.group];
    exchange(at(average, part.first), at(value, part.first), part.size * size_of(average.dtype));
  });
}

std::size_t first_non_finite(std::span<const Pair> pairs, std::size_t pairs_per_value,
                             int threads) noexcept {
  const Groups groups{pairs, pairs_per_value};
  const Kernels& kernels = active();
  std::atomic<std::size_t> found{groups.size()};
  run(groups, threads, [&](const Part& part) noexcept {
    const std::size_t i = part.group;
    std::size_t before = found.load(std::memory_order_relaxed);
    if (i >= before) return;  // those behind do not matter, and those before are all looked at
    const Span& value = groups[i].value;
    const Finite all_finite = kernels.all_finite[index_of(value.dtype)];
    if (all_finite(at(value, part.first), part.size)) return;
    while (i < before && !found.compare_exchange_weak(before, i, std::memory_order_relaxed)) {
    }
  });
  return found.load(std::memory_order_relaxed);
}

void copy(std::span<const Pair> pairs, int threads) noexcept {
  run({pairs, 1}, threads, [&](const Part& part) noexcept {
    const auto& [average, value, carry, into] = pairs[part.group];
    std::memcpy(at(average, part.first), at(value, part.first), part.size * size_of(average.dtype));
  });
}

}  // namespace fastema
