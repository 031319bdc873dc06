#pragma once

#include <pybind11/pybind11.h>

// Adds the protocol headers' types and functions, so that Python can size memory and test them.
void bind_protocol(pybind11::module_& m);
