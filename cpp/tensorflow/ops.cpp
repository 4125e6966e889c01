// The call of an op, and FastemaUpdateInPlace: it takes the variables' handles, their locks, and
// buffers that TensorFlow has made theirs alone (copied, where somebody holds them). No op writes
// memory that TensorFlow shares.
#include "ops.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "beside.hpp"

namespace fastema {
namespace {

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

bool same_shape(const tf::Tensor* x, const tf::Tensor* y) {
  const Shape a(x), b(y);
  return std::equal(a.dims, a.dims + a.count, b.dims, b.dims + b.count);
}

class InPlaceCall : public Call {
 public:
  using Kept = fastema::Kept;
  using Call::Call;

  bool take_pairs() {
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

 private:
  static void copy_tensor(tf::OpKernelContext*, tf::Tensor* from, tf::Tensor* to) {
    const TensorPtr source(from), target(to);
    std::memcpy(tf::TensorData(to), tf::TensorData(from), tf::TensorByteSize(from));
  }
};

bool register_in_place() {
  return register_op({.name = "FastemaUpdateInPlace",
                      .attribute = "N: int >= 1",
                      .averages = "averages: N * resource",
                      .output = nullptr,
                      .compute = compute<InPlaceCall>,
                      .create = create<Kept>,
                      .destroy = destroy<Kept>});
}

// TensorFlow collects what registers itself while it loads a library; Python sees which ops it
// found.
[[maybe_unused]] const bool registered_all =
    tf::resolve() && register_beside() && tf::resolve_for_variables() && register_in_place();

}  // namespace

Shape::Shape(const tf::Tensor* tensor) : count(tf::NumDims(tensor)) {
  for (int d = 0; d < count; ++d) dims[d] = tf::Dim(tensor, d);
}

Kept::Kept(tf::OpKernelConstruction* construction) : values(0) {
  const StatusPtr status(tf::NewStatus());
  std::int32_t total;
  tf::OpKernelConstruction_GetAttrSize(construction, "V", &values, &total, status.get());
}

Call::Call(tf::OpKernelContext* context, const Kept& kept)
    : context_(context), status_(tf::NewStatus()), count_(kept.values) {
  pairs_.reserve(static_cast<std::size_t>(count_));
}

bool Call::check_lengths() {
  const int averages = tf::NumInputs(context_) - 1 - count_;
  return averages == count_ || refuse("averages and values must have one length, got " +
                                      std::to_string(averages) + " and " + std::to_string(count_));
}

bool Call::take_decay() {
  const tf::Tensor* tensor = input(0);
  if (tensor == nullptr) return false;
  if (tf::TensorType(tensor) != tf::kDouble || tf::TensorElementCount(tensor) != 1) {
    return refuse("decay must be one float64");
  }
  decay_ = *static_cast<const double*>(tf::TensorData(tensor));
  return (decay_ >= 0.0 && decay_ <= 1.0) || refuse("decay must be from 0 to 1");
}

const tf::Tensor* Call::input(int i) {
  tf::Tensor* tensor = nullptr;
  tf::GetInput(context_, i, &tensor, status_.get());
  return fine() ? hold(tensor) : nullptr;
}

bool Call::add(const tf::Tensor* average, const tf::Tensor* value) {
  DType a, v;
  if (average == nullptr || value == nullptr) return false;
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

bool Call::refuse(const std::string& why) {
  tf::SetStatus(status_.get(), tf::kInvalidArgument, why.c_str());
  return false;
}

void Call::finish(bool ready) {
  if (ready) return update(pairs_, {&decay_, 1}, {});
  tf::OpKernelContext_Failure(context_, status_.get());
}

bool register_op(const Op& op) {
  tf::OpDefinitionBuilder* definition = tf::NewOpDefinitionBuilder(op.name);
  tf::OpDefinitionBuilderAddAttr(definition, op.attribute.c_str());
  tf::OpDefinitionBuilderAddAttr(definition, (std::string("V: ") + kTypes).c_str());
  tf::OpDefinitionBuilderAddInput(definition, "decay: double");
  tf::OpDefinitionBuilderAddInput(definition, op.averages);
  tf::OpDefinitionBuilderAddInput(definition, "values: V");
  if (op.output != nullptr) tf::OpDefinitionBuilderAddOutput(definition, op.output);
  tf::OpDefinitionBuilderSetIsStateful(definition, op.output == nullptr);
  tf::OpDefinitionBuilderSetShapeInferenceFunction(
      definition, [](tf::ShapeInferenceContext* context, tf::Status* status) {
        tf::ShapeInferenceContextSetUnknownShape(context, status);
      });
  const StatusPtr status(tf::NewStatus());
  tf::RegisterOpDefinition(definition, status.get());
  if (tf::GetCode(status.get()) != tf::kOk) return false;
  tf::KernelBuilder* kernel =
      tf::NewKernelBuilder(op.name, "CPU", op.create, op.compute, op.destroy);
  tf::RegisterKernelBuilder(op.name, kernel, status.get());
  return tf::GetCode(status.get()) == tf::kOk;
}

}  // namespace fastema
