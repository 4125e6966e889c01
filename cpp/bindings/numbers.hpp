// Numbers as Python gives them: checked, or an error that names the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace bindings {

namespace py = pybind11;

inline std::string text(const py::handle& object) { return py::cast<std::string>(py::str(object)); }

inline std::string type_name(const py::handle& object) {
  return text(py::type::handle_of(object).attr("__name__"));
}

inline void check_length(const std::string& a, std::size_t a_length, const std::string& b,
                         std::size_t b_length) {
  if (a_length == b_length) return;
  throw py::value_error(a + " and " + b + " must have one length, got " + std::to_string(a_length) +
                        " and " + std::to_string(b_length));
}

// Clears the error that Python has raised if it is of this kind.
inline bool caught(PyObject* kind) {
  if (PyErr_ExceptionMatches(kind) == 0) return false;
  PyErr_Clear();
  return true;
}

// A number as errors show it. Python writes no integers of more than 4,300 digits.
inline std::string shown(const py::handle& object) {
  if (PyObject* repr = PyObject_Repr(object.ptr())) {
    return text(py::reinterpret_steal<py::object>(repr));
  }
  if (!caught(PyExc_ValueError)) throw py::error_already_set();
  return "a number of more digits than Python writes";
}

// What it is as an int, if it is whole and says so; else nothing.
inline py::object whole(const py::handle& object) {
  if (PyLong_CheckExact(object.ptr())) return py::reinterpret_borrow<py::object>(object);
  py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index && !caught(PyExc_TypeError)) throw py::error_already_set();
  return index;
}

inline double decay_of(const py::handle& object) {
  const double decay = PyFloat_AsDouble(object.ptr());
  if (decay == -1.0 && PyErr_Occurred() != nullptr) {
    if (caught(PyExc_TypeError)) {
      throw py::type_error("decay must be a number from 0 to 1, got " + type_name(object));
    }
    if (!caught(PyExc_OverflowError)) throw py::error_already_set();
  }
  if (!(decay >= 0.0 && decay <= 1.0)) {
    throw py::value_error("decay must be from 0 to 1, got " + shown(object));
  }
  return decay;
}

inline int threads_of(const py::handle& object) {
  const py::object number = whole(object);
  if (!number) {
    throw py::type_error("threads must be a whole number, 0 for OpenMP's choice, got " +
                         shown(object));
  }
  int overflow = 0;
  const long threads = PyLong_AsLongAndOverflow(number.ptr(), &overflow);
  if (overflow < 0 || (overflow == 0 && threads < 0)) {
    throw py::value_error("threads must be 0 (OpenMP's choice) or more, got " + shown(number));
  }
  constexpr int kMost = std::numeric_limits<int>::max();
  return overflow > 0 ? kMost : static_cast<int>(std::min(threads, long{kMost}));
}

inline std::uint64_t count_of(const py::handle& object, const char* name) {
  if (const py::object number = whole(object)) {
    const unsigned long long count = PyLong_AsUnsignedLongLong(number.ptr());
    if (PyErr_Occurred() == nullptr) return count;
    PyErr_Clear();
  }
  throw py::value_error(std::string(name) + " must be a whole number from 0 below 2**64, got " +
                        shown(object));
}

// Of as many averages as share a value: a number, or a sequence of them.
inline std::vector<double> decays_of(const py::handle& object, std::size_t each) {
  if (each == 1) return {decay_of(object)};
  if (!py::isinstance<py::sequence>(object)) {
    throw py::type_error("decay must be a sequence of " + std::to_string(each) +
                         " numbers, one for each list of averages, got " + type_name(object));
  }
  std::vector<double> decays;
  for (const py::handle& decay : py::reinterpret_borrow<py::sequence>(object)) {
    decays.push_back(decay_of(decay));
  }
  check_length("averages", each, "decay", decays.size());
  return decays;
}

}  // namespace bindings
