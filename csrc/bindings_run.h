// How Python runs kernels that wait on the CPU.
#pragma once

#include <pybind11/pybind11.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "protocol/op.h"

namespace ep {

// Where Python is at its end, this thread, a daemon, stays here until the process is: asking for
// the GIL would unwind it, through frames that must not be unwound.
inline void stay_if_python_ends() {
#if PY_VERSION_HEX >= 0x030d0000
  while (Py_IsFinalizing()) pause();
#else
  while (_Py_IsFinalizing()) pause();
#endif
}

// Lets Ctrl-C and other Python signal handlers run while a kernel sleeps. They run in the main
// thread alone; another one must not wait for the GIL here, which Python may end meanwhile.
inline bool python_interrupted() {
  if (syscall(SYS_gettid) != getpid()) return false;
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
    stay_if_python_ends();
  }
  if (result.status == protocol::Status::kInterrupted) throw pybind11::error_already_set();
  return result;
}

}  // namespace ep
