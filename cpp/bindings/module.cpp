// The Python edge: check everything with the GIL, then run without it. A call that raises has
// changed nothing.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.hpp"
#include "fastema/core.hpp"
#include "parallel.hpp"

namespace py = pybind11;
using fastema::DType;
using fastema::Span;
using npy = py::detail::npy_api;

namespace {

std::string text(const py::handle& object) { return py::cast<std::string>(py::str(object)); }

std::string type_name(const py::handle& object) {
  return text(py::type::handle_of(object).attr("__name__"));
}

// How errors call the arrays of one argument: "averages[3]", "averages" where a single array was
// given, "averages[1][3]" where there are several lists of them.
struct Argument {
  std::string name;
  bool single = false;
  std::size_t lists = 1;

  std::string operator[](std::size_t i) const {
    if (single) return name;
    const std::string list = lists > 1 ? "[" + std::to_string(i % lists) + "]" : "";
    return name + list + "[" + std::to_string(i / lists) + "]";
  }
};

// One array of an argument; its name is put together only where an error needs it.
struct Label {
  const Argument* argument;
  std::size_t index;

  std::string str() const { return (*argument)[index]; }
};

std::string operator+(const Label& label, const char* rest) { return label.str() + rest; }
std::string both(const Label& x, const Label& y) { return x + " and " + y.str(); }

bool flagged(const py::array& array, int flag) { return (array.flags() & flag) == flag; }

// ml_dtypes registers bfloat16 with NumPy when it is imported, under a number of its own.
int bfloat16_number() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<int> storage;
  return storage
      .call_once_and_store_result([] {
        return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16")).num();
      })
      .get_stored();
}

std::optional<DType> known_dtype(const py::dtype& dtype) {
  if (dtype.byteorder() != '=') return std::nullopt;
  const int number = dtype.num();
  if (number == npy::NPY_FLOAT_) return DType::f32;
  if (number == npy::NPY_DOUBLE_) return DType::f64;
  if (number == 23) return DType::f16;  // NPY_HALF, which pybind11 has no name for
  if (number == bfloat16_number()) return DType::bf16;
  return std::nullopt;
}

// Shapes and strides without the axes of length 1, whose strides mean nothing.
using Axes = std::vector<std::pair<py::ssize_t, py::ssize_t>>;  // (stride in elements, length)

Axes axes_of(const py::array& array) {
  Axes axes;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    if (array.shape(i) == 1) continue;
    // an odd stride in bytes is no multiple of the element: not dense, whatever it is rounded to
    if (array.strides(i) % array.itemsize() != 0) return {{0, 0}};
    axes.emplace_back(array.strides(i) / array.itemsize(), array.shape(i));
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
  py::ssize_t expected = 1;
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

py::array array_of(const py::handle& object, const Label& label) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(label + " must be a NumPy array, got " + type_name(object));
  }
  return py::reinterpret_borrow<py::array>(object);
}

DType dtype_of(const py::array& array, const Label& label) {
  const std::optional<DType> dtype = known_dtype(array.dtype());
  if (dtype) return *dtype;
  throw py::type_error(label +
                       " must be float16, bfloat16, float32 or float64 in native byte order, got " +
                       text(py::repr(array.dtype())));
}

void check_memory(const py::array& array, const Label& label, bool written) {
  if (!flagged(array, npy::NPY_ARRAY_ALIGNED_)) {
    throw py::value_error(label + " must be aligned to its " + std::to_string(array.itemsize()) +
                          "-byte elements, and is not; make a copy of it");
  }
  if (!dense(array)) {
    throw py::value_error(label + " must be dense (no holes, no negative strides), got strides " +
                          text(array.attr("strides")) + " for shape " + text(array.attr("shape")));
  }
  if (written && !array.writeable()) {
    throw py::value_error(label + " must be writable, and is read-only");
  }
}

Span span_of(const py::array& array, const Label& label, bool written) {
  const DType dtype = dtype_of(array, label);
  check_memory(array, label, written);
  return {const_cast<void*>(array.data()), static_cast<std::size_t>(array.size()), dtype};
}

void check_alike(const py::array& a, const py::array& b, const Label& a_label,
                 const Label& b_label) {
  const auto differ = [&](const char* what, const char* attribute) {
    return both(a_label, b_label) + " must have one " + what + ", got " + text(a.attr(attribute)) +
           " and " + text(b.attr(attribute));
  };
  if (a.size() != b.size()) throw py::value_error(differ("size", "size"));
  if (!same_shape(a, b)) throw py::value_error(differ("shape", "shape"));
  if (!same_order(a, b)) throw py::value_error(differ("order in memory", "strides"));
}

// Memory that one array covers, for the overlap check.
struct Extent {
  std::uintptr_t begin, end;
  Label label;
  bool written;
};

// No written array may share memory with any other of the list: the result would depend on the
// order in which threads come by. Returns what is wrong, or nothing. Expects extents in order.
std::string overlap_in(const std::vector<Extent>& extents, bool all_written) {
  const Extent* furthest = nullptr;          // of all so far
  const Extent* furthest_written = nullptr;  // of the written ones so far
  for (const Extent& extent : extents) {
    const bool written = all_written || extent.written;
    const Extent* before = written ? furthest : furthest_written;
    if (before != nullptr && before->end > extent.begin) {
      const Extent *x = before, *y = &extent;
      const Argument *x_argument = x->label.argument, *y_argument = y->label.argument;
      // in the order of the arguments, which are members one after the other, then of the list
      if (x_argument == y_argument ? x->label.index > y->label.index : x_argument > y_argument) {
        std::swap(x, y);
      }
      return both(x->label, y->label) + " must not overlap, and share memory";
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
    throw py::type_error("decay must be a number from 0 to 1, got " + type_name(object));
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

std::uint64_t count_of(const py::handle& object, const char* name) {
  const unsigned long long count = PyLong_AsUnsignedLongLong(object.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " must be a whole number from 0 below 2**64, got " +
                          text(py::repr(object)));
  }
  return count;
}

// Averages and values (or the two sides of a swap) that were checked once and are kept alive.
class Pairs {
 public:
  // `lists`: how many averages share each value; those of one value follow each other in `a`.
  // `carries`: empty, or as many as averages. `exchanged`: both sides will be written.
  Pairs(const py::list& a, const py::list& b, const py::list& carries, const std::string& a_name,
        const std::string& b_name, bool single, std::size_t lists, bool exchanged)
      : a_{a_name, single, lists}, b_{b_name, single, 1}, carry_{"carries", single, lists} {
    check_length(a_name, a.size() / lists, b_name, b.size());
    if (!carries.empty()) check_length(a_name, a.size(), carry_.name, carries.size());
    std::vector<Extent> extents;
    for (std::size_t i = 0; i < a.size(); ++i) {
      add(a[i], b[i / lists], exchanged, extents);
      if (!carries.empty()) add_carry(carries[i], extents);
    }
    std::sort(extents.begin(), extents.end(),
              [](const Extent& x, const Extent& y) { return x.begin < y.begin; });
    const std::string overlap = overlap_in(extents, exchanged);
    if (!overlap.empty()) throw py::value_error(overlap);
    overlap_if_exchanged_ = overlap_in(extents, true);
  }

  std::size_t size() const { return pairs_.size() / a_.lists; }

  // `decay`: a number, or a sequence of as many as there are lists of averages.
  void update(const py::handle& decay, const py::handle& threads, bool stochastic,
              const py::handle& seed, const py::handle& step) const {
    const std::vector<double> decays = decays_of(decay);
    const fastema::Options options{threads_of(threads), stochastic, count_of(seed, "seed"),
                                   count_of(step, "step")};
    check_unmoved();
    without_lock([&] { fastema::update(pairs_, decays, options); });
  }

  // The same for what most calls are.
  void update_plainly(const py::handle& decay, const py::handle& threads) const {
    if (a_.lists != 1) return update(decay, threads, false, py::int_(0), py::int_(0));
    const double one = decay_of(decay);
    const fastema::Options options{.threads = threads_of(threads)};
    check_unmoved();
    without_lock([&] { fastema::update(pairs_, {&one, 1}, options); });
  }

  void swap(const py::handle& threads_object) const {
    const int threads = threads_of(threads_object);
    if (a_.lists != 1) throw py::value_error("swap needs one list of averages, got several");
    for (std::size_t i = 0; i < size(); ++i) check_exchangeable(i);
    if (!overlap_if_exchanged_.empty()) throw py::value_error(overlap_if_exchanged_);
    check_unmoved();
    without_lock([&] { fastema::swap(pairs_, threads); });
  }

 private:
  // Runs without the interpreter's lock, unless that is over sooner than the lock is back.
  template <class Body>
  void without_lock(const Body& body) const {
    if (bytes_ < kBrief) return body();
    const py::gil_scoped_release release;
    body();
  }

  static void check_length(const std::string& a, std::size_t a_length, const std::string& b,
                           std::size_t b_length) {
    if (a_length == b_length) return;
    throw py::value_error(a + " and " + b + " must have one length, got " +
                          std::to_string(a_length) + " and " + std::to_string(b_length));
  }

  void add(const py::handle& a, const py::handle& b, bool exchanged, std::vector<Extent>& extents) {
    const Label a_label{&a_, pairs_.size()}, b_label{&b_, pairs_.size() / a_.lists};
    const py::array a_array = array_of(a, a_label), b_array = array_of(b, b_label);
    const Span average = span_of(a_array, a_label, true);
    const Span value = span_of(b_array, b_label, exchanged);
    if (exchanged ? average.dtype != value.dtype : !fastema::offered(average.dtype, value.dtype)) {
      throw py::type_error(both(a_label, b_label) +
                           (exchanged ? " must have one type, got "
                                      : " must have one type, or be float32 and a 16-bit type, or "
                                        "float64 and float32; got ") +
                           text(a_array.dtype()) + " and " + text(b_array.dtype()));
    }
    check_alike(a_array, b_array, a_label, b_label);
    add_extent(average, true, a_label, extents);
    if (pairs_.size() % a_.lists == 0) add_extent(value, exchanged, b_label, extents);
    pairs_.push_back({average, value});
    bytes_ += average.size * fastema::size_of(average.dtype);
    hold(a_array, a_label);
    hold(b_array, b_label);
  }

  // Completes the pair that was added last.
  void add_carry(const py::handle& object, std::vector<Extent>& extents) {
    const Label label{&carry_, pairs_.size() - 1}, a_label{&a_, pairs_.size() - 1};
    fastema::Pair& pair = pairs_.back();
    const std::size_t element = fastema::carry_size(pair.average.dtype, pair.value.dtype);
    const py::array average = held_[held_.size() - 2].array;
    if (element == 0) {
      throw py::type_error(a_label +
                           " must be float32, or bfloat16 as its value, to be compensated, got " +
                           text(average.dtype()));
    }
    const py::array array = array_of(object, label);
    const char* needed = element == 4 ? "float32" : "int16";
    if (!array.dtype().equal(py::dtype(needed))) {
      throw py::type_error(label + " must be " + needed + " beside a " + text(average.dtype()) +
                           " average, got " + text(array.dtype()));
    }
    check_memory(array, label, true);
    check_alike(average, array, a_label, label);
    pair.carry = array.size() > 0 ? const_cast<void*>(array.data()) : &no_elements_;
    add_extent({pair.carry, pair.average.size, pair.average.dtype}, true, label, extents);
    hold(array, label);
  }

  static void add_extent(const Span& span, bool written, const Label& label,
                         std::vector<Extent>& extents) {
    const auto begin = reinterpret_cast<std::uintptr_t>(span.data);
    const std::size_t bytes = span.size * fastema::size_of(span.dtype);
    if (bytes > 0) extents.push_back({begin, begin + bytes, label, written});
  }

  std::vector<double> decays_of(const py::handle& object) const {
    if (a_.lists == 1) return {decay_of(object)};
    if (!py::isinstance<py::sequence>(object)) {
      throw py::type_error("decay must be a sequence of " + std::to_string(a_.lists) +
                           " numbers, one for each list of averages, got " + type_name(object));
    }
    std::vector<double> decays;
    for (const py::handle& decay : py::reinterpret_borrow<py::sequence>(object)) {
      decays.push_back(decay_of(decay));
    }
    check_length("averages", a_.lists, "decay", decays.size());
    return decays;
  }

  void check_exchangeable(std::size_t i) const {
    if (pairs_[i].average.dtype != pairs_[i].value.dtype) {
      throw py::type_error(both({&a_, i}, {&b_, i}) + " must have one type to be swapped");
    }
    if (pairs_[i].carry != nullptr) {
      throw py::type_error(a_[i] + " is compensated, and cannot be swapped without its carry");
    }
    if (!held_[2 * i + 1].array.writeable()) {
      throw py::value_error(b_[i] + " must be writable, and is read-only");
    }
  }

  // An array, and where it was when it was checked.
  struct Held {
    py::array array;
    const void* data;
    py::ssize_t size;
    Label label;
  };

  void hold(const py::array& array, const Label& label) {
    held_.push_back({array, array.data(), array.size(), label});
  }

  // Arrays can be resized in place, which frees their memory.
  void check_unmoved() const {
    for (const Held& held : held_) {
      if (held.array.data() != held.data || held.array.size() != held.size) {
        throw py::value_error(held.label + " was resized after it was paired; make the pairs anew");
      }
    }
  }

  const Argument a_, b_, carry_;
  std::vector<Held> held_;  // average, value and carry of each pair
  std::vector<fastema::Pair> pairs_;
  std::size_t bytes_ = 0;             // of averages
  std::string overlap_if_exchanged_;  // what keeps swap() from writing both sides
  static inline double no_elements_ = 0.0;
  static constexpr std::size_t kBrief = 16 << 10;
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
      .def(py::init<const py::list&, const py::list&, const py::list&, const std::string&,
                    const std::string&, bool, std::size_t, bool>(),
           py::arg("a"), py::arg("b"), py::arg("carries"), py::arg("a_name"), py::arg("b_name"),
           py::arg("single"), py::arg("lists"), py::arg("exchanged"))
      .def("__len__", &Pairs::size)
      .def("update", &Pairs::update, py::arg("decay"), py::arg("threads"), py::arg("stochastic"),
           py::arg("seed"), py::arg("step"))
      .def("update_plainly", &Pairs::update_plainly, py::arg("decay"), py::arg("threads"))
      .def("swap", &Pairs::swap, py::arg("threads"));

  m.def("instruction_sets", instruction_sets);
  m.def("use_instruction_set", use_instruction_set, py::arg("name"));
  m.def("build_config", build_config);
}
