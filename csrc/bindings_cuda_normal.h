#pragma once

#include <pybind11/pybind11.h>

// Adds the normal kernels on GPUs, and the benchmarks' yardsticks.
void bind_cuda_normal(pybind11::module_& m);
