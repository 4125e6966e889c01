// Arrays as Python gives them: checked against each other, or an error that names the user's array.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>
#include <vector>

#include "fastema/core.hpp"

namespace bindings {

namespace py = pybind11;

// Asks NumPy for what is needed of it, once, when the module is loaded: later that takes locks.
void know_numpy();

// How errors call the arrays of one argument: "averages[3]", "averages['layer.weight']" where the
// values have names, "averages" where a single array was given, "averages[1][3]" where several
// averages share a value.
struct Argument {
  std::string name;
  bool single = false;
  std::size_t each = 1;           // how many arrays share a name or number
  py::object names = py::none();  // a sequence of str, or None

  std::string operator[](std::size_t i) const;
};

// One array of an argument; its name is put together only where an error needs it.
struct Label {
  const Argument* argument;
  std::size_t index;

  std::string str() const { return (*argument)[index]; }
};

std::string operator+(const Label& label, const char* rest);
std::string both(const Label& x, const Label& y);
// What is to be done with pairs. An update computes; the others move bytes, whatever they mean.
enum class Verb { update, swap, copy };

// What a caller says of its lists: a dict (fastema._types.Terms), and keywords.
struct Terms {
  Argument averages, values, carries;
  Verb verb = Verb::update;
  bool floats = false;                 // whether types that cannot be averaged are refused
  std::size_t averages_per_value = 1;  // those of one value follow each other

  Terms(const py::dict& terms, const py::kwargs& keywords);

 private:
  void read(const py::dict& terms);
};

// Borrowed, which is cheaper than list[i].
inline py::handle item(const py::list& list, std::size_t i) {
  return PyList_GET_ITEM(list.ptr(), static_cast<py::ssize_t>(i));
}

// Lists that were checked.
struct Checked {
  std::vector<fastema::Pair> pairs;
  std::size_t bytes = 0;           // of averages
  std::string overlap_if_swapped;  // what keeps swap() from writing both sides
};

// `described`: whether descriptions will do, as where nothing is going to be read.
Checked check(const py::list& averages, const py::list& values, const py::list& carries,
              const Terms& terms, bool described);

// The arrays that one is a view of, if any.
std::vector<py::array> owners_of(const py::array& array);

inline constexpr const char* kReadOnly = " must be writable, and is read-only";
inline constexpr const char* kWithoutCarry =
    " is compensated, and cannot be swapped without its carry";

}  // namespace bindings
