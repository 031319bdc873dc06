// The low-latency kernels of a rank that reaches some peers only over a network.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/low_latency.h"
#include "protocol/network_layout.h"

namespace ep::nvshmem {

class NetworkRank : public cuda::RankHost {
 public:
  // `bases[r]`: memory of rank r where this GPU writes it itself; null: puts go there. `pes[r]`:
  // NVSHMEM's number of rank r. `num_sms`: blocks a kernel has at most. Throws
  // std::invalid_argument for a config that these kernels do not serve, or where the GPU has too
  // little shared memory; std::runtime_error with the CUDA error where it refuses.
  NetworkRank(const protocol::LowLatencyConfig& config, uint32_t self_rank,
              const std::vector<std::byte*>& bases, const std::vector<int32_t>& pes,
              uint64_t timeout_ns, uint32_t num_sms);
  ~NetworkRank();

  protocol::OpResult dispatch_send(const cuda::DispatchSendParams& send, void* stream);
  protocol::OpResult dispatch_recv(const cuda::DispatchRecvParams& recv, void* stream);
  protocol::OpResult combine_send(const cuda::CombineSendParams& send, void* stream);
  protocol::OpResult combine_recv(const cuda::CombineRecvParams& recv, void* stream);

 private:
  struct Plan;
  Plan plan(uint64_t num_wanted, void* stream) const;
  uint64_t blocks_for_parts(uint64_t num_rows, uint64_t row_bytes) const;
  uint64_t blocks_for_peers(uint64_t num_wanted) const;
  // Of the latest dispatch, at most.
  uint64_t num_messages() const;

  protocol::NetworkLayout network_;
  uint32_t num_sms_;
  uint32_t num_remote_;            // ranks behind the network
  bool has_room_for_two_ = false;  // two blocks of any kernel fit an SM
  uint32_t num_tokens_ = 0;        // of the latest dispatch
  int32_t* pes_ = nullptr;
  uint64_t* arrived_ = nullptr;
};

}  // namespace ep::nvshmem
