// Lists of arrays as Python holds them: check everything with the GIL, if there is one, then run
// without it. A call
// that raises has changed nothing.
#include <pybind11/stl.h>

#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "alone.hpp"
#include "arrays.hpp"
#include "module.hpp"
#include "numbers.hpp"
#include "unlocked.hpp"

namespace bindings {
namespace {

// Averages and values that were checked once and are kept alive.
class Pairs {
 public:
  Pairs(const py::list& averages, const py::list& values, const py::list& carries,
        const py::dict& terms, const py::kwargs& keywords)
      : Pairs(Lists{unshared(averages), unshared(values), unshared(carries)}, terms, keywords) {}
  Pairs(const Pairs&) = delete;  // labels point into it
  Pairs& operator=(const Pairs&) = delete;

  std::size_t size() const { return checked_.pairs.size() / terms_.averages_per_value; }

  // `decay`: a number, or a sequence of as many as averages share a value.
  // `done`: see `store`. `copies`: pairs that are copied in the same act, or None.
  void update(const py::handle& decay, const py::handle& threads, const py::object& done,
              const py::object& now, const py::object& copies, bool stochastic,
              const py::handle& seed, const py::handle& step) const {
    check_verb(Verb::update, "update");
    const std::vector<double> decays = decays_of(decay, terms_.averages_per_value);
    update(decays,
           {threads_of(threads), stochastic, count_of(seed, "seed"), count_of(step, "step")}, done,
           now, copies);
  }

  // The same for what most calls are, without what that does not need.
  void update_to_nearest(const py::handle& decay, const py::handle& threads, const py::object& done,
                         const py::object& now, const py::object& copies) const {
    if (terms_.averages_per_value != 1) {
      return update(decay, threads, done, now, copies, false, py::int_(0), py::int_(0));
    }
    check_verb(Verb::update, "update");
    const double one = decay_of(decay);
    update({&one, 1}, {.threads = threads_of(threads)}, done, now, copies);
  }

  void swap(const py::handle& threads_object) const {
    const int threads = threads_of(threads_object);
    if (terms_.verb == Verb::update) {
      check_swappable();
    } else {
      check_verb(Verb::swap, "swap");
    }
    check_unmoved();
    without_lock(checked_.bytes, [&] { fastema::swap(checked_.pairs, threads); });
  }

  void copy(const py::handle& threads_object) const {
    const int threads = threads_of(threads_object);
    check_verb(Verb::copy, "copy");
    check_unmoved();
    without_lock(checked_.bytes, [&] { fastema::copy(checked_.pairs, threads); });
  }

  // Arrays can be resized in place, which frees their memory, and made read-only.
  void check_unmoved() const {
    for (const Held& held : held_) {
      check_held(held);
      if (held.written && !held.array.writeable()) throw py::value_error(held.label + kReadOnly);
    }
    for (const Held& owner : owners_) check_held(owner);
  }

  // The number of the first value that is not finite, or None.
  py::object first_non_finite(const py::handle& threads_object) const {
    const int threads = threads_of(threads_object);
    check_verb(Verb::update, "update");
    check_unmoved();
    std::size_t found = 0;
    without_lock(checked_.bytes, [&] {
      found = fastema::first_non_finite(checked_.pairs, terms_.averages_per_value, threads);
    });
    return found == size() ? py::object(py::none()) : py::object(py::int_(found));
  }

 private:
  struct Lists {
    py::list averages, values, carries;
  };

  Pairs(const Lists& lists, const py::dict& terms, const py::kwargs& keywords)
      : terms_(terms, keywords),
        checked_(check(lists.averages, lists.values, lists.carries, terms_, false)) {
    const auto& [averages, values, carries] = lists;
    const std::size_t each = terms_.averages_per_value;
    held_.reserve(2 * averages.size() + carries.size());
    for (std::size_t i = 0; i < averages.size(); ++i) {
      hold(item(averages, i), {&terms_.averages, i}, true);
      hold(item(values, i / each), {&terms_.values, i / each}, terms_.verb == Verb::swap);
      if (!carries.empty()) hold(item(carries, i), {&terms_.carries, i}, true);
    }
  }

  void update(std::span<const double> decays, const fastema::Options& options,
              const py::object& done, const py::object& now, const py::object& also) const {
    // pybind11 would take None for a pointer only when no overload takes it as it is
    const Pairs* const copies = also.is_none() ? nullptr : &also.cast<const Pairs&>();
    check_unmoved();
    check_storable(done);
    if (copies != nullptr) {
      copies->check_verb(Verb::copy, "copy");
      copies->check_unmoved();
    }
    const std::size_t bytes = checked_.bytes + (copies != nullptr ? copies->checked_.bytes : 0);
    without_lock(bytes, [&] {
      fastema::update(checked_.pairs, decays, options);
      if (copies != nullptr) fastema::copy(copies->checked_.pairs, options.threads);
    });
    store(done, now);
  }

  // An array, and where it was when it was checked.
  struct Held {
    py::array array;
    const void* data;
    py::ssize_t size;
    const void* type;  // its object, which the array itself or NumPy keeps alive
    Label label;
    bool written;
  };

  void hold(const py::handle& object, const Label& label, bool written) {
    const auto array = py::reinterpret_borrow<py::array>(object);
    held_.push_back({array, array.data(), array.size(), type_of(array), label, written});
    for (const py::array& owner : owners_of(array)) {
      if (!owners_.empty() && owners_.back().array.is(owner)) break;  // as of packed averages
      owners_.push_back({owner, owner.data(), owner.size(), type_of(owner), label, false});
    }
  }

  // Runs without the interpreter's lock, unless that is over sooner than the lock is back.
  template <class Body>
  static void without_lock(std::size_t bytes, const Body& body) {
    if (bytes < kBrief) {
      const std::lock_guard alone(brief_calls_);
      return body();
    }
    const Unlocked unlocked;
    body();
  }

  static void check_storable(const py::object& done) {
    if (done.is_none() || (PyList_Check(done.ptr()) && PyList_GET_SIZE(done.ptr()) == 1)) return;
    throw py::type_error("done must be a list of one item, or None");
  }

  // Makes something a list's only item when averages have moved, and only then: Python's next
  // instruction may never run, for an interrupt comes up before it.
  static void store(const py::object& done, const py::object& now) {
    if (done.is_none()) return;
    if (PyList_SetItem(done.ptr(), 0, now.inc_ref().ptr()) != 0) throw py::error_already_set();
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
        throw py::value_error(b + kReadOnly);
      }
    }
    if (!checked_.overlap_if_swapped.empty()) throw py::value_error(checked_.overlap_if_swapped);
  }

  static void check_held(const Held& held) {
    const bool resized = held.array.data() != held.data || held.array.size() != held.size;
    if (!resized && type_of(held.array) == held.type) return;
    throw py::value_error(held.label + (resized ? " was resized" : " was given another type") +
                          " after it was paired; make the pairs anew (an EMA: rebind)");
  }

  static const void* type_of(const py::array& array) {
    return py::detail::array_proxy(array.ptr())->descr;
  }

  const Terms terms_;
  const Checked checked_;
  std::vector<Held> held_;    // average, value and carry of each pair
  std::vector<Held> owners_;  // those that these are views of
  static constexpr std::size_t kBrief = 16 << 10;
  static inline Alone brief_calls_;  // of all pairs: they may have arrays in common
};

void check_alone(const py::list& averages, const py::list& values, const py::list& carries,
                 const py::kwargs& terms) {
  check(unshared(averages), unshared(values), unshared(carries), Terms({}, terms), true);
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

}  // namespace

void bind_pairs(py::module_& m) {
  know_numpy();
  const auto averages = py::arg("averages"), values = py::arg("values");
  const auto carries = py::arg("carries") = py::list();
  const auto decay = py::arg("decay");
  const auto threads = py::arg("threads") = 0;
  const auto done = py::arg("done") = py::none(), now = py::arg("now") = py::none();
  const auto copies = py::arg("copies") = py::none();
  const auto terms = py::arg("terms") = py::dict();  // faster than keywords, by half a microsecond
  py::class_<Pairs>(m, "Pairs")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::dict&,
                    const py::kwargs&>(),
           averages, values, carries, terms)
      .def("__len__", &Pairs::size)
      .def("update", &Pairs::update_to_nearest, decay, threads, done, now, copies)
      .def("update",
           py::overload_cast<const py::handle&, const py::handle&, const py::object&,
                             const py::object&, const py::object&, bool, const py::handle&,
                             const py::handle&>(&Pairs::update, py::const_),
           decay, threads, done, now, copies, py::kw_only(), py::arg("stochastic") = false,
           py::arg("seed") = 0, py::arg("step") = 0)
      .def("swap", &Pairs::swap, threads)
      .def("copy", &Pairs::copy, threads)
      .def("check_unmoved", &Pairs::check_unmoved)
      .def("first_non_finite", &Pairs::first_non_finite, threads);
  m.def("check", check_alone, averages, values, carries);
  m.def("shown", shown, py::arg("number"));
  m.def("check_numbers", check_numbers, decay, threads, py::arg("seed") = 0, py::arg("step") = 0,
        py::kw_only(), py::arg("averages_per_value") = 1);
}

}  // namespace bindings
