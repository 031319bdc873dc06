#include "nvshmem/bindings_hierarchical.h"

#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings.h"
#include "nvshmem/hierarchical.h"

namespace py = pybind11;
using namespace ep;
using nvshmem::Forwarded;
using nvshmem::HierarchicalRank;

namespace {

Forwarded forwarded_at(uintptr_t num_messages, uintptr_t messages) {
  return {pointer<uint32_t>(num_messages), pointer<protocol::ForwardedMessage>(messages)};
}

}  // namespace

// As NetworkRank's methods; the hook of a dispatch and the send of a combine take two addresses
// more, behind those of the handle's `entries`.
void bind_hierarchical(py::module_& m) {
  py::class_<HierarchicalRank>(m, "HierarchicalRank")
      .def(py::init([](const protocol::MultiNodeConfig& config, uint32_t self_rank,
                       const std::vector<uintptr_t>& bases, const std::vector<int32_t>& pes,
                       uint64_t timeout_ns, uint32_t num_sms) {
             std::vector<std::byte*> pointers;
             for (uintptr_t base : bases) pointers.push_back(pointer<std::byte>(base));
             return std::make_unique<HierarchicalRank>(config, self_rank, pointers, pes, timeout_ns,
                                                       num_sms);
           }),
           py::arg("config"), py::arg("self_rank"), py::arg("bases"), py::arg("pes"), py::kw_only(),
           py::arg("timeout_ns"), py::arg("num_sms"))
      .def("dispatch_send",
           [](HierarchicalRank& self, uintptr_t x, bool x_is_quantized, uintptr_t x_scales,
              uintptr_t topk_idx, bool topk_idx_is_int64, uintptr_t topk_weights,
              uint32_t num_tokens, uintptr_t num_partials, uintptr_t answers, int32_t workspace,
              uint32_t num_slots, uintptr_t stream) {
             return self.dispatch_send(
                 make_dispatch_send(x, x_is_quantized, x_scales, topk_idx, topk_idx_is_int64,
                                    topk_weights, num_tokens, num_partials, answers, workspace,
                                    num_slots),
                 pointer<void>(stream));
           })
      .def("dispatch_recv",
           [](HierarchicalRank& self, protocol::OutputLayout output, uintptr_t recv_x,
              uintptr_t recv_scales, uintptr_t num_recv_tokens_per_expert, uintptr_t recv_topk_idx,
              uintptr_t recv_topk_weights, uintptr_t num_messages, uintptr_t messages,
              uintptr_t entries, uintptr_t num_forwarded, uintptr_t forwarded, int32_t workspace,
              uint32_t num_slots, uintptr_t stream) {
             return self.dispatch_recv(
                 {make_dispatch_recv(output, recv_x, recv_scales, num_recv_tokens_per_expert,
                                     recv_topk_idx, recv_topk_weights, num_messages, messages,
                                     entries, workspace, num_slots),
                  forwarded_at(num_forwarded, forwarded)},
                 pointer<void>(stream));
           })
      .def("combine_send",
           [](HierarchicalRank& self, uintptr_t expert_out, uintptr_t num_messages,
              uintptr_t messages, uintptr_t entries, uintptr_t num_forwarded, uintptr_t forwarded,
              int32_t workspace, uint32_t num_slots, uintptr_t stream) {
             return self.combine_send({make_combine_send(expert_out, num_messages, messages,
                                                         entries, workspace, num_slots),
                                       forwarded_at(num_forwarded, forwarded)},
                                      pointer<void>(stream));
           })
      .def("combine_recv",
           [](HierarchicalRank& self, uintptr_t out, uint32_t num_tokens, uintptr_t num_partials,
              uintptr_t answers, uintptr_t topk_weights, int32_t workspace, uint32_t num_slots,
              uintptr_t stream) {
             return self.combine_recv(make_combine_recv(out, num_tokens, num_partials, answers,
                                                        topk_weights, workspace, num_slots),
                                      pointer<void>(stream));
           })
      .def("report", &HierarchicalRank::report)
      .def("statistics", &HierarchicalRank::statistics);
}
