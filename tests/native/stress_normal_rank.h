// One rank of the normal kernels under stress: its inputs, its calls, and checks of all that comes
// out. Every third operation dispatches a second time with the routing of the first; every fifth is
// not combined; of the others, every second takes weights home and adds a bias.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "protocol/normal_layout.h"
#include "protocol/normal_op.h"
#include "stress_rank.h"

namespace stress {

inline uint32_t batch_size(uint64_t op, uint32_t rank) {
  return static_cast<uint32_t>(hash(op, rank, 0, 1) % 24) * (hash(op, rank, 0, 99) % 4 != 0);
}

// `Kernels`: of one node, or of several.
template <typename Kernels>
class NormalRankUnderStress {
 public:
  NormalRankUnderStress(const protocol::NormalConfig& config, uint32_t self,
                        std::unique_ptr<Kernels> kernels, bool damage)
      : config_(config),
        layout_(config),
        self_(self),
        damage_(damage),
        kernels_(std::move(kernels)),
        num_rows_(config.num_ranks),
        per_expert_(layout_.partition().num_local_experts(self)) {}

  void run(uint64_t op) {
    const uint32_t tokens = batch_size(op, self_);
    topk_idx_.clear();
    for (uint32_t token = 0; token < tokens; ++token) {
      for (uint32_t k = 0; k < kTopK; ++k) topk_idx_.push_back(expert_of(op, self_, token, k));
    }
    num_messages_.resize(tokens);
    messages_.resize(tokens * layout_.num_max_messages_per_token());
    check(kernels_->exchange_counts({topk_idx_.data(), true, routes(), &num_rounds_,
                                     num_rows_.data(), per_expert_.data()}),
          "counts", op);
    uint64_t num_rows = 0;
    for (uint64_t n : num_rows_) num_rows += n;
    per_round_.resize(num_rounds_ * config_.num_ranks);
    recv_x_.resize(num_rows * layout_.dispatch_row_bytes());
    recv_scales_.resize(num_rows * layout_.num_scale_words());
    recv_src_tokens_.resize(num_rows);
    recv_topk_idx_.resize(num_rows * kTopK);
    recv_topk_weights_.resize(num_rows * kTopK);
    dispatch(op, false);
    if (op % 3 == 1) dispatch(op, true);
    if (op % 5 != 2) combine(op, num_rows);
  }

 private:
  protocol::SendRoutes routes() {
    return {num_messages_.size(), num_messages_.data(), messages_.data()};
  }
  protocol::RecvRows rows() { return {num_rounds_, num_rows_.data(), per_round_.data()}; }

  void dispatch(uint64_t op, bool is_cached) {
    const uint64_t payload_op = op + is_cached;
    const uint64_t tokens = num_messages_.size();
    std::vector<std::byte> x(tokens * layout_.row_bytes());
    for (uint32_t token = 0; token < tokens; ++token) {
      for (uint32_t column = 0; column < config_.hidden; ++column) {
        store(x.data() + token * layout_.row_bytes(), column, config_.dtype,
              static_cast<float>(element_of(payload_op, self_, token, column)));
      }
    }
    const std::vector<float> weights(topk_idx_.size(), 1.0f);
    check(kernels_->dispatch({x.data(), false, nullptr, is_cached, topk_idx_.data(), true,
                              weights.data(), routes(), rows(), recv_x_.data(), recv_scales_.data(),
                              recv_topk_idx_.data(), recv_topk_weights_.data(),
                              recv_src_tokens_.data()}),
          "dispatch", op);
    check_rows(op, payload_op);
  }

  // Rows by source, then token, each with its local experts at their k.
  void check_rows(uint64_t op, uint64_t payload_op) const {
    const int64_t first = layout_.partition().first_expert(self_);
    const int64_t num_local = layout_.partition().num_local_experts(self_);
    uint64_t row = 0;
    for (uint32_t src = 0; src < config_.num_ranks; ++src) {
      for (uint32_t token = 0; token < batch_size(op, src); ++token) {
        int32_t expected[kTopK];
        for (uint32_t k = 0; k < kTopK; ++k) {
          const int64_t local = expert_of(op, src, token, k) - first;
          expected[k] = local >= 0 && local < num_local ? static_cast<int32_t>(local) : -1;
        }
        if (std::all_of(expected, expected + kTopK, [](int32_t e) { return e < 0; })) continue;
        if (!std::equal(expected, expected + kTopK, recv_topk_idx_.data() + row * kTopK)) {
          give_up("wrong experts (src rank, token)", self_, op, src, token);
        }
        if (recv_src_tokens_[row] != static_cast<int32_t>(token)) {
          give_up("wrong token (src rank, token)", self_, op, src, token);
        }
        for (uint32_t column = 0; column < config_.hidden; ++column) {
          const float value = received(row, column);
          if (value != static_cast<float>(element_of(payload_op, src, token, column))) {
            give_up("wrong row (src rank, token)", self_, op, src, token);
          }
        }
        ++row;
      }
    }
  }

  float received(uint64_t row, uint32_t column) const {
    const float value =
        load(recv_x_.data() + row * layout_.dispatch_row_bytes(), column, config_.dispatch_dtype);
    if (recv_scales_.empty()) return value;
    return value * protocol::float_of(recv_scales_[row * layout_.num_scale_words() + column / 128]);
  }

  // A rank answers a row with the row plus its own number, and weighs each expert that it has.
  void combine(uint64_t op, uint64_t num_rows) {
    const bool has_extras = op % 2 == 0;
    const uint64_t num_tokens = num_messages_.size();
    std::vector<std::byte> y(num_rows * layout_.row_bytes()), out(num_tokens * layout_.row_bytes());
    std::vector<std::byte> bias(out.size());
    for (uint64_t i = 0; i < num_tokens * config_.hidden; ++i) {
      store(bias.data(), static_cast<uint32_t>(i), config_.dtype, 3.0f);
    }
    std::vector<float> sums(num_tokens * kTopK);
    for (uint64_t row = 0; row < num_rows; ++row) {
      for (uint32_t column = 0; column < config_.hidden; ++column) {
        const uint64_t at = row * layout_.row_bytes();
        const float wrong = damage_ && op == 6 && self_ == 0 && row + 1 == num_rows ? 1.0f : 0.0f;
        store(y.data() + at, column, config_.dtype,
              received(row, column) + static_cast<float>(self_) + wrong);
      }
    }
    check(kernels_->combine({y.data(),
                             has_extras,
                             recv_topk_weights_.data(),
                             {has_extras ? bias.data() : nullptr, nullptr},
                             routes(),
                             rows(),
                             out.data(),
                             sums.data()}),
          "combine", op);
    const uint64_t payload_op = op + (op % 3 == 1);
    for (uint32_t token = 0; token < num_messages_.size(); ++token) {
      std::vector<uint32_t> ranks;
      for (uint32_t k = 0; k < kTopK; ++k) {
        const int64_t expert = expert_of(op, self_, token, k);
        const float weight = has_extras && expert >= 0 ? 1.0f : 0.0f;
        if (sums[token * kTopK + k] != weight)
          give_up("wrong weight (token, k)", self_, op, token, k);
        if (expert < 0) continue;
        const uint32_t rank = layout_.partition().owner(static_cast<uint32_t>(expert));
        if (std::find(ranks.begin(), ranks.end(), rank) == ranks.end()) ranks.push_back(rank);
      }
      for (uint32_t column = 0; column < config_.hidden; ++column) {
        uint32_t expected = has_extras ? 3 : 0;
        for (uint32_t rank : ranks) {
          expected += element_of(payload_op, self_, token, column) + rank;
        }
        const float got = load(out.data() + token * layout_.row_bytes(), column, config_.dtype);
        if (got != static_cast<float>(expected)) {
          give_up("wrong result (token, column)", self_, op, token, column);
        }
      }
    }
  }

  void check(const protocol::OpResult& result, const char* what, uint64_t op) const {
    if (result.status != cpu::Status::kOk) {
      give_up(what, self_, op, static_cast<uint64_t>(result.status),
              static_cast<uint64_t>(result.record.peer_rank));
    }
  }

  const protocol::NormalConfig config_;
  const protocol::NormalLayout layout_;
  const uint32_t self_;
  const bool damage_;
  std::unique_ptr<Kernels> kernels_;
  uint64_t num_rounds_ = 0;
  std::vector<uint64_t> num_rows_, per_expert_;
  std::vector<uint32_t> num_messages_, messages_, per_round_;
  std::vector<int64_t> topk_idx_;
  std::vector<std::byte> recv_x_;
  std::vector<uint32_t> recv_scales_;
  std::vector<int32_t> recv_src_tokens_;
  std::vector<int32_t> recv_topk_idx_;
  std::vector<float> recv_topk_weights_;
};

}  // namespace stress
