// Asks the processor which of the compiled instruction sets it runs, and keeps the choice.
#include "dispatch.hpp"

#include <array>
#include <atomic>
#include <cstddef>

#ifdef FASTEMA_X86
#include <cpuid.h>
#endif

#include "fastema/core.hpp"

namespace fastema {

extern const Kernels kernels_baseline;
#ifdef FASTEMA_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

#ifdef FASTEMA_X86
bool has_f16c() noexcept {  // older Clangs' __builtin_cpu_supports does not know it
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
}
#endif

struct Found {
  std::array<const Kernels*, 3> kernels{};
  std::array<const char*, 3> names{};
  std::size_t count = 0;

  Found() noexcept {
#ifdef FASTEMA_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      kernels[count++] = &kernels_avx512;
    }
    if (__builtin_cpu_supports("avx2") && has_f16c()) {
      kernels[count++] = &kernels_avx2;
    }
#endif
    kernels[count++] = &kernels_baseline;
    for (std::size_t i = 0; i < count; ++i) names[i] = kernels[i]->name;
  }
};

const Found& found() noexcept {
  static const Found once;
  return once;
}

std::atomic<const Kernels*>& chosen() noexcept {
  static std::atomic<const Kernels*> kernels{found().kernels[0]};
  return kernels;
}

}  // namespace

const Kernels& active() noexcept { return *chosen().load(std::memory_order_acquire); }

std::span<const char* const> instruction_sets() noexcept {
  return {found().names.data(), found().count};
}

const char* instruction_set() noexcept { return active().name; }

bool use_instruction_set(std::string_view name) noexcept {
  for (std::size_t i = 0; i < found().count; ++i) {
    if (name == found().names[i]) {
      chosen().store(found().kernels[i], std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace fastema
