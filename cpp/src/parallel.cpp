#include "parallel.hpp"

#include <pthread.h>

#include <algorithm>

#ifdef __SSE2__
#include <immintrin.h>
#else
#include <cfenv>
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastema {
namespace {

// GNU OpenMP's threads do not survive fork, and a forked child that asks for them waits for ever.
// They may be anybody's (the pool is shared by all who load the same libgomp), so a child never
// asks: it works alone.
std::atomic<bool> forked{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Between two training steps OpenMP's threads fall asleep, and the team waits for the last one that
// wakes: 2 to 8 ms, measured, in which one thread alone averages this many pieces
// (bench/bench_cold.py).
constexpr std::size_t kWorthATeam = 64;

// Round to nearest, subnormals kept. Frameworks set flush-to-zero on their threads, and an average
// must have the same bits there. Of x86, vector instructions look at MXCSR alone, and reading it
// costs nothing; fegetenv would cost more than a small update.
class DefaultEnvironment {
 public:
#ifdef __SSE2__
  DefaultEnvironment() noexcept : saved_(_mm_getcsr()) {
    if ((saved_ & kModes) != kDefault) _mm_setcsr((saved_ & ~kModes) | kDefault);
  }
  ~DefaultEnvironment() {
    if ((saved_ & kModes) != kDefault) _mm_setcsr(saved_);
  }
#else
  DefaultEnvironment() noexcept {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultEnvironment() { std::fesetenv(&saved_); }
#endif
  DefaultEnvironment(const DefaultEnvironment&) = delete;
  DefaultEnvironment& operator=(const DefaultEnvironment&) = delete;

 private:
#ifdef __SSE2__
  static constexpr unsigned kModes = 0xffc0;  // masks, rounding, flush-to-zero, subnormals-are-zero
  static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked, and nothing else
  const unsigned saved_;
#else
  std::fenv_t saved_;
#endif
};

}  // namespace

int default_threads() noexcept {
#ifdef _OPENMP
  return forked ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

int openmp_version() noexcept {
#ifdef _OPENMP
  return _OPENMP;
#else
  return 0;
#endif
}

void run_pieces(std::size_t count, int threads, void (*work)(Pieces&, const void*) noexcept,
                const void* context) noexcept {
  if (count == 0) return;
  Pieces pieces(count);
  const auto run = [&] {
    const DefaultEnvironment environment;
    work(pieces, context);
  };
#ifdef _OPENMP
  const int wanted = threads > 0 ? threads : (count < kWorthATeam ? 1 : default_threads());
  const int team =
      forked ? 1 : static_cast<int>(std::min<std::size_t>(static_cast<std::size_t>(wanted), count));
  if (team > 1) {
#pragma omp parallel num_threads(team)
    run();
    return;
  }
#else
  static_cast<void>(threads);
#endif
  run();
}

}  // namespace fastema
