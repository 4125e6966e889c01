// What the interpreter's lock keeps apart, kept apart where there is none.
#pragma once

#include <pybind11/pybind11.h>

namespace bindings {

namespace py = pybind11;

// A lock to be held by one thread, for std::lock_guard; nothing where Python has one of its own.
// Python's own kind: who waits for it does not keep others waiting that want the world to stop.
class Alone {
 public:
#ifdef Py_GIL_DISABLED
  void lock() { PyMutex_Lock(&mutex_); }
  void unlock() { PyMutex_Unlock(&mutex_); }

 private:
  PyMutex mutex_{};
#else
  void lock() {}
  void unlock() {}
#endif
};

// A list that no other thread changes: without the lock a copy, for borrowed items would be gone.
inline py::list unshared(const py::list& list) {
#ifdef Py_GIL_DISABLED
  PyObject* const copy = PyList_GetSlice(list.ptr(), 0, PY_SSIZE_T_MAX);
  if (copy == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::list>(copy);
#else
  return list;
#endif
}

}  // namespace bindings
