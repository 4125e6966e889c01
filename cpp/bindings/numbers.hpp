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

inline double decay_of(const py::handle& object) {
  const double decay = PyFloat_AsDouble(object.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::type_error("decay must be a number from 0 to 1, got " + type_name(object));
  }
  if (!(decay >= 0.0 && decay <= 1.0)) {
    throw py::value_error("decay must be from 0 to 1, got " + text(py::repr(object)));
  }
  return decay;
}

inline int threads_of(const py::handle& object) {
  const long threads = PyLong_AsLong(object.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::type_error("threads must be a whole number, 0 for OpenMP's choice, got " +
                         text(py::repr(object)));
  }
  if (threads < 0) {
    throw py::value_error("threads must be 0 (OpenMP's choice) or more, got " +
                          std::to_string(threads));
  }
  return static_cast<int>(std::min(threads, long{std::numeric_limits<int>::max()}));
}

inline std::uint64_t count_of(const py::handle& object, const char* name) {
  const unsigned long long count = PyLong_AsUnsignedLongLong(object.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " must be a whole number from 0 below 2**64, got " +
                          text(py::repr(object)));
  }
  return count;
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
