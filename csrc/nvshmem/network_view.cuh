// What kernels of a rank are given where it reaches some peers over a network: NVSHMEM's puts, and
// what counts their arrival. Peers whose memory this GPU sees are written to directly, by the same
// kernels.
//
// No order is asked of the network but one: a put's payload is there before the 1 that it adds to a
// word of its receiver. So puts may go by any queue pair, and a receiver counts them.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include "cuda/rank.cuh"
#include "protocol/network_layout.h"

namespace ep::nvshmem {

using cuda::kWarp;
using protocol::Phase;
using protocol::Status;

// What all families of such kernels have of NVSHMEM.
struct PuttingView : cuda::RankView {
  static constexpr bool kHasNetwork = true;

  const int32_t* pes;  // [R]: NVSHMEM's number of each rank

  // Offsets below are from the base of any rank's memory. To the memory of rank `r`, from this
  // rank's; then 1 is added to the word at `arrivals` there. One warp, which has written what is
  // put; the memory may be written again once r has credited the operation. (Adding is one request
  // to a card, setting two.)
  __device__ void put(uint64_t to, uint64_t from, uint32_t num_bytes, uint64_t arrivals,
                      uint32_t r) const {
    __syncwarp();
    if (num_bytes > 0) {
      nvshmemx_putmem_signal_nbi_warp(self_base + to, self_base + from, num_bytes, word(arrivals),
                                      1, NVSHMEM_SIGNAL_ADD, pes[r]);
    } else if (threadIdx.x % kWarp == 0) {
      add(arrivals, 1, r);
    }
  }
  // A word of rank `r`, of which this rank has written nothing that r has not seen.
  __device__ void store(uint64_t to, uint64_t value, uint32_t r) const {
    nvshmem_uint64_p(word(to), value, pes[r]);
  }
  // In any order with what this rank adds before and after.
  __device__ void add(uint64_t to, uint64_t value, uint32_t r) const {
    nvshmemx_signal_op(word(to), value, NVSHMEM_SIGNAL_ADD, pes[r]);
  }

  // Waits until the puts of rank `r` that add to the word at `arrivals` are `expected` more than
  // `before`. `speaks`: see cuda::wait_for_word. False: the wait was given up, or there are more.
  __device__ bool wait_for_puts(cuda::OpId id, uint32_t r, uint64_t arrivals, uint64_t before,
                                uint64_t expected, bool speaks) const {
    const auto* address = word(arrivals);
    uint64_t seen = ptx::ld_acquire_sys(address) - before;
    if (seen < expected) seen = wait_for_arrivals(id, r, address, before, expected, speaks);
    if (seen > expected) {
      return cuda::fail(*this, id, Status::kCorrupt, r, expected, seen, 0);
    }
    return seen == expected;
  }

 protected:
  __device__ uint64_t* word(uint64_t offset) const { return cuda::at<uint64_t>(self_base, offset); }
  __device__ __noinline__ uint64_t wait_for_arrivals(cuda::OpId id, uint32_t r,
                                                     const uint64_t* address, uint64_t before,
                                                     uint64_t expected, bool speaks) const {
    const uint64_t begin_ns = ptx::globaltimer_ns();
    while (true) {
      uint64_t seen;
#pragma unroll 1
      for (uint32_t poll = 0; poll < cuda::kPollsPerLook; ++poll) {
        seen = ptx::ld_acquire_sys(address) - before;
        if (seen >= expected) break;
      }
      const uint64_t waited_ns = ptx::globaltimer_ns() - begin_ns;
      if (seen >= expected) {
        if (speaks) cuda::count_wait(*this, id, r, waited_ns);
        return seen;
      }
      if (waited_ns > timeout_ns) {
        cuda::fail(*this, id, Status::kNotArrived, r, expected, seen, waited_ns);
        return seen;
      }
      if (ptx::ld_relaxed_gpu(&state->failed) != 0) return seen;
    }
  }
};

// Every pair of ranks has its link; all are peers.
struct NetworkView : PuttingView {
  protocol::NetworkLayout network;
  uint64_t* arrived;  // [B][phase][R]: what the hooks so far have seen arrive

  __device__ bool reaches(uint32_t r) const { return cuda::base_of(*this, r) != nullptr; }
  __device__ bool is_peer(uint32_t) const { return true; }
  __device__ uint64_t num_outcome_slots(uint32_t) const { return layout.num_outcome_slots(); }

  // Waits until all of that operation is here whose signal said that there are `count` messages.
  __device__ bool has_arrived(cuda::OpId id, uint32_t bank, uint32_t r, uint64_t count,
                              bool speaks) const {
    const uint64_t before = arrived[network.arrivals_idx(bank, id.phase, r)];
    const uint64_t expected = count + (id.phase == Phase::kDispatch ? 1 : 0);  // the counts
    return wait_for_puts(id, r, network.arrivals(bank, id.phase, r), before, expected, speaks);
  }
  // For the hook that ends: what is here from rank `r` has been read.
  __device__ void note_arrived(uint32_t bank, Phase phase, uint32_t r) const {
    arrived[network.arrivals_idx(bank, phase, r)] =
        ptx::ld_relaxed_sys(word(network.arrivals(bank, phase, r)));
  }
};

}  // namespace ep::nvshmem
