// What the operations of one rank have done since its buffer's creation. Always counted: some
// nanoseconds an operation (`ep-backend bench observe`). A kind of operation has one writer at a
// time, because operations of a kind do not overlap; any thread may read meanwhile.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/atomics.h"

namespace ep::cpu {

// Durations fall into buckets of up to 2, 4, 8 us, .. 1.07 s (powers of two of nanoseconds), and
// longer.
constexpr uint32_t kFirstBucketBits = 11;
constexpr uint32_t kNumBoundedBuckets = 20;
constexpr uint32_t kNumBuckets = kNumBoundedBuckets + 1;

constexpr uint64_t bucket_limit_ns(uint32_t bucket) {
  return uint64_t{1} << (kFirstBucketBits + bucket);
}

inline uint32_t bucket_of(uint64_t ns) {
  if (ns <= bucket_limit_ns(0)) return 0;
  const auto num_bits = static_cast<uint32_t>(64 - __builtin_clzll(ns - 1));
  const uint32_t bucket = num_bits - kFirstBucketBits;
  return bucket < kNumBoundedBuckets ? bucket : kNumBoundedBuckets;
}

struct OpCounters {
  uint64_t num_ops = 0;
  uint64_t num_rows = 0;  // rows of x, messages: what the operation read
  uint64_t total_ns = 0;
  uint64_t wait_ns = 0;  // part of total_ns spent waiting for peers
  uint64_t num_in_bucket[kNumBuckets] = {};
};

class Statistics {
 public:
  Statistics(uint32_t num_kinds, uint32_t num_ranks, uint32_t num_local_experts)
      : num_ranks_(num_ranks),
        ops_(num_kinds),
        wait_ns_(num_kinds * num_ranks),
        sent_bytes_(num_kinds * num_ranks),
        num_expert_rows_(num_local_experts) {}

  void add_op(uint32_t kind, uint64_t num_rows, uint64_t total_ns, uint64_t wait_ns) {
    OpCounters& op = ops_[kind];
    add(&op.num_ops, 1);
    add(&op.num_rows, num_rows);
    add(&op.total_ns, total_ns);
    add(&op.wait_ns, wait_ns);
    add(&op.num_in_bucket[bucket_of(total_ns)], 1);
  }
  void add_wait(uint32_t kind, uint32_t peer_rank, uint64_t ns) {
    add(&wait_ns_[kind * num_ranks_ + peer_rank], ns);
  }
  // Of rows and their scales, as they travel.
  void add_sent(uint32_t kind, uint32_t dst_rank, uint64_t num_bytes) {
    add(&sent_bytes_[kind * num_ranks_ + dst_rank], num_bytes);
  }
  void add_expert_rows(uint32_t local_expert, uint64_t num_rows) {
    add(&num_expert_rows_[local_expert], num_rows);
  }

  uint32_t num_ranks() const { return num_ranks_; }
  const std::vector<OpCounters>& ops() const { return ops_; }
  const std::vector<uint64_t>& wait_ns() const { return wait_ns_; }                  // [kind][R]
  const std::vector<uint64_t>& sent_bytes() const { return sent_bytes_; }            // [kind][R]
  const std::vector<uint64_t>& num_expert_rows() const { return num_expert_rows_; }  // [L]

 private:
  static void add(uint64_t* word, uint64_t value) { st_relaxed(word, *word + value); }

  uint32_t num_ranks_;
  std::vector<OpCounters> ops_;
  std::vector<uint64_t> wait_ns_;
  std::vector<uint64_t> sent_bytes_;
  std::vector<uint64_t> num_expert_rows_;
};

}  // namespace ep::cpu
