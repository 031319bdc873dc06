#pragma once

#include <pybind11/pybind11.h>

// Adds the layout of the normal kernels and the kernels themselves. Called after the types that
// kernels of all families share.
void bind_normal(pybind11::module_& m);
