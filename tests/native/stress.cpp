// R ranks as threads over ordinary memory, a few thousand dispatch/combine pairs with batch sizes
// and routings that change from one to the next; every received row and every result is checked.
// Built by test_sanitizers.py under ThreadSanitizer and AddressSanitizer, with no Python in the
// process.
//
//   stress MODE RANKS BANKS OPS HIDDEN DTYPE [damage]
//   MODE loop    d h c hc, one thread a rank
//        steady  BANKS dispatches outstanding all the time, one thread a rank
//        split   sends in one thread of the rank, hooks in another
//   damage       one payload byte of one message is changed: the check must end the program
//
// T tokens, H hidden, K top-k, E experts, R ranks, M tokens a rank at most, B banks.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cpu/low_latency.h"

namespace {

using namespace ep;
using protocol::DType;
using protocol::LowLatencyConfig;

constexpr uint32_t kMaxTokens = 5;
constexpr uint32_t kNumExperts = 7;
constexpr uint32_t kTopK = 3;

struct Options {
  std::string mode;
  uint32_t num_ranks, num_banks;
  uint64_t num_ops;
  uint32_t hidden;
  DType dtype;
  bool damage;
};

[[noreturn]] void give_up(const char* what, uint32_t rank, uint64_t op, uint64_t a, uint64_t b) {
  std::fprintf(stderr, "stress: rank %u, operation %llu: %s: %llu, %llu\n", rank,
               static_cast<unsigned long long>(op), what, static_cast<unsigned long long>(a),
               static_cast<unsigned long long>(b));
  std::fflush(stderr);
  std::_Exit(1);
}

// Routing and payload are functions of (op, rank, token): every rank can say what every other sent.
uint64_t mix(uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}
uint64_t hash(uint64_t op, uint32_t rank, uint32_t token, uint32_t salt) {
  return mix(mix(mix(op * 1024 + rank) + token) + salt);
}

uint32_t num_tokens(uint64_t op, uint32_t rank) {
  return static_cast<uint32_t>(hash(op, rank, 0, 1) % (kMaxTokens + 1));
}
int64_t expert_of(uint64_t op, uint32_t rank, uint32_t token, uint32_t k) {
  if (op % 11 == 3) return k == 0 ? int64_t{kNumExperts} - 1 : -1;  // all tokens on one expert
  return static_cast<int64_t>(hash(op, rank, token, 2 + k) % (kNumExperts + 1)) - 1;
}
// Integers up to 256 are exact in both payload types; so are all sums below.
uint32_t element_of(uint64_t op, uint32_t rank, uint32_t token, uint32_t column) {
  return static_cast<uint32_t>((op % 5 + rank * 2 + token + column) % 16);
}

void store(std::byte* row, uint32_t column, DType dtype, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (dtype == DType::kFloat32) {
    std::memcpy(row + 4 * column, &bits, 4);
  } else {
    const auto high = static_cast<uint16_t>(bits >> 16);
    std::memcpy(row + 2 * column, &high, 2);
  }
}
float load(const std::byte* row, uint32_t column, DType dtype) {
  uint32_t bits = 0;
  if (dtype == DType::kFloat32) {
    std::memcpy(&bits, row + 4 * column, 4);
  } else {
    uint16_t high;
    std::memcpy(&high, row + 2 * column, 2);
    bits = uint32_t{high} << 16;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// What one operation of one rank keeps between its send and its hooks.
struct Operation {
  std::vector<uint32_t> num_partials;
  std::vector<uint32_t> num_messages;
  std::vector<cpu::HandleMessage> messages;
  std::vector<cpu::HandleEntry> entries;
  std::vector<std::byte> recv_x;
  std::vector<int32_t> counts;
  std::vector<std::byte> out;

  cpu::HandleView handle() { return {num_messages.data(), messages.data(), entries.data()}; }
};

class Rank {
 public:
  Rank(const Options& options, const LowLatencyConfig& config, uint32_t self,
       const std::vector<std::byte*>& bases)
      : options_(options),
        self_(self),
        base_(bases[self]),
        kernels_(config, self, bases, cpu::WaitPolicy{20'000'000'000, self % 2 * 5'000, nullptr}) {}

  std::unique_ptr<Operation> dispatch_send(uint64_t op) {
    const uint32_t tokens = num_tokens(op, self_);
    const uint64_t row_bytes = kernels_.layout().row_bytes();
    std::vector<std::byte> x(tokens * row_bytes);
    std::vector<int64_t> topk_idx(tokens * kTopK);
    std::vector<float> topk_weights(tokens * kTopK, 1.0f);
    for (uint32_t token = 0; token < tokens; ++token) {
      for (uint32_t column = 0; column < options_.hidden; ++column) {
        store(x.data() + token * row_bytes, column, options_.dtype,
              static_cast<float>(element_of(op, self_, token, column)));
      }
      for (uint32_t k = 0; k < kTopK; ++k) {
        topk_idx[token * kTopK + k] = expert_of(op, self_, token, k);
      }
    }
    auto operation = std::make_unique<Operation>();
    operation->num_partials.resize(tokens);
    check(kernels_.dispatch_send({x.data(), topk_idx.data(), true, topk_weights.data(), tokens,
                                  operation->num_partials.data()}),
          "dispatch send", op);
    return operation;
  }

  void dispatch_recv(uint64_t op, Operation& operation) {
    const auto& layout = kernels_.layout();
    const uint32_t num_local = layout.partition().num_local_experts(self_);
    const uint64_t num_slots = layout.expert_capacity();
    operation.num_messages.resize(options_.num_ranks);
    operation.messages.resize(num_slots);
    operation.entries.resize(num_slots * kTopK);
    operation.recv_x.resize(num_local * num_slots * layout.row_bytes());
    operation.counts.resize(num_local);
    if (options_.damage && op == 6 && self_ == 0) damage(op);
    check(kernels_.dispatch_recv(
              {operation.recv_x.data(), operation.counts.data(), operation.handle()}),
          "dispatch recv", op);
    check_rows(op, operation);
  }

  // The expert: adds its number to a row. Weights are 1, so sums stay exact.
  void combine_send(uint64_t op, Operation& operation) {
    const auto& layout = kernels_.layout();
    for (size_t local = 0; local < operation.counts.size(); ++local) {
      const uint32_t expert = layout.partition().first_expert(self_) + static_cast<uint32_t>(local);
      for (int32_t i = 0; i < operation.counts[local]; ++i) {
        std::byte* row = row_of(operation, local, i);
        for (uint32_t c = 0; c < options_.hidden; ++c) {
          store(row, c, options_.dtype, load(row, c, options_.dtype) + static_cast<float>(expert));
        }
      }
    }
    check(kernels_.combine_send({operation.recv_x.data(), operation.handle()}), "combine send", op);
  }

  void combine_recv(uint64_t op, Operation& operation) {
    const uint32_t tokens = num_tokens(op, self_);
    const uint64_t row_bytes = kernels_.layout().row_bytes();
    operation.out.resize(tokens * row_bytes);
    check(kernels_.combine_recv({operation.out.data(), tokens, operation.num_partials.data()}),
          "combine recv", op);
    for (uint32_t token = 0; token < tokens; ++token) {
      for (uint32_t column = 0; column < options_.hidden; ++column) {
        float expected = 0;
        for (uint32_t k = 0; k < kTopK; ++k) {
          const int64_t expert = expert_of(op, self_, token, k);
          if (expert < 0) continue;
          expected +=
              static_cast<float>(element_of(op, self_, token, column)) + static_cast<float>(expert);
        }
        const float got = load(operation.out.data() + token * row_bytes, column, options_.dtype);
        if (got != expected) {
          give_up("wrong result (token, column)", self_, op, token, column);
        }
      }
    }
  }

 private:
  void check(const cpu::OpResult& result, const char* what, uint64_t op) const {
    if (result.status != cpu::Status::kOk) {
      give_up(what, self_, op, static_cast<uint64_t>(result.status),
              static_cast<uint64_t>(result.record.peer_rank));
    }
  }

  std::byte* row_of(Operation& operation, size_t local, int32_t i) const {
    const auto& layout = kernels_.layout();
    const uint64_t row = local * layout.expert_capacity() + static_cast<uint64_t>(i);
    return operation.recv_x.data() + row * layout.row_bytes();
  }

  // Rows of each expert, by source, then token; an expert that a token lists twice has one row.
  void check_rows(uint64_t op, Operation& operation) const {
    for (size_t local = 0; local < operation.counts.size(); ++local) {
      const int64_t expert =
          kernels_.layout().partition().first_expert(self_) + static_cast<int64_t>(local);
      int32_t next = 0;
      for (uint32_t src = 0; src < options_.num_ranks; ++src) {
        for (uint32_t token = 0; token < num_tokens(op, src); ++token) {
          bool is_routed = false;
          for (uint32_t k = 0; k < kTopK; ++k) {
            is_routed |= expert_of(op, src, token, k) == expert;
          }
          if (!is_routed) continue;
          const std::byte* row = row_of(operation, local, next++);
          for (uint32_t column = 0; column < options_.hidden; ++column) {
            if (load(row, column, options_.dtype) !=
                static_cast<float>(element_of(op, src, token, column))) {
              give_up("wrong row (src rank, token)", self_, op, src, token);
            }
          }
        }
      }
      if (next != operation.counts[local]) {
        give_up("wrong count (expected, got)", self_, op, static_cast<uint64_t>(next),
                static_cast<uint64_t>(operation.counts[local]));
      }
    }
  }

  // Of a message from this rank to itself, so that nobody else is writing there.
  void damage(uint64_t op) {
    const auto& layout = kernels_.layout();
    const uint32_t bank = protocol::bank_of(op + 1, options_.num_banks);
    base_[layout.message(bank, self_, 0) + layout.payload_in_message() + 1] ^= std::byte{0x40};
  }

  const Options& options_;
  uint32_t self_;
  std::byte* base_;
  cpu::LowLatencyRank kernels_;
};

void run_loop(Rank& rank, const Options& options) {
  for (uint64_t op = 0; op < options.num_ops; ++op) {
    auto operation = rank.dispatch_send(op);
    rank.dispatch_recv(op, *operation);
    rank.combine_send(op, *operation);
    rank.combine_recv(op, *operation);
  }
}

void run_steady(Rank& rank, const Options& options) {
  std::deque<std::unique_ptr<Operation>> sent;
  for (uint64_t op = 0; op < options.num_ops + options.num_banks; ++op) {
    if (op >= options.num_banks) {
      rank.dispatch_recv(op - options.num_banks, *sent.front());
      sent.pop_front();
    }
    if (op < options.num_ops) sent.push_back(rank.dispatch_send(op));
  }
}

// The sender publishes an operation to the hooks' thread, and waits there for a free bank.
void run_split(Rank& rank, const Options& options) {
  std::vector<std::unique_ptr<Operation>> operations(options.num_ops);
  std::atomic<uint64_t> num_sent{0}, num_hooked{0};
  std::thread hooks([&] {
    for (uint64_t op = 0; op < options.num_ops; ++op) {
      while (num_sent.load() <= op) std::this_thread::yield();
      rank.dispatch_recv(op, *operations[op]);
      num_hooked.store(op + 1);
      // Combine sends and hooks of this rank, beside the dispatch sends of the other thread.
      rank.combine_send(op, *operations[op]);
      rank.combine_recv(op, *operations[op]);
      operations[op].reset();
    }
  });
  for (uint64_t op = 0; op < options.num_ops; ++op) {
    while (op - num_hooked.load() >= options.num_banks) std::this_thread::yield();
    operations[op] = rank.dispatch_send(op);
    num_sent.store(op + 1);
  }
  hooks.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) return 2;
  const Options options{argv[1],
                        static_cast<uint32_t>(std::atoi(argv[2])),
                        static_cast<uint32_t>(std::atoi(argv[3])),
                        static_cast<uint64_t>(std::atoll(argv[4])),
                        static_cast<uint32_t>(std::atoi(argv[5])),
                        std::string(argv[6]) == "float32" ? DType::kFloat32 : DType::kBFloat16,
                        argc > 7};
  const LowLatencyConfig config{options.num_ranks, kNumExperts,  kMaxTokens, options.hidden, kTopK,
                                options.num_banks, options.dtype};
  // Exactly as many bytes as the layout says: AddressSanitizer sees the first byte behind them.
  const uint64_t num_bytes = protocol::LowLatencyLayout(config).num_bytes();
  std::vector<std::byte*> bases;
  for (uint32_t rank = 0; rank < options.num_ranks; ++rank) {
    bases.push_back(static_cast<std::byte*>(std::aligned_alloc(128, num_bytes)));
    std::memset(bases.back(), 0, num_bytes);
  }
  auto* run = options.mode == "loop" ? run_loop : options.mode == "steady" ? run_steady : run_split;
  std::vector<std::unique_ptr<Rank>> ranks;
  for (uint32_t rank = 0; rank < options.num_ranks; ++rank) {
    ranks.push_back(std::make_unique<Rank>(options, config, rank, bases));
  }
  std::vector<std::thread> threads;
  for (auto& rank : ranks) threads.emplace_back([&] { run(*rank, options); });
  for (auto& thread : threads) thread.join();
  for (std::byte* base : bases) std::free(base);
  std::puts("stress: ok");
  return 0;
}
