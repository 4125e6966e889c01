// TensorFlow's ops for averaging a list of variables at once, over the same kernels and pieces as
// everything else. They never write memory that TensorFlow shares:
//
// FastemaUpdateInPlace takes the variables' handles, their locks, and buffers that TensorFlow has
//   made theirs alone (copied, where somebody holds them). Not every TensorFlow exports what it
//   needs.
// FastemaUpdate reads averages where they lie and makes new ones beside the old, which
//   AssignVariableOp then takes over.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "fastema/core.hpp"
#include "beside_buffers.hpp"
#include "c_api.hpp"

namespace fastema {
namespace {

struct Delete {
  void operator()(tf::Tensor* tensor) const noexcept { tf::DeleteTensor(tensor); }
  void operator()(tf::Status* status) const noexcept { tf::DeleteStatus(status); }
  void operator()(tf::VariableInputLockHolder* locks) const noexcept {
    tf::ReleaseVariableInputLockHolder(locks);
  }
};
using TensorPtr = std::unique_ptr<tf::Tensor, Delete>;
using StatusPtr = std::unique_ptr<tf::Status, Delete>;
using LocksPtr = std::unique_ptr<tf::VariableInputLockHolder, Delete>;

bool to_dtype(tf::DataType type, DType& dtype) noexcept {
  switch (type) {
    case tf::kHalf:
      dtype = DType::f16;
      return true;
    case tf::kBfloat16:
      dtype = DType::bf16;
      return true;
    case tf::kFloat:
      dtype = DType::f32;
      return true;
    case tf::kDouble:
      dtype = DType::f64;
      return true;
  }
  return false;
}

// Bytes of averages: smaller ones lie together in packs, which bounds what one that somebody holds
// keeps alive; of larger ones it is noticed where their memory comes from.
constexpr std::size_t kSmall = std::size_t{16} << 10;
constexpr std::size_t kPack = std::size_t{64} << 10;
constexpr std::size_t kLarge = std::size_t{1} << 20;

struct Shape {
  explicit Shape(const tf::Tensor* tensor) : count(tf::NumDims(tensor)) {
    for (int d = 0; d < count; ++d) dims[d] = tf::Dim(tensor, d);
  }
  int count;
  std::int64_t dims[254];  // TensorFlow's own limit
};

bool same_shape(const tf::Tensor* x, const tf::Tensor* y) {
  const Shape a(x), b(y);
  return std::equal(a.dims, a.dims + a.count, b.dims, b.dims + b.count);
}

// Whether one kernel's large new averages get memory of our own: so after TensorFlow's was fresh
// several times in a row.
class Outputs {
 public:
  bool own() const noexcept { return fresh_calls_ >= 3; }
  void note(std::size_t bytes, std::size_t fresh) noexcept {
    if (bytes >= kLarge) fresh_calls_ = 2 * fresh > bytes ? fresh_calls_ + 1 : 0;
  }

 private:
  std::atomic<int> fresh_calls_{0};
};

// What both ops share: inputs are the decay, the averages and as many values. Everything is asked
// for and checked before the first element changes.
class Call {
 public:
  explicit Call(tf::OpKernelContext* context)
      : context_(context), status_(tf::NewStatus()), count_((tf::NumInputs(context) - 1) / 2) {
    pairs_.reserve(static_cast<std::size_t>(count_));
  }

  void update_beside(void* outputs) { finish(decay() && beside(*static_cast<Outputs*>(outputs))); }
  void update_in_place(void*) { finish(decay() && in_place()); }

 private:
  bool beside(Outputs& outputs) {
    std::vector<const tf::Tensor*> averages;
    for (int i = 0; i < count_; ++i) {
      averages.push_back(input(1 + i));
      if (averages.back() == nullptr || !add(averages.back(), value(i))) return false;
    }
    const bool own = outputs.own();
    std::size_t large = 0, fresh = 0;  // bytes that TensorFlow gave
    for (int i = 0; i < count_; ++i) {
      const tf::Tensor* average = averages[static_cast<std::size_t>(i)];
      const std::size_t bytes = tf::TensorByteSize(average);
      const TensorPtr made(bytes < kSmall ? packed(i, average)
                           : own ? set_output(i, average, BlockPtr(Block::take(bytes)).get(), 0)
                                 : allocate(i, average));
      if (!fine()) return false;
      void* into = tf::TensorData(made.get());
      pairs_[static_cast<std::size_t>(i)].into = into;
      if (own || bytes < kLarge) continue;
      large += bytes;
      if (!is_fresh(into, bytes)) continue;
      fresh += bytes;
      advise_huge(into, bytes);
    }
    if (!own) outputs.note(large, fresh);
    return true;
  }

  bool in_place() {
    std::vector<int> averages(static_cast<std::size_t>(count_));
    for (int i = 0; i < count_; ++i) averages[static_cast<std::size_t>(i)] = 1 + i;
    tf::VariableInputLockHolder* locks = nullptr;
    tf::MaybeLockVariableInputMutexesInOrder(context_, true, false, averages.data(),
                                             averages.size(), copy_tensor, &locks, status_.get());
    locks_.reset(locks);
    if (!fine()) return false;
    for (int i = 0; i < count_; ++i) {
      tf::Tensor* average = nullptr;
      tf::GetInputTensorFromVariable(context_, 1 + i, true, false, false, copy_tensor, &average,
                                     status_.get());
      if (!fine() || !add(hold(average), value(i))) return false;
    }
    return true;
  }

  static void copy_tensor(tf::OpKernelContext*, tf::Tensor* from, tf::Tensor* to) {
    const TensorPtr source(from), target(to);
    std::memcpy(tf::TensorData(to), tf::TensorData(from), tf::TensorByteSize(from));
  }

  bool decay() {
    const tf::Tensor* tensor = input(0);
    if (tensor == nullptr) return false;
    if (tf::TensorType(tensor) != tf::kDouble || tf::TensorElementCount(tensor) != 1) {
      return refuse("decay must be one float64");
    }
    decay_ = *static_cast<const double*>(tf::TensorData(tensor));
    return (decay_ >= 0.0 && decay_ <= 1.0) || refuse("decay must be from 0 to 1");
  }

  const tf::Tensor* value(int i) { return input(1 + count_ + i); }

  const tf::Tensor* input(int i) {
    tf::Tensor* tensor = nullptr;
    tf::GetInput(context_, i, &tensor, status_.get());
    return fine() ? hold(tensor) : nullptr;
  }

  const tf::Tensor* hold(tf::Tensor* tensor) { return held_.emplace_back(tensor).get(); }

  bool add(const tf::Tensor* average, const tf::Tensor* value) {
    DType a, v;
    if (value == nullptr) return false;
    if (!to_dtype(tf::TensorType(average), a) || !to_dtype(tf::TensorType(value), v) ||
        !offered(a, v)) {
      return refuse("averages and values must have types that can be averaged");
    }
    if (!same_shape(average, value)) return refuse("averages and values must have one shape");
    const auto size = static_cast<std::size_t>(tf::TensorElementCount(average));
    pairs_.push_back(
        {.average = {tf::TensorData(average), size, a}, .value = {tf::TensorData(value), size, v}});
    return true;
  }

  tf::Tensor* allocate(int i, const tf::Tensor* average) {
    const Shape shape(average);
    return tf::AllocateOutput(context_, i, tf::TensorType(average), shape.dims, shape.count,
                              tf::TensorByteSize(average), status_.get());
  }

  tf::Tensor* packed(int i, const tf::Tensor* average) {
    constexpr std::size_t kLine = 64;
    if (pack_ == nullptr || pack_used_ + kSmall > kPack) {
      pack_.reset(Block::take(kPack));
      pack_used_ = 0;
    }
    tf::Tensor* made = set_output(i, average, pack_.get(), pack_used_);
    pack_used_ += (tf::TensorByteSize(average) + kLine - 1) / kLine * kLine;
    return made;
  }

  // Null blocks are no memory of our own: TensorFlow may have some.
  tf::Tensor* set_output(int i, const tf::Tensor* average, Block* block, std::size_t begin) {
    if (block == nullptr) return allocate(i, average);
    const Shape shape(average);
    block->hold();
    tf::Tensor* made = tf::NewTensor(
        tf::TensorType(average), shape.dims, shape.count, block->data() + begin,
        tf::TensorByteSize(average),
        [](void*, std::size_t, void* held) { static_cast<Block*>(held)->drop(); }, block);
    tf::SetOutput(context_, i, made, status_.get());
    return made;
  }

  bool fine() const noexcept { return tf::GetCode(status_.get()) == tf::kOk; }

  bool refuse(const char* why) {
    tf::SetStatus(status_.get(), tf::kInvalidArgument, why);
    return false;
  }

  void finish(bool ready) {
    if (ready) return update(pairs_, {&decay_, 1}, {});
    tf::OpKernelContext_Failure(context_, status_.get());
  }

  tf::OpKernelContext* context_;
  StatusPtr status_;
  int count_;
  double decay_ = 0.0;
  LocksPtr locks_;  // released last: the next writer would copy a buffer that is still held here
  std::vector<TensorPtr> held_;
  std::vector<Pair> pairs_;
  BlockPtr pack_;  // of small averages, the one that is being filled
  std::size_t pack_used_ = 0;
};

// No exception may leave through C.
template <void (Call::*update)(void*)>
void compute(void* state, tf::OpKernelContext* context) {
  try {
    (Call(context).*update)(state);
  } catch (const std::bad_alloc&) {
    const StatusPtr status(tf::NewStatus());
    tf::SetStatus(status.get(), tf::kResourceExhausted, "no memory for the list of averages");
    tf::OpKernelContext_Failure(context, status.get());
  }
}

// What a kernel keeps between its calls, and what it does.
struct Kernel {
  void* (*create)(tf::OpKernelConstruction*);
  void (*compute)(void*, tf::OpKernelContext*);
  void (*destroy)(void*);
};

bool registered(const char* name, tf::OpDefinitionBuilder* op, const Kernel& kernel) {
  tf::OpDefinitionBuilderSetShapeInferenceFunction(
      op, [](tf::ShapeInferenceContext* context, tf::Status* s) {
        tf::ShapeInferenceContextSetUnknownShape(context, s);
      });
  const StatusPtr status(tf::NewStatus());
  tf::RegisterOpDefinition(op, status.get());
  if (tf::GetCode(status.get()) != tf::kOk) return false;
  tf::KernelBuilder* builder =
      tf::NewKernelBuilder(name, "CPU", kernel.create, kernel.compute, kernel.destroy);
  tf::RegisterKernelBuilder(name, builder, status.get());
  return tf::GetCode(status.get()) == tf::kOk;
}

bool register_beside() {
  tf::OpDefinitionBuilder* op = tf::NewOpDefinitionBuilder("FastemaUpdate");
  tf::OpDefinitionBuilderAddAttr(op, "A: list({half, bfloat16, float, double}) >= 1");
  tf::OpDefinitionBuilderAddAttr(op, "V: list({half, bfloat16, float, double}) >= 1");
  tf::OpDefinitionBuilderAddInput(op, "decay: double");
  tf::OpDefinitionBuilderAddInput(op, "averages: A");
  tf::OpDefinitionBuilderAddInput(op, "values: V");
  tf::OpDefinitionBuilderAddOutput(op, "updated: A");
  return registered("FastemaUpdate", op,
                    {[](tf::OpKernelConstruction*) -> void* { return new Outputs; },
                     compute<&Call::update_beside>,
                     [](void* outputs) { delete static_cast<Outputs*>(outputs); }});
}

bool register_in_place() {
  tf::OpDefinitionBuilder* op = tf::NewOpDefinitionBuilder("FastemaUpdateInPlace");
  tf::OpDefinitionBuilderAddAttr(op, "N: int >= 1");
  tf::OpDefinitionBuilderAddAttr(op, "V: list({half, bfloat16, float, double}) >= 1");
  tf::OpDefinitionBuilderAddInput(op, "decay: double");
  tf::OpDefinitionBuilderAddInput(op, "averages: N * resource");
  tf::OpDefinitionBuilderAddInput(op, "values: V");
  tf::OpDefinitionBuilderSetIsStateful(op, true);
  return registered("FastemaUpdateInPlace", op,
                    {nullptr, compute<&Call::update_in_place>, nullptr});
}

// TensorFlow collects what registers itself while it loads a library; Python sees which ops it
// found.
[[maybe_unused]] const bool registered_all =
    tf::resolve() && register_beside() && tf::resolve_for_variables() && register_in_place();

}  // namespace
}  // namespace fastema
