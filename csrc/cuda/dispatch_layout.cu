#include "cuda/check.h"
#include "cuda/dispatch_layout.h"

namespace ep::cuda {
namespace {

constexpr uint32_t kThreads = 1024;

// A block is a rank's, and alone writes what is its: nothing need be zero before.
template <typename Index>
class RankCounter {
 public:
  __device__ RankCounter(const DispatchLayout& layout, uint32_t r)
      : layout_(layout),
        rank_(r),
        first_(layout.partition.first_expert(r)),
        num_local_(layout.partition.num_local_experts(r)),
        of_expert_(layout.num_tokens_per_expert + first_) {}

  __device__ void run() const {
    for (uint32_t e = threadIdx.x; e < num_local_; e += kThreads) of_expert_[e] = 0;
    __syncthreads();
    int32_t num_tokens = 0;
    // Every thread as often as the others, because they count together.
    for (uint64_t first = 0; first < layout_.num_tokens; first += kThreads) {
      const uint64_t token = first + threadIdx.x;
      const bool is_here = token < layout_.num_tokens && count_experts(token);
      if (token < layout_.num_tokens) {
        layout_.is_token_in_rank[token * layout_.partition.num_ranks + rank_] = is_here;
      }
      num_tokens += __syncthreads_count(is_here);
    }
    if (threadIdx.x == 0) layout_.num_tokens_per_rank[rank_] = num_tokens;
  }

 private:
  // Among the rank's; those of others, and none, are at least `num_local_`.
  __device__ uint32_t local_expert(uint64_t token, uint32_t k) const {
    const Index expert = static_cast<const Index*>(layout_.topk_idx)[token * layout_.top_k + k];
    if (expert < 0) return num_local_;
    const uint32_t last = layout_.partition.num_experts - 1;
    return (expert > Index(last) ? last : static_cast<uint32_t>(expert)) - first_;
  }

  // Whether the token lists some of the rank's.
  __device__ bool count_experts(uint64_t token) const {
    bool is_here = false;
    for (uint32_t k = 0; k < layout_.top_k; ++k) {
      const uint32_t expert = local_expert(token, k);
      if (expert >= num_local_) continue;
      is_here = true;
      bool is_listed = false;
      for (uint32_t before = 0; before < k; ++before) {
        is_listed |= local_expert(token, before) == expert;
      }
      if (!is_listed) atomicAdd(&of_expert_[expert], 1);
    }
    return is_here;
  }

  const DispatchLayout& layout_;
  uint32_t rank_, first_, num_local_;
  int32_t* of_expert_;
};

template <typename Index>
__global__ void __launch_bounds__(kThreads)
    dispatch_layout_kernel(const __grid_constant__ DispatchLayout layout) {
  RankCounter<Index>(layout, blockIdx.x).run();
}

}  // namespace

void dispatch_layout(const DispatchLayout& layout, void* stream) {
  auto* kernel = layout.topk_idx_is_int64 ? &dispatch_layout_kernel<int64_t>
                                          : &dispatch_layout_kernel<int32_t>;
  kernel<<<layout.partition.num_ranks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(layout);
  check(cudaGetLastError(), "counting where tokens go");
}

}  // namespace ep::cuda
