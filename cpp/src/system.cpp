// Linux, macOS, and what is left of the questions elsewhere.
#include "fastema/system.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

#ifdef __linux__
#include <link.h>
#include <sched.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

#ifdef __APPLE__
#include <mach-o/dyld.h>
#endif

namespace fastema {

// --- threads -------------------------------------------------------------------------------------

#ifdef __linux__

std::size_t processors() noexcept {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    return static_cast<std::size_t>(CPU_COUNT(&allowed));
  }
  return std::max(1u, std::thread::hardware_concurrency());
}

int current_processor() noexcept { return sched_getcpu(); }

bool keep_off(int processor, std::span<const ThreadHandle> threads) noexcept {
  cpu_set_t allowed;
  if (processor < 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return false;
  if (CPU_COUNT(&allowed) > 1) CPU_CLR(static_cast<unsigned>(processor), &allowed);
  for (const ThreadHandle thread : threads) {
    pthread_setaffinity_np(thread, sizeof allowed, &allowed);
  }
  return true;
}

void take_short_slices() noexcept {
  struct {  // sched_setattr(2): struct sched_attr, which not every C library declares
    std::uint32_t size, policy;
    std::uint64_t flags;
    std::int32_t nice;
    std::uint32_t priority;
    std::uint64_t runtime, deadline, period;
  } attributes{};
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return;
  if (attributes.policy != SCHED_OTHER) return;
  attributes.runtime = 100'000;  // nanoseconds, the least there is
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

ThreadNumber this_thread() noexcept { return static_cast<ThreadNumber>(syscall(SYS_gettid)); }

bool is_main_thread() noexcept { return this_thread() == getpid(); }

unsigned long threads_of_process() noexcept {
  struct stat tasks;
  return stat("/proc/self/task", &tasks) == 0 ? static_cast<unsigned long>(tasks.st_nlink) : 0;
}

namespace {

// What a thread has spent on processors, in nanoseconds; < 0 if it is no more.
// clock_getcpuclockid(3) knows processes alone, pthread_getcpuclockid(3) needs more than a number.
std::int64_t spent_by(ThreadNumber thread) noexcept {
  constexpr unsigned kScheduler = 2, kOneThread = 4;
  const auto clock =
      static_cast<clockid_t>((~static_cast<unsigned>(thread) << 3) | kOneThread | kScheduler);
  timespec time;
  if (clock_gettime(clock, &time) != 0) return -1;
  return std::int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

}  // namespace

// The clock of a thread that is on a processor goes on between two looks at it.
bool runs(ThreadNumber thread) noexcept {
  const std::int64_t before = spent_by(thread);
  return before >= 0 && spent_by(thread) > before;
}

#else

std::size_t processors() noexcept { return std::max(1u, std::thread::hardware_concurrency()); }
int current_processor() noexcept { return -1; }
bool keep_off(int, std::span<const ThreadHandle>) noexcept { return false; }
void take_short_slices() noexcept {}
ThreadNumber this_thread() noexcept { return 0; }
bool is_main_thread() noexcept { return false; }
unsigned long threads_of_process() noexcept { return 0; }
bool runs(ThreadNumber) noexcept { return false; }

#endif

#if defined(__unix__) || defined(__APPLE__)

SignalsBlocked::SignalsBlocked() noexcept {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before_);
}
SignalsBlocked::~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

bool call_in_children(void (*function)()) noexcept {
  return pthread_atfork(nullptr, nullptr, function) == 0;
}

#else  // neither signals that threads get nor forks

SignalsBlocked::SignalsBlocked() noexcept = default;
SignalsBlocked::~SignalsBlocked() = default;
bool call_in_children(void (*)()) noexcept { return true; }

#endif

// --- libraries that are loaded -------------------------------------------------------------------

#if defined(__linux__) || defined(__APPLE__)

namespace {

bool is_like(std::string_view path, std::span<const char* const> prefixes) noexcept {
  const std::string_view name = path.substr(path.rfind('/') + 1);
  return std::ranges::any_of(prefixes,
                             [&](const char* prefix) { return name.starts_with(prefix); });
}

#ifdef __linux__

// Calls a function with the path of each library, while it returns true.
template <class Function>
void for_each_library(Function function) {
  dl_iterate_phdr(
      [](dl_phdr_info* library, std::size_t, void* context) {
        return (*static_cast<Function*>(context))(library->dlpi_name) ? 0 : 1;
      },
      &function);
}

#else

template <class Function>
void for_each_library(Function function) {
  for (std::uint32_t i = 0; i < _dyld_image_count(); ++i) {
    const char* const path = _dyld_get_image_name(i);
    if (path != nullptr && !function(path)) return;
  }
}

#endif

}  // namespace

unsigned long long count_of_loads() noexcept {
#ifdef __linux__
  unsigned long long count = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* library, std::size_t, void* found) {
        *static_cast<unsigned long long*>(found) = library->dlpi_adds;
        return 1;
      },
      &count);
  return count;
#else
  return _dyld_image_count();
#endif
}

void* loaded_library(const char* name) noexcept { return dlopen(name, RTLD_LAZY | RTLD_NOLOAD); }

void* loaded_library_like(std::span<const char* const> prefixes) noexcept {
  std::string found;
  for_each_library([&](const char* path) {  // which holds the loader's lock
    if (is_like(path, prefixes)) found = path;
    return found.empty();
  });
  return found.empty() ? nullptr : loaded_library(found.c_str());
}

void* function_in(void* library, const char* name) noexcept {
  return dlsym(library == nullptr ? RTLD_DEFAULT : library, name);
}

const char* library_of(void* function) noexcept {
  Dl_info found;
  return dladdr(function, &found) != 0 && found.dli_fname != nullptr ? found.dli_fname : "";
}

#else

unsigned long long count_of_loads() noexcept { return 0; }
void* loaded_library(const char*) noexcept { return nullptr; }
void* loaded_library_like(std::span<const char* const>) noexcept { return nullptr; }
void* function_in(void*, const char*) noexcept { return nullptr; }
const char* library_of(void*) noexcept { return ""; }

#endif

}  // namespace fastema
