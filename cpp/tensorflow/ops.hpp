// What TensorFlow's ops for averaging a list of variables share: how one is declared, and one call
// of it, over the same kernels and pieces as everything else.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "c_api.hpp"
#include "fastema/core.hpp"

namespace fastema {

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

struct Shape {
  explicit Shape(const tf::Tensor* tensor);
  int count;
  std::int64_t dims[254];  // TensorFlow's own limit
};

// What an op's kernel keeps between its calls.
struct Kept {
  int values;  // how many there are

  explicit Kept(tf::OpKernelConstruction* construction);
};

// A call of an op, whose inputs are the decay, the averages and as many values. Everything is asked
// for and checked before the first element changes: what returns false has set the status.
class Call {
 public:
  Call(tf::OpKernelContext* context, const Kept& kept);

  // As many averages as values: the op's definition leaves that open.
  bool check_lengths();
  bool take_decay();
  // Updates the pairs that were added, or fails.
  void finish(bool ready);

 protected:
  const tf::Tensor* average(int i) { return input(1 + i); }
  const tf::Tensor* value(int i) { return input(1 + count_ + i); }
  const tf::Tensor* hold(tf::Tensor* tensor) { return held_.emplace_back(tensor).get(); }
  bool add(const tf::Tensor* average, const tf::Tensor* value);
  bool fine() const noexcept { return tf::GetCode(status_.get()) == tf::kOk; }

  tf::OpKernelContext* const context_;
  const StatusPtr status_;
  const int count_;  // of values, and of averages once that is checked
  LocksPtr locks_;   // released last: the next writer would copy a buffer that is still held
  std::vector<Pair> pairs_;

 private:
  const tf::Tensor* input(int i);
  bool refuse(const std::string& why);

  double decay_ = 0.0;
  std::vector<TensorPtr> held_;
};

template <class Kept>
void* create(tf::OpKernelConstruction* construction) {
  return new Kept(construction);
}

template <class Kept>
void destroy(void* kept) {
  delete static_cast<Kept*>(kept);
}

// A call that makes itself ready for the update. No exception may leave through C.
template <class OneCall>
void compute(void* kept, tf::OpKernelContext* context) {
  try {
    OneCall call(context, *static_cast<typename OneCall::Kept*>(kept));
    call.finish(call.check_lengths() && call.take_decay() && call.take_pairs());
  } catch (const std::bad_alloc&) {
    const StatusPtr status(tf::NewStatus());
    tf::SetStatus(status.get(), tf::kResourceExhausted, "no memory for the list of averages");
    tf::OpKernelContext_Failure(context, status.get());
  }
}

// Its inputs are "decay: double", the averages, and "values: V" of any types.
struct Op {
  const char* name;
  std::string attribute;  // of the averages
  const char* averages;
  const char* output;  // null: none, it changes the averages

  // A kernel's calls, and what it keeps between them.
  void (*compute)(void*, tf::OpKernelContext*);
  void* (*create)(tf::OpKernelConstruction*);
  void (*destroy)(void*);
};

constexpr const char* kTypes = "list({half, bfloat16, float, double}) >= 1";

// False: TensorFlow refused it.
bool register_op(const Op& op);

}  // namespace fastema
