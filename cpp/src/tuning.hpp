// How far ahead of its use memory is asked for: no bit depends on it, only time. 2 KiB is worth a
// third on one processor and costs a third on another, so the calls that a process makes anyway
// find out what is best where they run.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace fastema {

// One loop's way to the best distance. Parts of real calls take turns with all distances and are
// timed; the best one is then used until the next look, each time for twice as many calls.
class Tuner {
 public:
  // Smaller parts are not timed: the clock would be what is seen.
  static constexpr std::size_t kLeast = std::size_t{32} << 10;  // bytes of averages

  struct Trial {
    std::uint32_t call;
    std::uint32_t candidate;
    std::size_t ahead;  // bytes
    bool timed;
  };

  // How a thread that has taken so many pieces of a call does a part of the next. All threads of a
  // call go the same way at about the same time, for they share the way to memory.
  Trial trial(std::uint32_t call, std::size_t turn, std::size_t bytes) const noexcept;

  void took(const Trial& trial, std::size_t bytes, std::chrono::nanoseconds time) noexcept;

  // What is used now between looks, in bytes; < 0 before the first is over.
  int found() const noexcept;

  void forget() noexcept;

 private:
  static constexpr std::array<std::uint16_t, 6> kDistances{0, 256, 512, 1024, 2048, 4096};
  static constexpr std::uint32_t kUsual = 4;  // the place of kUsualAhead
  static constexpr std::uint32_t kUnknown = kDistances.size();
  static constexpr std::uint32_t kFirstRest = 16, kLongestRest = 4096;  // calls between looks
  static constexpr std::size_t kSamples = 128;                          // of each distance
  using Samples = std::array<float, kSamples>;

  void settle(std::uint32_t call) noexcept;

  std::atomic<std::uint32_t> best_{kUnknown};
  std::atomic<std::uint32_t> next_look_{0};  // the call that begins it
  std::uint32_t rest_ = kFirstRest;
  // Of the look that is going on. Who finds the flag set leaves its sample out.
  std::atomic_flag writing_;
  std::array<std::size_t, kDistances.size()> counts_{};
  std::array<Samples, kDistances.size()> samples_{};
};

// The number of a call, as trials want it.
std::uint32_t next_call() noexcept;

// Has all tuners ask so far ahead, in bytes; < 0: as far as they find best.
void fix_distance(int bytes) noexcept;

}  // namespace fastema
