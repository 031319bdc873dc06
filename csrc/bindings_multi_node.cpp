#include "bindings_multi_node.h"

#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bindings_run.h"
#include "bindings_statistics.h"
#include "cpu/multi_node.h"
#include "cpu/network.h"
#include "protocol/node_network_layout.h"

namespace py = pybind11;
using namespace ep;
using cpu::MultiNodeRank;
using cpu::Network;
using protocol::MultiNodeConfig;
using protocol::MultiNodeLayout;
using protocol::NodeNetworkLayout;
using protocol::Nodes;

namespace {

void bind_layout(py::module_& m) {
  py::class_<Nodes>(m, "Nodes")
      .def(py::init([](uint32_t num_ranks, uint32_t ranks_per_node) {
             return Nodes{num_ranks, ranks_per_node};
           }),
           py::arg("num_ranks"), py::arg("ranks_per_node"))
      .def_property_readonly("num_nodes", &Nodes::num_nodes)
      .def("node_of", &Nodes::node_of)
      .def("rank_in_node", &Nodes::rank_in_node)
      .def("rank_at", &Nodes::rank_at)
      .def("share_node", &Nodes::share_node)
      .def("forwarder", &Nodes::forwarder)
      .def("remote_idx", &Nodes::remote_idx)
      .def("remote_node", &Nodes::remote_node);
  py::class_<MultiNodeConfig>(m, "MultiNodeConfig")
      .def(py::init([](const protocol::LowLatencyConfig& low_latency, uint32_t ranks_per_node,
                       bool is_hierarchical) {
             return MultiNodeConfig{low_latency, ranks_per_node, is_hierarchical};
           }),
           py::arg("low_latency"), py::kw_only(), py::arg("ranks_per_node"),
           py::arg("is_hierarchical"))
      .def_readonly("low_latency", &MultiNodeConfig::low_latency)
      .def_readonly("ranks_per_node", &MultiNodeConfig::ranks_per_node)
      .def_readonly("is_hierarchical", &MultiNodeConfig::is_hierarchical);
  py::class_<MultiNodeLayout>(m, "MultiNodeLayout")
      .def(py::init<const MultiNodeConfig&>())
      .def_property_readonly("base", &MultiNodeLayout::base)
      .def_property_readonly("num_bytes", &MultiNodeLayout::num_bytes)
      .def_property_readonly("header_bytes", &MultiNodeLayout::header_bytes)
      .def_property_readonly("scales_bytes", &MultiNodeLayout::scales_bytes)
      .def_property_readonly("node_message_bytes", &MultiNodeLayout::node_message_bytes)
      .def_property_readonly("combine_bytes", &MultiNodeLayout::combine_bytes)
      .def_property_readonly("num_columns", &MultiNodeLayout::num_columns)
      .def("node_signal", &MultiNodeLayout::node_signal)
      .def("node_signal_sleepers", &MultiNodeLayout::node_signal_sleepers)
      .def("node_inbox", &MultiNodeLayout::node_inbox)
      .def("node_outbox", &MultiNodeLayout::node_outbox)
      .def("node_partial", &MultiNodeLayout::node_partial)
      .def("node_sum", &MultiNodeLayout::node_sum)
      .def("remote_rank", &MultiNodeLayout::remote_rank)
      .def("staged_header", &MultiNodeLayout::staged_header)
      .def("staged_row", &MultiNodeLayout::staged_row)
      .def("staged_scales", &MultiNodeLayout::staged_scales)
      .def("staged_counts", &MultiNodeLayout::staged_counts)
      .def("row_outbox", &MultiNodeLayout::row_outbox)
      .def_property_readonly("node_signals_offset", &MultiNodeLayout::node_signals_offset)
      .def_property_readonly("node_sleepers_offset", &MultiNodeLayout::node_sleepers_offset)
      .def_property_readonly("node_inbox_offset", &MultiNodeLayout::node_inbox_offset)
      .def_property_readonly("node_outbox_offset", &MultiNodeLayout::node_outbox_offset)
      .def_property_readonly("node_partials_offset", &MultiNodeLayout::node_partials_offset)
      .def_property_readonly("node_sums_offset", &MultiNodeLayout::node_sums_offset)
      .def_property_readonly("staged_headers_offset", &MultiNodeLayout::staged_headers_offset)
      .def_property_readonly("staged_rows_offset", &MultiNodeLayout::staged_rows_offset)
      .def_property_readonly("staged_scales_offset", &MultiNodeLayout::staged_scales_offset)
      .def_property_readonly("staged_counts_offset", &MultiNodeLayout::staged_counts_offset)
      .def_property_readonly("row_outbox_offset", &MultiNodeLayout::row_outbox_offset);
  py::class_<NodeNetworkLayout>(m, "NodeNetworkLayout")
      .def(py::init<const MultiNodeLayout&>())
      .def_property_readonly("num_bytes", &NodeNetworkLayout::num_bytes)
      .def("arrivals", &NodeNetworkLayout::arrivals)
      .def_property_readonly("arrivals_offset", &NodeNetworkLayout::arrivals_offset);
  m.attr("MULTI_NODE_PROTOCOL_VERSION") = protocol::kMultiNodeProtocolVersion;
}

void bind_network(py::module_& m) {
  py::class_<cpu::LinkCounters>(m, "LinkCounters")
      .def_readonly("num_puts", &cpu::LinkCounters::num_puts)
      .def_readonly("put_bytes", &cpu::LinkCounters::put_bytes)
      .def_readonly("num_signals", &cpu::LinkCounters::num_signals);
  py::class_<Network, std::shared_ptr<Network>>(m, "Network")
      .def(py::init([](uint32_t num_ranks, uint32_t ranks_per_node, uint64_t seed,
                       uint32_t max_delay_us) {
             auto network =
                 std::make_shared<Network>(Nodes{num_ranks, ranks_per_node}, seed, max_delay_us);
             network->start_thread();
             return network;
           }),
           py::kw_only(), py::arg("num_ranks"), py::arg("ranks_per_node"), py::arg("seed"),
           py::arg("max_delay_us"))
      .def("counters", &Network::counters, py::arg("src_rank"), py::arg("dst_rank"))
      .def("flush", &Network::flush, py::arg("src_rank"), py::call_guard<py::gil_scoped_release>());
}

MultiNodeRank::Forwarded forwarded_at(uintptr_t num_messages, uintptr_t messages) {
  return {pointer<uint32_t>(num_messages), pointer<protocol::ForwardedMessage>(messages)};
}

// As LowLatencyRank's methods; the hook of a dispatch and the send of a combine take two addresses
// more, behind those of the handle's `entries`.
void bind_rank(py::module_& m) {
  py::class_<MultiNodeRank>(m, "MultiNodeRank")
      .def(py::init([](const MultiNodeConfig& config, uint32_t self_rank,
                       const std::vector<uintptr_t>& bases, std::shared_ptr<Network> network,
                       uint64_t timeout_ns, uint64_t spin_ns) {
             std::vector<std::byte*> pointers;
             for (uintptr_t base : bases) pointers.push_back(pointer<std::byte>(base));
             return std::make_unique<MultiNodeRank>(
                 config, self_rank, std::move(pointers),
                 cpu::WaitPolicy{timeout_ns, spin_ns, &python_interrupted}, std::move(network));
           }),
           py::arg("config"), py::arg("self_rank"), py::arg("bases"), py::arg("network"),
           py::kw_only(), py::arg("timeout_ns"), py::arg("spin_ns"))
      .def("dispatch_send",
           [](MultiNodeRank& self, uintptr_t x, bool x_is_quantized, uintptr_t x_scales,
              uintptr_t topk_idx, bool topk_idx_is_int64, uintptr_t topk_weights,
              uint32_t num_tokens, uintptr_t num_partials, uintptr_t answers, int32_t workspace,
              uint32_t num_slots) {
             return run([&] {
               return self.dispatch_send(make_dispatch_send(
                   x, x_is_quantized, x_scales, topk_idx, topk_idx_is_int64, topk_weights,
                   num_tokens, num_partials, answers, workspace, num_slots));
             });
           })
      .def("dispatch_recv",
           [](MultiNodeRank& self, protocol::OutputLayout output, uintptr_t recv_x,
              uintptr_t recv_scales, uintptr_t num_recv_tokens_per_expert, uintptr_t recv_topk_idx,
              uintptr_t recv_topk_weights, uintptr_t num_messages, uintptr_t messages,
              uintptr_t entries, uintptr_t num_forwarded, uintptr_t forwarded, int32_t workspace,
              uint32_t num_slots) {
             return run([&] {
               return self.dispatch_recv(
                   make_dispatch_recv(output, recv_x, recv_scales, num_recv_tokens_per_expert,
                                      recv_topk_idx, recv_topk_weights, num_messages, messages,
                                      entries, workspace, num_slots),
                   forwarded_at(num_forwarded, forwarded));
             });
           })
      .def("combine_send",
           [](MultiNodeRank& self, uintptr_t expert_out, uintptr_t num_messages, uintptr_t messages,
              uintptr_t entries, uintptr_t num_forwarded, uintptr_t forwarded, int32_t workspace,
              uint32_t num_slots) {
             return run([&] {
               return self.combine_send(make_combine_send(expert_out, num_messages, messages,
                                                          entries, workspace, num_slots),
                                        forwarded_at(num_forwarded, forwarded));
             });
           })
      .def("combine_recv",
           [](MultiNodeRank& self, uintptr_t out, uint32_t num_tokens, uintptr_t num_partials,
              uintptr_t answers, uintptr_t topk_weights, int32_t workspace, uint32_t num_slots) {
             return run([&] {
               return self.combine_recv(make_combine_recv(out, num_tokens, num_partials, answers,
                                                          topk_weights, workspace, num_slots));
             });
           })
      .def("epoch", [](const MultiNodeRank& self, protocol::Phase phase,
                       protocol::Half half) { return self.epoch(phase, half); })
      .def("statistics",
           [](const MultiNodeRank& self) { return statistics_dict(self.statistics()); });
}

}  // namespace

void bind_multi_node(py::module_& m) {
  bind_layout(m);
  bind_network(m);
  bind_rank(m);
}
