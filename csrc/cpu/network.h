// A network between the nodes of a virtual world, and what is counted of every pair of ranks.
//
// It promises what RDMA promises, and nothing else. A put reads its source's memory when it is
// delivered, long after it was posted, and a piece at a time. A signal is written behind all puts
// and signals that were posted before it on its queue pair; apart from that everything comes in any
// order: puts of one queue pair, a put before a signal that was posted earlier, queue pairs among
// each other. A seed decides the order; delays keep whole queue pairs back.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "protocol/nodes.h"

namespace ep::cpu {

// Of one rank to one other: puts, or stores of rows where they reach each other's memory; 8-byte
// words that others wait for.
struct LinkCounters {
  uint64_t num_puts = 0;
  uint64_t put_bytes = 0;
  uint64_t num_signals = 0;
};

struct QueuePair {
  uint32_t src_rank;
  uint32_t dst_rank;
  uint32_t idx;  // below kNumQueuePairs
};
constexpr uint32_t kNumQueuePairs = 4;

class Network {
 public:
  // `max_delay_us`: how long, at most, the network's thread pauses between two deliveries.
  Network(const protocol::Nodes& nodes, uint64_t seed, uint32_t max_delay_us = 0);
  ~Network();
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  const protocol::Nodes& nodes() const { return nodes_; }

  // `src` must not change before a signal behind this put has been seen.
  void put(QueuePair queue_pair, std::byte* dst, const std::byte* src, uint64_t num_bytes);
  // Publishes `value` as publish() does (wait.h), behind all of the queue pair's puts so far.
  void signal(QueuePair queue_pair, uint64_t* word, uint64_t value, uint32_t* sleepers);
  // Of ranks of one node, which need no network.
  void count_store(uint32_t src_rank, uint32_t dst_rank, uint64_t num_bytes);
  void count_signal(uint32_t src_rank, uint32_t dst_rank);

  // Delivers something; false: there is nothing. For programs that call it between the steps of
  // their ranks; else a thread of the network's does, once started.
  bool deliver_one();
  void start_thread();
  // Waits until all that `src_rank` has posted is delivered. Whoever unmaps memory calls it first.
  void flush(uint32_t src_rank);

  LinkCounters counters(uint32_t src_rank, uint32_t dst_rank);

 private:
  struct Posted {
    std::byte* dst;  // null: a signal
    const std::byte* src;
    uint64_t num_bytes;
    uint64_t* word;
    uint64_t value;
    uint32_t* sleepers;
  };
  struct Queue {
    std::deque<Posted> posted;
    uint64_t held_until = 0;  // in deliveries
    uint32_t src_rank = 0;
  };

  uint64_t draw(uint64_t limit);  // 0 .. limit - 1
  void post(QueuePair queue_pair, const Posted& posted);
  LinkCounters& counters_of(uint32_t src_rank, uint32_t dst_rank) {
    return counters_[src_rank * nodes_.num_ranks + dst_rank];
  }
  size_t choose_queue();
  bool deliver_locked();
  void run();

  const protocol::Nodes nodes_;
  const uint32_t max_delay_us_;

  std::mutex mutex_;  // of all that follows
  std::condition_variable changed_;
  uint64_t random_;
  std::vector<Queue> queues_;
  std::vector<uint32_t> waiting_queues_;  // those with something posted
  std::vector<uint64_t> num_posted_of_;   // by source, not delivered yet
  std::vector<LinkCounters> counters_;
  uint64_t num_deliveries_ = 0;
  bool is_stopping_ = false;
  std::thread thread_;
};

// One rank's side of it. Offsets are in the memory of the rank that is written to, but for what is
// staged, which is in this rank's own.
class NetworkPort {
 public:
  NetworkPort(std::shared_ptr<Network> network, uint32_t self_rank, std::vector<std::byte*> bases)
      : network_(std::move(network)), self_rank_(self_rank), bases_(std::move(bases)) {}

  // To a rank of another node.
  void put(protocol::Phase phase, uint32_t dst_rank, uint64_t offset, uint64_t staged,
           uint64_t num_bytes);
  // Publishes: a word, and all that was put or stored before, to a rank of any node.
  void publish_word(protocol::Phase phase, uint32_t peer, uint64_t word, uint64_t value,
                    uint64_t sleepers);
  void count_store(uint32_t dst_rank, uint64_t num_bytes) {
    network_->count_store(self_rank_, dst_rank, num_bytes);
  }

 private:
  // Payload and signals of a phase share one, so that signals come behind the payload.
  QueuePair queue_pair(protocol::Phase phase, uint32_t dst_rank) const {
    return {self_rank_, dst_rank, static_cast<uint32_t>(phase)};
  }

  std::shared_ptr<Network> network_;
  uint32_t self_rank_;
  std::vector<std::byte*> bases_;
};

}  // namespace ep::cpu
