// The native module `ep_backend._native`: raw pointers and sizes in, status out. No torch here, so
// one build serves every torch version; Python checks tensors before it calls.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings_multi_node.h"
#include "bindings_normal.h"
#include "bindings_protocol.h"
#include "bindings_run.h"
#include "bindings_statistics.h"
#include "cpu/low_latency.h"

#if defined(EP_BACKEND_CUDA)
#include "bindings_cuda.h"
#include "bindings_cuda_normal.h"
#endif

namespace py = pybind11;
using namespace ep;
using protocol::Half;
using protocol::Phase;

namespace {

// A method that packs its arguments with `make` and runs `kernel` on them.
template <typename Params, typename... Args>
auto method(protocol::OpResult (cpu::LowLatencyRank::*kernel)(const Params&),
            Params (*make)(Args...)) {
  return [=](cpu::LowLatencyRank& self, Args... args) {
    return run([&] { return (self.*kernel)(make(args...)); });
  };
}

void bind_results(py::module_& m) {
  py::enum_<protocol::Status>(m, "Status")
      .value("OK", protocol::Status::kOk)
      .value("TIMEOUT", protocol::Status::kTimeout)
      .value("BUFFER_FAILED", protocol::Status::kBufferFailed)
      .value("OUT_OF_ORDER", protocol::Status::kOutOfOrder)
      .value("NEWER_EPOCH", protocol::Status::kNewerEpoch)
      .value("CORRUPT", protocol::Status::kCorrupt)
      .value("BAD_EXPERT", protocol::Status::kBadExpert)
      .value("TOO_MANY_ROWS", protocol::Status::kTooManyRows)
      .value("NOT_ARRIVED", protocol::Status::kNotArrived);
  py::enum_<Phase>(m, "Phase")
      .value("DISPATCH", Phase::kDispatch)
      .value("COMBINE", Phase::kCombine);
  py::enum_<Half>(m, "Half").value("SEND", Half::kSend).value("RECV", Half::kRecv);
  py::class_<protocol::FlightRecord>(m, "FlightRecord")
      .def_readonly("self_rank", &protocol::FlightRecord::self_rank)
      .def_readonly("peer_rank", &protocol::FlightRecord::peer_rank)
      .def_readonly("phase", &protocol::FlightRecord::phase)
      .def_readonly("half", &protocol::FlightRecord::half)
      .def_readonly("epoch", &protocol::FlightRecord::epoch)
      .def_readonly("expected", &protocol::FlightRecord::expected)
      .def_readonly("seen", &protocol::FlightRecord::seen)
      .def_readonly("waited_ns", &protocol::FlightRecord::waited_ns);
  py::class_<protocol::OpResult>(m, "OpResult")
      .def(py::init<>())
      .def_property_readonly(
          "ok", [](const protocol::OpResult& r) { return r.status == protocol::Status::kOk; })
      .def_readonly("status", &protocol::OpResult::status)
      .def_readonly("record", &protocol::OpResult::record)
      .def_readonly("token", &protocol::OpResult::token)
      .def_readonly("k", &protocol::OpResult::k)
      .def_readonly("expert", &protocol::OpResult::expert)
      .def_readonly("wait_ns", &protocol::OpResult::wait_ns);
}

void bind_low_latency_rank(py::module_& m) {
  using cpu::LowLatencyRank;
  py::class_<LowLatencyRank>(m, "LowLatencyRank")
      .def(py::init([](const protocol::LowLatencyConfig& config, uint32_t self_rank,
                       const std::vector<uintptr_t>& bases, uint64_t timeout_ns, uint64_t spin_ns) {
             std::vector<std::byte*> pointers;
             for (uintptr_t base : bases) pointers.push_back(pointer<std::byte>(base));
             return std::make_unique<LowLatencyRank>(
                 config, self_rank, std::move(pointers),
                 cpu::WaitPolicy{timeout_ns, spin_ns, &python_interrupted});
           }),
           py::arg("config"), py::arg("self_rank"), py::arg("bases"), py::kw_only(),
           py::arg("timeout_ns"), py::arg("spin_ns"))
      .def("dispatch_send", method(&LowLatencyRank::dispatch_send, &make_dispatch_send))
      .def("dispatch_recv", method(&LowLatencyRank::dispatch_recv, &make_dispatch_recv))
      .def("combine_send", method(&LowLatencyRank::combine_send, &make_combine_send))
      .def("combine_recv", method(&LowLatencyRank::combine_recv, &make_combine_recv))
      .def("epoch", &LowLatencyRank::epoch)
      .def("statistics",
           [](const LowLatencyRank& self) { return statistics_dict(self.statistics()); });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of ep_backend (private: use ep_backend's buffers)";
  bind_protocol(m);
  bind_results(m);
  bind_statistics(m);
  bind_low_latency_rank(m);
  bind_multi_node(m);
  bind_normal(m);
#if defined(EP_BACKEND_CUDA)
  m.attr("has_cuda") = true;
  bind_cuda(m);
  bind_cuda_normal(m);
#else
  m.attr("has_cuda") = false;
#endif
}
