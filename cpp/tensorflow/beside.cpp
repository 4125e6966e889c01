// New averages beside the old, a bucket at a time, for TensorFlows that lack locks.
#include "beside.hpp"

#include <atomic>
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "ops.hpp"

namespace fastema {
namespace {

// Bytes of averages: smaller ones lie together in packs, as TensorFlow's allocator takes longer for
// each than the averaging; a pack's size bounds what one that somebody holds keeps alive.
constexpr std::size_t kSmall = std::size_t{16} << 10;
constexpr std::size_t kPackBytes = std::size_t{64} << 10;
constexpr std::size_t kLine = 64;

// Memory that begins on a line and goes when the last of its tensors does.
class Pack {
 public:
  // Held once, by the caller.
  static Pack* make() { return new Pack; }

  void* place(std::size_t bytes) {
    std::byte* begin = memory_.get() + used_;
    used_ += (bytes + kLine - 1) / kLine * kLine;
    return begin;
  }
  bool full() const noexcept { return used_ + kSmall > kPackBytes; }
  void hold() noexcept { ++holders_; }
  void drop() noexcept {
    if (--holders_ == 0) delete this;
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const noexcept {
      ::operator delete[](memory, std::align_val_t{kLine});
    }
  };

  std::unique_ptr<std::byte[], Free> memory_{
      static_cast<std::byte*>(::operator new[](kPackBytes, std::align_val_t{kLine}))};
  std::size_t used_ = 0;
  std::atomic<std::size_t> holders_{1};
};

struct Drop {
  void operator()(Pack* pack) const noexcept { pack->drop(); }
};

class BesideCall : public Call {
 public:
  using Kept = fastema::Kept;
  using Call::Call;

  bool take_pairs() {
    std::vector<const tf::Tensor*> averages;
    for (int i = 0; i < count_; ++i) {
      averages.push_back(average(i));
      if (!fine() || !add(averages.back(), value(i))) return false;
    }
    for (int i = 0; i < count_; ++i) {
      const tf::Tensor* average = averages[static_cast<std::size_t>(i)];
      const bool small = tf::TensorByteSize(average) < kSmall;
      const TensorPtr made(small ? packed(i, average) : allocate(i, average));
      if (!fine()) return false;
      pairs_[static_cast<std::size_t>(i)].into = tf::TensorData(made.get());
    }
    return true;
  }

 private:
  tf::Tensor* allocate(int i, const tf::Tensor* average) {
    const Shape shape(average);
    return tf::AllocateOutput(context_, i, tf::TensorType(average), shape.dims, shape.count,
                              tf::TensorByteSize(average), status_.get());
  }

  tf::Tensor* packed(int i, const tf::Tensor* average) {
    if (pack_ == nullptr || pack_->full()) pack_.reset(Pack::make());
    const Shape shape(average);
    const std::size_t bytes = tf::TensorByteSize(average);
    pack_->hold();
    tf::Tensor* made = tf::NewTensor(
        tf::TensorType(average), shape.dims, shape.count, pack_->place(bytes), bytes,
        [](void*, std::size_t, void* held) { static_cast<Pack*>(held)->drop(); }, pack_.get());
    tf::SetOutput(context_, i, made, status_.get());
    return made;
  }

  std::unique_ptr<Pack, Drop> pack_;  // the one that is being filled
};

}  // namespace

bool register_beside() {
  return register_op({.name = "FastemaUpdate",
                      .attribute = std::string("A: ") + kTypes,
                      .averages = "averages: A",
                      .output = "updated: A",
                      .compute = compute<BesideCall>,
                      .create = create<Kept>,
                      .destroy = destroy<Kept>});
}

}  // namespace fastema
