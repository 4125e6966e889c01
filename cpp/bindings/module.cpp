// The Python edge: what the module holds, and where each is.
#include "module.hpp"

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  m.doc() = "The native core: averages, swaps and copies lists of NumPy arrays in place.";

  bindings::bind_pairs(m);       // Pairs, check, check_numbers
  bindings::bind_contents(m);    // Contents
  bindings::bind_layouts(m);     // Layouts
  bindings::bind_interrupts(m);  // Scope, locked
  bindings::bind_build(m);       // mixes, instruction_sets, use_instruction_set, build_config
}
