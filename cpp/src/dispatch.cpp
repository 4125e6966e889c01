// Asks the processor which of the compiled instruction sets it runs, and keeps the choice.
#include "dispatch.hpp"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

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

constexpr bool bit(std::uint64_t word, int place) { return ((word >> place) & 1) != 0; }

// What the processor has and the system keeps over a change of threads. We ask ourselves: zig's
// __builtin_cpu_supports denies everything, older Clangs' does not know F16C.
// Intel's manual, volume 2, CPUID; volume 1, 13.3, XCR0.
struct Processor {
  bool avx2 = false, avx512 = false;

  Processor() noexcept {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0) return;
    const bool f16c = bit(c, 29), avx = bit(c, 28), osxsave = bit(c, 27);
    if (!osxsave || !avx || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return;
    const std::uint64_t kept = kept_by_system();
    constexpr std::uint64_t kVectors = 0x6, kWideVectors = 0xe6;
    avx2 = (kept & kVectors) == kVectors && bit(b, 5) && f16c;
    const bool f = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31);
    avx512 = avx2 && (kept & kWideVectors) == kWideVectors && f && dq && bw && vl;
  }

 private:
  static std::uint64_t kept_by_system() noexcept {
    std::uint32_t low = 0, high = 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // the intrinsic needs -mxsave
#ifdef __APPLE__
    low |= 0xe0;  // macOS keeps wide vectors from their first use on
#endif
    return (std::uint64_t{high} << 32) | low;
  }
};

#endif

struct Found {
  std::array<const Kernels*, 3> kernels{};
  std::array<const char*, 3> names{};
  std::size_t count = 0;

  Found() noexcept {
#ifdef FASTEMA_X86
    const Processor processor;
    if (processor.avx512) kernels[count++] = &kernels_avx512;
    if (processor.avx2) kernels[count++] = &kernels_avx2;
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
