// The floating-point environment that the bits depend on.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#else
#include <cfenv>
#endif

namespace fastema {

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

}  // namespace fastema
