// Memory for new averages that stays ours between two steps: fresh pages cost more than averaging.
#include "beside_buffers.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <vector>

namespace fastema {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kHuge = std::size_t{2} << 20;    // a huge page
constexpr std::size_t kMapped = std::size_t{1} << 18;  // from here on from the system, and kept
constexpr std::size_t kGrain = std::size_t{1} << 16;   // sizes that are close share what is kept

struct Size {
  std::size_t in_use = 0;
  std::vector<Buffer*> spares;
};

std::mutex mutex;
std::map<std::size_t, Size>& sizes() {
  static auto* const all = new std::map<std::size_t, Size>;  // tensors may outlive static objects
  return *all;
}

std::byte* memory_of(std::size_t bytes) noexcept {
  if (bytes < kMapped) return static_cast<std::byte*>(std::aligned_alloc(kLine, bytes));
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  advise_huge(memory, bytes);
  return static_cast<std::byte*>(memory);
}

void give_back(std::byte* memory, std::size_t bytes) noexcept {
  if (bytes < kMapped) {
    std::free(memory);
  } else {
    munmap(memory, bytes);
  }
}

std::uintptr_t page() noexcept { return static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

bool is_fresh(const void* data, std::size_t bytes) noexcept {
  const auto middle = reinterpret_cast<std::uintptr_t>(data) + bytes / 2;
  unsigned char resident = 1;
  mincore(reinterpret_cast<void*>(middle / page() * page()), page(), &resident);
  return (resident & 1) == 0;
}

void advise_huge([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) noexcept {
#ifdef MADV_HUGEPAGE
  if (bytes < kHuge) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + page() - 1) / page() * page();
  const std::uintptr_t last = (begin + bytes) / page() * page();
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void Buffer::destroy(Buffer* buffer) noexcept {
  give_back(buffer->data_, buffer->bytes_);
  delete buffer;
}

Buffer* Buffer::make(std::size_t bytes) noexcept {
  std::byte* memory = memory_of(bytes);
  if (memory == nullptr) return nullptr;
  Buffer* buffer = new (std::nothrow) Buffer(memory, bytes);
  if (buffer == nullptr) give_back(memory, bytes);
  return buffer;
}

Buffer* Buffer::take(std::size_t bytes) noexcept try {
  bytes = (bytes + kGrain - 1) / kGrain * kGrain;
  if (bytes < kMapped) return make(bytes);
  const std::lock_guard lock(mutex);
  Size& size = sizes()[bytes];
  size.spares.reserve(size.in_use + 3);  // for all that are in use, so that drop() needs no memory
  Buffer* buffer = size.spares.empty() ? make(bytes) : size.spares.back();
  if (buffer == nullptr) return nullptr;
  if (!size.spares.empty()) size.spares.pop_back();
  ++size.in_use;
  buffer->holders_ = 1;
  return buffer;
} catch (const std::bad_alloc&) {
  return nullptr;
}

void Buffer::drop() noexcept {
  if (--holders_ > 0) return;
  if (bytes_ < kMapped) return destroy(this);
  const std::lock_guard lock(mutex);
  const auto found = sizes().find(bytes_);
  Size& size = found->second;
  --size.in_use;
  size.spares.push_back(this);
  while (size.spares.size() > size.in_use) {
    destroy(size.spares.back());
    size.spares.pop_back();
  }
  if (size.in_use == 0) sizes().erase(found);
}

}  // namespace fastema
