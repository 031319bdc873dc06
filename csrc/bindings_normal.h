#pragma once

#include <pybind11/pybind11.h>

// Adds the layouts of the normal kernels, on the CPU and on GPUs, and the CPU's kernels themselves.
// Called after the types that kernels of all families share.
void bind_normal(pybind11::module_& m);
