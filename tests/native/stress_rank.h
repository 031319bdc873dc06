// One rank of the stress program: its inputs, the four calls, and checks of all that comes out.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "protocol/scales.h"
#include "stress_kernels.h"

namespace stress {

using namespace ep;
using protocol::DType;
using protocol::LowLatencyConfig;
using protocol::OutputLayout;

constexpr uint32_t kMaxTokens = 5;
constexpr uint32_t kNumExperts = 7;
constexpr uint32_t kTopK = 3;

struct Options {
  std::string mode;
  uint32_t num_ranks, num_banks;
  uint64_t num_ops;
  uint32_t hidden;
  DType dtype, dispatch_dtype, combine_dtype;
  OutputLayout output;
  protocol::Reduction reduction;
  bool damage;
};

inline LowLatencyConfig config_of(const Options& options) {
  LowLatencyConfig config{options.num_ranks,
                          kNumExperts,
                          kMaxTokens,
                          options.hidden,
                          kTopK,
                          options.num_banks,
                          options.dtype,
                          options.dispatch_dtype,
                          protocol::ScaleFormat::kPowerOfTwo};
  config.reduction = options.reduction;
  config.combine_dtype = options.combine_dtype;
  return config;
}

[[noreturn]] inline void give_up(const char* what, uint32_t rank, uint64_t op, uint64_t a,
                                 uint64_t b) {
  std::fprintf(stderr, "stress: rank %u, operation %llu: %s: %llu, %llu\n", rank,
               static_cast<unsigned long long>(op), what, static_cast<unsigned long long>(a),
               static_cast<unsigned long long>(b));
  std::fflush(stderr);
  std::_Exit(1);
}

// Routing and payload are functions of (op, rank, token): every rank can say what every other sent.
inline uint64_t mix(uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}
inline uint64_t hash(uint64_t op, uint32_t rank, uint32_t token, uint32_t salt) {
  return mix(mix(mix(op * 1024 + rank) + token) + salt);
}

inline uint32_t num_tokens(uint64_t op, uint32_t rank) {
  return static_cast<uint32_t>(hash(op, rank, 0, 1) % (kMaxTokens + 1));
}
inline int64_t expert_of(uint64_t op, uint32_t rank, uint32_t token, uint32_t k) {
  if (op % 11 == 3) return k == 0 ? int64_t{kNumExperts} - 1 : -1;  // all tokens on one expert
  return static_cast<int64_t>(hash(op, rank, token, 2 + k) % (kNumExperts + 1)) - 1;
}
// Integers up to 16 are exact in all payload types, also as float8 with a scale that is a power of
// two; so are all sums below.
inline uint32_t element_of(uint64_t op, uint32_t rank, uint32_t token, uint32_t column) {
  return static_cast<uint32_t>((op % 5 + rank * 2 + token + column) % 16);
}

inline void store(std::byte* row, uint32_t column, DType dtype, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (dtype == DType::kFloat32) {
    std::memcpy(row + 4 * column, &bits, 4);
  } else {
    const auto high = static_cast<uint16_t>(bits >> 16);
    std::memcpy(row + 2 * column, &high, 2);
  }
}
// Four bits of exponent, three of mantissa; no number here is so small that it has no exponent.
inline float from_e4m3(std::byte byte) {
  const auto bits = static_cast<uint32_t>(byte);
  return bits == 0 ? 0.0f : protocol::float_of((bits << 20) + ((127 - 7) << 23));
}
inline float load(const std::byte* row, uint32_t column, DType dtype) {
  uint32_t bits = 0;
  if (dtype == DType::kFloat8E4M3) return from_e4m3(row[column]);
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

class Rank {
 public:
  Rank(const Options& options, uint32_t self, std::byte* base, std::unique_ptr<Kernels> kernels)
      : options_(options), self_(self), base_(base), kernels_(std::move(kernels)) {}

  std::unique_ptr<Operation> dispatch_send(uint64_t op) {
    const uint32_t tokens = num_tokens(op, self_);
    const uint64_t row_bytes = kernels_->layout().row_bytes();
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
    operation->answers.resize(tokens * kernels_->layout().num_outcome_columns());
    check(kernels_->dispatch_send({x.data(), false, nullptr, topk_idx.data(), true,
                                   is_source() ? nullptr : topk_weights.data(), tokens,
                                   operation->num_partials.data(), operation->answers.data()}),
          "dispatch send", op);
    return operation;
  }

  void dispatch_recv(uint64_t op, Operation& operation) {
    const auto& layout = kernels_->layout();
    const uint32_t num_local = layout.partition().num_local_experts(self_);
    const uint64_t num_slots = layout.expert_capacity();
    operation.num_messages.resize(options_.num_ranks);
    operation.messages.resize(num_slots);
    operation.entries.resize(num_slots * kTopK);
    const uint64_t num_rows = is_rank_major() ? num_slots : num_local * num_slots;
    operation.recv_x.resize(num_rows * layout.dispatch_row_bytes());
    operation.recv_scales.resize(num_rows * layout.num_scales());
    operation.counts.resize(num_local);
    if (is_rank_major()) {
      operation.recv_topk_idx.resize(num_rows * kTopK);
      operation.recv_topk_weights.resize(num_rows * kTopK);
    }
    if (options_.damage && op == 6 && self_ == 0) damage(op);
    check(kernels_->dispatch_recv(
              {options_.output, operation.recv_x.data(), operation.recv_scales.data(),
               operation.counts.data(), operation.recv_topk_idx.data(),
               operation.recv_topk_weights.data(), operation.handle()},
              operation),
          "dispatch recv", op);
    if (is_rank_major()) {
      check_sources(op, operation);
    } else {
      check_rows(op, operation);
    }
  }

  // The expert: adds its number to a row. Weights are 1, so sums stay exact.
  void combine_send(uint64_t op, Operation& operation) {
    const auto& layout = kernels_->layout();
    const uint32_t first_expert = layout.partition().first_expert(self_);
    operation.expert_out.resize(operation.recv_x.size() / layout.dispatch_row_bytes() *
                                layout.row_bytes());
    if (is_rank_major()) {
      for (uint64_t row = 0; row < layout.expert_capacity(); ++row) {
        const int32_t* experts = operation.recv_topk_idx.data() + row * kTopK;
        uint32_t num_experts = 0, sum = 0;
        for (; num_experts < kTopK && experts[num_experts] >= 0; ++num_experts) {
          sum += first_expert + static_cast<uint32_t>(experts[num_experts]);
        }
        if (num_experts > 0) write_output(operation, row, num_experts, sum);
      }
    } else {
      for (size_t local = 0; local < operation.counts.size(); ++local) {
        for (int32_t i = 0; i < operation.counts[local]; ++i) {
          write_output(operation, row_of(local, i), 1, first_expert + static_cast<uint32_t>(local));
        }
      }
    }
    check(kernels_->combine_send({operation.expert_out.data(), operation.handle()}, operation),
          "combine send", op);
  }

  void combine_recv(uint64_t op, Operation& operation) {
    const uint32_t tokens = num_tokens(op, self_);
    const uint64_t row_bytes = kernels_->layout().row_bytes();
    operation.out.resize(tokens * row_bytes);
    const std::vector<float> topk_weights(is_source() ? tokens * kTopK : 0, 1.0f);
    check(kernels_->combine_recv({operation.out.data(), tokens, operation.num_partials.data(),
                                  operation.answers.data(), topk_weights.data()}),
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
        if (!(std::abs(got - expected) <= expected * tolerance())) {
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

  // Terms are not negative, and none is so small that its float8 has no exponent: half a step of
  // three bits of mantissa; where a node's sum is quantised again, another half. Everything else is
  // exact.
  float tolerance() const {
    if (options_.combine_dtype != DType::kFloat8E4M3) return 0.0f;
    return options_.mode == "hierarchical" ? 2.0626f / 16 : 1.0001f / 16;
  }
  bool is_source() const { return options_.reduction == protocol::Reduction::kSource; }
  bool is_rank_major() const { return options_.output == OutputLayout::kRankMajor; }

  uint64_t row_of(size_t local, int32_t i) const {
    return local * kernels_->layout().expert_capacity() + static_cast<uint64_t>(i);
  }

  float received(const Operation& operation, uint64_t row, uint32_t column) const {
    const auto& layout = kernels_->layout();
    const std::byte* values = operation.recv_x.data() + row * layout.dispatch_row_bytes();
    const float value = load(values, column, options_.dispatch_dtype);
    if (operation.recv_scales.empty()) return value;
    return value *
           operation
               .recv_scales[protocol::scale_word_idx(layout, options_.output, row, column / 128)];
  }

  // The sum of what `num_experts` experts whose numbers have the sum `sum` make of a row.
  void write_output(Operation& operation, uint64_t row, uint32_t num_experts, uint32_t sum) const {
    std::byte* out = operation.expert_out.data() + row * kernels_->layout().row_bytes();
    for (uint32_t column = 0; column < options_.hidden; ++column) {
      const float value = received(operation, row, column);
      store(out, column, options_.dtype,
            static_cast<float>(num_experts) * value + static_cast<float>(sum));
    }
  }

  void check_row(uint64_t op, const Operation& operation, uint64_t row, uint32_t src,
                 uint32_t token) const {
    for (uint32_t column = 0; column < options_.hidden; ++column) {
      if (received(operation, row, column) !=
          static_cast<float>(element_of(op, src, token, column))) {
        give_up("wrong row (src rank, token)", self_, op, src, token);
      }
    }
  }

  // Rows of each expert, by source, then token; an expert that a token lists twice has one row.
  void check_rows(uint64_t op, const Operation& operation) const {
    for (size_t local = 0; local < operation.counts.size(); ++local) {
      const int64_t expert =
          kernels_->layout().partition().first_expert(self_) + static_cast<int64_t>(local);
      int32_t next = 0;
      for (uint32_t src = 0; src < options_.num_ranks; ++src) {
        for (uint32_t token = 0; token < num_tokens(op, src); ++token) {
          bool is_routed = false;
          for (uint32_t k = 0; k < kTopK; ++k) {
            is_routed |= expert_of(op, src, token, k) == expert;
          }
          if (!is_routed) continue;
          check_row(op, operation, row_of(local, next++), src, token);
        }
      }
      if (next != operation.counts[local]) {
        give_up("wrong count (expected, got)", self_, op, static_cast<uint64_t>(next),
                static_cast<uint64_t>(operation.counts[local]));
      }
    }
  }

  // Rows of each source, by token, with the local experts of each; no expert in the unused ones.
  void check_sources(uint64_t op, const Operation& operation) const {
    const auto& partition = kernels_->layout().partition();
    const int64_t first_expert = partition.first_expert(self_);
    const int64_t num_local = partition.num_local_experts(self_);
    for (uint32_t src = 0; src < options_.num_ranks; ++src) {
      uint64_t row = uint64_t{src} * kMaxTokens;
      for (uint32_t token = 0; token < num_tokens(op, src); ++token) {
        const int32_t* experts = operation.recv_topk_idx.data() + row * kTopK;
        uint32_t num_listed = 0;
        for (uint32_t k = 0; k < kTopK; ++k) {
          const int64_t local = expert_of(op, src, token, k) - first_expert;
          if (local < 0 || local >= num_local) continue;
          if (experts[num_listed++] != local) give_up("wrong expert", self_, op, src, token);
        }
        if (num_listed == 0) continue;
        if (num_listed < kTopK && experts[num_listed] != -1) {
          give_up("one expert too many", self_, op, src, token);
        }
        check_row(op, operation, row++, src, token);
      }
      for (uint64_t i = row * kTopK; i < (uint64_t{src} + 1) * kMaxTokens * kTopK; ++i) {
        if (operation.recv_topk_idx[i] != -1) give_up("an unused slot (place)", self_, op, src, i);
      }
    }
  }

  // Of a message from this rank to itself, so that nobody else is writing there.
  void damage(uint64_t op) {
    const auto& layout = kernels_->layout();
    const uint32_t bank = protocol::bank_of(op + 1, options_.num_banks);
    base_[layout.inbox_row(bank, self_, 0) + 1] ^= std::byte{0x40};
  }

  const Options& options_;
  uint32_t self_;
  std::byte* base_;
  std::unique_ptr<Kernels> kernels_;
};

}  // namespace stress
