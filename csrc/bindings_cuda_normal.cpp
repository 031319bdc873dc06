#include "bindings_cuda_normal.h"

#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings.h"
#include "bindings_run.h"
#include "cuda/dispatch_layout.h"
#include "cuda/normal.h"
#include "cuda/yardstick.h"

namespace py = pybind11;
using namespace ep;

namespace {

using cuda::CombineInput;
using cuda::DispatchStart;
using cuda::NormalCombine;
using cuda::NormalDispatch;
using cuda::NormalOutputs;
using cuda::NormalRank;
using cuda::NormalRoutes;

NormalRoutes routes(uint32_t num_tokens, uintptr_t messages, uintptr_t round_begins,
                    uintptr_t batch) {
  return {num_tokens, pointer<uint64_t>(messages), pointer<uint32_t>(round_begins),
          pointer<uint32_t>(batch)};
}

NormalOutputs outputs(uintptr_t recv_x, uintptr_t recv_scales, uintptr_t recv_topk_idx,
                      uintptr_t recv_topk_weights, uintptr_t recv_src_tokens, uint64_t num_rows) {
  return {pointer<std::byte>(recv_x),        pointer<uint32_t>(recv_scales),
          pointer<int32_t>(recv_topk_idx),   pointer<float>(recv_topk_weights),
          pointer<int32_t>(recv_src_tokens), num_rows};
}

// Launches do not block, so the GIL is kept; waiting for counts lets go of it.
void bind_rank(py::module_& m) {
  py::enum_<DispatchStart>(m, "DispatchStart")
      .value("ROUTE", DispatchStart::kRoute)
      .value("CACHED", DispatchStart::kCached)
      .value("RESUME", DispatchStart::kResume);
  py::enum_<CombineInput>(m, "CombineInput")
      .value("ELSEWHERE", CombineInput::kElsewhere)
      .value("COMBINE_ROWS", CombineInput::kCombineRows)
      .value("RECEIVED_ROWS", CombineInput::kReceivedRows);
  py::class_<NormalRank>(m, "CudaNormalRank")
      .def(py::init([](const protocol::NormalDeviceConfig& config, uint32_t self_rank,
                       const std::vector<uintptr_t>& bases, uint64_t timeout_ns,
                       uint32_t num_max_sms, bool shares_gpu) {
             std::vector<std::byte*> pointers;
             for (uintptr_t base : bases) pointers.push_back(pointer<std::byte>(base));
             return std::make_unique<NormalRank>(config, self_rank, pointers, timeout_ns,
                                                 num_max_sms, shares_gpu);
           }),
           py::arg("config"), py::arg("self_rank"), py::arg("bases"), py::kw_only(),
           py::arg("timeout_ns"), py::arg("num_max_sms"), py::arg("shares_gpu"))
      .def("dispatch",
           [](NormalRank& self, uintptr_t x, bool x_is_quantized, uintptr_t x_scales,
              DispatchStart start, uintptr_t topk_idx, bool topk_idx_is_int64,
              uintptr_t topk_weights, uint32_t num_tokens, uintptr_t messages,
              uintptr_t round_begins, uintptr_t batch, uintptr_t num_recv_tokens_per_expert,
              uint64_t ticket, uint64_t num_rows, bool may_come_in_rounds, uintptr_t recv_x,
              uintptr_t recv_scales, uintptr_t recv_topk_idx, uintptr_t recv_topk_weights,
              uintptr_t recv_src_tokens, uint32_t num_sms, uintptr_t stream) {
             const NormalDispatch params{pointer<std::byte>(x),
                                         x_is_quantized,
                                         pointer<float>(x_scales),
                                         start,
                                         pointer<void>(topk_idx),
                                         topk_idx_is_int64,
                                         pointer<float>(topk_weights),
                                         routes(num_tokens, messages, round_begins, batch),
                                         pointer<int32_t>(num_recv_tokens_per_expert),
                                         ticket,
                                         num_rows,
                                         may_come_in_rounds,
                                         outputs(recv_x, recv_scales, recv_topk_idx,
                                                 recv_topk_weights, recv_src_tokens, num_rows)};
             return self.dispatch(params, num_sms, pointer<void>(stream));
           })
      .def("unpack",
           [](NormalRank& self, uintptr_t batch, uintptr_t recv_x, uintptr_t recv_scales,
              uintptr_t recv_topk_idx, uintptr_t recv_topk_weights, uintptr_t recv_src_tokens,
              uint64_t num_rows, uint32_t num_sms, uintptr_t stream) {
             return self.unpack(pointer<uint32_t>(batch),
                                outputs(recv_x, recv_scales, recv_topk_idx, recv_topk_weights,
                                        recv_src_tokens, num_rows),
                                num_sms, pointer<void>(stream));
           })
      .def(
          "combine",
          [](NormalRank& self, uintptr_t x, CombineInput input, bool has_topk_weights,
             uintptr_t topk_weights, uintptr_t bias_0, uintptr_t bias_1, uint32_t num_tokens,
             uintptr_t messages, uintptr_t round_begins, uintptr_t batch, uintptr_t recv_src_tokens,
             uintptr_t out, uintptr_t combined_topk_weights, uint32_t num_sms, uintptr_t stream) {
            const NormalCombine params{pointer<std::byte>(x),
                                       input,
                                       has_topk_weights,
                                       pointer<float>(topk_weights),
                                       {pointer<std::byte>(bias_0), pointer<std::byte>(bias_1)},
                                       routes(num_tokens, messages, round_begins, batch),
                                       pointer<int32_t>(recv_src_tokens),
                                       pointer<std::byte>(out),
                                       pointer<float>(combined_topk_weights)};
            return self.combine(params, num_sms, pointer<void>(stream));
          })
      .def("wait_for_counts",
           [](NormalRank& self, uint64_t ticket, uintptr_t stream) {
             return run([&] {
               return self.wait_for_counts(ticket, pointer<void>(stream), &python_interrupted);
             });
           })
      .def(
          "counts",
          [](const NormalRank& self) {
            const cuda::HostCounts counts = self.counts();
            return py::make_tuple(counts.num_rows, counts.num_rounds, counts.is_direct != 0,
                                  self.expert_counts());
          },
          "N, I, whether all ranks have room, and rows of each local expert.")
      .def("report", &NormalRank::report)
      .def("epochs",
           [](const NormalRank& self) { return reinterpret_cast<uintptr_t>(self.epochs()); });
}

void bind_dispatch_layout(py::module_& m) {
  m.def("cuda_dispatch_layout",
        [](uintptr_t topk_idx, bool topk_idx_is_int64, uint32_t num_tokens, uint32_t top_k,
           const protocol::ExpertPartition& partition, uintptr_t num_tokens_per_rank,
           uintptr_t num_tokens_per_expert, uintptr_t is_token_in_rank, uintptr_t stream) {
          const cuda::DispatchLayout layout{pointer<void>(topk_idx),
                                            topk_idx_is_int64,
                                            num_tokens,
                                            top_k,
                                            partition,
                                            pointer<int32_t>(num_tokens_per_rank),
                                            pointer<int32_t>(num_tokens_per_expert),
                                            pointer<bool>(is_token_in_rank)};
          cuda::dispatch_layout(layout, pointer<void>(stream));
        });
}

void bind_yardsticks(py::module_& m) {
  m.def("cuda_copy_on_sms",
        [](uintptr_t dst, uintptr_t src, uint64_t num_bytes, uint32_t num_sms, uintptr_t stream) {
          cuda::copy_on_sms(pointer<void>(dst), pointer<void>(src), num_bytes, num_sms,
                            pointer<void>(stream));
        });
  m.def("cuda_copy_by_engine", [](uintptr_t dst, uintptr_t src, uint64_t num_bytes,
                                  uintptr_t stream) {
    cuda::copy_by_engine(pointer<void>(dst), pointer<void>(src), num_bytes, pointer<void>(stream));
  });
  m.def("cuda_fill_on_sms",
        [](uintptr_t dst, uint64_t num_bytes, uint32_t num_sms, uintptr_t stream) {
          cuda::fill_on_sms(pointer<void>(dst), num_bytes, num_sms, pointer<void>(stream));
        });
}

}  // namespace

void bind_cuda_normal(py::module_& m) {
  bind_rank(m);
  bind_dispatch_layout(m);
  bind_yardsticks(m);
}
