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
  float weight;
};
static_assert(sizeof(HandleEntry) == 8);
struct HandleView {
  uint32_t* num_messages;   // [R]
  HandleMessage* messages;  // [R * M]
  HandleEntry* entries;     // [R * M * K], by message, then k
};

}  // namespace ep::protocol
