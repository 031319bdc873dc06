// A message: one token for one rank, however many of its experts live there. Its header, its row
// and the row's scales (float8 only) lie in regions of their own, under the same slot.
//
//   0                16                     header_bytes
//   | MessageHeader  | ExpertEntry x top_k  | pad |        | row: hidden elements |     | scales |
//
// Example, top_k = 3, R = 2, E = 4 (rank 1 owns experts 2 and 3): token 5 routed to experts
// [3, 0, 2] reaches rank 1 as {src_token 5, outcome_slot 5 * 2 + 1, num_entries 2, epoch_tag} and
// the entries {local_expert 1, k 0, p, w0}, {local_expert 0, k 2, q, w2}, where p of the tokens
// 0..4 of this source go to expert 3 and q to expert 2.
#pragma once

#include "protocol/base.h"

namespace ep::protocol {

struct MessageHeader {
  uint32_t src_token;  // row of x on the source
  // Where combine puts this rank's partial row, in rows of `outcome`; Reduction::kSource: the row
  // of k 0, behind which those of the other k lie.
  uint32_t outcome_slot;
  uint32_t num_entries;  // experts of this token on the receiving rank, 1..top_k
  uint32_t epoch_tag;    // low 32 bits of the epoch: a message from another epoch is an error
};
static_assert(sizeof(MessageHeader) == 16);

struct ExpertEntry {
  uint16_t local_expert;
  uint16_t k;  // position in the token's topk_idx; entries are in this order
  // Rows that this source sends to the expert before this one. The row's place follows: behind the
  // rows of earlier sources, which the counts tell. So messages are unpacked in any order.
  uint32_t position;
  float weight;
};
static_assert(sizeof(ExpertEntry) == 12);

EP_HOST_DEVICE constexpr uint64_t header_bytes(uint32_t top_k) {
  return align_up(sizeof(MessageHeader) + top_k * sizeof(ExpertEntry), kHeaderAlign);
}

}  // namespace ep::protocol
