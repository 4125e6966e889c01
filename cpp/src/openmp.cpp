// How OpenMP's threads are known, and how it is seen that they spin.
#include "openmp.hpp"

#include "fastema/core.hpp"
#include "fastema/system.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(_OPENMP) && defined(__linux__)
#include <atomic>
#endif

namespace fastema {

int default_threads() noexcept {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return static_cast<int>(processors());
#endif
}

int openmp_version() noexcept {
#ifdef _OPENMP
  return _OPENMP;
#else
  return 0;
#endif
}

#if defined(_OPENMP) && defined(__linux__)

namespace {

// OpenMP does not survive a fork: a child that calls it would hang.
std::atomic<bool> forked{false};
[[maybe_unused]] const bool registered =
    call_in_children([] { forked.store(true, std::memory_order_relaxed); });

std::atomic<unsigned long> calls{0};

// What one calling thread knows of its team.
struct Known {
  ThreadNumber worker = 0;  // one of it, that spins if all do
  bool ours = false;        // nobody had it before: no other library computes with it
};
thread_local Known known;

bool usable() noexcept {
  return !forked.load(std::memory_order_relaxed) && omp_in_parallel() == 0 && !known.ours;
}

bool torch_is_loaded() noexcept { return loaded_library("libtorch_cpu.so") != nullptr; }

}  // namespace

bool openmp_spins() noexcept { return known.worker != 0 && usable() && runs(known.worker); }

bool openmp_is_worth_a_look() noexcept {
  // a look from another thread might make a team that nobody needs; and training runs in this one
  return is_main_thread() && known.worker == 0 && usable() && torch_is_loaded();
}

void run_by_openmp(void (*work)(const void*, std::size_t) noexcept, const void* context) noexcept {
  const unsigned long threads = known.worker == 0 ? threads_of_process() : 0;
  std::atomic<ThreadNumber> worker{0};
#pragma omp parallel
  {
    if (omp_get_thread_num() == 1) worker = this_thread();
    work(context, static_cast<std::size_t>(omp_get_thread_num()));
  }
  if (known.worker == 0) known.ours = threads_of_process() > threads;
  known.worker = worker;
  calls.fetch_add(1, std::memory_order_relaxed);
}

unsigned long calls_by_openmp() noexcept { return calls.load(std::memory_order_relaxed); }

#else

bool openmp_spins() noexcept { return false; }
bool openmp_is_worth_a_look() noexcept { return false; }
void run_by_openmp(void (*work)(const void*, std::size_t) noexcept, const void* context) noexcept {
  work(context, 0);
}
unsigned long calls_by_openmp() noexcept { return 0; }

#endif

}  // namespace fastema
