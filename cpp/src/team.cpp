// How helpers are woken, moved and put to sleep, and what a fork leaves of them.
#include "team.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "environment.hpp"
#include "fastema/core.hpp"
#include "fastema/system.hpp"
#include "openmp.hpp"

namespace fastema {
namespace {

// How long to look out for what is about to come before going to sleep: helpers for the next list
// of the same step (bench/bench_cold.py).
constexpr auto kPatience = std::chrono::microseconds(200);

void pause() noexcept {
#ifdef __SSE2__
  _mm_pause();
#endif
}

// Waits until `word` is no longer `old`: awake at first, then asleep. Returns whether it slept.
bool wait(const std::atomic<std::uint32_t>& word, std::uint32_t old) noexcept {
  using std::chrono::steady_clock;
  const steady_clock::time_point end = steady_clock::now() + kPatience;
  while (word.load(std::memory_order_acquire) == old) {
    for (int i = 0; i < 16; ++i) pause();
    if (steady_clock::now() > end) {
      word.wait(old, std::memory_order_acquire);
      return true;
    }
  }
  return false;
}

struct Job {
  void (*work)(Pieces::Walk&, const void*) noexcept;
  Pieces* pieces;
  const void* context;

  void run(std::size_t thread) const noexcept {  // the caller is 0
    const DefaultEnvironment environment;
    Pieces::Walk walk(*pieces, thread);
    work(walk, context);
  }
};

// Threads of our own that help with one job at a time. The caller starts at once, helpers join when
// they have woken, and the end waits for those who joined, never for one who still sleeps. OpenMP's
// teams cannot do this: a cold one costs 2 to 8 ms, measured, because whoever arrives first spins
// on the processor that the other was woken for.
class Team {
 public:
  // The process's team; after a fork the child makes its own. Never destroyed: helpers may sleep in
  // it until the process ends.
  static Team& current() noexcept {
    Team* team = current_.load(std::memory_order_acquire);
    if (team != nullptr) return *team;
    Team* made = new Team;
    if (current_.compare_exchange_strong(team, made)) return *made;
    delete made;
    return *team;
  }

  enum class Ran { no, yes, late };

  // `no`, with nothing done, while another caller's job has the team; `late` if no
  // helper came, or the caller had to wait for one that was kept from its work.
  Ran run(const Job& job, std::uint32_t helpers) noexcept {
    if (busy_.test_and_set(std::memory_order_acquire)) return Ran::no;
    job_ = job;
    const std::uint32_t seats = hire(helpers);
    keep_off_the_callers_processor();
    state_.store(kOpen | seats * kSeat, std::memory_order_release);
    ring(seats);
    job.run(0);
    const std::uint32_t closed = state_.fetch_and(kInside, std::memory_order_acq_rel);
    bool late = closed == (kOpen | seats * kSeat);  // nobody came
    for (std::uint32_t state = closed & kInside; state != 0;
         state = state_.load(std::memory_order_acquire)) {
      late |= wait(state_, state);
    }
    busy_.clear(std::memory_order_release);
    return late ? Ran::late : Ran::yes;
  }

 private:
  // The state: whether the job may be joined, seats that are left, helpers inside.
  static constexpr std::uint32_t kOpen = 1u << 31;
  static constexpr std::uint32_t kSeat = 1u << 15;
  static constexpr std::uint32_t kInside = kSeat - 1;

  void ring(std::uint32_t seats) noexcept {
    bell_.fetch_add(1, std::memory_order_release);
    if (seats == helpers_.size()) return bell_.notify_all();
    for (; seats > 0; --seats) bell_.notify_one();
  }

  // Sees to it that there are so many helpers, if there are processors for them, and returns how
  // many there are to be of use.
  std::uint32_t hire(std::uint32_t wanted) noexcept {
    wanted = std::min(wanted, kInside);
    if (helpers_.size() < wanted) {
      const std::size_t useful = std::max(helpers_.size(), processors() - 1);
      wanted = static_cast<std::uint32_t>(std::min<std::size_t>(wanted, useful));
    }
    while (helpers_.size() < wanted) {
      const SignalsBlocked signals;
      try {
        helpers_.reserve(wanted);
        std::thread helper([this, thread = helpers_.size() + 1,
                            seen = bell_.load(std::memory_order_relaxed)] { help(thread, seen); });
        helpers_.push_back(helper.native_handle());
        helper.detach();
        avoided_ = -1;
      } catch (const std::exception&) {
        wanted = static_cast<std::uint32_t>(helpers_.size());  // the system gives no more
      }
    }
    return wanted;
  }

  // Linux likes to wake a thread on the processor of whoever wakes it, where it is of no help for
  // milliseconds. Helpers may use the caller's processors, but for the one the caller is on.
  void keep_off_the_callers_processor() noexcept {
    const int here = current_processor();
    if (here != avoided_ && keep_off(here, helpers_)) avoided_ = here;
  }

  [[noreturn]] void help(std::size_t thread, std::uint32_t seen) noexcept {
    take_short_slices();
    for (;;) {
      wait(bell_, seen);
      seen = bell_.load(std::memory_order_acquire);
      if (!join()) continue;
      job_.run(thread);
      if (state_.fetch_sub(1, std::memory_order_acq_rel) == 1) state_.notify_one();
    }
  }

  bool join() noexcept {
    std::uint32_t state = state_.load(std::memory_order_acquire);
    do {
      if (state < (kOpen | kSeat)) return false;
    } while (!state_.compare_exchange_weak(state, state - kSeat + 1, std::memory_order_acq_rel));
    return true;
  }

  static std::atomic<Team*> current_;
  [[maybe_unused]] static const bool registered_;

  std::atomic_flag busy_;
  std::atomic<std::uint32_t> bell_{0};
  std::atomic<std::uint32_t> state_{0};
  std::vector<ThreadHandle> helpers_;
  int avoided_ = -1;  // the processor on which no helper may run
  Job job_{};
};

std::atomic<Team*> Team::current_{nullptr};
const bool Team::registered_ = call_in_children([] { current_ = nullptr; });

}  // namespace

void run_pieces(std::size_t count, int threads, void (*work)(Pieces::Walk&, const void*) noexcept,
                const void* context) noexcept {
  if (count == 0) return;
  const int all = count > 1 ? default_threads() : 1;
  const int wanted = threads > 0 ? threads : all;
  const std::size_t team = std::min<std::size_t>(static_cast<std::size_t>(wanted), count);
  Pieces pieces(count, team);
  const Job job{work, &pieces, context};
  if (team == 1) return job.run(0);
  thread_local bool was_late = false;  // so that somebody else's threads may spin
  if (wanted == all &&
      (openmp_spins() || (std::exchange(was_late, false) && openmp_is_worth_a_look()))) {
    return run_by_openmp(
        [](const void* of, std::size_t thread) noexcept {
          static_cast<const Job*>(of)->run(thread);
        },
        &job);
  }
  const Team::Ran ran = Team::current().run(job, static_cast<std::uint32_t>(team - 1));
  if (ran == Team::Ran::no) job.run(0);
  was_late = ran == Team::Ran::late;
}

}  // namespace fastema
