// Shapes, orders, types and memory of arrays, checked pair by pair and then as one list.
#include "arrays.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include "numbers.hpp"

namespace bindings {
namespace {

using fastema::DType;
using fastema::Span;
using npy = py::detail::npy_api;

Verb verb_of(std::string_view name) {
  if (name == "update") return Verb::update;
  if (name == "swap") return Verb::swap;
  if (name == "copy") return Verb::copy;
  throw py::value_error("verb must be 'update', 'swap' or 'copy', got " +
                        text(py::repr(py::str(name))));
}

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

Array numpy_array(const py::array& array) {
  const auto axes = static_cast<std::size_t>(array.ndim());
  const int flags = array.flags();
  return {.dtype = array.dtype(),
          .shape = {array.shape(), axes},
          .strides = {array.strides(), axes},
          .itemsize = array.itemsize(),
          .size = array.size(),
          .data = array.data(),
          .writable = (flags & npy::NPY_ARRAY_WRITEABLE_) != 0,
          .aligned = (flags & npy::NPY_ARRAY_ALIGNED_) != 0,
          .c_order = (flags & npy::NPY_ARRAY_C_CONTIGUOUS_) != 0,
          .f_order = (flags & npy::NPY_ARRAY_F_CONTIGUOUS_) != 0};
}

// Of fastema._arrays.Descriptor: (dtype, shape, strides in bytes, address, writable).
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

// Classes derived from NumPy's are taken for the memory that they have, but not where a mask would
// be dropped: NumPy's, which is not loaded until it is used, and astropy's.
void check_unmasked(const py::handle& array, const Label& label) {
  const py::handle kind = py::type::handle_of(array);
  if (kind.ptr() == reinterpret_cast<PyObject*>(npy::get().PyArray_Type_)) return;
  if (!py::hasattr(kind, "mask") || !py::hasattr(kind, "filled")) return;
  throw py::type_error(label + " must be an array without a mask, which would be dropped, got " +
                       type_name(array) + "; give what its .filled() returns, or its .data");
}

// `described`: whether a description will do, as where nothing is going to be read.
Array array_of(const py::handle& object, const Label& label, bool described) {
  if (py::isinstance<py::array>(object)) {
    check_unmasked(object, label);
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
        text(py::repr(array.dtype)) +
        (array.dtype.attr("isnative").cast<bool>()
             ? ""
             : "; give a copy by .astype(array.dtype.newbyteorder('='))"));
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
    throw py::value_error(label + kReadOnly);
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

// Checks lists against each other, pair by pair.
class Checker {
 public:
  Checker(const Terms& terms, bool described) : terms_(terms), described_(described) {}

  Checked check(const py::list& averages, const py::list& values, const py::list& carries) {
    const std::size_t each = terms_.averages_per_value;
    if (terms_.verb == Verb::swap && each != 1) {
      throw py::value_error("swap needs one list of averages, got several");
    }
    check_length(terms_.averages.name, averages.size() / each, terms_.values.name, values.size());
    if (!terms_.averages.names.is_none()) {
      check_length("names", py::len(terms_.averages.names), terms_.values.name, values.size());
    }
    if (!carries.empty()) {
      check_length(terms_.averages.name, averages.size(), terms_.carries.name, carries.size());
    }
    checked_.pairs.reserve(averages.size());
    extents_.reserve(averages.size() + values.size() + carries.size());
    const bool compensated = !carries.empty();
    for (std::size_t i = 0; i < averages.size(); ++i) {
      const Array average = array_of(item(averages, i), {&terms_.averages, i}, described_);
      add(average, item(values, i / each), i);
      if (compensated) add_carry(average, item(carries, i), i);
    }
    std::sort(extents_.begin(), extents_.end(),
              [](const Extent& x, const Extent& y) { return x.begin < y.begin; });
    const std::string overlap = overlap_in(extents_, terms_.verb == Verb::swap);
    if (!overlap.empty()) throw py::value_error(overlap);
    checked_.overlap_if_swapped = overlap_in(extents_, true);
    return std::move(checked_);
  }

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
    checked_.pairs.push_back({a_span, b_span});
    checked_.bytes += a_span.size * fastema::size_of(a_span.dtype);
  }

  void check_types(const Array& a, const Array& b, DType a_dtype, DType b_dtype,
                   const Label& a_label, const Label& b_label) const {
    const bool update = terms_.verb == Verb::update;
    if (update ? fastema::offered(a_dtype, b_dtype)
               : a.dtype.is(b.dtype) || a.dtype.equal(b.dtype)) {
      return;
    }
    throw py::type_error(both(a_label, b_label) +
                         (update ? " must have one type, or be float32 and a 16-bit type or the "
                                   "other way round, or float64 and a narrower one; got "
                          : terms_.verb == Verb::swap ? " must have one type to be swapped, got "
                                                      : " must have one type to be copied, got ") +
                         text(a.dtype) + " and " + text(b.dtype));
  }

  // Completes the pair that was added last.
  void add_carry(const Array& average, const py::handle& object, std::size_t i) {
    const Label label{&terms_.carries, i}, a_label{&terms_.averages, i};
    if (terms_.verb != Verb::update) throw py::type_error(a_label + kWithoutCarry);
    fastema::Pair& pair = checked_.pairs.back();
    const std::size_t element = fastema::carry_size(pair.average.dtype, pair.value.dtype);
    if (element == 0) {
      throw py::type_error(a_label + " must be float32 or bfloat16 to be compensated, got " +
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

  const Terms& terms_;
  const bool described_;
  Checked checked_;
  std::vector<Extent> extents_;
  static inline double no_elements_ = 0.0;
};

}  // namespace

void know_numpy() { bfloat16_number(); }

std::string Argument::operator[](std::size_t i) const {
  const std::string list = each > 1 ? "[" + std::to_string(i % each) + "]" : "";
  if (!names.is_none()) return name + list + "[" + text(py::repr(names[py::int_(i / each)])) + "]";
  if (single) return name;
  return name + list + "[" + std::to_string(i / each) + "]";
}

std::string operator+(const Label& label, const char* rest) { return label.str() + rest; }
std::string both(const Label& x, const Label& y) { return x + " and " + y.str(); }

Terms::Terms(const py::dict& terms, const py::kwargs& keywords)
    : averages{.name = "averages"}, values{.name = "values"}, carries{.name = "carries"} {
  read(terms);
  read(keywords);
  if (averages_per_value == 0) throw py::value_error("averages_per_value must be 1 or more, got 0");
  floats = floats || verb == Verb::update;
}

void Terms::read(const py::dict& terms) {
  for (const auto& [key, value] : terms) {
    const auto name = key.cast<std::string_view>();
    if (name == "verb") {
      verb = verb_of(value.cast<std::string_view>());
    } else if (name == "only_floats") {
      floats = value.cast<bool>();
    } else if (name == "arguments") {
      const auto names = value.cast<py::tuple>();
      averages.name = names[0].cast<std::string_view>();
      values.name = names[1].cast<std::string_view>();
    } else if (name == "names") {
      averages.names = values.names = carries.names = py::reinterpret_borrow<py::object>(value);
    } else if (name == "single") {
      averages.single = values.single = carries.single = value.cast<bool>();
    } else if (name == "averages_per_value") {
      averages_per_value = averages.each = carries.each = value.cast<std::size_t>();
    } else {
      throw py::type_error("unknown keyword " + text(py::repr(key)));
    }
  }
}

std::vector<py::array> owners_of(const py::array& array) {
  std::vector<py::array> owners;
  py::object base = array.base();
  for (int step = 0; base && step < 16; ++step) {
    if (py::isinstance<py::array>(base)) {
      owners.push_back(py::reinterpret_borrow<py::array>(base));
      base = owners.back().base();
    } else if (std::string_view(Py_TYPE(base.ptr())->tp_name) == "DummyArray") {
      base = base.attr("base");  // of `as_strided`
    } else {
      break;  // to ask whatever it is for a base would cost a microsecond
    }
  }
  return owners;
}

Checked check(const py::list& averages, const py::list& values, const py::list& carries,
              const Terms& terms, bool described) {
  return Checker(terms, described).check(averages, values, carries);
}

}  // namespace bindings
