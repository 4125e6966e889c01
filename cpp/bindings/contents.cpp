// Dictionaries and lists that are watched: do they still hold the very objects that they held?
#include <pybind11/pybind11.h>

#include <mutex>
#include <vector>

#include "alone.hpp"
#include "module.hpp"
#include "numbers.hpp"

namespace bindings {
namespace {

// Keys and values are compared by identity, a few nanoseconds each; they are kept alive, so none
// can be taken for another that was made where it lay. Where Python numbers the versions of a
// dictionary, one that was not changed is not looked into.
class Contents {
 public:
  explicit Contents(const py::list& containers) {
    for (const py::handle& container : containers) {
      if (!PyDict_Check(container.ptr()) && !PyList_Check(container.ptr())) {
        throw py::type_error("containers must be dictionaries and lists, got " +
                             type_name(container));
      }
      containers_.push_back({py::reinterpret_borrow<py::object>(container), 0, 0});
    }
    accept();
  }

  void accept() {
    std::vector<py::object> held;  // what is let go of goes when others may come in
    const std::lock_guard alone(alone_);
    for (Container& container : containers_) {
      container.version = version(container.object.ptr());
      visit(container.object.ptr(), [&](PyObject* object) {
        held.push_back(py::reinterpret_borrow<py::object>(object));
        return true;
      });
      container.end = held.size();
    }
    held_.swap(held);
  }

  bool changed() {
    const std::lock_guard alone(alone_);
    std::size_t seen = 0;
    for (Container& container : containers_) {
      PyObject* const object = container.object.ptr();
      const uint64_t now = version(object);
      if (now == 0 || now != container.version) {
        const bool same = size(object) == container.end - seen && visit(object, [&](PyObject* one) {
                            return seen < container.end && held_[seen++].ptr() == one;
                          });
        if (!same || seen != container.end) return true;
        container.version = now;
      }
      seen = container.end;
    }
    return false;
  }

 private:
  struct Container {
    py::object object;
    std::size_t end;   // of what it held, among all that is held
    uint64_t version;  // in which it held that; 0: not known
  };

  // The number of a dictionary's version, which no other has; 0 where Python tells none.
  static uint64_t version([[maybe_unused]] PyObject* container) {
#if PY_VERSION_HEX < 0x030C0000 && !defined(PYPY_VERSION)
    if (PyDict_Check(container)) {
      return reinterpret_cast<PyDictObject*>(container)->ma_version_tag;
    }
#endif
    return 0;
  }

  static std::size_t size(PyObject* container) {
    return static_cast<std::size_t>(PyDict_Check(container) ? 2 * PyDict_Size(container)
                                                            : PyList_GET_SIZE(container));
  }

  // Calls a function with each key and value, or entry, while it returns true; returns whether it
  // did of all.
  template <typename Function>
  static bool visit(PyObject* container, Function&& function) {
    if (size(container) == 0) return true;
    bool all = true;
#if PY_VERSION_HEX >= 0x030D0000
    Py_BEGIN_CRITICAL_SECTION(container);
#endif
    if (PyDict_Check(container)) {
      PyObject *key, *value;
      for (Py_ssize_t at = 0; all && PyDict_Next(container, &at, &key, &value);) {
        all = function(key) && function(value);
      }
    } else {
      for (Py_ssize_t i = 0; all && i < PyList_GET_SIZE(container); ++i) {
        all = function(PyList_GET_ITEM(container, i));
      }
    }
#if PY_VERSION_HEX >= 0x030D0000
    Py_END_CRITICAL_SECTION();
#endif
    return all;
  }

  Alone alone_;
  std::vector<Container> containers_;
  std::vector<py::object> held_;
};

}  // namespace

void bind_contents(py::module_& m) {
  py::class_<Contents>(m, "Contents")
      .def(py::init<const py::list&>(), py::arg("containers"))
      .def("changed", &Contents::changed)
      .def("accept", &Contents::accept);
}

}  // namespace bindings
