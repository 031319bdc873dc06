#pragma once

#include <pybind11/pybind11.h>

// The normal kernels over a network.
void bind_normal(pybind11::module_& m);
