#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include "bindings.h"
#include "cuda/counters.h"
#include "cuda/event.h"
#include "cuda/low_latency.h"
#include "cuda/memory.h"
#include "cuda/protocol_selftest.h"

namespace py = pybind11;
using namespace ep;

namespace {

using cuda::LowLatencyRank;
using protocol::OpResult;

void bind_memory(py::module_& m) {
  py::class_<cuda::DeviceMemory>(m, "DeviceMemory")
      .def(py::init<size_t>())
      .def_property_readonly("address", &cuda::DeviceMemory::address)
      .def("ipc_handle",
           [](const cuda::DeviceMemory& self) { return py::bytes(self.ipc_handle()); });
  py::class_<cuda::PeerMemory>(m, "PeerMemory")
      .def(py::init<const std::string&>())
      .def_property_readonly("address", &cuda::PeerMemory::address);
}

// A method that packs its arguments with `make` and launches `kernel` on the stream behind them.
// Launches do not block, so the GIL is kept.
template <typename Params, typename... Args>
auto method(OpResult (LowLatencyRank::*kernel)(const Params&, void*), Params (*make)(Args...)) {
  return [=](LowLatencyRank& self, Args... args, uintptr_t stream) {
    return (self.*kernel)(make(args...), pointer<void>(stream));
  };
}

// The same for both halves: the send's arguments, the receive's, the stream.
template <typename Send, typename... SendArgs, typename Recv, typename... RecvArgs>
auto method(OpResult (LowLatencyRank::*kernel)(const Send&, const Recv&, void*),
            Send (*make_send)(SendArgs...), Recv (*make_recv)(RecvArgs...)) {
  return [=](LowLatencyRank& self, SendArgs... send, RecvArgs... recv, uintptr_t stream) {
    return (self.*kernel)(make_send(send...), make_recv(recv...), pointer<void>(stream));
  };
}

// The same methods as the CPU's LowLatencyRank, with a stream behind the arguments, and more.
void bind_rank(py::module_& m) {
  py::class_<cuda::Statistics>(m, "CudaStatistics")
      .def_readonly("num_ops", &cuda::Statistics::num_ops)
      .def_readonly("wait_ns", &cuda::Statistics::wait_ns)
      .def_readonly("num_expert_rows", &cuda::Statistics::num_expert_rows);
  py::class_<LowLatencyRank>(m, "CudaLowLatencyRank")
      .def(py::init([](const protocol::LowLatencyConfig& config, uint32_t self_rank,
                       const std::vector<uintptr_t>& bases, uint64_t timeout_ns, uint32_t num_sms,
                       bool shares_gpu) {
             std::vector<std::byte*> pointers;
             for (uintptr_t base : bases) pointers.push_back(pointer<std::byte>(base));
             return std::make_unique<LowLatencyRank>(config, self_rank, pointers, timeout_ns,
                                                     num_sms, shares_gpu);
           }),
           py::arg("config"), py::arg("self_rank"), py::arg("bases"), py::kw_only(),
           py::arg("timeout_ns"), py::arg("num_sms"), py::arg("shares_gpu"))
      .def("dispatch_send", method(&LowLatencyRank::dispatch_send, &make_dispatch_send))
      .def("dispatch_recv", method(&LowLatencyRank::dispatch_recv, &make_dispatch_recv))
      .def("combine_send", method(&LowLatencyRank::combine_send, &make_combine_send))
      .def("combine_recv", method(&LowLatencyRank::combine_recv, &make_combine_recv))
      .def("dispatch", method(&LowLatencyRank::dispatch, &make_dispatch_send, &make_dispatch_recv))
      .def("combine", method(&LowLatencyRank::combine, &make_combine_send, &make_combine_recv))
      .def("report", &LowLatencyRank::report)
      .def("statistics", &LowLatencyRank::statistics,
           "wait_ns [phase][half][R], num_expert_rows [L].");
}

void bind_event(py::module_& m) {
  using cuda::Event;
  py::class_<Event>(m, "CudaEvent")
      .def(py::init<>())
      .def("record", [](Event& self, uintptr_t stream) { self.record(pointer<void>(stream)); })
      .def("wait", [](const Event& self, uintptr_t stream) { self.wait(pointer<void>(stream)); })
      .def("has_happened", &Event::has_happened);
}

void bind_counters(py::module_& m) {
  using cuda::CounterReader;
  py::class_<CounterReader>(m, "CudaCounterReader")
      .def(py::init<>())
      .def("read", [](const CounterReader& self, uintptr_t counters, size_t count) {
        return self.read(pointer<const uint64_t>(counters), count);
      });
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_memory(m);
  bind_rank(m);
  bind_event(m);
  bind_counters(m);
  m.attr("CUDA_MAX_EXPERTS") = cuda::kNumMaxExperts;
  m.def("cuda_protocol_mismatches", &cuda::protocol_mismatches, py::arg("config"),
        "Words that a GPU computes differently from the host in the protocol headers; -1: no GPU.");
}
