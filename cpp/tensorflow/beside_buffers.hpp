// Memory of our own for new averages, where TensorFlow's allocator does badly: for many small ones,
// of which each costs more than the averaging; and where it gives freed memory back to the system
// (without oneDNN it does), so that every step takes fresh pages, which costs several times what
// the averaging costs.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>

namespace fastema {

// Whether memory of at least a page has not been touched since the system gave it.
bool is_fresh(const void* data, std::size_t bytes) noexcept;

// Asks for huge pages, where that makes sense.
void advise_huge(void* data, std::size_t bytes) noexcept;

// Memory that begins on a line. When the last who holds it drops it, a large one is kept
// for the next of its size, as long as no fewer of its size are in use.
class Buffer {
 public:
  // Held once, by the caller. Null: there is no memory.
  static Buffer* take(std::size_t bytes) noexcept;

  std::byte* data() const noexcept { return data_; }
  void hold() noexcept { ++holders_; }
  void drop() noexcept;

 private:
  Buffer(std::byte* data, std::size_t bytes) noexcept : data_(data), bytes_(bytes) {}
  static Buffer* make(std::size_t bytes) noexcept;
  static void destroy(Buffer* buffer) noexcept;

  std::byte* data_;
  std::size_t bytes_;
  std::atomic<std::size_t> holders_{1};
};

struct Drop {
  void operator()(Buffer* buffer) const noexcept { buffer->drop(); }
};
using BufferPtr = std::unique_ptr<Buffer, Drop>;

}  // namespace fastema
