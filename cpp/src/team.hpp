// Pieces of work and the threads that take them: the only file that knows threads and fork.
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

// Calls work(pieces, context) on the caller and on as many other threads as wake in time, which
// makes at most `threads`, at most `count`, and no more than there are processors for; 0 threads
// means default_threads(). While another
// caller has the other threads, this one works alone. Threads of OpenMP that spin are taken instead
// (openmp.hpp). Every call runs in the default floating-point
// environment, whatever the caller's thread was set to.
void run_pieces(std::size_t count, int threads, void (*work)(Pieces&, const void*) noexcept,
                const void* context) noexcept;

}  // namespace fastema
