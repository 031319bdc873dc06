// Where one token goes: its experts, by the rank that owns them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "protocol/layout.h"
#include "protocol/op.h"

namespace ep::cpu {

inline int64_t expert_at(const protocol::DispatchSendParams& params, uint64_t i) {
  return params.topk_idx_is_int64 ? static_cast<const int64_t*>(params.topk_idx)[i]
                                  : static_cast<const int32_t*>(params.topk_idx)[i];
}

// The weight of a route; none where only its home knows them (Reduction::kSource).
inline float weight_at(const protocol::DispatchSendParams& params, uint64_t i) {
  return params.topk_weights == nullptr ? 0.0f : params.topk_weights[i];
}

// The experts of one token, grouped by the rank that owns them: ranks ascending, k ascending
// within.
class TokenRoutes {
 public:
  struct Route {
    uint32_t rank;
    uint32_t expert;
    protocol::ExpertEntry entry;
  };

  void assign(const protocol::ExpertPartition& partition,
              const protocol::DispatchSendParams& params, uint32_t token, uint32_t top_k) {
    num_routes_ = 0;
    for (uint32_t k = 0; k < top_k; ++k) {
      const uint64_t i = uint64_t{token} * top_k + k;
      const int64_t expert_or_none = expert_at(params, i);
      if (expert_or_none < 0) continue;
      const uint32_t expert = static_cast<uint32_t>(expert_or_none);
      const uint32_t rank = partition.owner(expert);
      const auto local_expert = static_cast<uint16_t>(expert - partition.first_expert(rank));
      uint32_t place = num_routes_++;
      for (; place > 0 && routes_[place - 1].rank > rank; --place) {
        routes_[place] = routes_[place - 1];
      }
      routes_[place] = {
          rank, expert, {local_expert, static_cast<uint16_t>(k), 0, weight_at(params, i)}};
    }
  }

  const Route* begin() const { return routes_; }
  const Route* end() const { return routes_ + num_routes_; }

 private:
  Route routes_[protocol::kMaxTopK];
  uint32_t num_routes_ = 0;
};

// A token may list an expert twice. It then occupies one row there, and both weights count.
inline const protocol::ExpertEntry* find_twin(const protocol::ExpertEntry* entries,
                                              const protocol::ExpertEntry* entry) {
  const auto* twin = std::find_if(entries, entry, [&](const protocol::ExpertEntry& e) {
    return e.local_expert == entry->local_expert;
  });
  return twin == entry ? nullptr : twin;
}

}  // namespace ep::cpu
