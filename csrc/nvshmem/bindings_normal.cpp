#include "nvshmem/bindings_normal.h"

#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings.h"
#include "bindings_run.h"
#include "nvshmem/normal.h"

namespace py = pybind11;
using namespace ep;
using nvshmem::NodeCombine;
using nvshmem::NodeCounts;
using nvshmem::NodeDispatch;
using nvshmem::NodeRoutes;
using nvshmem::NormalNetworkRank;

namespace {

NodeRoutes routes(uint32_t num_tokens, uintptr_t ranks, uintptr_t messages, uintptr_t node_slots,
                  uintptr_t round_counts, uintptr_t sources) {
  return {num_tokens,
          pointer<uint64_t>(ranks),
          pointer<uint32_t>(messages),
          pointer<uint32_t>(node_slots),
          pointer<uint32_t>(round_counts),
          pointer<uint32_t>(sources)};
}

}  // namespace

// Launches do not block, so the GIL is kept; waiting for counts lets go of it.
void bind_normal(py::module_& m) {
  py::class_<NormalNetworkRank>(m, "NormalNetworkRank")
      .def(py::init([](const protocol::NormalNodeConfig& config, uint32_t self_rank,
                       const std::vector<uintptr_t>& bases, const std::vector<int32_t>& pes,
                       uint64_t timeout_ns) {
             std::vector<std::byte*> pointers;
             for (uintptr_t base : bases) pointers.push_back(pointer<std::byte>(base));
             return std::make_unique<NormalNetworkRank>(config, self_rank, pointers, pes,
                                                        timeout_ns);
           }),
           py::arg("config"), py::arg("self_rank"), py::arg("bases"), py::arg("pes"), py::kw_only(),
           py::arg("timeout_ns"))
      .def("exchange_counts",
           [](NormalNetworkRank& self, uintptr_t topk_idx, bool topk_idx_is_int64,
              uint32_t num_tokens, uintptr_t ranks, uintptr_t messages, uintptr_t node_slots,
              uintptr_t round_counts, uintptr_t sources, uintptr_t num_recv_tokens_per_expert,
              uint64_t ticket, uint64_t num_rows, uint32_t num_sms, uintptr_t stream) {
             const NodeCounts params{
                 pointer<void>(topk_idx),
                 topk_idx_is_int64,
                 routes(num_tokens, ranks, messages, node_slots, round_counts, sources),
                 pointer<int32_t>(num_recv_tokens_per_expert),
                 ticket,
                 num_rows};
             return self.exchange_counts(params, num_sms, pointer<void>(stream));
           })
      .def("dispatch",
           [](NormalNetworkRank& self, uintptr_t x, bool x_is_quantized, uintptr_t x_scales,
              bool is_cached, uintptr_t topk_idx, bool topk_idx_is_int64, uintptr_t topk_weights,
              uint32_t num_tokens, uintptr_t ranks, uintptr_t messages, uintptr_t node_slots,
              uintptr_t round_counts, uintptr_t sources, uintptr_t recv_x, uintptr_t recv_scales,
              uintptr_t recv_topk_idx, uintptr_t recv_topk_weights, uintptr_t recv_src_tokens,
              uint64_t num_rows, uint32_t num_sms, uintptr_t stream) {
             const NodeDispatch params{
                 pointer<std::byte>(x),
                 x_is_quantized,
                 pointer<float>(x_scales),
                 is_cached,
                 pointer<void>(topk_idx),
                 topk_idx_is_int64,
                 pointer<float>(topk_weights),
                 routes(num_tokens, ranks, messages, node_slots, round_counts, sources),
                 pointer<std::byte>(recv_x),
                 pointer<uint32_t>(recv_scales),
                 pointer<int32_t>(recv_topk_idx),
                 pointer<float>(recv_topk_weights),
                 pointer<int32_t>(recv_src_tokens),
                 num_rows};
             return self.dispatch(params, num_sms, pointer<void>(stream));
           })
      .def("combine",
           [](NormalNetworkRank& self, uintptr_t x, bool has_topk_weights, uintptr_t topk_weights,
              uintptr_t bias_0, uintptr_t bias_1, uint32_t num_tokens, uintptr_t ranks,
              uintptr_t messages, uintptr_t node_slots, uintptr_t round_counts, uintptr_t sources,
              uintptr_t recv_src_tokens, uintptr_t out, uintptr_t combined_topk_weights,
              uint32_t num_sms, uintptr_t stream) {
             const NodeCombine params{
                 pointer<std::byte>(x),
                 has_topk_weights,
                 pointer<float>(topk_weights),
                 {pointer<std::byte>(bias_0), pointer<std::byte>(bias_1)},
                 routes(num_tokens, ranks, messages, node_slots, round_counts, sources),
                 pointer<int32_t>(recv_src_tokens),
                 pointer<std::byte>(out),
                 pointer<float>(combined_topk_weights)};
             return self.combine(params, num_sms, pointer<void>(stream));
           })
      .def("wait_for_counts",
           [](NormalNetworkRank& self, uint64_t ticket, uintptr_t stream) {
             return run([&] {
               return self.wait_for_counts(ticket, pointer<void>(stream), &python_interrupted);
             });
           })
      .def(
          "counts",
          [](const NormalNetworkRank& self) {
            const cuda::HostCounts& counts = self.counts();
            return py::make_tuple(counts.num_rows, counts.num_rounds, self.expert_counts());
          },
          "N, I, and rows of each local expert.")
      .def("report", &NormalNetworkRank::report)
      .def("num_operations", [](const NormalNetworkRank& self) {
        return reinterpret_cast<uintptr_t>(self.num_operations());
      });
}
