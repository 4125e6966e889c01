// The Python edge: check everything with the GIL, then run without it. A call that raises has
// changed nothing.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fastema/core.hpp"

namespace py = pybind11;
using fastema::DType;
using fastema::Span;
using npy = py::detail::npy_api;

namespace {

std::string text(const py::handle& object) { return py::cast<std::string>(py::str(object)); }

std::string type_name(const py::handle& object) {
  return text(py::type::handle_of(object).attr("__name__"));
}

// How errors call the arrays of one argument: "averages[3]", "averages['layer.weight']" where the
// values have names, "averages" where a single array was given, "averages[1][3]" where several
// averages share a value.
struct Argument {
  std::string name;
  bool single;
  std::size_t each;  // how many arrays share a name or number
  py::object names;  // a sequence of str, or None

  std::string operator[](std::size_t i) const {
    const std::string list = each > 1 ? "[" + std::to_string(i % each) + "]" : "";
    if (!names.is_none())
      return name + list + "[" + text(py::repr(names[py::int_(i / each)])) + "]";
    if (single) return name;
    return name + list + "[" + std::to_string(i / each) + "]";
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

// What is to be done with pairs. An update computes; the others move bytes, whatever they mean.
enum class Verb { update, swap, copy };

Verb verb_of(const std::string& name) {
  if (name == "update") return Verb::update;
  if (name == "swap") return Verb::swap;
  if (name == "copy") return Verb::copy;
  throw py::value_error("verb must be 'update', 'swap' or 'copy', got " +
                        text(py::repr(py::str(name))));
}

// What a caller says of its lists.
struct Terms {
  Argument averages, values, carries;
  Verb verb;
  bool floats;  // whether types that cannot be averaged are refused; updates always do
  std::size_t averages_per_value;  // those of one value follow each other

  Terms(const std::string& verb_name, bool only_floats,
        const std::pair<std::string, std::string>& arguments, const py::object& names, bool single,
        std::size_t each)
      : averages{arguments.first, single, each, names},
        values{arguments.second, single, 1, names},
        carries{"carries", single, each, names},
        verb(verb_of(verb_name)),
        floats(only_floats || verb == Verb::update),
        averages_per_value(each) {}
};

// An array as far as it is checked: NumPy's, or a described one, whose memory no one here may read.
struct Array {
  py::dtype dtype;
  std::span<const py::ssize_t> shape, strides;
  py::ssize_t itemsize, size;
  const void* data;
  bool writable, aligned;
  bool c_order, f_order;           // in C's or Fortran's order; without elements both
  std::vector<py::ssize_t> own{};  // shape and strides of a described array
};

bool flagged(const py::array& array, int flag) { return (array.flags() & flag) == flag; }

Array numpy_array(const py::array& array) {
  const auto axes = static_cast<std::size_t>(array.ndim());
  return {.dtype = array.dtype(),
          .shape = {array.shape(), axes},
          .strides = {array.strides(), axes},
          .itemsize = array.itemsize(),
          .size = array.size(),
          .data = array.data(),
          .writable = array.writeable(),
          .aligned = flagged(array, npy::NPY_ARRAY_ALIGNED_),
          .c_order = flagged(array, npy::NPY_ARRAY_C_CONTIGUOUS_),
          .f_order = flagged(array, npy::NPY_ARRAY_F_CONTIGUOUS_)};
}

// Of fastema._types.Descriptor: (dtype, shape, strides in bytes, address, writable).
Array described_array(const py::tuple& descriptor) {
  const auto shape = descriptor[1].cast<std::vector<py::ssize_t>>();
  const auto strides = descriptor[2].cast<std::vector<py::ssize_t>>();
  const auto address = descriptor[3].cast<std::uintptr_t>();
  const py::dtype dtype = descriptor[0].cast<py::dtype>();
  if (shape.size() != strides.size()) throw py::value_error("a stride is needed for each axis");
  py::ssize_t size = 1;
  for (const py::ssize_t length : shape) size *= length;
  const auto alignment = static_cast<std::uintptr_t>(dtype.alignment());
  Array array{.dtype = dtype,
              .shape = {},
              .strides = {},
              .itemsize = dtype.itemsize(),
              .size = size,
              .data = reinterpret_cast<const void*>(address),
              .writable = descriptor[4].cast<bool>(),
              .aligned = address % alignment == 0,
              .c_order = size == 0,
              .f_order = size == 0,
              .own = shape};
  array.own.insert(array.own.end(), strides.begin(), strides.end());
  array.shape = {array.own.data(), shape.size()};
  array.strides = {array.own.data() + shape.size(), shape.size()};
  return array;
}

// `described`: whether a description will do, as where nothing is going to be read.
Array array_of(const py::handle& object, const Label& label, bool described) {
  if (py::isinstance<py::array>(object)) {
    return numpy_array(py::reinterpret_borrow<py::array>(object));
  }
  if (described && py::isinstance<py::tuple>(object) && py::len(object) == 5) {
    return described_array(py::reinterpret_borrow<py::tuple>(object));
  }
  throw py::type_error(label + " must be a NumPy array, got " + type_name(object));
}

std::string listed(std::span<const py::ssize_t> numbers) {
  return text(py::tuple(py::cast(std::vector<py::ssize_t>(numbers.begin(), numbers.end()))));
}

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

Axes axes_of(const Array& array) {
  Axes axes;
  for (std::size_t i = 0; i < array.shape.size(); ++i) {
    if (array.shape[i] == 1) continue;
    // an odd stride in bytes is no multiple of the element: not dense, whatever it is rounded to
    if (array.strides[i] % array.itemsize != 0) return {{0, 0}};
    axes.emplace_back(array.strides[i] / array.itemsize, array.shape[i]);
  }
  return axes;
}

bool dense(const Array& array) {
  if (array.c_order || array.f_order) return true;
  Axes axes = axes_of(array);
  std::sort(axes.begin(), axes.end());
  py::ssize_t expected = 1;
  for (const auto& [stride, length] : axes) {
    if (stride != expected) return false;
    expected *= length;
  }
  return true;
}

bool same_order(const Array& a, const Array& b) {
  return (a.c_order && b.c_order) || (a.f_order && b.f_order) || axes_of(a) == axes_of(b);
}

// What only bytes are moved of: any type but those that count references.
DType dtype_of(const Array& array, const Label& label, bool floats) {
  if (floats) {
    const std::optional<DType> dtype = known_dtype(array.dtype);
    if (dtype) return *dtype;
    throw py::type_error(
        label + " must be float16, bfloat16, float32 or float64 in native byte order, got " +
        text(py::repr(array.dtype)));
  }
  if (array.dtype.attr("hasobject").cast<bool>()) {
    throw py::type_error(label + " must hold numbers, got " + text(py::repr(array.dtype)));
  }
  return DType::byte;
}

void check_memory(const Array& array, const Label& label, bool written, bool aligned) {
  if (aligned && !array.aligned) {
    throw py::value_error(label + " must be aligned to its " + std::to_string(array.itemsize) +
                          "-byte elements, and is not; make a copy of it");
  }
  if (!dense(array)) {
    throw py::value_error(label + " must be dense (no holes, no negative strides), got strides " +
                          listed(array.strides) + " for shape " + listed(array.shape));
  }
  if (written && !array.writable) {
    throw py::value_error(label + " must be writable, and is read-only");
  }
}

Span span_of(const Array& array, const Label& label, bool written, bool floats) {
  const DType dtype = dtype_of(array, label, floats);
  check_memory(array, label, written, floats);
  const py::ssize_t elements = floats ? array.size : array.size * array.itemsize;
  return {const_cast<void*>(array.data), static_cast<std::size_t>(elements), dtype};
}

void check_alike(const Array& a, const Array& b, const Label& a_label, const Label& b_label) {
  const auto differ = [&](const char* what, const std::string& x, const std::string& y) {
    return py::value_error(both(a_label, b_label) + " must have one " + what + ", got " + x +
                           " and " + y);
  };
  if (a.size != b.size) throw differ("size", std::to_string(a.size), std::to_string(b.size));
  if (!std::equal(a.shape.begin(), a.shape.end(), b.shape.begin(), b.shape.end())) {
    throw differ("shape", listed(a.shape), listed(b.shape));
  }
  if (!same_order(a, b)) throw differ("order in memory", listed(a.strides), listed(b.strides));
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

constexpr const char* kWithoutCarry = " is compensated, and cannot be swapped without its carry";

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

void check_length(const std::string& a, std::size_t a_length, const std::string& b,
                  std::size_t b_length) {
  if (a_length == b_length) return;
  throw py::value_error(a + " and " + b + " must have one length, got " + std::to_string(a_length) +
                        " and " + std::to_string(b_length));
}

// Lists that were checked against each other.
class Checked {
 public:
  Checked(const py::list& averages, const py::list& values, const py::list& carries,
          const Terms& terms, bool described)
      : terms_(terms), described_(described) {
    const std::size_t each = terms.averages_per_value;
    if (terms.verb == Verb::swap && each != 1) {
      throw py::value_error("swap needs one list of averages, got several");
    }
    check_length(terms.averages.name, averages.size() / each, terms.values.name, values.size());
    if (!terms.averages.names.is_none()) {
      check_length("names", py::len(terms.averages.names), terms.values.name, values.size());
    }
    if (!carries.empty()) {
      check_length(terms.averages.name, averages.size(), terms.carries.name, carries.size());
    }
    pairs.reserve(averages.size());
    for (std::size_t i = 0; i < averages.size(); ++i) {
      const Array average = array_of(averages[i], {&terms.averages, i}, described);
      add(average, values[i / each], i);
      if (!carries.empty()) add_carry(average, carries[i], i);
    }
    std::sort(extents_.begin(), extents_.end(),
              [](const Extent& x, const Extent& y) { return x.begin < y.begin; });
    const std::string overlap = overlap_in(extents_, terms.verb == Verb::swap);
    if (!overlap.empty()) throw py::value_error(overlap);
    overlap_if_swapped = overlap_in(extents_, true);
    extents_.clear();
  }

  std::vector<fastema::Pair> pairs;
  std::size_t bytes = 0;           // of averages
  std::string overlap_if_swapped;  // what keeps swap() from writing both sides

 private:
  void add(const Array& a, const py::handle& value, std::size_t i) {
    const std::size_t each = terms_.averages_per_value;
    const Label a_label{&terms_.averages, i}, b_label{&terms_.values, i / each};
    const Array b = array_of(value, b_label, described_);
    const bool swapped = terms_.verb == Verb::swap;
    const Span a_span = span_of(a, a_label, true, terms_.floats);
    const Span b_span = span_of(b, b_label, swapped, terms_.floats);
    check_types(a, b, a_span.dtype, b_span.dtype, a_label, b_label);
    check_alike(a, b, a_label, b_label);
    add_extent(a_span, true, a_label);
    if (i % each == 0) add_extent(b_span, swapped, b_label);
    pairs.push_back({a_span, b_span});
    bytes += a_span.size * fastema::size_of(a_span.dtype);
  }

  void check_types(const Array& a, const Array& b, DType a_dtype, DType b_dtype,
                   const Label& a_label, const Label& b_label) const {
    const bool update = terms_.verb == Verb::update;
    if (update ? fastema::offered(a_dtype, b_dtype)
               : a.dtype.is(b.dtype) || a.dtype.equal(b.dtype)) {
      return;
    }
    throw py::type_error(
        both(a_label, b_label) +
        (update
             ? " must have one type, or be float32 and a 16-bit type, or float64 and float32; got "
         : terms_.verb == Verb::swap ? " must have one type to be swapped, got "
                                     : " must have one type to be copied, got ") +
        text(a.dtype) + " and " + text(b.dtype));
  }

  // Completes the pair that was added last.
  void add_carry(const Array& average, const py::handle& object, std::size_t i) {
    const Label label{&terms_.carries, i}, a_label{&terms_.averages, i};
    if (terms_.verb != Verb::update) throw py::type_error(a_label + kWithoutCarry);
    fastema::Pair& pair = pairs.back();
    const std::size_t element = fastema::carry_size(pair.average.dtype, pair.value.dtype);
    if (element == 0) {
      throw py::type_error(a_label +
                           " must be float32, or bfloat16 as its value, to be compensated, got " +
                           text(average.dtype));
    }
    const Array carry = array_of(object, label, described_);
    const char* needed = element == 4 ? "float32" : "int16";
    if (!carry.dtype.equal(py::dtype(needed))) {
      throw py::type_error(label + " must be " + needed + " beside a " + text(average.dtype) +
                           " average, got " + text(carry.dtype));
    }
    check_memory(carry, label, true, true);
    check_alike(average, carry, a_label, label);
    pair.carry = carry.size > 0 ? const_cast<void*>(carry.data) : &no_elements_;
    add_extent({pair.carry, pair.average.size, pair.average.dtype}, true, label);
  }

  void add_extent(const Span& span, bool written, const Label& label) {
    const auto begin = reinterpret_cast<std::uintptr_t>(span.data);
    const std::size_t size = span.size * fastema::size_of(span.dtype);
    if (size > 0) extents_.push_back({begin, begin + size, label, written});
  }

  const Terms& terms_;  // outlives the construction, which is all it is needed for
  bool described_;
  std::vector<Extent> extents_;
  static inline double no_elements_ = 0.0;
};

std::vector<double> decays_of(const py::handle& object, std::size_t each) {
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

// Averages and values that were checked once and are kept alive.
class Pairs {
 public:
  Pairs(const py::list& averages, const py::list& values, const py::list& carries,
        const std::string& verb, bool only_floats,
        const std::pair<std::string, std::string>& arguments, const py::object& names, bool single,
        std::size_t averages_per_value)
      : terms_(verb, only_floats, arguments, names, single, averages_per_value),
        checked_(averages, values, carries, terms_, false) {
    for (std::size_t i = 0; i < averages.size(); ++i) {
      hold(averages[i], {&terms_.averages, i});
      hold(values[i / averages_per_value], {&terms_.values, i / averages_per_value});
      if (!carries.empty()) hold(carries[i], {&terms_.carries, i});
    }
  }
  Pairs(const Pairs&) = delete;  // labels point into it
  Pairs& operator=(const Pairs&) = delete;

  std::size_t size() const { return checked_.pairs.size() / terms_.averages_per_value; }

  // `decay`: a number, or a sequence of as many as averages share a value.
  void update(const py::handle& decay, const py::handle& threads, bool stochastic,
              const py::handle& seed, const py::handle& step) const {
    check_verb(Verb::update, "update");
    const std::vector<double> decays = decays_of(decay, terms_.averages_per_value);
    const fastema::Options options{threads_of(threads), stochastic, count_of(seed, "seed"),
                                   count_of(step, "step")};
    check_unmoved();
    without_lock([&] { fastema::update(checked_.pairs, decays, options); });
  }

  // The same for what most calls are, without what that does not need.
  void update_to_nearest(const py::handle& decay, const py::handle& threads) const {
    if (terms_.averages_per_value != 1) {
      return update(decay, threads, false, py::int_(0), py::int_(0));
    }
    check_verb(Verb::update, "update");
    const double one = decay_of(decay);
    const fastema::Options options{.threads = threads_of(threads)};
    check_unmoved();
    without_lock([&] { fastema::update(checked_.pairs, {&one, 1}, options); });
  }

  void swap(const py::handle& threads_object) const {
    const int threads = threads_of(threads_object);
    if (terms_.verb == Verb::update) {
      check_swappable();
    } else {
      check_verb(Verb::swap, "swap");
    }
    check_unmoved();
    without_lock([&] { fastema::swap(checked_.pairs, threads); });
  }

  void copy(const py::handle& threads_object) const {
    const int threads = threads_of(threads_object);
    check_verb(Verb::copy, "copy");
    check_unmoved();
    without_lock([&] { fastema::copy(checked_.pairs, threads); });
  }

 private:
  // An array, and where it was when it was checked.
  struct Held {
    py::array array;
    const void* data;
    py::ssize_t size;
    Label label;
  };

  void hold(const py::handle& object, const Label& label) {
    const auto array = py::reinterpret_borrow<py::array>(object);
    held_.push_back({array, array.data(), array.size(), label});
  }

  // Runs without the interpreter's lock, unless that is over sooner than the lock is back.
  template <class Body>
  void without_lock(const Body& body) const {
    if (checked_.bytes < kBrief) return body();
    const py::gil_scoped_release release;
    body();
  }

  void check_verb(Verb verb, const char* name) const {
    if (verb == terms_.verb) return;
    throw py::value_error(std::string("pairs must be made for verb='") + name + "' to " + name);
  }

  void check_swappable() const {
    if (terms_.averages_per_value != 1) {
      throw py::value_error("swap needs one list of averages, got several");
    }
    for (std::size_t i = 0; i < size(); ++i) {
      const fastema::Pair& pair = checked_.pairs[i];
      const Label a{&terms_.averages, i}, b{&terms_.values, i};
      if (pair.average.dtype != pair.value.dtype) {
        throw py::type_error(both(a, b) + " must have one type to be swapped, got " +
                             fastema::name_of(pair.average.dtype) + " and " +
                             fastema::name_of(pair.value.dtype));
      }
      if (pair.carry != nullptr) throw py::type_error(a + kWithoutCarry);
      if (!held_[2 * i + 1].array.writeable()) {
        throw py::value_error(b + " must be writable, and is read-only");
      }
    }
    if (!checked_.overlap_if_swapped.empty()) throw py::value_error(checked_.overlap_if_swapped);
  }

  // Arrays can be resized in place, which frees their memory.
  void check_unmoved() const {
    for (const Held& held : held_) {
      if (held.array.data() != held.data || held.array.size() != held.size) {
        throw py::value_error(held.label + " was resized after it was paired; make the pairs anew");
      }
    }
  }

  const Terms terms_;
  const Checked checked_;
  std::vector<Held> held_;  // average, value and carry of each pair
  static constexpr std::size_t kBrief = 16 << 10;
};

void check(const py::list& averages, const py::list& values, const py::list& carries,
           const std::string& verb, bool only_floats,
           const std::pair<std::string, std::string>& arguments, const py::object& names,
           bool single, std::size_t averages_per_value) {
  const Terms terms(verb, only_floats, arguments, names, single, averages_per_value);
  const Checked checked(averages, values, carries, terms, true);
}

std::vector<double> check_numbers(const py::handle& decay, const py::handle& threads,
                                  const py::handle& seed, const py::handle& step,
                                  std::size_t averages_per_value) {
  std::vector<double> decays = decays_of(decay, averages_per_value);
  threads_of(threads);
  count_of(seed, "seed");
  count_of(step, "step");
  return decays;
}

std::vector<std::pair<std::string, std::string>> mixes() {
  std::vector<std::pair<std::string, std::string>> names;
  for (const auto& [average, value] : fastema::mixes()) {
    names.emplace_back(fastema::name_of(average), fastema::name_of(value));
  }
  return names;
}

std::vector<std::string> instruction_sets() {
  const auto names = fastema::instruction_sets();
  return {names.begin(), names.end()};
}

void use_instruction_set(const std::string& name) {
  if (!fastema::use_instruction_set(name)) {
    throw py::value_error("name must be one of " + text(py::repr(py::cast(instruction_sets()))) +
                          " on this machine, got " + text(py::repr(py::str(name))));
  }
}

py::dict build_config() {
  using namespace py::literals;
  return py::dict("version"_a = FASTEMA_VERSION, "compiler"_a = FASTEMA_COMPILER,
                  "instruction_set"_a = fastema::instruction_set(),
                  "instruction_sets"_a = instruction_sets(), "openmp"_a = fastema::openmp_version(),
                  "threads"_a = fastema::default_threads());
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "The native core: averages, swaps and copies lists of NumPy arrays in place.";

  const auto terms = [](auto&& define) {
    define(py::arg("averages"), py::arg("values"), py::arg("carries") = py::list(), py::kw_only(),
           py::arg("verb") = "update", py::arg("only_floats") = false,
           py::arg("arguments") = std::pair("averages", "values"), py::arg("names") = py::none(),
           py::arg("single") = false, py::arg("averages_per_value") = 1);
  };
  py::class_<Pairs> pairs(m, "Pairs");
  terms([&](const auto&... arguments) {
    pairs.def(py::init<const py::list&, const py::list&, const py::list&, const std::string&, bool,
                       const std::pair<std::string, std::string>&, const py::object&, bool,
                       std::size_t>(),
              arguments...);
    m.def("check", check, arguments...);
  });
  pairs.def("__len__", &Pairs::size)
      .def("update", &Pairs::update_to_nearest, py::arg("decay"), py::arg("threads") = 0)
      .def("update", &Pairs::update, py::arg("decay"), py::arg("threads"), py::arg("stochastic"),
           py::arg("seed"), py::arg("step"))
      .def("swap", &Pairs::swap, py::arg("threads") = 0)
      .def("copy", &Pairs::copy, py::arg("threads") = 0);

  m.def("check_numbers", check_numbers, py::arg("decay"), py::arg("threads") = 0,
        py::arg("seed") = 0, py::arg("step") = 0, py::kw_only(), py::arg("averages_per_value") = 1);
  m.def("mixes", mixes);
  m.def("instruction_sets", instruction_sets);
  m.def("use_instruction_set", use_instruction_set, py::arg("name"));
  m.def("build_config", build_config);
}
