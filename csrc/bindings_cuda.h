#pragma once

#include <pybind11/pybind11.h>

// Adds the CUDA kernels and memory. Called after the types that kernels of all devices share.
void bind_cuda(pybind11::module_& m);
