// How OpenMP is found among the libraries of the process, and how it is seen that its threads spin.
#include "openmp.hpp"

#include <atomic>
#include <cstdlib>

#include "fastema/core.hpp"
#include "fastema/system.hpp"

namespace fastema {
namespace {

// What others have loaded of OpenMP. We are linked with none: a wheel would bring one of its own,
// which torch.set_num_threads does not reach, and a second one aborts a process on macOS.
struct OpenMp {
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  int (*thread_number)() = nullptr;
  // What GCC makes of `#pragma omp parallel`; the libraries of LLVM and Intel have it as well.
  void (*parallel)(void (*work)(void*), void* context, unsigned threads, unsigned) = nullptr;

  bool operator==(const OpenMp&) const = default;
};

template <class Function>
void find(Function*& function, void* library, const char* name) noexcept {
  function = reinterpret_cast<Function*>(function_in(library, name));
}

OpenMp found_in(void* library) noexcept {
  OpenMp found;
  find(found.max_threads, library, "omp_get_max_threads");
  find(found.in_parallel, library, "omp_in_parallel");
  find(found.thread_number, library, "omp_get_thread_num");
  find(found.parallel, library, "GOMP_parallel");
  if (found.in_parallel == nullptr || found.thread_number == nullptr) found.parallel = nullptr;
  return found;
}

void* torch() noexcept {
  constexpr const char* kNames[] = {"libtorch_cpu."};
  return loaded_library_like(kNames);
}

// Walks through all libraries only where one was loaded since.
bool torch_is_loaded() noexcept {
  static std::atomic<bool> loaded{false};
  static std::atomic<unsigned long long> loads_then{~0ull};
  const unsigned long long loads = count_of_loads();
  if (!loaded.load(std::memory_order_relaxed) &&
      loads_then.exchange(loads, std::memory_order_relaxed) != loads) {
    loaded.store(torch() != nullptr, std::memory_order_relaxed);
  }
  return loaded.load(std::memory_order_relaxed);
}

// What torch calls, where that is loaded: a library that all can see comes before its own. Else
// any. Says whether that is settled, whatever is loaded later.
OpenMp look(bool& settled) noexcept {
  constexpr const char* kNames[] = {"libgomp.", "libgomp-", "libiomp5.", "libomp.", "libomp-"};
  OpenMp found = found_in(nullptr);
  if (found.max_threads == nullptr) {
    if (void* const library = torch()) found = found_in(library);
  }
  settled = found.max_threads != nullptr;
  if (!settled) {
    if (void* const library = loaded_library_like(kNames)) found = found_in(library);
  }
  return found;
}

// Looks anew after a library was loaded, until that is settled. Null: there is none.
const OpenMp* openmp() noexcept {
  static std::atomic<const OpenMp*> known{nullptr};
  static std::atomic<bool> settled{false};
  static std::atomic<unsigned long long> loads_then{~0ull};
  static std::atomic_flag looking;
  if (settled.load(std::memory_order_acquire)) return known.load(std::memory_order_acquire);
  const unsigned long long loads = count_of_loads();
  if (loads != loads_then.load(std::memory_order_acquire) &&
      !looking.test_and_set(std::memory_order_acquire)) {
    bool is_settled = false;
    const OpenMp found = look(is_settled);
    const OpenMp* const before = known.load(std::memory_order_relaxed);
    if (found.max_threads != nullptr && (before == nullptr || found != *before)) {
      known.store(new OpenMp(found), std::memory_order_release);  // kept, for who is within it
    }
    settled.store(is_settled, std::memory_order_release);
    loads_then.store(loads, std::memory_order_release);
    looking.clear(std::memory_order_release);
  }
  return known.load(std::memory_order_acquire);
}

// As OpenMP would count: the first number of OMP_NUM_THREADS, or the processors.
int threads_without_openmp() noexcept {
  const char* const asked = std::getenv("OMP_NUM_THREADS");
  const long number = asked == nullptr ? 0 : std::strtol(asked, nullptr, 10);
  constexpr long kMost = 1 << 20;
  if (number > 0) return static_cast<int>(number < kMost ? number : kMost);
  return static_cast<int>(processors());
}

// OpenMP does not survive a fork: a child that calls it would hang.
std::atomic<bool> forked{false};
[[maybe_unused]] const bool registered =
    call_in_children([] { forked.store(true, std::memory_order_relaxed); });

std::atomic<unsigned long> calls{0};

// What one calling thread knows of its team.
struct Known {
  const OpenMp* openmp = nullptr;  // whose team it is
  ThreadNumber worker = 0;         // one of it, that spins if all do
  bool ours = false;               // nobody had it before: no other library computes with it
};
thread_local Known known;

// The library whose team may be used here and now, or null.
const OpenMp* usable() noexcept {
  if (forked.load(std::memory_order_relaxed)) return nullptr;
  const OpenMp* const found = openmp();
  if (found == nullptr || found->parallel == nullptr) return nullptr;
  if (known.openmp != found) known = {.openmp = found};
  return known.ours || found->in_parallel() != 0 ? nullptr : found;
}

}  // namespace

int default_threads() noexcept {
  static const int alone = threads_without_openmp();
  const OpenMp* const found = openmp();
  return found == nullptr ? alone : found->max_threads();
}

const char* openmp_library() noexcept {
  const OpenMp* const found = openmp();
  return found == nullptr ? "" : library_of(reinterpret_cast<void*>(found->max_threads));
}

bool openmp_spins() noexcept {
  return known.worker != 0 && usable() != nullptr && known.worker != 0 && runs(known.worker);
}

bool openmp_is_worth_a_look() noexcept {
  // a look from another thread might make a team that nobody needs; and training runs in this one
  return is_main_thread() && usable() != nullptr && known.worker == 0 && torch_is_loaded();
}

void run_by_openmp(void (*work)(const void*, std::size_t) noexcept, const void* context) noexcept {
  const OpenMp* const found = usable();
  if (found == nullptr) return work(context, 0);
  struct Shared {
    const OpenMp& openmp;
    void (*work)(const void*, std::size_t) noexcept;
    const void* context;
    std::atomic<ThreadNumber> worker{0};
  } shared{*found, work, context};
  const unsigned long threads = known.worker == 0 ? threads_of_process() : 0;
  found->parallel(
      [](void* of) {
        auto& all = *static_cast<Shared*>(of);
        const int thread = all.openmp.thread_number();
        if (thread == 1) all.worker = this_thread();
        all.work(all.context, static_cast<std::size_t>(thread));
      },
      &shared, 0, 0);
  if (known.worker == 0) known.ours = threads_of_process() > threads;
  known.worker = shared.worker;
  calls.fetch_add(1, std::memory_order_relaxed);
}

unsigned long calls_by_openmp() noexcept { return calls.load(std::memory_order_relaxed); }

}  // namespace fastema
