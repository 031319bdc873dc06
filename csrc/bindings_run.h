// How Python runs kernels that wait on the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include "protocol/op.h"

namespace ep {

// Lets Ctrl-C and other Python signal handlers run while a kernel sleeps.
inline bool python_interrupted() {
  pybind11::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// Runs a kernel without the GIL; a handler's exception (KeyboardInterrupt) goes on from here.
template <typename Kernel>
protocol::OpResult run(Kernel&& kernel) {
  protocol::OpResult result;
  {
    pybind11::gil_scoped_release no_gil;
    result = kernel();
  }
  if (result.status == protocol::Status::kInterrupted) throw pybind11::error_already_set();
  return result;
}

}  // namespace ep
