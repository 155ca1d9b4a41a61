// A decoder layer over packed weights.
//
// Only valid tokens are computed: they are gathered into consecutive rows, so that a batch or chunk
// that is not full costs no more than what is in it. The residual stream is float32; what enters a
// matrix product from the left is rounded to Left<E>, or to 8 bits where weights W are Int8 (int8.h).
#pragma once

#include <initializer_list>
#include <vector>

#include "layer_weights.h"
#include "norm.h"
#include "small_pages.h"

namespace pshare {

template <class E, class W = E>
class LayerCall {
 public:
  // x [batch * tokens, embed] is updated in place; cos and sin are [batch * tokens, rotated / 2].
  // Of the two kinds of pages one is null.
  LayerCall(const Layer<E, W>& layer, const Rows& rows, long tokens, float* x, const float* cos,
            const float* sin, E* pages, fp8* small_pages)
      : l_(layer), rows_(rows), g_(layer.geometry), x_(x), cos_(cos), sin_(sin), pages_(pages),
        small_pages_(small_pages) {
    for (long b = 0; b < rows.batch; b++) {
      first_.push_back(static_cast<long>(index_.size()));
      for (long t = 0; t < std::min<long>(rows.lens[b], tokens); t++) {
        index_.push_back(b * tokens + t);
        row_.push_back(b);
      }
    }
    one_query_ = tokens == 1;
    count_ = static_cast<long>(index_.size());
    k_panel_ = panels(g_.heads() * g_.head_dim);
    v_panel_ = k_panel_ + panels(g_.kv_heads * g_.head_dim);
    qkv_panels_ = v_panel_ + panels(g_.kv_heads * g_.head_dim);
  }

  void run() {
    if (count_ == 0) return;
    static thread_local Buffer<Left<E>> normed, q, attended, hidden, low;
    static thread_local Buffer<float> qkv, update;
    static thread_local RoundedBuffer rounded;
    rounded_memory_ = &rounded;
    normed_ = normed.get(count_ * embed_stride());
    qkv_ = qkv.get(count_ * qkv_panels_ * kPanel);
    q_ = q.get(count_ * g_.heads() * g_.head_dim);
    attended_ = attended.get(count_ * round_up(g_.heads() * g_.head_dim, 2));
    bool kept = l_.attn_post_norm != nullptr || l_.experts.count > 0;
    update_ = update.get(kept ? count_ * l_.embed : 0);
    hidden_ = hidden.get(count_ * round_up(l_.mlp, 2));
    find_adapters();
    low_ = low.get(used_.empty() ? 0 : kTargets * count_ * l_.rank);
    if (small_pages_ == nullptr) {
      run_over(pages_, pages_, rows_, [](Team&) {});
      return;
    }
    WidenedPages<E> wide(small_pages_, rows_, g_);
    run_over(small_pages_, wide.pages(), wide.rows(), [&](Team& team) { wide.widen(team); });
  }

 private:
  static constexpr bool kRounds = std::is_same_v<W, Int8>;

  // Writes K and V into `pages`, calls `prepare`, and attends to `read`.
  template <class P, class Prepare>
  void run_over(P* pages, const E* read, const Rows& rows, Prepare prepare) {
    Attention<E, Left<E>> attention(q_, attended_, read, rows, g_, first_, one_query_);
    Pool::instance().run([&](Team& team) {
      project(team);
      team.at("rotation, KV written");
      team.rows(count_, [&](long r) { rotate_and_store(r, pages); });
      if (l_.kv_only) return;
      prepare(team);
      attention.run(team);
      project_back(team);
      norm(team, l_.mlp_norm);
      if (l_.experts.count > 0) experts_block(team);
      else mlp_block(team);
    });
  }

  long embed_stride() const { return round_up(l_.embed, 2); }
  // Of a row; -1 for none.
  long adapter(long r) const { return l_.num_adapters > 0 ? l_.adapter_index[row_[r]] : -1; }
  float* row(long r) { return x_ + index_[r] * l_.embed; }

  void project(Team& team) {
    norm(team, l_.attn_norm);
    if (l_.kv_only) lower(team, {kK, kV}, normed_, l_.embed);
    else lower(team, {kQ, kK, kV}, normed_, l_.embed);
    long columns = qkv_panels_ * kPanel;
    team.at("q, k, v");
    times(team, normed_, embed_stride(), l_.qkv, l_.embed, l_.kv_only ? k_panel_ : 0,
          qkv_panels_, 1, [&](long r, long n, long panel, float* tile) {
            Target target = panel < k_panel_ ? kQ : panel < v_panel_ ? kK : kV;
            long base = target == kQ ? 0 : target == kK ? k_panel_ : v_panel_;
            adapt(target, r, n, panel - base, tile, kPanel);
            for (long i = 0; i < n; i++) {
              float* to = qkv_ + (r + i) * columns + panel * kPanel;
              std::memcpy(to, tile + i * kPanel, kPanel * sizeof(float));
              if (l_.bias == nullptr) continue;
              for (long j = 0; j < kPanel; j++) to[j] += l_.bias[panel * kPanel + j];
            }
          });
  }

  void project_back(Team& team) {
    long width = g_.heads() * g_.head_dim;
    lower(team, {kO}, attended_, width);
    round(team, attended_, width, width);
    team.at("attention's output");
    times(team, attended_, width, l_.o, width, 0, panels(l_.embed), 1,
          [&](long r, long n, long panel, float* tile) {
            adapt(kO, r, n, panel, tile, kPanel);
            add_bias(n, tile, l_.o_bias, panel, kPanel);
            add(r, n, panel, tile, l_.attn_post_norm);
          });
    add_normed(team, l_.attn_post_norm);
  }

  void mlp_block(Team& team) {
    lower(team, {kGate, kUp}, normed_, l_.embed);
    long stride = round_up(l_.mlp, 2);
    team.at("gate and up");
    // Panels of gate and up alternate.
    times(team, normed_, embed_stride(), l_.gate_up, l_.embed, 0, 2 * panels(l_.mlp), 2,
          [&](long r, long n, long panel, float* tile) {
            adapt(kGate, r, n, panel / 2, tile, 2 * kPanel);
            adapt(kUp, r, n, panel / 2, tile + kPanel, 2 * kPanel);
            add_bias(n, tile, l_.gate_up_bias, panel / 2, 2 * kPanel);
            long column = panel / 2 * kPanel;
            long width = std::min<long>(kPanel, stride - column);
            for (long i = 0; i < n; i++) {
              float* gate = tile + i * 2 * kPanel;
              for (int v = 0; v < kVectors; v++) {
                VF g = load<VF>(gate + v * kWidth);
                VF up = load<VF>(gate + kPanel + v * kWidth);
                store(gate + v * kWidth, g / (1.0f + exp(-exponent(g))) * up);
              }
              convert(gate, hidden_ + (r + i) * stride + column, width);
            }
          });
    lower(team, {kDown}, hidden_, l_.mlp);
    round(team, hidden_, stride, l_.mlp);
    team.at("down");
    times(team, hidden_, stride, l_.down, l_.mlp, 0, panels(l_.embed), 1,
          [&](long r, long n, long panel, float* tile) {
            adapt(kDown, r, n, panel, tile, kPanel);
            add_bias(n, tile, l_.down_bias, panel, kPanel);
            add(r, n, panel, tile, l_.mlp_post_norm);
          });
    add_normed(team, l_.mlp_post_norm);
  }

  void experts_block(Team& team) {
    ExpertsCall<E> experts(l_.experts, l_.embed, l_.mlp, normed_, embed_stride(), count_);
    experts.run(team);
    const float* post_norm = l_.mlp_post_norm;
    team.at("residual");
    team.rows(count_, [&](long r) {
      float *update = update_ + r * l_.embed, *to = row(r);
      experts.sum(r, update);
      if (post_norm != nullptr) normalise(update, post_norm, l_.embed, l_.eps, update);
      for (long j = 0; j < l_.embed; j++) to[j] += l_.residual_scale * update[j];
    });
  }

  // Calls `done(row, rows, panel, tile)` with tiles of x [count_, k] times some panels of a matrix.
  template <class Done>
  void times(Team& team, const Left<E>* x, long stride, const Matrix<W>& m, long k, long first,
             long last, int group, Done done) {
    if constexpr (kRounds) multiply(team, count_, rounded_, m, first, last, group, done);
    else multiply(team, count_, x, stride, m, k, first, last, group, done);
  }

  // Rounds x [count_, k] for the next product, where weights need that.
  void round(Team& team, const Left<E>* x, long stride, long k) {
    if constexpr (!kRounds) return;
    rounded_ = rounded_memory_->get(count_, k);
    team.at("rounding");
    team.rows(count_, [&](long r) {
      static thread_local Buffer<float> wide;
      convert(x + r * stride, wide.get(k), k);
      round_row(wide.get(k), rounded_, r);
    });
  }

  // x in the form that products read, normalised where there is a norm.
  void norm(Team& team, const float* scale) {
    if constexpr (kRounds) rounded_ = rounded_memory_->get(count_, l_.embed);
    team.at("norm");
    team.rows(count_, [&](long r) {
      Left<E>* to = normed_ + r * embed_stride();
      if constexpr (kRounds) {
        static thread_local Buffer<float> memory;
        float* wide = memory.get(l_.embed);
        if (scale == nullptr) convert(row(r), wide, l_.embed);
        else normalise(row(r), scale, l_.embed, l_.eps, wide);
        round_row(wide, rounded_, r);
        if (used_.empty()) return;
        convert(wide, to, l_.embed);
      } else if (scale == nullptr) {
        convert(row(r), to, l_.embed);
      } else {
        norm_row(row(r), scale, l_.embed, l_.eps, to);
      }
      if (l_.embed % 2) to[embed_stride() - 1] = Left<E>{};
    });
  }

  // SiLU(g) is g * sigmoid(g), and GELU's approximation by tanh is g * sigmoid of this cubic.
  VF exponent(VF g) const {
    return l_.gelu ? g * (g * g * 0.0713548163f + 1.5957691216f) : g;
  }

  // Adds panel `panel` of a bias, of `width` columns, to the rows of a tile.
  static void add_bias(long n, float* tile, const float* bias, long panel, long width) {
    if (bias == nullptr) return;
    for (long i = 0; i < n; i++) {
      for (long j = 0; j < width; j++) tile[i * width + j] += bias[panel * width + j];
    }
  }

  // Adds a tile to the residual stream; with a norm in between it is kept until rows are whole.
  void add(long r, long n, long panel, const float* tile, const float* post_norm) {
    long width = std::min<long>(kPanel, l_.embed - panel * kPanel);
    for (long i = 0; i < n; i++) {
      const float* from = tile + i * kPanel;
      if (post_norm != nullptr) {
        std::memcpy(update_ + (r + i) * l_.embed + panel * kPanel, from, width * sizeof(float));
        continue;
      }
      float* to = row(r + i) + panel * kPanel;
      for (long j = 0; j < width; j++) to[j] += l_.residual_scale * from[j];
    }
  }

  void add_normed(Team& team, const float* post_norm) {
    if (post_norm == nullptr) return;
    team.at("residual");
    team.rows(count_, [&](long r) {
      float *from = update_ + r * l_.embed, *to = row(r);
      normalise(from, post_norm, l_.embed, l_.eps, from);
      for (long j = 0; j < l_.embed; j++) to[j] += l_.residual_scale * from[j];
    });
  }

  template <class P>
  void rotate_and_store(long r, P* pages) {
    long half = l_.rotated / 2, b = row_[r], position = rows_.start[b] + r - first_[b];
    const float *cos = cos_ + index_[r] * half, *sin = sin_ + index_[r] * half;
    float* all = qkv_ + r * qkv_panels_ * kPanel;
    long q_size = g_.heads() * g_.head_dim, k_size = g_.kv_heads * g_.head_dim;
    if (l_.norm_all_heads && l_.q_norm != nullptr) {
      float* keys = all + k_panel_ * kPanel;
      normalise(keys, l_.k_norm, k_size, l_.eps, keys);
      if (!l_.kv_only) normalise(all, l_.q_norm, q_size, l_.eps, all);
    }
    auto rotate = [&](float* head, const float* scale) {
      if (scale != nullptr && !l_.norm_all_heads) normalise(head, scale, g_.head_dim, l_.eps, head);
      for (long i = 0; i < half; i++) {
        float x = head[i], y = head[half + i];
        head[i] = x * cos[i] - y * sin[i];
        head[half + i] = y * cos[i] + x * sin[i];
      }
    };
    for (long h = 0; h < g_.kv_heads; h++) {
      float* k = all + k_panel_ * kPanel + h * g_.head_dim;
      rotate(k, l_.k_norm);
      convert(k, slot(pages, rows_, g_, b, position, 0, h), g_.head_dim);
      convert(all + v_panel_ * kPanel + h * g_.head_dim,
              slot(pages, rows_, g_, b, position, 1, h), g_.head_dim);
    }
    if (l_.kv_only) return;
    for (long h = 0; h < g_.heads(); h++) {
      rotate(all + h * g_.head_dim, l_.q_norm);
      if (l_.query_factor != 1.0f) {
        for (long i = 0; i < g_.head_dim; i++) all[h * g_.head_dim + i] *= l_.query_factor;
      }
      convert(all + h * g_.head_dim, q_ + (r * g_.heads() + h) * g_.head_dim, g_.head_dim);
    }
  }

  // The panels of A factors that some row's adapter has columns in.
  void find_adapters() {
    std::vector<bool> used(panels(l_.num_adapters * l_.rank), false);
    for (long b = 0; b < rows_.batch && l_.num_adapters > 0; b++) {
      long mine = l_.adapter_index[b];
      if (rows_.lens[b] <= 0 || mine < 0) continue;
      for (long p = mine * l_.rank / kPanel; p * kPanel < (mine + 1) * l_.rank; p++) used[p] = true;
    }
    for (size_t p = 0; p < used.size(); p++) {
      if (used[p]) used_.push_back(static_cast<long>(p));
    }
  }

  // x times the A factors of the targets' adapters, of which a row keeps its own one's columns.
  void lower(Team& team, std::initializer_list<Target> targets, const Left<E>* x, long inputs) {
    Target adapted[kTargets];
    long count = 0, shares = static_cast<long>(used_.size());
    for (Target target : targets) {
      if (l_.adapters[target].a != nullptr) adapted[count++] = target;
    }
    if (count == 0 || shares == 0) return;
    long blocks = (count_ + kBlockRows - 1) / kBlockRows;
    team.at("adapters");
    team.loop(blocks * count * shares, [&](long item) {
      alignas(64) float tile[kBlockRows * kPanel];
      Target target = adapted[item / shares % count];
      long panel = used_[item % shares], r = item / shares / count * kBlockRows;
      long n = std::min(kBlockRows, count_ - r), stride = round_up(inputs, 2);
      multiply_panel<E>(n, x + r * stride, stride,
                        l_.adapters[target].a + panel * panel_size<E>(inputs), units<E>(inputs),
                        tile, kPanel, false);
      for (long i = 0; i < n; i++) {
        long first = adapter(r + i) * l_.rank;
        if (first < 0) continue;
        long begin = std::max(first, panel * kPanel);
        long end = std::min(first + l_.rank, (panel + 1) * kPanel);
        Left<E>* low = low_ + (target * count_ + r + i) * l_.rank;
        for (long c = begin; c < end; c++) {
          low[c - first] = from_float<Left<E>>(tile[i * kPanel + c - panel * kPanel]);
        }
      }
    });
  }

  // Adds the B factors' part to a tile of the target's output, run of rows by run of rows.
  void adapt(Target target, long r, long n, long panel, float* tile, long ldt) {
    const E* b = l_.adapters[target].b;
    if (used_.empty() || b == nullptr) return;
    b += panel * panel_size<E>(l_.num_adapters * l_.rank);
    for (long i = 0, end = 0; i < n; i = end) {
      long mine = adapter(r + i);
      for (end = i + 1; end < n && adapter(r + end) == mine;) end++;
      if (mine < 0) continue;
      multiply_panel<E>(end - i, low_ + (target * count_ + r + i) * l_.rank, l_.rank,
                        b + mine * l_.rank * kPanel, l_.rank / Unit<E>::size, tile + i * ldt, ldt,
                        true);
    }
  }

  const Layer<E, W>& l_;
  const Rows& rows_;
  const Geometry& g_;
  float* x_;
  const float *cos_, *sin_;
  E* pages_;
  fp8* small_pages_;
  bool one_query_ = false;
  long count_ = 0, k_panel_ = 0, v_panel_ = 0, qkv_panels_ = 0;
  std::vector<long> index_, row_, first_, used_;
  Left<E> *normed_ = nullptr, *q_ = nullptr, *attended_ = nullptr, *hidden_ = nullptr,
          *low_ = nullptr;
  float *qkv_ = nullptr, *update_ = nullptr;
  RoundedBuffer* rounded_memory_ = nullptr;
  RoundedRows rounded_;  // what the next product reads, where it reads rounded rows
};

}  // namespace pshare
