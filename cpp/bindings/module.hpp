// What each file of the binding adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace bindings {

void bind_pairs(pybind11::module_& m);
void bind_interrupts(pybind11::module_& m);
void bind_contents(pybind11::module_& m);
void bind_layouts(pybind11::module_& m);
void bind_build(pybind11::module_& m);

}  // namespace bindings
