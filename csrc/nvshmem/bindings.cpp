// The native module `ep_backend._nvshmem`: the kernels for ranks that a network joins. Types that
// both modules pass around are those of `ep_backend._native`, which is imported first.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "nvshmem/bindings_hierarchical.h"
#include "nvshmem/bindings_normal.h"
#include "nvshmem/low_latency.h"
#include "nvshmem/runtime.h"

namespace py = pybind11;
using namespace ep;
using nvshmem::NetworkRank;

namespace {

std::string to_string(const nvshmem::Version& v) {
  return std::to_string(v.major) + '.' + std::to_string(v.minor) + '.' + std::to_string(v.patch);
}

// NVSHMEM itself takes a newer host library, but the words that its device code and its host code
// share, queue pairs among them, have changed between minor versions.
void check_versions() {
  const nvshmem::Version device = nvshmem::device_version(), host = nvshmem::host_version();
  if (device.major == host.major && device.minor == host.minor) return;
  throw py::import_error(
      "ep_backend._nvshmem was built with the device library of NVSHMEM " + to_string(device) +
      ", but " + nvshmem::host_library() + " is " + to_string(host) +
      ". Install nvidia-nvshmem-cu13==" + to_string(device) +
      " (or -cu12), or build ep_backend again beside the version that is there.");
}

// A method that packs its arguments with `make` and launches `kernel` on the stream behind them.
template <typename Params, typename... Args>
auto method(protocol::OpResult (NetworkRank::*kernel)(const Params&, void*),
            Params (*make)(Args...)) {
  return [=](NetworkRank& self, Args... args, uintptr_t stream) {
    return (self.*kernel)(make(args...), pointer<void>(stream));
  };
}

void bind_rank(py::module_& m) {
  py::class_<NetworkRank>(m, "NetworkRank")
      .def(py::init([](const protocol::LowLatencyConfig& config, uint32_t self_rank,
                       const std::vector<uintptr_t>& bases, const std::vector<int32_t>& pes,
                       uint64_t timeout_ns, uint32_t num_sms) {
             std::vector<std::byte*> pointers;
             for (uintptr_t base : bases) pointers.push_back(pointer<std::byte>(base));
             return std::make_unique<NetworkRank>(config, self_rank, pointers, pes, timeout_ns,
                                                  num_sms);
           }),
           py::arg("config"), py::arg("self_rank"), py::arg("bases"), py::arg("pes"), py::kw_only(),
           py::arg("timeout_ns"), py::arg("num_sms"))
      .def("dispatch_send", method(&NetworkRank::dispatch_send, &make_dispatch_send))
      .def("dispatch_recv", method(&NetworkRank::dispatch_recv, &make_dispatch_recv))
      .def("combine_send", method(&NetworkRank::combine_send, &make_combine_send))
      .def("combine_recv", method(&NetworkRank::combine_recv, &make_combine_recv))
      .def("report", &NetworkRank::report)
      .def("statistics", &NetworkRank::statistics);
}

// Collective calls wait for peers: without the GIL.
void bind_runtime(py::module_& m) {
  using no_gil = py::call_guard<py::gil_scoped_release>;
  m.attr("DEVICE_VERSION") = to_string(nvshmem::device_version());
  m.attr("HOST_VERSION") = to_string(nvshmem::host_version());
  m.attr("HOST_LIBRARY") = nvshmem::host_library();
  m.def("is_initialized", &nvshmem::is_initialized);
  m.def("make_unique_id", [] { return py::bytes(nvshmem::make_unique_id()); });
  m.def("initialize", &nvshmem::initialize, py::arg("unique_id"), py::arg("pe"), py::arg("num_pes"),
        no_gil());
  m.def("attach", &nvshmem::attach, no_gil());
  m.def("self_pe", &nvshmem::self_pe);
  m.def("num_pes", &nvshmem::num_pes);
  m.def("allocate", &nvshmem::allocate, py::arg("num_bytes"), no_gil());
  m.def("address_on", &nvshmem::address_on, py::arg("address"), py::arg("pe"));
  m.def("quiet", &nvshmem::quiet, no_gil());
}

}  // namespace

PYBIND11_MODULE(_nvshmem, m) {
  m.doc() = "Kernels over a network, through NVSHMEM (private: use ep_backend's buffers)";
  check_versions();
  bind_runtime(m);
  bind_rank(m);
  bind_hierarchical(m);
  bind_normal(m);
}
