// The functions of `_core` that say which mixes and instruction sets this build has, and choose
// one.
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "fastema/core.hpp"
#include "module.hpp"
#include "numbers.hpp"

namespace bindings {
namespace {

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

std::vector<py::dict> tuned() {
  using namespace py::literals;
  std::vector<py::dict> all;
  for (const fastema::Tuned& loop : fastema::tuned()) {
    all.push_back(py::dict("average"_a = fastema::name_of(loop.mix.average),
                           "value"_a = fastema::name_of(loop.mix.value),
                           "rounding"_a = loop.rounding, "together"_a = loop.together,
                           "ahead"_a = loop.ahead));
  }
  return all;
}

py::dict build_config() {
  using namespace py::literals;
  const std::string openmp = fastema::openmp_library();
  return py::dict("version"_a = FASTEMA_VERSION, "compiler"_a = FASTEMA_COMPILER,
                  "instruction_set"_a = fastema::instruction_set(),
                  "instruction_sets"_a = instruction_sets(),
                  "openmp"_a = openmp.empty() ? py::object(py::none()) : py::str(openmp),
                  "threads"_a = fastema::default_threads());
}

}  // namespace

void bind_build(py::module_& m) {
  m.def("mixes", mixes);
  m.def("instruction_sets", instruction_sets);
  m.def("use_instruction_set", use_instruction_set, py::arg("name"));
  m.def("tuned", tuned);
  m.def("calls_by_openmp", fastema::calls_by_openmp);
  m.def("tune", fastema::tune, py::arg("ahead"));
  m.attr("USUAL_AHEAD") = fastema::kUsualAhead;
  m.def("build_config", build_config);
}

}  // namespace bindings
