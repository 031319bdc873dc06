// What an operation reports, and what a dispatch leaves for its combine. The same for all kernels.
#pragma once

#include "protocol/base.h"

namespace ep::protocol {

enum class Status : uint32_t {
  kOk,
  kTimeout,       // a peer did not come in time; the buffer is failed from now on
  kBufferFailed,  // an earlier operation failed the buffer
  kOutOfOrder,    // this call may not start now
  kNewerEpoch,    // a peer is ahead of what the protocol allows
  kCorrupt,       // a message or count contradicts its signal
  kBadExpert,     // topk_idx holds an expert that does not exist
  kInterrupted,   // a signal handler wants to run (Ctrl-C); nothing was done, call again
  kTooManyRows,   // more rows come than there is room for
  kNotArrived,    // a peer's signal came, over a network, but not all of what it tells
};

// What an operation was doing when it gave up. Filled by the kernels, turned into an exception
// above.
struct FlightRecord {
  int32_t self_rank = -1;
  int32_t peer_rank = -1;
  Phase phase = Phase::kDispatch;
  Half half = Half::kSend;
  uint64_t epoch = 0;
  uint64_t expected = 0;
  uint64_t seen = 0;
  uint64_t waited_ns = 0;
};

struct OpResult {
  Status status = Status::kOk;
  FlightRecord record;  // for every status but kOk and kBadExpert
  uint32_t token = 0;   // for kBadExpert: topk_idx[token][k] == expert
  uint32_t k = 0;
  int64_t expert = 0;
  uint64_t wait_ns = 0;
};

// What the dispatch hook copies out of the inbox so that combine can answer after the bank has been
// given back. Messages of source 0 come first, then of source 1, ...
struct HandleMessage {
  uint32_t src_token;
  uint32_t outcome_slot;
  uint32_t first_entry;
  uint32_t num_entries;
};
static_assert(sizeof(HandleMessage) == 16);
struct HandleEntry {
  uint32_t row;  // in recv_x seen as [L * S, H]
  float weight;  // Reduction::kSource: the bits of k
};
static_assert(sizeof(HandleEntry) == 8);
struct HandleView {
  uint32_t* num_messages;   // [R]
  HandleMessage* messages;  // [R * M]
  HandleEntry* entries;     // [R * M * K], by message, then k
};

// How received rows are arranged.
enum class OutputLayout : uint32_t {
  kExpertMajor = 0,  // [L, S, H]: a row for each (token, expert), packed
  kRankMajor = 1,    // [R, M, H]: a row for each (token, source), with its experts beside it
};

// What the four kernels are given. Shapes: T tokens of this rank (T <= M), H hidden, K top_k, L
// local experts, R ranks, M tokens a rank at most, S = R * M, N scales of a row.
struct DispatchSendParams {
  const std::byte* x;     // [T, H]
  bool x_is_quantized;    // x is float8 already, with its scales
  const float* x_scales;  // [T, N], where x_is_quantized
  const void* topk_idx;   // [T, K] int32 or int64, -1 = not routed
  bool topk_idx_is_int64;
  const float* topk_weights;  // [T, K]
  uint32_t num_tokens;
  // out [T], and [T, C]: rows that will come home for each token, and which they are. Partial rows:
  // in the order of their ranks, rank << 16 | the message's slot (read by GPUs, and between nodes).
  // All rows (Reduction::kSource): by ascending k, rank << 16 | k; or, where they are packed,
  // column << 16 | k. From workspaces by expert, [T, 2 K]: of each k its rank, ~0 where it is not
  // routed, then of each k the row there.
  uint32_t* num_partials;
  uint32_t* answers;
  int32_t workspace;   // where the rows go on every rank; -1: the buffer has no workspaces
  uint32_t num_slots;  // of each source in the workspace, T of every rank at most
};
// Of a workspace only the handle's num_messages are written, and by expert the counts: the rest is
// where it came from.
struct DispatchRecvParams {
  OutputLayout output;
  std::byte* recv_x;                    // out [L, S, H] or [R, M, H]
  void* recv_scales;                    // out, float8: see scales.h
  int32_t* num_recv_tokens_per_expert;  // out [L], expert-major
  int32_t* recv_topk_idx;               // out [R, M, K] local experts, -1 = none; rank-major
  float* recv_topk_weights;             // out [R, M, K], rank-major
  HandleView handle;                    // out
  int32_t workspace;                    // as above
  uint32_t num_slots;                   // as above
  // By expert in workspaces, where the send was a kernel of its own: its batch, whose answers the
  // hook completes if its rows are tagged.
  uint32_t num_tokens = 0;
  uint32_t* answers = nullptr;
};
struct CombineSendParams {
  const std::byte* expert_out;  // [L, S, H] or [R, M, H], as dispatch's output
  HandleView handle;
  int32_t workspace;   // as above; expert_out is its combine input
  uint32_t num_slots;  // as above
};
struct CombineRecvParams {
  std::byte* out;  // out [T, H]
  uint32_t num_tokens;
  const uint32_t* num_partials;  // [T], from dispatch_send
  const uint32_t* answers;       // [T, C], from dispatch_send
  const float* topk_weights;     // [T, K], Reduction::kSource
  int32_t workspace;             // as above
  uint32_t num_slots;            // as above
};

}  // namespace ep::protocol
