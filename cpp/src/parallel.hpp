// Pieces of work and the threads that take them: the only file that knows OpenMP and fork.
#pragma once

#include <atomic>
#include <cstddef>

namespace fastema {

// Pieces 0 .. count-1, each handed to whoever asks next. One thread's pieces only go up.
class Pieces {
 public:
  explicit Pieces(std::size_t count) noexcept : count_(count) {}

  bool take(std::size_t& piece) noexcept {
    piece = next_.fetch_add(1, std::memory_order_relaxed);
    return piece < count_;
  }

 private:
  const std::size_t count_;
  std::atomic<std::size_t> next_{0};
};

// Calls work(pieces, context) once on each thread of a team, which is at most `threads` and at most
// `count`. With 0, few pieces are for the caller alone, and many for as many threads as OpenMP
// would take. A team of one opens no parallel region. Every call runs in the default floating-point
// environment, whatever the caller's thread was set to.
void run_pieces(std::size_t count, int threads, void (*work)(Pieces&, const void*) noexcept,
                const void* context) noexcept;

// What threads=0 means here and now, for many pieces.
int default_threads() noexcept;

// The OpenMP this was built with (yyyymm), 0 for none.
int openmp_version() noexcept;

}  // namespace fastema
