#include "arena.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>

namespace fastema {
namespace {

constexpr std::size_t kHuge = std::size_t{2} << 20;  // bytes of a huge page

// Stands at the beginning of its memory; the averages begin a line after it.
struct Block : Arena {
  std::size_t bytes;
  std::atomic<std::size_t> holders{1};
};
constexpr std::size_t kHead = 64;
static_assert(sizeof(Block) <= kHead);

struct Size {
  std::size_t in_use = 0;
  Block* spare = nullptr;
};

std::mutex mutex;
std::map<std::size_t, Size>& sizes() {
  static auto* const all = new std::map<std::size_t, Size>;  // tensors may outlive static objects
  return *all;
}

Block* fresh_block(std::size_t bytes) noexcept {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  Block* block = new (memory) Block;
  block->bytes = bytes;
  return block;
}

void give_back(Block* block) noexcept {
  if (block != nullptr) munmap(block, block->bytes);
}

}  // namespace

bool is_fresh(const void* data, std::size_t bytes) noexcept {
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto middle = reinterpret_cast<std::uintptr_t>(data) + bytes / 2;
  unsigned char resident = 1;
  mincore(reinterpret_cast<void*>(middle / page * page), page, &resident);
  return (resident & 1) == 0;
}

Arena* Arena::take(std::size_t bytes) noexcept try {
  bytes = (bytes + kHead + kHuge - 1) / kHuge * kHuge;
  const std::lock_guard lock(mutex);
  Size& size = sizes()[bytes];
  Block* block = size.spare != nullptr ? size.spare : fresh_block(bytes);
  if (block == nullptr) return nullptr;
  size.spare = nullptr;
  ++size.in_use;
  block->holders = 1;
  return block;
} catch (const std::bad_alloc&) {
  return nullptr;
}

std::byte* Arena::data() noexcept { return reinterpret_cast<std::byte*>(this) + kHead; }

void Arena::hold() noexcept { ++static_cast<Block*>(this)->holders; }

void Arena::drop() noexcept {
  auto* block = static_cast<Block*>(this);
  if (--block->holders > 0) return;
  const std::lock_guard lock(mutex);
  const auto found = sizes().find(block->bytes);
  Size& size = found->second;
  if (size.spare == nullptr) {
    size.spare = block;
  } else {
    give_back(block);
  }
  if (--size.in_use > 0) return;
  give_back(size.spare);
  sizes().erase(found);
}

}  // namespace fastema
