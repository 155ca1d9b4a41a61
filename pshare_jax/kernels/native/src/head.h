// The final norm, the head, and the choice of the most likely token.
#pragma once

#include <limits>
#include <vector>

#include "weight_only.h"

namespace pshare {

// The columns of a panel that a row may choose from, a bit each; a mask of nothing allows all.
inline uint32_t panel_bits(const uint32_t* mask, long panel) {
  static_assert(32 % kPanel == 0);
  constexpr uint32_t all = kPanel == 32 ? ~0u : (1u << kPanel % 32) - 1;
  long first = panel * kPanel;
  return mask == nullptr ? all : mask[first / 32] >> first % 32 & all;
}

// Leaves -inf where a row may not choose.
inline void forbid(float* tile, long width, uint32_t bits) {
  for (long j = 0; j < width; j++) {
    tile[j] = bits >> j & 1 ? tile[j] : -std::numeric_limits<float>::infinity();
  }
}

// The most likely token of each row with lens > 0, of those that its bits in mask [batch, words]
// allow, and its logits [batch, vocab] if they are wanted, allowed or not: final norm, then the
// head. Other rows get 0.
template <class W>
void head(const float* x, const float* scale, const Matrix<W>& m, const int32_t* lens, long batch,
          long embed, long vocab, float eps, bool wanted, const uint32_t* mask, long words,
          float* logits, int32_t* best) {
  std::vector<long> rows;
  for (long b = 0; b < batch; b++) {
    best[b] = 0;
    if (lens[b] > 0) rows.push_back(b);
    else if (wanted) std::fill_n(logits + b * vocab, vocab, 0.0f);
  }
  if (rows.empty()) return;
  auto allowed = [&](long r, long panel) {
    return panel_bits(mask == nullptr ? nullptr : mask + rows[r] * words, panel);
  };
  long count = static_cast<long>(rows.size()), stride = round_up(embed, 2), all = panels(vocab);
  constexpr bool rounds = std::is_same_v<W, Int8>;
  using X = std::conditional_t<rounds, float, Left<W>>;
  static thread_local Buffer<X> memory;
  static thread_local RoundedBuffer rounded_memory;
  static thread_local Buffer<float> tops;
  X* normed = memory.get(count * stride);
  RoundedRows rounded;
  if constexpr (rounds) rounded = rounded_memory.get(count, embed);
  float* top = tops.get(all * count);  // of each panel
  Pool::instance().run([&](Team& team) {
    team.at("final norm");
    team.rows(count, [&](long r) {
      norm_row(x + rows[r] * embed, scale, embed, eps, normed + r * stride);
      if (embed % 2) normed[(r + 1) * stride - 1] = X{};
      if constexpr (rounds) round_row(normed + r * stride, rounded, r);
    });
    auto done = [&](long r, long n, long panel, float* tile) {
      long width = std::min<long>(kPanel, vocab - panel * kPanel);
      for (long i = 0; i < n; i++) {
        float* from = tile + i * kPanel;
        if (wanted) {
          float* to = logits + rows[r + i] * vocab + panel * kPanel;
          std::memcpy(to, from, width * sizeof(float));
        }
        if (mask != nullptr) forbid(from, width, allowed(r + i, panel));
        top[panel * count + r + i] = *std::max_element(from, from + width);
      }
    };
    team.at("head");
    if constexpr (rounds) multiply(team, count, rounded, m, 0, all, 1, done);
    else multiply(team, count, normed, stride, m, embed, 0, all, 1, done);
    team.at("best token");
    // The first of the highest: its panel is computed again.
    team.loop(count, [&](long r) {
      long panel = 0;
      for (long p = 1; p < all; p++) {
        if (top[p * count + r] > top[panel * count + r]) panel = p;
      }
      float tile[kPanel];
      if constexpr (rounds) {
        multiply_panel(rounded, r, 1, m, panel, tile, kPanel);
      } else {
        multiply_panel(1, normed + r * stride, stride, m, panel, embed, tile, kPanel);
      }
      long width = std::min<long>(kPanel, vocab - panel * kPanel);
      if (mask != nullptr) forbid(tile, width, allowed(r, panel));
      best[rows[r]] = panel * kPanel + (std::max_element(tile, tile + width) - tile);
    });
  });
}

}  // namespace pshare
