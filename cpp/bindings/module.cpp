// The Python edge: check everything with the GIL, then run without it. A call that raises has
// changed nothing.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.hpp"
#include "fastema/core.hpp"
#include "parallel.hpp"

namespace py = pybind11;
using fastema::DType;
using fastema::Span;

namespace {

std::string text(const py::handle& object) { return py::cast<std::string>(py::str(object)); }

// How an error calls one array: "averages[3]", or "averages" where a single array was given.
struct Name {
  std::string argument;
  bool single;

  std::string operator[](std::size_t i) const {
    return single ? argument : argument + "[" + std::to_string(i) + "]";
  }
};

std::string names_of(const Name& a, std::size_t i, const Name& b, std::size_t j) {
  return a[i] + " and " + b[j];
}

using npy = py::detail::npy_api;

bool flagged(const py::array& array, int flag) { return (array.flags() & flag) == flag; }

DType dtype_of(const py::array& array, const std::string& name) {
  const py::dtype dtype = array.dtype();
  if (dtype.byteorder() == '=') {
    if (dtype.num() == npy::NPY_FLOAT_) return DType::f32;
    if (dtype.num() == npy::NPY_DOUBLE_) return DType::f64;
  }
  throw py::type_error(name + " must be float32 or float64 in native byte order, got " +
                       text(py::repr(dtype)));
}

// Shapes and strides without the axes of length 1, whose strides mean nothing.
using Axes = std::vector<std::pair<py::ssize_t, py::ssize_t>>;  // (stride in bytes, length)

Axes axes_of(const py::array& array) {
  Axes axes;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    if (array.shape(i) != 1) axes.emplace_back(array.strides(i), array.shape(i));
  }
  return axes;
}

bool dense(const py::array& array) {
  if (flagged(array, npy::NPY_ARRAY_C_CONTIGUOUS_) ||
      flagged(array, npy::NPY_ARRAY_F_CONTIGUOUS_)) {
    return true;  // an array without elements is both
  }
  Axes axes = axes_of(array);
  std::sort(axes.begin(), axes.end());
  py::ssize_t expected = array.itemsize();
  for (const auto& [stride, length] : axes) {
    if (stride != expected) return false;
    expected *= length;
  }
  return true;
}

bool same_shape(const py::array& a, const py::array& b) {
  return a.ndim() == b.ndim() && std::equal(a.shape(), a.shape() + a.ndim(), b.shape());
}

bool same_order(const py::array& a, const py::array& b) {
  for (const int flag : {npy::NPY_ARRAY_C_CONTIGUOUS_, npy::NPY_ARRAY_F_CONTIGUOUS_}) {
    if (flagged(a, flag) && flagged(b, flag)) return true;
  }
  return axes_of(a) == axes_of(b);
}

py::array array_of(const py::handle& object, const std::string& name) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(name + " must be a NumPy array, got " +
                         text(py::type::handle_of(object).attr("__name__")));
  }
  return py::reinterpret_borrow<py::array>(object);
}

Span span_of(const py::array& array, const std::string& name, bool written) {
  const DType dtype = dtype_of(array, name);
  if (!flagged(array, npy::NPY_ARRAY_ALIGNED_)) {
    throw py::value_error(name + " must be aligned to its " + std::to_string(array.itemsize()) +
                          "-byte elements, and is not; make a copy of it");
  }
  if (!dense(array)) {
    throw py::value_error(name + " must be dense (no holes, no negative strides), got strides " +
                          text(array.attr("strides")) + " for shape " + text(array.attr("shape")));
  }
  if (written && !array.writeable()) {
    throw py::value_error(name + " must be writable, and is read-only");
  }
  return {const_cast<void*>(array.data()), static_cast<std::size_t>(array.size()), dtype};
}

void check_pair(const py::array& a, const py::array& b, const std::string& names) {
  const auto differ = [&](const char* what, const char* attribute) {
    const auto of = [attribute](const py::array& array) { return text(array.attr(attribute)); };
    return names + " must have one " + what + ", got " + of(a) + " and " + of(b);
  };
  if (a.size() != b.size()) throw py::value_error(differ("size", "size"));
  if (!same_shape(a, b)) throw py::value_error(differ("shape", "shape"));
  if (!same_order(a, b)) throw py::value_error(differ("order in memory", "strides"));
}

// Memory that one array covers, for the overlap check.
struct Extent {
  std::uintptr_t begin, end;
  std::size_t index;
  bool first;  // of averages (or a); else of values (or b)
};

// No written array may share memory with any other of the list: the result would depend on the
// order in which threads come by. Returns what is wrong, or nothing. Expects extents in order.
std::string overlap_in(const std::vector<Extent>& extents, bool all_written, const Name& a,
                       const Name& b) {
  const Extent* furthest = nullptr;          // of all so far
  const Extent* furthest_written = nullptr;  // of the written ones so far
  for (const Extent& extent : extents) {
    const bool written = all_written || extent.first;
    const Extent* before = written ? furthest : furthest_written;
    if (before != nullptr && before->end > extent.begin) {
      const Extent *x = before, *y = &extent;
      if (x->first == y->first ? x->index > y->index : y->first) std::swap(x, y);
      return names_of(x->first ? a : b, x->index, y->first ? a : b, y->index) +
             " must not overlap, and share memory";
    }
    if (furthest == nullptr || extent.end > furthest->end) furthest = &extent;
    if (written && (furthest_written == nullptr || extent.end > furthest_written->end)) {
      furthest_written = &extent;
    }
  }
  return {};
}

double decay_of(const py::handle& object) {
  const double decay = PyFloat_AsDouble(object.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::type_error("decay must be a number from 0 to 1, got " +
                         text(py::type::handle_of(object).attr("__name__")));
  }
  if (!(decay >= 0.0 && decay <= 1.0)) {
    throw py::value_error("decay must be from 0 to 1, got " + text(py::repr(object)));
  }
  return decay;
}

int threads_of(const py::handle& object) {
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

// Two lists of arrays, checked once and kept alive.
class Pairs {
 public:
  // `exchanged`: both lists will be written, so both must be writable and of one type.
  Pairs(const py::sequence& a, const py::sequence& b, const std::string& a_name,
        const std::string& b_name, bool single, bool exchanged)
      : a_name_{a_name, single}, b_name_{b_name, single} {
    if (a.size() != b.size()) {
      throw py::value_error(a_name + " and " + b_name + " must have one length, got " +
                            std::to_string(a.size()) + " and " + std::to_string(b.size()));
    }
    std::vector<Extent> extents;
    for (std::size_t i = 0; i < a.size(); ++i) add(a[i], b[i], exchanged, extents);
    std::sort(extents.begin(), extents.end(),
              [](const Extent& x, const Extent& y) { return x.begin < y.begin; });
    const std::string overlap = overlap_in(extents, exchanged, a_name_, b_name_);
    if (!overlap.empty()) throw py::value_error(overlap);
    overlap_if_exchanged_ = overlap_in(extents, true, a_name_, b_name_);
  }

  std::size_t size() const { return pairs_.size(); }

  void update(const py::handle& decay_object, const py::handle& threads_object) const {
    const double decay = decay_of(decay_object);
    const int threads = threads_of(threads_object);
    check_unmoved();
    const py::gil_scoped_release release;
    fastema::update(pairs_, decay, threads);
  }

  void swap(const py::handle& threads_object) const {
    const int threads = threads_of(threads_object);
    for (std::size_t i = 0; i < size(); ++i) check_exchangeable(i);
    if (!overlap_if_exchanged_.empty()) throw py::value_error(overlap_if_exchanged_);
    check_unmoved();
    const py::gil_scoped_release release;
    fastema::swap(pairs_, threads);
  }

 private:
  struct Owners {
    py::array a, b;
  };

  void add(const py::handle& a, const py::handle& b, bool exchanged, std::vector<Extent>& extents) {
    const std::size_t i = size();
    Owners owners{array_of(a, a_name_[i]), array_of(b, b_name_[i])};
    const Span x = span_of(owners.a, a_name_[i], true);
    const Span y = span_of(owners.b, b_name_[i], exchanged);
    const std::string names = names_of(a_name_, i, b_name_, i);
    if (!fastema::offered(x.dtype, y.dtype)) {
      throw py::type_error(names + " must have one type, got " + text(owners.a.dtype()) + " and " +
                           text(owners.b.dtype()));
    }
    check_pair(owners.a, owners.b, names);
    for (const bool first : {true, false}) {
      const Span& span = first ? x : y;
      const auto begin = reinterpret_cast<std::uintptr_t>(span.data);
      const std::size_t bytes = span.size * fastema::size_of(span.dtype);
      if (bytes > 0) extents.push_back({begin, begin + bytes, i, first});
    }
    pairs_.push_back({x, y});
    owners_.push_back(std::move(owners));
  }

  void check_exchangeable(std::size_t i) const {
    if (pairs_[i].average.dtype != pairs_[i].value.dtype) {
      throw py::type_error(names_of(a_name_, i, b_name_, i) + " must have one type to be swapped");
    }
    if (!owners_[i].b.writeable()) {
      throw py::value_error(b_name_[i] + " must be writable, and is read-only");
    }
  }

  // Arrays can be resized in place, which frees their memory.
  void check_unmoved() const {
    const auto moved = [](const py::array& array, const Span& span) {
      return array.data() != span.data || static_cast<std::size_t>(array.size()) != span.size;
    };
    for (std::size_t i = 0; i < size(); ++i) {
      for (const bool first : {true, false}) {
        if (first ? moved(owners_[i].a, pairs_[i].average) : moved(owners_[i].b, pairs_[i].value)) {
          throw py::value_error((first ? a_name_ : b_name_)[i] +
                                " was resized after it was paired; make the pairs anew");
        }
      }
    }
  }

  Name a_name_, b_name_;
  std::vector<Owners> owners_;
  std::vector<fastema::Pair> pairs_;
  std::string overlap_if_exchanged_;  // what keeps swap() from writing both sides
};

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const fastema::Kernels* kernels : fastema::available()) names.emplace_back(kernels->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  if (!fastema::activate(name)) {
    throw py::value_error("name must be one of " + text(py::repr(py::cast(instruction_sets()))) +
                          " on this machine, got " + text(py::repr(py::str(name))));
  }
}

py::dict build_config() {
  using namespace py::literals;
  return py::dict("version"_a = FASTEMA_VERSION, "compiler"_a = FASTEMA_COMPILER,
                  "instruction_set"_a = fastema::active().name,
                  "instruction_sets"_a = instruction_sets(), "openmp"_a = fastema::openmp_version(),
                  "threads"_a = fastema::default_threads());
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "The native core: averages and swaps lists of NumPy arrays in place.";

  py::class_<Pairs>(m, "Pairs")
      .def(py::init<const py::sequence&, const py::sequence&, const std::string&,
                    const std::string&, bool, bool>(),
           py::arg("a"), py::arg("b"), py::arg("a_name"), py::arg("b_name"), py::arg("single"),
           py::arg("exchanged"))
      .def("__len__", &Pairs::size)
      .def("update", &Pairs::update, py::arg("decay"), py::arg("threads") = 0)
      .def("swap", &Pairs::swap, py::arg("threads") = 0);

  m.def("instruction_sets", instruction_sets);
  m.def("use_instruction_set", use_instruction_set, py::arg("name"));
  m.def("build_config", build_config);
}
