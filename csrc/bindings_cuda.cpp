#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include "cuda/low_latency.h"
#include "cuda/memory.h"
#include "cuda/protocol_selftest.h"

namespace py = pybind11;
using namespace ep;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

protocol::HandleView handle_view(uintptr_t num_messages, uintptr_t messages, uintptr_t entries) {
  return {pointer<uint32_t>(num_messages), pointer<protocol::HandleMessage>(messages),
          pointer<protocol::HandleEntry>(entries)};
}

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

// The same methods as the CPU's LowLatencyRank, with a stream behind the arguments. Launches do not
// block, so the GIL is kept.
void bind_rank(py::module_& m) {
  using cuda::LowLatencyRank;
  py::class_<LowLatencyRank>(m, "CudaLowLatencyRank")
      .def(py::init([](const protocol::LowLatencyConfig& config, uint32_t self_rank,
                       const std::vector<uintptr_t>& bases, uint64_t timeout_ns, uint32_t num_sms) {
             std::vector<std::byte*> pointers;
             for (uintptr_t base : bases) pointers.push_back(pointer<std::byte>(base));
             return std::make_unique<LowLatencyRank>(config, self_rank, pointers, timeout_ns,
                                                     num_sms);
           }),
           py::arg("config"), py::arg("self_rank"), py::arg("bases"), py::kw_only(),
           py::arg("timeout_ns"), py::arg("num_sms"))
      .def("dispatch_send",
           [](LowLatencyRank& self, uintptr_t x, uintptr_t topk_idx, bool topk_idx_is_int64,
              uintptr_t topk_weights, uint32_t num_tokens, uintptr_t num_partials,
              uintptr_t stream) {
             return self.dispatch_send(
                 {pointer<std::byte>(x), pointer<void>(topk_idx), topk_idx_is_int64,
                  pointer<float>(topk_weights), num_tokens, pointer<uint32_t>(num_partials)},
                 pointer<void>(stream));
           })
      .def("dispatch_recv",
           [](LowLatencyRank& self, uintptr_t recv_x, uintptr_t num_recv_tokens_per_expert,
              uintptr_t num_messages, uintptr_t messages, uintptr_t entries, uintptr_t stream) {
             return self.dispatch_recv(
                 {pointer<std::byte>(recv_x), pointer<int32_t>(num_recv_tokens_per_expert),
                  handle_view(num_messages, messages, entries)},
                 pointer<void>(stream));
           })
      .def("combine_send",
           [](LowLatencyRank& self, uintptr_t expert_out, uintptr_t num_messages,
              uintptr_t messages, uintptr_t entries, uintptr_t stream) {
             return self.combine_send(
                 {pointer<std::byte>(expert_out), handle_view(num_messages, messages, entries)},
                 pointer<void>(stream));
           })
      .def("combine_recv",
           [](LowLatencyRank& self, uintptr_t out, uint32_t num_tokens, uintptr_t num_partials,
              uintptr_t stream) {
             return self.combine_recv(
                 {pointer<std::byte>(out), num_tokens, pointer<uint32_t>(num_partials)},
                 pointer<void>(stream));
           })
      .def("report", &LowLatencyRank::report);
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_memory(m);
  bind_rank(m);
  m.attr("CUDA_MAX_EXPERTS") = cuda::kNumMaxExperts;
  m.def("cuda_protocol_mismatches", &cuda::protocol_mismatches, py::arg("config"),
        "Words that a GPU computes differently from the host in the protocol headers; -1: no GPU.");
}
