// A feed-forward block of which each row takes the few experts that a router gives most.
//
// Rows are gathered by expert, so that each chosen expert's panels are read once for all of its
// rows. Every element is summed in the order of its inner axis, and a row's experts in the order of
// their scores: a row's result does not depend on what it is computed beside.
#pragma once

#include <numeric>
#include <vector>

#include "gemm.h"
#include "norm.h"

namespace pshare {

// Experts of a layer; `count` 0: the block is dense. A panel of gate is followed by one of up, as in
// a dense block; experts lie one after the other.
template <class E>
struct Experts {
  long count = 0, per_token = 0;
  bool normalised = false;  // weights are divided by the sum of the chosen ones
  float limit = 0;          // of gpt-oss's gate; 0: SiLU
  const E *router = nullptr, *gate_up = nullptr, *down = nullptr;
  // Null where there are none; each as long as its product's panels.
  const float *router_bias = nullptr, *gate_up_bias = nullptr, *down_bias = nullptr;
};

template <class E>
class ExpertsCall {
 public:
  // rows of x are `stride` apart, a whole number of units.
  ExpertsCall(const Experts<E>& experts, long embed, long mlp, const Left<E>* x, long stride,
              long rows)
      : e_(experts), embed_(embed), mlp_(mlp), x_(x), stride_(stride), rows_(rows) {
    static thread_local Buffer<Left<E>> gathered, hidden;
    static thread_local Buffer<float> scores, outputs;
    long taken = rows * e_.per_token;
    scores_ = scores.get(rows * panels(e_.count) * kPanel);
    gathered_ = gathered.get(taken * stride);
    hidden_ = hidden.get(taken * round_up(mlp, 2));
    outputs_ = outputs.get(taken * embed);
    weights_.resize(taken);
    chosen_.resize(taken);
    place_.resize(taken);
  }

  void run(Team& team) {
    long width = panels(e_.count) * kPanel;
    team.at("router");
    multiply<E>(team, rows_, x_, stride_, e_.router, embed_, 0, panels(e_.count), 1,
                [&](long r, long n, long panel, float* tile) {
                  for (long i = 0; i < n; i++) {
                    std::memcpy(scores_ + (r + i) * width + panel * kPanel, tile + i * kPanel,
                                kPanel * sizeof(float));
                  }
                });
    team.at("experts chosen");
    team.rows(rows_, [&](long r) { choose_experts(r, scores_ + r * width); });
    sort_rows();
    team.rows(rows_ * e_.per_token, [&](long i) {
      std::memcpy(gathered_ + place_[i] * stride_, x_ + i / e_.per_token * stride_,
                  stride_ * sizeof(Left<E>));
    });
    team.at("experts");
    loop(team, panels(mlp_), [&](const Block& b, long panel) { multiply_gate(b, panel); });
    loop(team, panels(embed_), [&](const Block& b, long panel) { multiply_down(b, panel); });
  }

  // The weighted sum of row r's experts.
  void sum(long r, float* out) const {
    std::fill_n(out, embed_, 0.0f);
    for (long i = r * e_.per_token; i < (r + 1) * e_.per_token; i++) {
      const float* from = outputs_ + place_[i] * embed_;
      for (long j = 0; j < embed_; j++) out[j] += weights_[i] * from[j];
    }
  }

 private:
  // Rows of one expert, among those that are sorted by expert.
  struct Block {
    long expert, first, rows;
  };

  void choose_experts(long r, float* scores) {
    float highest = kLowest, total = 0;
    for (long j = 0; j < e_.count; j++) {
      if (e_.router_bias != nullptr) scores[j] += e_.router_bias[j];
      highest = std::max(highest, scores[j]);
    }
    for (long j = 0; j < e_.count; j++) {
      scores[j] = std::exp(scores[j] - highest);
      total += scores[j];
    }
    int32_t* chosen = &chosen_[r * e_.per_token];
    float *weights = &weights_[r * e_.per_token], kept = 0;
    for (long i = 0; i < e_.per_token; i++) {
      // The lowest of equal ones; scores that are no numbers still give some expert, each once.
      long best = -1;
      for (long j = 0; j < e_.count; j++) {
        if (std::find(chosen, chosen + i, j) != chosen + i) continue;
        if (best < 0 || scores[j] > scores[best]) best = j;
      }
      chosen[i] = static_cast<int32_t>(best);
      weights[i] = scores[best] / total;
      kept += weights[i];
    }
    for (long i = 0; i < e_.per_token && e_.normalised; i++) weights[i] /= kept;
  }

  void sort_rows() {
    std::vector<long> begin(e_.count + 1, 0);
    for (int32_t expert : chosen_) begin[expert + 1]++;
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<long> next(begin.begin(), begin.end() - 1);
    for (size_t i = 0; i < chosen_.size(); i++) place_[i] = next[chosen_[i]]++;
    for (long expert = 0; expert < e_.count; expert++) {
      for (long row = begin[expert]; row < begin[expert + 1]; row += kBlockRows) {
        blocks_.push_back({expert, row, std::min(kBlockRows, begin[expert + 1] - row)});
      }
    }
  }

  // Calls `body(block, panel)` for every panel of every block. A thread keeps to a block's rows.
  template <class Body>
  void loop(Team& team, long count, Body body) {
    long blocks = static_cast<long>(blocks_.size());
    if (blocks == 0) return;
    long shares = std::min(count, (4 * team.size() + blocks - 1) / blocks);
    team.loop(blocks * shares, [&](long item) {
      const Block& block = blocks_[item / shares];
      long share = item % shares;
      for (long p = count * share / shares; p < count * (share + 1) / shares; p++) body(block, p);
    });
  }

  void multiply_gate(const Block& b, long panel) {
    alignas(64) float tile[kBlockRows * 2 * kPanel];
    long pair = b.expert * panels(mlp_) + panel, size = panel_size<E>(embed_);
    for (long p = 0; p < 2; p++) {
      multiply_panel<E>(b.rows, gathered_ + b.first * stride_, stride_,
                        e_.gate_up + (2 * pair + p) * size, units<E>(embed_), tile + p * kPanel,
                        2 * kPanel, false);
    }
    const float* bias = e_.gate_up_bias ? e_.gate_up_bias + pair * 2 * kPanel : nullptr;
    long column = panel * kPanel, stride = round_up(mlp_, 2);
    for (long i = 0; i < b.rows; i++) {
      float* row = tile + i * 2 * kPanel;
      for (long j = 0; j < 2 * kPanel && bias != nullptr; j++) row[j] += bias[j];
      for (int v = 0; v < kVectors; v++) {
        store(row + v * kWidth,
              gated(load<VF>(row + v * kWidth), load<VF>(row + kPanel + v * kWidth)));
      }
      // What lies beyond the last unit stays 0: panels are padded with zeros, and so are biases.
      convert(row, hidden_ + (b.first + i) * stride + column,
              std::min<long>(kPanel, stride - column));
    }
  }

  // SiLU, or gpt-oss's gate (arXiv 2508.10925): bounded, sharper, and with 1 added to `up`.
  VF gated(VF gate, VF up) const {
    if (e_.limit == 0) return gate / (1.0f + exp(-gate)) * up;
    VF limit = splat(e_.limit);
    gate = choose(gate > limit, limit, gate);
    up = choose(up > limit, limit, choose(up < -limit, -limit, up));
    return gate / (1.0f + exp(-1.702f * gate)) * (up + 1.0f);
  }

  void multiply_down(const Block& b, long panel) {
    alignas(64) float tile[kBlockRows * kPanel];
    long stride = round_up(mlp_, 2), width = std::min<long>(kPanel, embed_ - panel * kPanel);
    long number = b.expert * panels(embed_) + panel;
    multiply_panel<E>(b.rows, hidden_ + b.first * stride, stride,
                      e_.down + number * panel_size<E>(mlp_), units<E>(mlp_), tile, kPanel, false);
    const float* bias = e_.down_bias ? e_.down_bias + number * kPanel : nullptr;
    for (long i = 0; i < b.rows; i++) {
      float* to = outputs_ + (b.first + i) * embed_ + panel * kPanel;
      for (long j = 0; j < width; j++) {
        to[j] = tile[i * kPanel + j] + (bias != nullptr ? bias[j] : 0.0f);
      }
    }
  }

  static constexpr float kLowest = -3.4e38f;

  const Experts<E>& e_;
  const long embed_, mlp_;
  const Left<E>* x_;
  const long stride_, rows_;
  float *scores_, *outputs_;
  Left<E> *gathered_, *hidden_;
  std::vector<float> weights_;
  std::vector<int32_t> chosen_;
  std::vector<long> place_;
  std::vector<Block> blocks_;
};

}  // namespace pshare
