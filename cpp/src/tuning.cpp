// When the distances take turns, and which of them is chosen.
#include "tuning.hpp"

#include <algorithm>

#include "fastema/core.hpp"

namespace fastema {
namespace {

constexpr std::size_t kRow = 8;    // pieces that go one way
constexpr float kClearly = 0.98f;  // of the time of what was best before; the rest is chance

std::atomic<int> fixed{-1};
std::atomic<std::uint32_t> calls{0};

}  // namespace

Tuner::Trial Tuner::trial(std::uint32_t call, std::size_t turn, std::size_t bytes) const noexcept {
  if (const int distance = fixed.load(std::memory_order_relaxed); distance >= 0) {
    return {call, kUnknown, static_cast<std::size_t>(distance), false};
  }
  static_assert(kDistances[kUsual] == kUsualAhead);
  std::uint32_t candidate = best_.load(std::memory_order_relaxed);
  const auto calls_to_go =
      static_cast<std::int32_t>(next_look_.load(std::memory_order_relaxed) - call);
  const bool timed = calls_to_go <= 0 && bytes >= kLeast;
  if (timed) {
    candidate = static_cast<std::uint32_t>((turn / kRow + call) % kDistances.size());
  } else if (candidate == kUnknown) {
    candidate = kUsual;
  }
  return {call, candidate, kDistances[candidate], timed};
}

void Tuner::took(const Trial& trial, std::size_t bytes, std::chrono::nanoseconds time) noexcept {
  if (writing_.test_and_set(std::memory_order_acquire)) return;
  std::size_t& count = counts_[trial.candidate];
  if (count < kSamples) {
    samples_[trial.candidate][count++] =
        static_cast<float>(time.count()) / static_cast<float>(bytes);
  }
  if (std::ranges::all_of(counts_, [](std::size_t n) { return n == kSamples; })) settle(trial.call);
  writing_.clear(std::memory_order_release);
}

void Tuner::settle(std::uint32_t call) noexcept {
  std::array<float, kDistances.size()> times;
  std::ranges::transform(samples_, times.begin(), [](Samples& samples) {
    const auto middle = samples.begin() + kSamples / 2;
    std::ranges::nth_element(samples, middle);
    return *middle;
  });
  const auto fastest = static_cast<std::uint32_t>(std::ranges::min_element(times) - times.begin());
  const std::uint32_t before = best_.load(std::memory_order_relaxed);
  if (before == kUnknown || times[fastest] < kClearly * times[before]) {
    best_.store(fastest, std::memory_order_relaxed);
  }
  counts_.fill(0);
  next_look_.store(call + rest_, std::memory_order_relaxed);
  rest_ = std::min(2 * rest_, kLongestRest);
}

int Tuner::found() const noexcept {
  const std::uint32_t best = best_.load(std::memory_order_relaxed);
  return best == kUnknown ? -1 : kDistances[best];
}

void Tuner::forget() noexcept {
  while (writing_.test_and_set(std::memory_order_acquire)) {
  }
  best_ = kUnknown;
  next_look_ = calls.load(std::memory_order_relaxed);
  rest_ = kFirstRest;
  counts_.fill(0);
  writing_.clear(std::memory_order_release);
}

std::uint32_t next_call() noexcept { return calls.fetch_add(1, std::memory_order_relaxed); }

void fix_distance(int bytes) noexcept { fixed.store(bytes, std::memory_order_relaxed); }

}  // namespace fastema
