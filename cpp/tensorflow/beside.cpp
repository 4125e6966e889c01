// New averages beside the old, a bucket at a time, for TensorFlows that lack locks.
#include "beside.hpp"

#include <atomic>
#include <cstddef>
#include <vector>

#include "beside_buffers.hpp"
#include "ops.hpp"

namespace fastema {
namespace {

// Bytes of averages: smaller ones lie together in packs, which bounds what one that somebody holds
// keeps alive; of larger ones it is noticed where their memory comes from.
constexpr std::size_t kSmall = std::size_t{16} << 10;
constexpr std::size_t kPack = std::size_t{64} << 10;
constexpr std::size_t kLarge = std::size_t{1} << 20;

// Whether one kernel's large new averages get memory of our own: so after TensorFlow's was fresh
// several times in a row.
class Outputs : public Kept {
 public:
  using Kept::Kept;

  bool own() const noexcept { return fresh_calls_ >= 3; }
  void note(std::size_t bytes, std::size_t fresh) noexcept {
    if (bytes >= kLarge) fresh_calls_ = 2 * fresh > bytes ? fresh_calls_ + 1 : 0;
  }

 private:
  std::atomic<int> fresh_calls_{0};
};

class BesideCall : public Call {
 public:
  using Kept = Outputs;

  BesideCall(tf::OpKernelContext* context, Outputs& outputs)
      : Call(context, outputs), outputs_(outputs) {}

  bool take_pairs() {
    std::vector<const tf::Tensor*> averages;
    for (int i = 0; i < count_; ++i) {
      averages.push_back(average(i));
      if (!fine() || !add(averages.back(), value(i))) return false;
    }
    const bool own = outputs_.own();
    std::size_t large = 0, fresh = 0;  // bytes that TensorFlow gave
    for (int i = 0; i < count_; ++i) {
      const tf::Tensor* average = averages[static_cast<std::size_t>(i)];
      const std::size_t bytes = tf::TensorByteSize(average);
      const TensorPtr made(bytes < kSmall ? packed(i, average)
                           : own ? set_output(i, average, BufferPtr(Buffer::take(bytes)).get(), 0)
                                 : allocate(i, average));
      if (!fine()) return false;
      void* output = tf::TensorData(made.get());
      pairs_[static_cast<std::size_t>(i)].into = output;
      if (own || bytes < kLarge) continue;
      large += bytes;
      if (!is_fresh(output, bytes)) continue;
      fresh += bytes;
      advise_huge(output, bytes);
    }
    if (!own) outputs_.note(large, fresh);
    return true;
  }

 private:
  tf::Tensor* allocate(int i, const tf::Tensor* average) {
    const Shape shape(average);
    return tf::AllocateOutput(context_, i, tf::TensorType(average), shape.dims, shape.count,
                              tf::TensorByteSize(average), status_.get());
  }

  tf::Tensor* packed(int i, const tf::Tensor* average) {
    constexpr std::size_t kLine = 64;
    if (pack_ == nullptr || pack_used_ + kSmall > kPack) {
      pack_.reset(Buffer::take(kPack));
      pack_used_ = 0;
    }
    tf::Tensor* made = set_output(i, average, pack_.get(), pack_used_);
    pack_used_ += (tf::TensorByteSize(average) + kLine - 1) / kLine * kLine;
    return made;
  }

  // A null buffer is no memory of our own: TensorFlow may have some.
  tf::Tensor* set_output(int i, const tf::Tensor* average, Buffer* buffer, std::size_t begin) {
    if (buffer == nullptr) return allocate(i, average);
    const Shape shape(average);
    buffer->hold();
    tf::Tensor* made = tf::NewTensor(
        tf::TensorType(average), shape.dims, shape.count, buffer->data() + begin,
        tf::TensorByteSize(average),
        [](void*, std::size_t, void* held) { static_cast<Buffer*>(held)->drop(); }, buffer);
    tf::SetOutput(context_, i, made, status_.get());
    return made;
  }

  Outputs& outputs_;
  BufferPtr pack_;  // of small averages, the one that is being filled
  std::size_t pack_used_ = 0;
};

}  // namespace

bool register_beside() {
  return register_op({.name = "FastemaUpdate",
                      .attribute = std::string("A: ") + kTypes,
                      .averages = "averages: A",
                      .output = "updated: A",
                      .compute = compute<BesideCall>,
                      .create = create<Outputs>,
                      .destroy = destroy<Outputs>});
}

}  // namespace fastema
