// Dictionaries and lists that are watched: do they still hold the very objects that they held?
#include <pybind11/pybind11.h>

#include <vector>

#include "module.hpp"
#include "numbers.hpp"

namespace bindings {
namespace {

// Objects are compared by identity, a few nanoseconds each; they are kept alive, so none can be
// taken for another that was made where it lay.
class Contents {
 public:
  explicit Contents(const py::list& containers) {
    for (const py::handle& container : containers) {
      if (!PyDict_Check(container.ptr()) && !PyList_Check(container.ptr())) {
        throw py::type_error("containers must be dictionaries and lists, got " +
                             type_name(container));
      }
      containers_.push_back(py::reinterpret_borrow<py::object>(container));
    }
    accept();
  }

  void accept() {
    std::vector<std::vector<py::object>> held;
    for (const py::object& container : containers_) {
      std::vector<py::object>& objects = held.emplace_back();
      visit(container, [&](PyObject* object) {
        objects.push_back(py::reinterpret_borrow<py::object>(object));
        return true;
      });
    }
    held_.swap(held);
  }

  bool changed() const {
    for (std::size_t i = 0; i < containers_.size(); ++i) {
      const std::vector<py::object>& held = held_[i];
      std::size_t seen = 0;
      const bool same = visit(containers_[i], [&](PyObject* object) {
        return seen < held.size() && held[seen++].ptr() == object;
      });
      if (!same || seen != held.size()) return true;
    }
    return false;
  }

 private:
  // Returns whether the function returned true of all.
  template <typename Function>
  static bool visit(const py::object& container, Function&& function) {
    bool all = true;
#if PY_VERSION_HEX >= 0x030D0000
    Py_BEGIN_CRITICAL_SECTION(container.ptr());
#endif
    if (PyDict_Check(container.ptr())) {
      PyObject *key, *value;
      for (Py_ssize_t at = 0; all && PyDict_Next(container.ptr(), &at, &key, &value);) {
        all = function(value);
      }
    } else {
      for (Py_ssize_t i = 0; all && i < PyList_GET_SIZE(container.ptr()); ++i) {
        all = function(PyList_GET_ITEM(container.ptr(), i));
      }
    }
#if PY_VERSION_HEX >= 0x030D0000
    Py_END_CRITICAL_SECTION();
#endif
    return all;
  }

  std::vector<py::object> containers_;
  std::vector<std::vector<py::object>> held_;
};

}  // namespace

void bind_contents(py::module_& m) {
  py::class_<Contents>(m, "Contents")
      .def(py::init<const py::list&>(), py::arg("containers"))
      .def("changed", &Contents::changed)
      .def("accept", &Contents::accept);
}

}  // namespace bindings
