// Memory of our own for new averages. TensorFlow's allocator may give the old ones back to the
// system (without oneDNN it does): then every step takes fresh pages, which costs several times
// what the averaging costs.
#pragma once

#include <cstddef>

namespace fastema {

// Whether memory of at least a page has not been touched since the system gave it.
bool is_fresh(const void* data, std::size_t bytes) noexcept;

// One piece of memory for all new averages of a call, held by each of their tensors. When the last
// is gone it is kept for the next call of its size, as long as others of its size are in use.
class Arena {
 public:
  // Held once, by the caller. Null: there is no memory.
  static Arena* take(std::size_t bytes) noexcept;

  std::byte* data() noexcept;
  void hold() noexcept;
  void drop() noexcept;

 protected:
  Arena() = default;
};

}  // namespace fastema
