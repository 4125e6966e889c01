// TensorFlow's op for averaging a list of variables at once, over the same kernels and pieces as
// everything else. It never writes memory that TensorFlow shares: it reads averages and values
// where they lie and makes new averages beside the old, which AssignVariableOp then takes over.
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
};
using TensorPtr = std::unique_ptr<tf::Tensor, Delete>;
using StatusPtr = std::unique_ptr<tf::Status, Delete>;

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

class Update {
 public:
  explicit Update(tf::OpKernelContext* context) : context_(context), status_(tf::NewStatus()) {}

  void run() {
    const int inputs = tf::NumInputs(context_);
    const int count = (inputs - 1) / 2;
    pairs_.reserve(static_cast<std::size_t>(count));
    const tf::Tensor* decay = input(0);
    if (decay == nullptr) return fail();
    if (tf::TensorType(decay) != tf::kDouble || tf::TensorElementCount(decay) != 1) {
      return fail("decay must be one float64");
    }
    for (int i = 0; i < count; ++i) {
      if (!add(i, input(1 + i), input(1 + count + i))) return fail();
    }
    const double decays[] = {*static_cast<const double*>(tf::TensorData(decay))};
    if (!(decays[0] >= 0.0 && decays[0] <= 1.0)) return fail("decay must be from 0 to 1");
    update(pairs_, decays, {});
  }

 private:
  const tf::Tensor* input(int i) {
    tf::Tensor* tensor = nullptr;
    tf::GetInput(context_, i, &tensor, status_.get());
    if (tf::GetCode(status_.get()) != tf::kOk) return nullptr;
    return held_.emplace_back(tensor).get();
  }

  bool add(int i, const tf::Tensor* average, const tf::Tensor* value) {
    if (average == nullptr || value == nullptr) return false;
    const tf::DataType type = tf::TensorType(average);
    DType a, v;
    if (!to_dtype(type, a) || !to_dtype(tf::TensorType(value), v) || !offered(a, v)) {
      return refuse("averages and values must have types that can be averaged");
    }
    if (tf::TensorElementCount(average) != tf::TensorElementCount(value)) {
      return refuse("averages and values must have one size");
    }
    std::vector<std::int64_t> shape(static_cast<std::size_t>(tf::NumDims(average)));
    for (std::size_t d = 0; d < shape.size(); ++d) {
      shape[d] = tf::Dim(average, static_cast<int>(d));
    }
    const TensorPtr made(tf::AllocateOutput(context_, i, type, shape.data(),
                                            static_cast<int>(shape.size()),
                                            tf::TensorByteSize(average), status_.get()));
    if (tf::GetCode(status_.get()) != tf::kOk) return false;
    const auto size = static_cast<std::size_t>(tf::TensorElementCount(average));
    pairs_.push_back({.average = {tf::TensorData(average), size, a},
                      .value = {tf::TensorData(value), size, v},
                      .into = tf::TensorData(made.get())});
    return true;
  }

  bool refuse(const char* why) {
    tf::SetStatus(status_.get(), tf::kInvalidArgument, why);
    return false;
  }
  void fail() { tf::OpKernelContext_Failure(context_, status_.get()); }
  void fail(const char* why) {
    refuse(why);
    fail();
  }

  tf::OpKernelContext* context_;
  StatusPtr status_;
  std::vector<TensorPtr> held_;
  std::vector<Pair> pairs_;
};

// No exception may leave through C.
void compute(void*, tf::OpKernelContext* context) {
  try {
    Update(context).run();
  } catch (const std::bad_alloc&) {
    const StatusPtr status(tf::NewStatus());
    tf::SetStatus(status.get(), tf::kInvalidArgument, "no memory for the list of averages");
    tf::OpKernelContext_Failure(context, status.get());
  }
}

bool register_update() noexcept {
  if (tf::resolve() != nullptr) return false;
  const StatusPtr status(tf::NewStatus());
  tf::OpDefinitionBuilder* op = tf::NewOpDefinitionBuilder("FastemaUpdate");
  tf::OpDefinitionBuilderAddAttr(op, "A: list({half, bfloat16, float, double}) >= 1");
  tf::OpDefinitionBuilderAddAttr(op, "V: list({half, bfloat16, float, double}) >= 1");
  tf::OpDefinitionBuilderAddInput(op, "decay: double");
  tf::OpDefinitionBuilderAddInput(op, "averages: A");
  tf::OpDefinitionBuilderAddInput(op, "values: V");
  tf::OpDefinitionBuilderAddOutput(op, "updated: A");
  tf::OpDefinitionBuilderSetShapeInferenceFunction(
      op, [](tf::ShapeInferenceContext* context, tf::Status* s) {
        tf::ShapeInferenceContextSetUnknownShape(context, s);
      });
  tf::RegisterOpDefinition(op, status.get());
  if (tf::GetCode(status.get()) != tf::kOk) return false;
  tf::KernelBuilder* kernel =
      tf::NewKernelBuilder("FastemaUpdate", "CPU", nullptr, compute, nullptr);
  tf::RegisterKernelBuilder("FastemaUpdate", kernel, status.get());
  return tf::GetCode(status.get()) == tf::kOk;
}

// TensorFlow collects what registers itself while it loads a library.
[[maybe_unused]] const bool registered = register_update();

}  // namespace
}  // namespace fastema
