// How OpenMP's threads are known, and how it is seen that they spin.
#include "openmp.hpp"

#include <algorithm>
#include <thread>

#include "fastema/core.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(_OPENMP) && defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#endif

namespace fastema {

int default_threads() noexcept {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
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
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

std::atomic<unsigned long> calls{0};

// What one calling thread knows of its team.
struct Known {
  pid_t worker = 0;   // one of it, that spins if all do
  bool ours = false;  // nobody had it before: no other library computes with it
};
thread_local Known known;

bool usable() noexcept {
  return !forked.load(std::memory_order_relaxed) && omp_in_parallel() == 0 && !known.ours;
}

// What a thread has spent on processors, in nanoseconds; < 0 if it is no more.
// clock_getcpuclockid(3) knows processes alone, pthread_getcpuclockid(3) needs more than a number.
long spent_by(pid_t thread) noexcept {
  constexpr unsigned kScheduler = 2, kOneThread = 4;
  const auto clock =
      static_cast<clockid_t>((~static_cast<unsigned>(thread) << 3) | kOneThread | kScheduler);
  timespec time;
  if (clock_gettime(clock, &time) != 0) return -1;
  return time.tv_sec * 1'000'000'000L + time.tv_nsec;
}

// The clock of a thread that is on a processor goes on between two looks at it.
bool runs(pid_t thread) noexcept {
  const long before = spent_by(thread);
  return before >= 0 && spent_by(thread) > before;
}

unsigned long threads_of_process() noexcept {
  struct stat tasks;
  return stat("/proc/self/task", &tasks) == 0 ? static_cast<unsigned long>(tasks.st_nlink) : 0;
}

bool torch_is_loaded() noexcept {
  void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return false;
  dlclose(library);
  return true;
}

}  // namespace

bool openmp_spins() noexcept { return known.worker != 0 && usable() && runs(known.worker); }

bool openmp_is_worth_a_look() noexcept {
  // a look from another thread might make a team that nobody needs; and training runs in this one
  const bool main_thread = syscall(SYS_gettid) == getpid();
  return main_thread && known.worker == 0 && usable() && torch_is_loaded();
}

void run_by_openmp(void (*work)(const void*, std::size_t) noexcept, const void* context) noexcept {
  const unsigned long threads = known.worker == 0 ? threads_of_process() : 0;
  std::atomic<pid_t> worker{0};
#pragma omp parallel
  {
    if (omp_get_thread_num() == 1) worker = static_cast<pid_t>(syscall(SYS_gettid));
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
