#include "bindings_protocol.h"

#include <pybind11/stl.h>

#include <optional>
#include <utility>

#include "protocol/blanks.h"
#include "protocol/layout.h"
#include "protocol/network_layout.h"
#include "protocol/op.h"

namespace py = pybind11;
using namespace ep::protocol;

namespace {

void bind_enums(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("FLOAT32", DType::kFloat32)
      .value("BFLOAT16", DType::kBFloat16)
      .value("FLOAT8_E4M3", DType::kFloat8E4M3);
  py::enum_<ScaleFormat>(m, "ScaleFormat")
      .value("FLOAT32", ScaleFormat::kFloat32)
      .value("POWER_OF_TWO", ScaleFormat::kPowerOfTwo)
      .value("UE8M0", ScaleFormat::kUE8M0);
  py::enum_<Transfer>(m, "Transfer")
      .value("PUSH", Transfer::kPush)
      .value("PULL", Transfer::kPull)
      .value("PULL_PUSH", Transfer::kPullPush);
  py::enum_<Reduction>(m, "Reduction")
      .value("RANK", Reduction::kRank)
      .value("SOURCE", Reduction::kSource);
  py::enum_<OutputLayout>(m, "OutputLayout")
      .value("EXPERT_MAJOR", OutputLayout::kExpertMajor)
      .value("RANK_MAJOR", OutputLayout::kRankMajor);
}

void bind_config(py::module_& m) {
  py::class_<LowLatencyConfig>(m, "LowLatencyConfig")
      .def(py::init([](uint32_t num_ranks, uint32_t num_experts, uint32_t num_max_tokens_per_rank,
                       uint32_t hidden, uint32_t top_k, uint32_t num_banks, DType dtype,
                       DType dispatch_dtype, ScaleFormat scale_format, Transfer transfer,
                       uint32_t num_max_tagged_tokens, uint32_t num_workspaces, Reduction reduction,
                       bool global_expert_ids, std::optional<DType> combine_dtype,
                       bool packs_messages) {
             return LowLatencyConfig{num_ranks,
                                     num_experts,
                                     num_max_tokens_per_rank,
                                     hidden,
                                     top_k,
                                     num_banks,
                                     dtype,
                                     dispatch_dtype,
                                     scale_format,
                                     transfer,
                                     reduction,
                                     num_max_tagged_tokens,
                                     num_workspaces,
                                     global_expert_ids,
                                     packs_messages,
                                     combine_dtype.value_or(dtype)};
           }),
           py::kw_only(), py::arg("num_ranks"), py::arg("num_experts"),
           py::arg("num_max_tokens_per_rank"), py::arg("hidden"), py::arg("top_k"),
           py::arg("num_banks"), py::arg("dtype"), py::arg("dispatch_dtype"),
           py::arg("scale_format"), py::arg("transfer"), py::arg("num_max_tagged_tokens"),
           py::arg("num_workspaces") = 0, py::arg("reduction") = Reduction::kRank,
           py::arg("global_expert_ids") = false, py::arg("combine_dtype") = py::none(),
           py::arg("packs_messages") = false)
      .def_readonly("num_ranks", &LowLatencyConfig::num_ranks)
      .def_readonly("num_experts", &LowLatencyConfig::num_experts)
      .def_readonly("num_max_tokens_per_rank", &LowLatencyConfig::num_max_tokens_per_rank)
      .def_readonly("hidden", &LowLatencyConfig::hidden)
      .def_readonly("top_k", &LowLatencyConfig::top_k)
      .def_readonly("num_banks", &LowLatencyConfig::num_banks)
      .def_readonly("dtype", &LowLatencyConfig::dtype)
      .def_readonly("dispatch_dtype", &LowLatencyConfig::dispatch_dtype)
      .def_readonly("combine_dtype", &LowLatencyConfig::combine_dtype)
      .def_readonly("scale_format", &LowLatencyConfig::scale_format)
      .def_readonly("transfer", &LowLatencyConfig::transfer)
      .def_readonly("num_max_tagged_tokens", &LowLatencyConfig::num_max_tagged_tokens)
      .def_readonly("num_workspaces", &LowLatencyConfig::num_workspaces)
      .def_readonly("global_expert_ids", &LowLatencyConfig::global_expert_ids)
      .def_readonly("packs_messages", &LowLatencyConfig::packs_messages)
      .def_readonly("reduction", &LowLatencyConfig::reduction);
  m.attr("PROTOCOL_VERSION") = kProtocolVersion;
  m.attr("MAX_RANKS") = kNumMaxRanks;
  m.attr("MAX_EXPERTS") = kNumMaxExperts;
  m.attr("MAX_TOKENS_PER_RANK") = kNumMaxTokensPerRank;
  m.attr("MAX_TOP_K") = kMaxTopK;
  m.attr("MAX_BANKS") = kMaxBanks;
}

void bind_layout(py::module_& m) {
  py::class_<ExpertPartition>(m, "ExpertPartition")
      .def(py::init([](uint32_t num_experts, uint32_t num_ranks) {
             return ExpertPartition{num_experts, num_ranks};
           }),
           py::arg("num_experts"), py::arg("num_ranks"))
      .def("num_local_experts", &ExpertPartition::num_local_experts)
      .def("num_max_local_experts", &ExpertPartition::num_max_local_experts)
      .def("first_expert", &ExpertPartition::first_expert)
      .def("owner", &ExpertPartition::owner);
  py::class_<LowLatencyLayout>(m, "LowLatencyLayout")
      .def(py::init<const LowLatencyConfig&>())
      .def_property_readonly("partition", &LowLatencyLayout::partition)
      .def_property_readonly("row_bytes", &LowLatencyLayout::row_bytes)
      .def_property_readonly("dispatch_row_bytes", &LowLatencyLayout::dispatch_row_bytes)
      .def_property_readonly("num_scales", &LowLatencyLayout::num_scales)
      .def_property_readonly("combine_row_bytes", &LowLatencyLayout::combine_row_bytes)
      .def_property_readonly("num_combine_scales", &LowLatencyLayout::num_combine_scales)
      .def_property_readonly("combine_scales_in_row", &LowLatencyLayout::combine_scales_in_row)
      .def_property_readonly("num_bytes", &LowLatencyLayout::num_bytes)
      .def_property_readonly("num_outcome_columns", &LowLatencyLayout::num_outcome_columns)
      .def_property_readonly("num_outcome_slots", &LowLatencyLayout::num_outcome_slots)
      .def_property_readonly("num_answer_words", &LowLatencyLayout::num_answer_words)
      .def_property_readonly("expert_capacity", &LowLatencyLayout::expert_capacity)
      .def("signal", &LowLatencyLayout::signal)
      .def("credit", &LowLatencyLayout::credit)
      .def("signal_sleepers", &LowLatencyLayout::signal_sleepers)
      .def("credit_sleepers", &LowLatencyLayout::credit_sleepers)
      .def("counts", &LowLatencyLayout::counts)
      .def("all_counts", &LowLatencyLayout::all_counts)
      .def("header", &LowLatencyLayout::header)
      .def("inbox_row", &LowLatencyLayout::inbox_row)
      .def("inbox_scales", &LowLatencyLayout::inbox_scales)
      .def("staged_row", &LowLatencyLayout::staged_row)
      .def("staged_scales", &LowLatencyLayout::staged_scales)
      .def("outcome", &LowLatencyLayout::outcome)
      .def("outbox", &LowLatencyLayout::outbox)
      .def("tagged_message", &LowLatencyLayout::tagged_message)
      .def_property_readonly("tagged_row_in_message", &LowLatencyLayout::tagged_row_in_message)
      .def_property_readonly("tagged_message_bytes", &LowLatencyLayout::tagged_message_bytes)
      .def("tagged_outcome", &LowLatencyLayout::tagged_outcome)
      .def_property_readonly("tagged_outcome_stride", &LowLatencyLayout::tagged_outcome_stride)
      .def("answering_row", &LowLatencyLayout::answering_row)
      .def("workspace_credit", &LowLatencyLayout::workspace_credit)
      .def("workspace_arrivals", &LowLatencyLayout::workspace_arrivals)
      .def("workspace_row", &LowLatencyLayout::workspace_row)
      .def("workspace_scales", &LowLatencyLayout::workspace_scales)
      .def("workspace_topk_idx", &LowLatencyLayout::workspace_topk_idx)
      .def("workspace_topk_weights", &LowLatencyLayout::workspace_topk_weights)
      .def("combine_input", &LowLatencyLayout::combine_input)
      .def_property_readonly("signals_offset", &LowLatencyLayout::signals_offset)
      .def_property_readonly("credits_offset", &LowLatencyLayout::credits_offset)
      .def_property_readonly("workspace_credits_offset",
                             &LowLatencyLayout::workspace_credits_offset)
      .def_property_readonly("workspace_arrivals_offset",
                             &LowLatencyLayout::workspace_arrivals_offset)
      .def_property_readonly("sleepers_offset", &LowLatencyLayout::sleepers_offset)
      .def_property_readonly("counts_offset", &LowLatencyLayout::counts_offset)
      .def_property_readonly("headers_offset", &LowLatencyLayout::headers_offset)
      .def_property_readonly("inbox_offset", &LowLatencyLayout::inbox_offset)
      .def_property_readonly("scales_offset", &LowLatencyLayout::scales_offset)
      .def_property_readonly("outcome_offset", &LowLatencyLayout::outcome_offset)
      .def_property_readonly("tagged_inbox_offset", &LowLatencyLayout::tagged_inbox_offset)
      .def_property_readonly("tagged_outcome_offset", &LowLatencyLayout::tagged_outcome_offset)
      .def_property_readonly("workspaces_offset", &LowLatencyLayout::workspaces_offset);
  py::class_<NetworkLayout>(m, "NetworkLayout")
      .def(py::init<const LowLatencyLayout&>())
      .def_property_readonly("message_bytes", &NetworkLayout::message_bytes)
      .def("outcome_bytes", &NetworkLayout::outcome_bytes)
      .def_property_readonly("num_bytes", &NetworkLayout::num_bytes)
      .def("arrivals", &NetworkLayout::arrivals)
      .def("staged_counts", &NetworkLayout::staged_counts)
      .def("staged_message", &NetworkLayout::staged_message)
      .def("staged_outcome", &NetworkLayout::staged_outcome)
      .def_property_readonly("arrivals_offset", &NetworkLayout::arrivals_offset)
      .def_property_readonly("counts_offset", &NetworkLayout::counts_offset)
      .def_property_readonly("messages_offset", &NetworkLayout::messages_offset)
      .def_property_readonly("outcomes_offset", &NetworkLayout::outcomes_offset);
}

}  // namespace

void bind_protocol(py::module_& m) {
  bind_enums(m);
  bind_config(m);
  bind_layout(m);
  m.def("pack_signal", &pack_signal);
  m.def("signal_epoch", &signal_epoch);
  m.def("signal_count", &signal_count);
  m.def("signal_is_tagged", &signal_is_tagged);
  m.attr("TAGGED_BIT") = kTaggedBit;
  m.def("bank_of", &bank_of);
  m.def("credit_admits", &credit_admits);
  m.def("may_send", &may_send);
  m.def("may_hook", &may_hook);
  m.def("to_e4m3", &to_e4m3);
  m.def("from_e4m3", &from_e4m3);
  m.def("scale_for", [](float amax, ScaleFormat format) {
    const Scale scale = scale_for(amax, format);
    return std::pair(scale.scale, scale.inverse);
  });
  m.def("tagged_header_bytes", &tagged_header_bytes);
  m.def("tagged_row_bytes", &tagged_row_bytes);
  m.def("filling", &filling);
  m.def("filled", &filled);
}
