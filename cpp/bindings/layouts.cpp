// Tensors that are watched: do they still have the very memory, shape and strides that they had?
#include <pybind11/pybind11.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "alone.hpp"
#include "module.hpp"
#include "numbers.hpp"

namespace bindings {
namespace {

// What DLPack 1.3 says of a type of tensors: C functions that need no Python call of each tensor.
// https://dmlc.github.io/dlpack/latest/c_api.html
struct ExchangeApi {
  struct Tensor {
    void* data;
    int32_t device[2];
    int32_t ndim;
    uint8_t dtype[4];
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
  };

  uint32_t major, minor;
  const ExchangeApi* older;
  void* others[3];
  int (*tensor_of)(void* object, Tensor* tensor);
  void* stream;
};

const ExchangeApi* api_of(const py::handle& tensor) {
  const py::object capsule =
      py::getattr(py::type::handle_of(tensor), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto api =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api != nullptr && api->major > 1) api = api->older;
  const bool complete = api != nullptr && api->major == 1 && api->tensor_of != nullptr;
  return complete ? api : nullptr;
}

std::optional<ExchangeApi::Tensor> asked(const ExchangeApi* api, const py::handle& tensor) {
  ExchangeApi::Tensor found{};
  if (api != nullptr && api->tensor_of(tensor.ptr(), &found) == 0) return found;
  PyErr_Clear();
  return std::nullopt;
}

bool is_readable(const py::handle& tensor) { return asked(api_of(tensor), tensor).has_value(); }

class Layouts {
 public:
  explicit Layouts(const py::list& tensors) {
    for (const py::handle& tensor : tensors) {
      if (!is_readable(tensor)) {
        throw py::type_error("tensors must have DLPack's exchange API, got " + type_name(tensor));
      }
      tensors_.push_back({py::reinterpret_borrow<py::object>(tensor), api_of(tensor)});
    }
    accept();
  }

  std::size_t size() const { return tensors_.size(); }

  void accept() {
    std::vector<int64_t> seen;
    for (const Watched& one : tensors_) {
      each(one, [&](int64_t number) {
        seen.push_back(number);
        return true;
      });
    }
    const std::lock_guard alone(alone_);
    seen_.swap(seen);
  }

  bool changed() {
    const std::lock_guard alone(alone_);
    std::size_t at = 0;
    for (const Watched& one : tensors_) {
      const auto is_same = [&](int64_t number) {
        return at < seen_.size() && seen_[at++] == number;
      };
      if (!each(one, is_same)) return true;
    }
    return at != seen_.size();
  }

 private:
  struct Watched {
    py::object tensor;
    const ExchangeApi* api;
  };

  // Calls a function with each number of a layout, while it returns true; returns whether it did of
  // all. One that tells none any more has a layout that no other has.
  template <typename Function>
  static bool each(const Watched& one, Function&& function) {
    const std::optional<ExchangeApi::Tensor> found = asked(one.api, one.tensor);
    if (!found) return function(-1);
    const auto address = reinterpret_cast<uintptr_t>(found->data) + found->byte_offset;
    bool all = function(static_cast<int64_t>(address)) && function(found->ndim);
    for (int32_t axis = 0; all && axis < found->ndim; ++axis) {
      all = function(found->shape[axis]) &&
            (found->strides == nullptr || function(found->strides[axis]));
    }
    return all;
  }

  Alone alone_;
  std::vector<Watched> tensors_;
  std::vector<int64_t> seen_;
};

}  // namespace

void bind_layouts(py::module_& m) {
  py::class_<Layouts>(m, "Layouts")
      .def(py::init<const py::list&>(), py::arg("tensors"))
      .def("__len__", &Layouts::size)
      .def("changed", &Layouts::changed)
      .def("accept", &Layouts::accept)
      .def_static("is_readable", &is_readable, py::arg("tensor"));
}

}  // namespace bindings
