#include "bindings_protocol.h"

#include "protocol/layout.h"

namespace py = pybind11;
using namespace ep::protocol;

namespace {

void bind_config(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("FLOAT32", DType::kFloat32)
      .value("BFLOAT16", DType::kBFloat16);
  py::class_<LowLatencyConfig>(m, "LowLatencyConfig")
      .def(py::init([](uint32_t num_ranks, uint32_t num_experts, uint32_t num_max_tokens_per_rank,
                       uint32_t hidden, uint32_t top_k, uint32_t num_banks, DType dtype) {
             return LowLatencyConfig{num_ranks, num_experts, num_max_tokens_per_rank, hidden, top_k,
                                     num_banks, dtype};
           }),
           py::kw_only(), py::arg("num_ranks"), py::arg("num_experts"),
           py::arg("num_max_tokens_per_rank"), py::arg("hidden"), py::arg("top_k"),
           py::arg("num_banks"), py::arg("dtype"))
      .def_readonly("num_ranks", &LowLatencyConfig::num_ranks)
      .def_readonly("num_experts", &LowLatencyConfig::num_experts)
      .def_readonly("num_max_tokens_per_rank", &LowLatencyConfig::num_max_tokens_per_rank)
      .def_readonly("hidden", &LowLatencyConfig::hidden)
      .def_readonly("top_k", &LowLatencyConfig::top_k)
      .def_readonly("num_banks", &LowLatencyConfig::num_banks)
      .def_readonly("dtype", &LowLatencyConfig::dtype);
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
      .def_property_readonly("message_bytes", &LowLatencyLayout::message_bytes)
      .def_property_readonly("payload_in_message", &LowLatencyLayout::payload_in_message)
      .def_property_readonly("num_bytes", &LowLatencyLayout::num_bytes)
      .def_property_readonly("num_outcome_columns", &LowLatencyLayout::num_outcome_columns)
      .def_property_readonly("num_outcome_slots", &LowLatencyLayout::num_outcome_slots)
      .def_property_readonly("expert_capacity", &LowLatencyLayout::expert_capacity)
      .def("signal", &LowLatencyLayout::signal)
      .def("credit", &LowLatencyLayout::credit)
      .def("signal_sleepers", &LowLatencyLayout::signal_sleepers)
      .def("credit_sleepers", &LowLatencyLayout::credit_sleepers)
      .def("counts", &LowLatencyLayout::counts)
      .def("message", &LowLatencyLayout::message)
      .def("outcome", &LowLatencyLayout::outcome)
      .def_property_readonly("signals_offset", &LowLatencyLayout::signals_offset)
      .def_property_readonly("credits_offset", &LowLatencyLayout::credits_offset)
      .def_property_readonly("sleepers_offset", &LowLatencyLayout::sleepers_offset)
      .def_property_readonly("counts_offset", &LowLatencyLayout::counts_offset)
      .def_property_readonly("inbox_offset", &LowLatencyLayout::inbox_offset)
      .def_property_readonly("outcome_offset", &LowLatencyLayout::outcome_offset);
}

}  // namespace

void bind_protocol(py::module_& m) {
  bind_config(m);
  bind_layout(m);
  m.def("pack_signal", &pack_signal);
  m.def("signal_epoch", &signal_epoch);
  m.def("signal_count", &signal_count);
  m.def("bank_of", &bank_of);
  m.def("credit_admits", &credit_admits);
  m.def("may_send", &may_send);
  m.def("may_hook", &may_hook);
}
