// The CPU's kernels of ranks on several nodes, and the network between those, for Python.
#pragma once

#include <pybind11/pybind11.h>

void bind_multi_node(pybind11::module_& m);
