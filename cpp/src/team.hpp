// Pieces of work and the threads that take them.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <memory>

namespace fastema {

// Pieces 0 .. count-1, in as many parts as threads may come. A thread takes those of its own part,
// one after the other, and then those that are left of others: so what it worked on lies in its
// caches, and on its side of the machine, at the next call, and nobody waits for who comes late.
class Pieces {
 public:
  Pieces(std::size_t count, std::size_t threads) noexcept
      : count_(count), parts_(std::min(threads, kMostParts)) {
    for (std::size_t i = 0; i < parts_; ++i) std::construct_at(&next_[i].piece, begin_of(i));
  }

  // One thread's way through them.
  class Walk {
   public:
    Walk(Pieces& pieces, std::size_t thread) noexcept
        : pieces_(pieces), part_(thread % pieces.parts_) {}

    bool take(std::size_t& piece) noexcept {
      for (; left_ > 0; --left_, part_ = (part_ + 1) % pieces_.parts_) {
        piece = pieces_.next_[part_].piece.fetch_add(1, std::memory_order_relaxed);
        if (piece < pieces_.begin_of(part_ + 1)) {
          ++taken_;
          return true;
        }
      }
      return false;
    }

    std::size_t taken() const noexcept { return taken_; }

   private:
    Pieces& pieces_;
    std::size_t part_;
    std::size_t left_ = pieces_.parts_;  // parts that may have pieces left
    std::size_t taken_ = 0;
  };

 private:
  static constexpr std::size_t kMostParts = 64;

  std::size_t begin_of(std::size_t part) const noexcept { return count_ * part / parts_; }

  struct alignas(64) Next {
    Next() noexcept {}  // those of parts that are not there cost nothing
    union {
      std::atomic<std::size_t> piece;
    };
  };

  const std::size_t count_, parts_;
  std::array<Next, kMostParts> next_;
};

// Calls work(walk, context) on the caller and on as many other threads as wake in time, which
// makes at most `threads`, at most `count`, and no more than there are processors for; 0 threads
// means default_threads(). While another
// caller has the other threads, this one works alone. Threads of OpenMP that spin are taken instead
// (openmp.hpp). Every call runs in the default floating-point
// environment, whatever the caller's thread was set to.
void run_pieces(std::size_t count, int threads, void (*work)(Pieces::Walk&, const void*) noexcept,
                const void* context) noexcept;

}  // namespace fastema
