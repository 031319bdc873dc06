#include "cpu/network.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "cpu/atomics.h"
#include "cpu/rows.h"
#include "cpu/wait.h"

namespace ep::cpu {
namespace {

// Among how many of a queue pair's oldest operations the next one is drawn.
constexpr uint64_t kWindow = 16;
// A put is delivered in up to so many pieces.
constexpr uint64_t kMaxPieces = 3;
// One queue pair in so many is held back when something is posted to it, for up to so many
// deliveries of others.
constexpr uint64_t kHeldOneIn = 4;
constexpr uint64_t kMaxHeld = 64;

}  // namespace

Network::Network(const protocol::Nodes& nodes, uint64_t seed, uint32_t max_delay_us)
    : nodes_(nodes),
      max_delay_us_(max_delay_us),
      random_(seed),
      queues_(nodes.num_ranks * nodes.num_ranks * kNumQueuePairs),
      num_posted_of_(nodes.num_ranks),
      counters_(nodes.num_ranks * nodes.num_ranks) {}

Network::~Network() {
  {
    std::lock_guard lock(mutex_);
    is_stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

// splitmix64
uint64_t Network::draw(uint64_t limit) {
  uint64_t z = random_ += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return (z ^ (z >> 31)) % limit;
}

void Network::put(QueuePair queue_pair, std::byte* dst, const std::byte* src, uint64_t num_bytes) {
  std::lock_guard lock(mutex_);
  LinkCounters& counters = counters_of(queue_pair.src_rank, queue_pair.dst_rank);
  ++counters.num_puts;
  counters.put_bytes += num_bytes;
  const uint64_t num_pieces = 1 + draw(kMaxPieces);
  for (uint64_t i = 0; i < num_pieces; ++i) {
    const uint64_t begin = num_bytes * i / num_pieces, end = num_bytes * (i + 1) / num_pieces;
    post(queue_pair, {dst + begin, src + begin, end - begin, nullptr, 0, nullptr});
  }
}

void Network::signal(QueuePair queue_pair, uint64_t* word, uint64_t value, uint32_t* sleepers) {
  std::lock_guard lock(mutex_);
  ++counters_of(queue_pair.src_rank, queue_pair.dst_rank).num_signals;
  post(queue_pair, {nullptr, nullptr, 0, word, value, sleepers});
}

void Network::count_store(uint32_t src_rank, uint32_t dst_rank, uint64_t num_bytes) {
  std::lock_guard lock(mutex_);
  LinkCounters& counters = counters_of(src_rank, dst_rank);
  ++counters.num_puts;
  counters.put_bytes += num_bytes;
}

void Network::count_signal(uint32_t src_rank, uint32_t dst_rank) {
  std::lock_guard lock(mutex_);
  ++counters_of(src_rank, dst_rank).num_signals;
}

void Network::post(QueuePair queue_pair, const Posted& posted) {
  const uint32_t idx =
      (queue_pair.src_rank * nodes_.num_ranks + queue_pair.dst_rank) * kNumQueuePairs +
      queue_pair.idx;
  Queue& queue = queues_[idx];
  queue.src_rank = queue_pair.src_rank;
  if (queue.posted.empty()) {
    waiting_queues_.push_back(idx);
    if (draw(kHeldOneIn) == 0) queue.held_until = num_deliveries_ + draw(kMaxHeld);
  }
  queue.posted.push_back(posted);
  ++num_posted_of_[queue_pair.src_rank];
  changed_.notify_all();
}

// An index into waiting_queues_. Where all are held back, of the one that is held the shortest.
size_t Network::choose_queue() {
  const size_t num_queues = waiting_queues_.size();
  const size_t first = draw(num_queues);
  size_t shortest = first;
  for (size_t i = 0; i < num_queues; ++i) {
    const size_t candidate = (first + i) % num_queues;
    const uint64_t held_until = queues_[waiting_queues_[candidate]].held_until;
    if (held_until <= num_deliveries_) return candidate;
    if (held_until < queues_[waiting_queues_[shortest]].held_until) shortest = candidate;
  }
  return shortest;
}

bool Network::deliver_locked() {
  if (waiting_queues_.empty()) return false;
  const size_t chosen = choose_queue();
  Queue& queue = queues_[waiting_queues_[chosen]];
  uint64_t i = draw(std::min<uint64_t>(kWindow, queue.posted.size()));
  const bool is_signal = queue.posted[i].dst == nullptr;
  if (is_signal) i = 0;  // what was posted first goes before it
  const Posted posted = queue.posted[i];
  queue.posted.erase(queue.posted.begin() + static_cast<std::ptrdiff_t>(i));
  if (posted.dst != nullptr) {
    std::memcpy(posted.dst, posted.src, posted.num_bytes);
  } else {
    publish(posted.word, posted.value, posted.sleepers);
  }
  ++num_deliveries_;
  --num_posted_of_[queue.src_rank];
  if (queue.posted.empty()) {
    waiting_queues_[chosen] = waiting_queues_.back();
    waiting_queues_.pop_back();
  }
  changed_.notify_all();
  return true;
}

bool Network::deliver_one() {
  std::lock_guard lock(mutex_);
  return deliver_locked();
}

void Network::start_thread() {
  thread_ = std::thread([this] { run(); });
}

void Network::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return is_stopping_ || !waiting_queues_.empty(); });
    if (waiting_queues_.empty()) return;
    deliver_locked();
    const uint64_t delay_us = max_delay_us_ > 0 ? draw(max_delay_us_ + 1) : 0;
    // The lock is free for a moment either way: ranks want to post.
    lock.unlock();
    if (delay_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
    lock.lock();
  }
}

void Network::flush(uint32_t src_rank) {
  std::unique_lock lock(mutex_);
  while (num_posted_of_[src_rank] > 0) {
    if (thread_.joinable()) {
      changed_.wait(lock);
    } else {
      deliver_locked();
    }
  }
}

LinkCounters Network::counters(uint32_t src_rank, uint32_t dst_rank) {
  std::lock_guard lock(mutex_);
  return counters_of(src_rank, dst_rank);
}

void NetworkPort::put(protocol::Phase phase, uint32_t dst_rank, uint64_t offset, uint64_t staged,
                      uint64_t num_bytes) {
  fence_streamed_rows();
  network_->put(queue_pair(phase, dst_rank), bases_[dst_rank] + offset, bases_[self_rank_] + staged,
                num_bytes);
}

void NetworkPort::publish_word(protocol::Phase phase, uint32_t peer, uint64_t word, uint64_t value,
                               uint64_t sleepers) {
  auto* dst = at<uint64_t>(bases_[peer], word);
  auto* dst_sleepers = at<uint32_t>(bases_[peer], sleepers);
  if (network_->nodes().share_node(self_rank_, peer)) {
    network_->count_signal(self_rank_, peer);
    publish(dst, value, dst_sleepers);
  } else {
    network_->signal(queue_pair(phase, peer), dst, value, dst_sleepers);
  }
}

}  // namespace ep::cpu
