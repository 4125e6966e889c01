#include "parallel.hpp"

#include <pthread.h>

#include <algorithm>
#include <cfenv>

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

// Round to nearest, subnormals kept. Frameworks set flush-to-zero on their threads, and an average
// must have the same bits there.
class DefaultEnvironment {
 public:
  DefaultEnvironment() noexcept {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultEnvironment() { std::fesetenv(&saved_); }
  DefaultEnvironment(const DefaultEnvironment&) = delete;
  DefaultEnvironment& operator=(const DefaultEnvironment&) = delete;

 private:
  std::fenv_t saved_;
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
  const std::size_t wanted =
      forked ? 1 : static_cast<std::size_t>(threads > 0 ? threads : omp_get_max_threads());
  const int team = static_cast<int>(std::min(wanted, count));
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
