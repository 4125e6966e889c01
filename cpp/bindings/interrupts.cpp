// What an interrupt cannot cut in two. Python raises one between two of its own instructions, and
// here are none: what is called is Python's, the order of the calls is not.
#include <pybind11/pybind11.h>

#include <atomic>
#include <stdexcept>
#include <utility>

#include "module.hpp"

namespace py = pybind11;

namespace bindings {
namespace {

// A context manager whose `leave` runs whenever `enter` has begun. Both may be interrupted, so
// `leave` tells by itself what is to be undone.
class Scope {
 public:
  Scope(py::object enter, py::object leave) : enter_(std::move(enter)), leave_(std::move(leave)) {}

  void enter() {
    if (entered_.exchange(true)) throw std::runtime_error("a scope can be entered once");
    try {
      enter_();
    } catch (const py::error_already_set&) {
      leave();
      throw;
    }
  }

  void exit(const py::args& /* what was raised within */) const { leave(); }

 private:
  // Calls `leave` until it comes to its end: an interrupt may come up in it, or two. Raises the
  // first.
  void leave(int attempts = 3) const {
    try {
      leave_();
    } catch (const py::error_already_set&) {
      if (attempts > 1) leave(attempts - 1);
      throw;
    }
  }

  py::object enter_, leave_;
  std::atomic<bool> entered_{false};
};

// Returns what a call returns that is made while a lock is held.
py::object locked(const py::object& lock, const py::object& call, const py::args& arguments) {
  const py::object release = lock.attr("release");
  lock.attr("acquire")();
  try {
    py::object result = call(*arguments);
    release();
    return result;
  } catch (const py::error_already_set&) {
    release();
    throw;
  }
}

}  // namespace

void bind_interrupts(py::module_& m) {
  py::class_<Scope>(m, "Scope")
      .def(py::init<py::object, py::object>(), py::arg("enter"), py::arg("leave"))
      .def("__enter__", &Scope::enter)
      .def("__exit__", &Scope::exit);
  m.def("locked", locked, py::arg("lock"), py::arg("call"));
}

}  // namespace bindings
