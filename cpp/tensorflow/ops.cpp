// TensorFlow's ops for averaging a list of variables at once, over the same kernels and pieces as
// everything else. They never write memory that TensorFlow shares:
//
// FastemaUpdateInPlace takes the variables' handles, their locks, and buffers that TensorFlow has
//   made theirs alone (copied, where somebody holds them). Not every TensorFlow exports what it
//   needs.
// FastemaUpdate reads averages where they lie and makes new ones beside the old, which
//   AssignVariableOp then takes over.
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "fastema/core.hpp"
#include "tf_c_api.hpp"

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

// What both ops share: inputs are the decay, the averages and as many values. Everything is asked
// for and checked before the first element changes.
class Call {
 public:
  explicit Call(tf::OpKernelContext* context)
      : context_(context), status_(tf::NewStatus()), count_((tf::NumInputs(context) - 1) / 2) {
    pairs_.reserve(static_cast<std::size_t>(count_));
  }

  void update_beside() { finish(decay() && beside()); }
  void update_in_place() { finish(decay() && in_place()); }

 private:
  bool beside() {
    for (int i = 0; i < count_; ++i) {
      const tf::Tensor* average = input(1 + i);
      if (average == nullptr || !add(average, value(i))) return false;
      pairs_.back().into = make_output(i, average);
      if (!fine()) return false;
    }
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
    if (tf::TensorElementCount(average) != tf::TensorElementCount(value)) {
      return refuse("averages and values must have one size");
    }
    const auto size = static_cast<std::size_t>(tf::TensorElementCount(average));
    pairs_.push_back(
        {.average = {tf::TensorData(average), size, a}, .value = {tf::TensorData(value), size, v}});
    return true;
  }

  void* make_output(int i, const tf::Tensor* average) {
    std::int64_t shape[kMaxDims];
    const int dims = tf::NumDims(average);
    for (int d = 0; d < dims; ++d) shape[d] = tf::Dim(average, d);
    const TensorPtr made(tf::AllocateOutput(context_, i, tf::TensorType(average), shape, dims,
                                            tf::TensorByteSize(average), status_.get()));
    return fine() ? tf::TensorData(made.get()) : nullptr;
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

  static constexpr int kMaxDims = 254;  // TensorShape's own limit

  tf::OpKernelContext* context_;
  StatusPtr status_;
  int count_;
  double decay_ = 0.0;
  LocksPtr locks_;  // released last: the next writer would copy a buffer that is still held here
  std::vector<TensorPtr> held_;
  std::vector<Pair> pairs_;
};

// No exception may leave through C.
template <void (Call::*update)()>
void compute(void*, tf::OpKernelContext* context) {
  try {
    (Call(context).*update)();
  } catch (const std::bad_alloc&) {
    const StatusPtr status(tf::NewStatus());
    tf::SetStatus(status.get(), tf::kResourceExhausted, "no memory for the list of averages");
    tf::OpKernelContext_Failure(context, status.get());
  }
}

using Compute = void (*)(void*, tf::OpKernelContext*);

bool registered(const char* name, tf::OpDefinitionBuilder* op, Compute compute) {
  tf::OpDefinitionBuilderSetShapeInferenceFunction(
      op, [](tf::ShapeInferenceContext* context, tf::Status* s) {
        tf::ShapeInferenceContextSetUnknownShape(context, s);
      });
  const StatusPtr status(tf::NewStatus());
  tf::RegisterOpDefinition(op, status.get());
  if (tf::GetCode(status.get()) != tf::kOk) return false;
  tf::KernelBuilder* kernel = tf::NewKernelBuilder(name, "CPU", nullptr, compute, nullptr);
  tf::RegisterKernelBuilder(name, kernel, status.get());
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
  return registered("FastemaUpdate", op, compute<&Call::update_beside>);
}

bool register_in_place() {
  tf::OpDefinitionBuilder* op = tf::NewOpDefinitionBuilder("FastemaUpdateInPlace");
  tf::OpDefinitionBuilderAddAttr(op, "N: int >= 1");
  tf::OpDefinitionBuilderAddAttr(op, "V: list({half, bfloat16, float, double}) >= 1");
  tf::OpDefinitionBuilderAddInput(op, "decay: double");
  tf::OpDefinitionBuilderAddInput(op, "averages: N * resource");
  tf::OpDefinitionBuilderAddInput(op, "values: V");
  tf::OpDefinitionBuilderSetIsStateful(op, true);
  return registered("FastemaUpdateInPlace", op, compute<&Call::update_in_place>);
}

// TensorFlow collects what registers itself while it loads a library; Python sees which ops it
// found.
[[maybe_unused]] const bool registered_all =
    tf::resolve() && register_beside() && tf::resolve_for_variables() && register_in_place();

}  // namespace
}  // namespace fastema
