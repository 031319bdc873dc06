#include "bindings_normal.h"

#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bindings_run.h"
#include "bindings_statistics.h"
#include "cpu/normal.h"
#include "cpu/normal_nodes.h"
#include "protocol/normal_device_layout.h"
#include "protocol/normal_layout.h"
#include "protocol/normal_network_layout.h"
#include "protocol/normal_node_layout.h"
#include "protocol/normal_op.h"

namespace py = pybind11;
using namespace ep;
using namespace ep::protocol;

namespace {

void bind_layout(py::module_& m) {
  m.attr("NORMAL_PROTOCOL_VERSION") = kNormalProtocolVersion;
  m.attr("NUM_ROUND_BANKS") = kNumRoundBanks;
  py::class_<NormalConfig>(m, "NormalConfig")
      .def(py::init([](uint32_t num_ranks, uint32_t num_experts, uint32_t hidden, uint32_t top_k,
                       DType dtype, DType dispatch_dtype, ScaleFormat scale_format,
                       uint32_t num_tokens_per_round) {
             return NormalConfig{num_ranks, num_experts,    hidden,       top_k,
                                 dtype,     dispatch_dtype, scale_format, num_tokens_per_round};
           }),
           py::kw_only(), py::arg("num_ranks"), py::arg("num_experts"), py::arg("hidden"),
           py::arg("top_k"), py::arg("dtype"), py::arg("dispatch_dtype"), py::arg("scale_format"),
           py::arg("num_tokens_per_round"))
      .def_readwrite("num_tokens_per_round", &NormalConfig::num_tokens_per_round);
  py::class_<NormalLayout>(m, "NormalLayout")
      .def(py::init<const NormalConfig&>())
      .def_static("num_tokens_that_fit", &NormalLayout::num_tokens_that_fit)
      .def_property_readonly("partition", &NormalLayout::partition)
      .def_property_readonly("row_bytes", &NormalLayout::row_bytes)
      .def_property_readonly("num_scales", &NormalLayout::num_scales)
      .def_property_readonly("num_scale_words", &NormalLayout::num_scale_words)
      .def_property_readonly("num_bytes", &NormalLayout::num_bytes)
      .def_property_readonly("num_max_messages_per_token",
                             &NormalLayout::num_max_messages_per_token)
      .def("num_rounds", &NormalLayout::num_rounds)
      .def("signal", &NormalLayout::signal)
      .def("credit", &NormalLayout::credit)
      .def("signal_sleepers", &NormalLayout::signal_sleepers)
      .def("credit_sleepers", &NormalLayout::credit_sleepers)
      .def("counts", &NormalLayout::counts)
      .def("expert_counts", &NormalLayout::expert_counts)
      .def("message", &NormalLayout::message)
      .def("weights", &NormalLayout::weights)
      .def("token", &NormalLayout::token)
      .def("row", &NormalLayout::row)
      .def("scales", &NormalLayout::scales);
}

void bind_node_layout(py::module_& m) {
  m.attr("NORMAL_NODE_PROTOCOL_VERSION") = kNormalNodeProtocolVersion;
  py::class_<NormalNodeConfig>(m, "NormalNodeConfig")
      .def(py::init([](const NormalConfig& normal, uint32_t ranks_per_node) {
             return NormalNodeConfig{normal, ranks_per_node};
           }),
           py::arg("normal"), py::arg("ranks_per_node"));
  py::class_<NormalNodeLayout>(m, "NormalNodeLayout")
      .def(py::init<const NormalNodeConfig&>())
      .def_static("num_tokens_that_fit", &NormalNodeLayout::num_tokens_that_fit)
      .def_property_readonly("base", &NormalNodeLayout::base)
      .def_property_readonly("num_bytes", &NormalNodeLayout::num_bytes)
      .def_property_readonly("num_columns", &NormalNodeLayout::num_columns)
      .def_property_readonly("counts_stride", &NormalNodeLayout::counts_stride)
      .def_property_readonly("route_bytes", &NormalNodeLayout::route_bytes)
      .def_property_readonly("dispatch_bytes", &NormalNodeLayout::dispatch_bytes)
      .def_property_readonly("weights_in_message", &NormalNodeLayout::weights_in_message)
      .def_property_readonly("row_in_message", &NormalNodeLayout::row_in_message)
      .def("node_signal", &NormalNodeLayout::node_signal)
      .def("node_signal_sleepers", &NormalNodeLayout::node_signal_sleepers)
      .def("node_counts", &NormalNodeLayout::node_counts)
      .def("staged_counts", &NormalNodeLayout::staged_counts)
      .def("node_route", &NormalNodeLayout::node_route)
      .def("staged_route", &NormalNodeLayout::staged_route)
      .def("node_inbox", &NormalNodeLayout::node_inbox)
      .def("node_outbox", &NormalNodeLayout::node_outbox)
      .def_property_readonly("node_signals_offset", &NormalNodeLayout::node_signals_offset)
      .def_property_readonly("node_sleepers_offset", &NormalNodeLayout::node_sleepers_offset)
      .def_property_readonly("node_counts_offset", &NormalNodeLayout::node_counts_offset)
      .def_property_readonly("staged_counts_offset", &NormalNodeLayout::staged_counts_offset)
      .def_property_readonly("node_routes_offset", &NormalNodeLayout::node_routes_offset)
      .def_property_readonly("staged_routes_offset", &NormalNodeLayout::staged_routes_offset)
      .def_property_readonly("node_inbox_offset", &NormalNodeLayout::node_inbox_offset)
      .def_property_readonly("node_outbox_offset", &NormalNodeLayout::node_outbox_offset);
}

void bind_network_layout(py::module_& m) {
  m.attr("NORMAL_NETWORK_PROTOCOL_VERSION") = kNormalNetworkProtocolVersion;
  py::enum_<Arrival>(m, "Arrival")
      .value("DISPATCH", Arrival::kDispatch)
      .value("ROUTES", Arrival::kRoutes)
      .value("SUMS", Arrival::kSums);
  py::class_<NormalNetworkLayout>(m, "NormalNetworkLayout")
      .def(py::init<const NormalNodeConfig&>())
      .def_static("num_tokens_that_fit", &NormalNetworkLayout::num_tokens_that_fit)
      .def_property_readonly("nodes", &NormalNetworkLayout::nodes)
      .def_property_readonly("num_bytes", &NormalNetworkLayout::num_bytes)
      .def("arrivals", &NormalNetworkLayout::arrivals)
      .def_property_readonly("arrivals_offset", &NormalNetworkLayout::arrivals_offset);
}

void bind_device_layout(py::module_& m) {
  m.attr("NORMAL_DEVICE_PROTOCOL_VERSION") = kNormalDeviceProtocolVersion;
  m.attr("MAX_DEVICE_RANKS") = kNumMaxDeviceRanks;
  m.attr("MAX_DEVICE_EXPERTS") = kNumMaxDeviceExperts;
  py::class_<NormalDeviceConfig>(m, "NormalDeviceConfig")
      .def(py::init([](uint32_t num_ranks, uint32_t num_experts, uint32_t hidden, uint32_t top_k,
                       DType dtype, DType dispatch_dtype, ScaleFormat scale_format,
                       uint32_t num_rows, bool global_expert_ids) {
             return NormalDeviceConfig{num_ranks,    num_experts, hidden,
                                       top_k,        dtype,       dispatch_dtype,
                                       scale_format, num_rows,    global_expert_ids};
           }),
           py::kw_only(), py::arg("num_ranks"), py::arg("num_experts"), py::arg("hidden"),
           py::arg("top_k"), py::arg("dtype"), py::arg("dispatch_dtype"), py::arg("scale_format"),
           py::arg("num_rows"), py::arg("global_expert_ids") = false)
      .def_readwrite("num_rows", &NormalDeviceConfig::num_rows);
  py::class_<NormalDeviceLayout>(m, "NormalDeviceLayout")
      .def(py::init<const NormalDeviceConfig&>())
      .def_static("num_rows_that_fit", &NormalDeviceLayout::num_rows_that_fit)
      .def_static("budget_for", &NormalDeviceLayout::budget_for)
      .def_property_readonly("partition", &NormalDeviceLayout::partition)
      .def_property_readonly("num_bytes", &NormalDeviceLayout::num_bytes)
      .def_property_readonly("num_scales", &NormalDeviceLayout::num_scales)
      .def_property_readonly("num_scale_words", &NormalDeviceLayout::num_scale_words)
      .def_property_readonly("num_tokens_per_round", &NormalDeviceLayout::num_tokens_per_round)
      .def_property_readonly("num_max_messages_per_token",
                             &NormalDeviceLayout::num_max_messages_per_token)
      .def("ready", &NormalDeviceLayout::ready)
      .def("done", &NormalDeviceLayout::done)
      .def("credit", &NormalDeviceLayout::credit)
      .def("round_signal", &NormalDeviceLayout::round_signal)
      .def("round_credit", &NormalDeviceLayout::round_credit)
      .def("counts", &NormalDeviceLayout::counts)
      .def("rank_counts", &NormalDeviceLayout::rank_counts)
      .def("expert_counts", &NormalDeviceLayout::expert_counts)
      .def("row", &NormalDeviceLayout::row)
      .def("scales", &NormalDeviceLayout::scales)
      .def("topk_idx", &NormalDeviceLayout::topk_idx)
      .def("topk_weights", &NormalDeviceLayout::topk_weights)
      .def("src_token", &NormalDeviceLayout::src_token)
      .def("combine_row", &NormalDeviceLayout::combine_row)
      .def("combine_weights", &NormalDeviceLayout::combine_weights)
      .def("staged_row", &NormalDeviceLayout::staged_row);
}

SendRoutes routes(uint64_t num_tokens, uintptr_t num_messages, uintptr_t messages) {
  return {num_tokens, pointer<uint32_t>(num_messages), pointer<uint32_t>(messages)};
}

RecvRows rows(uint64_t num_rounds, uintptr_t num_rows, uintptr_t per_round) {
  return {num_rounds, pointer<uint64_t>(num_rows), pointer<uint32_t>(per_round)};
}

// The calls of a rank, on one node or on several.
template <typename Rank>
void bind_calls(py::class_<Rank>& rank) {
  rank.def("exchange_counts",
           [](Rank& self, uintptr_t topk_idx, bool topk_idx_is_int64, uint64_t num_tokens,
              uintptr_t num_messages, uintptr_t messages, uintptr_t num_rounds, uintptr_t num_rows,
              uintptr_t num_recv_tokens_per_expert) {
             const NormalCountsParams params{pointer<void>(topk_idx),
                                             topk_idx_is_int64,
                                             routes(num_tokens, num_messages, messages),
                                             pointer<uint64_t>(num_rounds),
                                             pointer<uint64_t>(num_rows),
                                             pointer<uint64_t>(num_recv_tokens_per_expert)};
             return run([&] { return self.exchange_counts(params); });
           })
      .def("dispatch",
           [](Rank& self, uintptr_t x, bool x_is_quantized, uintptr_t x_scales, bool is_cached,
              uintptr_t topk_idx, bool topk_idx_is_int64, uintptr_t topk_weights,
              uint64_t num_tokens, uintptr_t num_messages, uintptr_t messages, uint64_t num_rounds,
              uintptr_t num_rows, uintptr_t per_round, uintptr_t recv_x, uintptr_t recv_scales,
              uintptr_t recv_topk_idx, uintptr_t recv_topk_weights, uintptr_t recv_src_tokens) {
             const NormalDispatchParams params{pointer<std::byte>(x),
                                               x_is_quantized,
                                               pointer<float>(x_scales),
                                               is_cached,
                                               pointer<void>(topk_idx),
                                               topk_idx_is_int64,
                                               pointer<float>(topk_weights),
                                               routes(num_tokens, num_messages, messages),
                                               rows(num_rounds, num_rows, per_round),
                                               pointer<std::byte>(recv_x),
                                               pointer<uint32_t>(recv_scales),
                                               pointer<int32_t>(recv_topk_idx),
                                               pointer<float>(recv_topk_weights),
                                               pointer<int32_t>(recv_src_tokens)};
             return run([&] { return self.dispatch(params); });
           })
      .def("combine",
           [](Rank& self, uintptr_t x, bool has_topk_weights, uintptr_t topk_weights,
              uintptr_t bias_0, uintptr_t bias_1, uint64_t num_tokens, uintptr_t num_messages,
              uintptr_t messages, uint64_t num_rounds, uintptr_t num_rows, uintptr_t per_round,
              uintptr_t out, uintptr_t combined_topk_weights) {
             const NormalCombineParams params{
                 pointer<std::byte>(x),
                 has_topk_weights,
                 pointer<float>(topk_weights),
                 {pointer<std::byte>(bias_0), pointer<std::byte>(bias_1)},
                 routes(num_tokens, num_messages, messages),
                 rows(num_rounds, num_rows, per_round),
                 pointer<std::byte>(out),
                 pointer<float>(combined_topk_weights)};
             return run([&] { return self.combine(params); });
           })
      .def("epoch", [](const Rank& self, Phase phase) { return self.epoch(phase); })
      .def("statistics", [](const Rank& self) { return statistics_dict(self.statistics()); });
}

std::vector<std::byte*> pointers(const std::vector<uintptr_t>& bases) {
  std::vector<std::byte*> pointers;
  for (uintptr_t base : bases) pointers.push_back(pointer<std::byte>(base));
  return pointers;
}

void bind_rank(py::module_& m) {
  py::class_<cpu::NormalRank> rank(m, "NormalRank");
  rank.def(py::init([](const NormalConfig& config, uint32_t self_rank,
                       const std::vector<uintptr_t>& bases, uint64_t timeout_ns, uint64_t spin_ns) {
             return std::make_unique<cpu::NormalRank>(
                 config, self_rank, pointers(bases),
                 cpu::WaitPolicy{timeout_ns, spin_ns, &python_interrupted});
           }),
           py::arg("config"), py::arg("self_rank"), py::arg("bases"), py::kw_only(),
           py::arg("timeout_ns"), py::arg("spin_ns"));
  bind_calls(rank);
  py::class_<cpu::NormalNodeRank> node_rank(m, "NormalNodeRank");
  node_rank.def(
      py::init([](const NormalNodeConfig& config, uint32_t self_rank,
                  const std::vector<uintptr_t>& bases, std::shared_ptr<cpu::Network> network,
                  uint64_t timeout_ns, uint64_t spin_ns) {
        return std::make_unique<cpu::NormalNodeRank>(
            config, self_rank, pointers(bases),
            cpu::WaitPolicy{timeout_ns, spin_ns, &python_interrupted}, std::move(network));
      }),
      py::arg("config"), py::arg("self_rank"), py::arg("bases"), py::arg("network"), py::kw_only(),
      py::arg("timeout_ns"), py::arg("spin_ns"));
  bind_calls(node_rank);
}

}  // namespace

void bind_normal(py::module_& m) {
  bind_layout(m);
  bind_node_layout(m);
  bind_network_layout(m);
  bind_device_layout(m);
  bind_rank(m);
}
