// A decoder layer, and the head, over packed weights.
//
// Only valid tokens are computed: they are gathered into consecutive rows, so that a batch or chunk
// that is not full costs no more than what is in it. The residual stream is float32; what enters a
// matrix product is rounded to E.
#pragma once

#include <vector>

#include "attention.h"

namespace pshare {

constexpr int kTargets = 7;
enum Target { kQ, kK, kV, kO, kGate, kUp, kDown };

template <class E>
struct Adapter {
  const E *a = nullptr, *b = nullptr;  // packed [inputs, num * rank] and [num * rank, outputs]
};

template <class E>
struct Layer {
  long embed, mlp;
  Geometry geometry;
  float eps;
  bool kv_only;  // write K and V and compute nothing else
  const float *attn_norm, *mlp_norm;
  const float *bias, *q_norm, *k_norm;  // null where there is none; bias as long as qkv's panels
  const E *qkv, *o, *gate_up, *down;
  long num_adapters = 0, rank = 0;
  const int32_t* adapter_index = nullptr;  // [batch], -1 for none
  Adapter<E> adapters[kTargets];
};

inline float mean_square(const float* x, long count) {
  VF total[2] = {};
  long i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    VF a = load<VF>(x + i), b = load<VF>(x + i + kWidth);
    total[0] += a * a;
    total[1] += b * b;
  }
  float rest = 0;
  for (; i < count; i++) rest += x[i] * x[i];
  return (sum(total[0] + total[1]) + rest) / static_cast<float>(count);
}

// RMS normalisation (arXiv 1910.07467) of one row; x and out may be the same.
inline void normalise(const float* x, const float* scale, long count, float eps, float* out) {
  float factor = 1.0f / std::sqrt(mean_square(x, count) + eps);
  for (long i = 0; i < count; i++) out[i] = x[i] * factor * scale[i];
}

template <class E>
void norm_row(const float* x, const float* scale, long count, float eps, E* out) {
  static thread_local std::vector<float> wide;
  wide.resize(count);
  normalise(x, scale, count, eps, wide.data());
  convert(wide.data(), out, count);
}

// Memory of a call that lasts until the next one of the same size or less in this thread.
template <class T>
struct Buffer {
  std::vector<T> data;
  T* get(long count) {
    if (static_cast<long>(data.size()) < count) data.resize(count);
    return data.data();
  }
};

// Where a layer's weights begin in the vectors and matrices of all layers, see
// decoder_layer/packing.py.
template <class E>
void locate(Layer<E>& l, const float* vectors, const E* matrices, bool bias, bool qk_norm) {
  const Geometry& g = l.geometry;
  long heads = g.heads() * g.head_dim, kv = g.kv_heads * g.head_dim;
  long qkv = panels(heads) + 2 * panels(kv);
  auto take = [](auto& from, long count) {
    auto at = from;
    from += count;
    return at;
  };
  l.attn_norm = take(vectors, l.embed);
  l.mlp_norm = take(vectors, l.embed);
  l.bias = bias ? take(vectors, qkv * kPanel) : nullptr;
  l.q_norm = qk_norm ? take(vectors, g.head_dim) : nullptr;
  l.k_norm = qk_norm ? take(vectors, g.head_dim) : nullptr;
  l.qkv = take(matrices, qkv * panel_size<E>(l.embed));
  l.o = take(matrices, panels(l.embed) * panel_size<E>(heads));
  l.gate_up = take(matrices, 2 * panels(l.mlp) * panel_size<E>(l.embed));
  l.down = take(matrices, panels(l.embed) * panel_size<E>(l.mlp));
}

// The same for the factors of the targets in the bit set `targets`.
template <class E>
void locate_adapters(Layer<E>& l, const E* factors, long targets) {
  const Geometry& g = l.geometry;
  long heads = g.heads() * g.head_dim, kv = g.kv_heads * g.head_dim;
  const long inputs[kTargets] = {l.embed, l.embed, l.embed, heads, l.embed, l.embed, l.mlp};
  const long outputs[kTargets] = {heads, kv, kv, l.embed, l.mlp, l.mlp, l.embed};
  long low = l.num_adapters * l.rank;
  for (int t = 0; t < kTargets; t++) {
    if ((targets >> t & 1) == 0) continue;
    l.adapters[t].a = factors;
    factors += panels(low) * panel_size<E>(inputs[t]);
    l.adapters[t].b = factors;
    factors += panels(outputs[t]) * panel_size<E>(low);
  }
}

template <class E>
class LayerCall {
 public:
  // x [batch * tokens, embed] is updated in place; cos and sin are [batch * tokens, head_dim / 2].
  LayerCall(const Layer<E>& layer, const Rows& rows, long tokens, float* x, const float* cos,
            const float* sin, E* pages)
      : l_(layer), rows_(rows), g_(layer.geometry), x_(x), cos_(cos), sin_(sin), pages_(pages) {
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
    static thread_local Buffer<E> normed, q, attended, hidden, low;
    static thread_local Buffer<float> qkv;
    normed_ = normed.get(count_ * embed_stride());
    qkv_ = qkv.get(count_ * qkv_panels_ * kPanel);
    q_ = q.get(count_ * g_.heads() * g_.head_dim);
    attended_ = attended.get(count_ * round_up(g_.heads() * g_.head_dim, 2));
    hidden_ = hidden.get(count_ * round_up(l_.mlp, 2));
    find_adapters();
    low_ = low.get(used_.empty() ? 0 : kTargets * count_ * low_stride());
    Attention<E> attention(q_, attended_, pages_, rows_, g_, first_, one_query_);
    Pool::instance().run([&](Team& team) {
      attention_block(team, attention);
      if (!l_.kv_only) mlp_block(team);
    });
  }

 private:
  long embed_stride() const { return round_up(l_.embed, 2); }
  long low_stride() const { return l_.num_adapters * l_.rank; }
  float* row(long r) { return x_ + index_[r] * l_.embed; }

  void attention_block(Team& team, Attention<E>& attention) {
    norm(team, l_.attn_norm);
    for (Target target : {kQ, kK, kV}) {
      if (target != kQ || !l_.kv_only) lower(team, target, normed_, l_.embed);
    }
    long columns = qkv_panels_ * kPanel;
    multiply<E>(team, count_, normed_, embed_stride(), l_.qkv, l_.embed,
                l_.kv_only ? k_panel_ : 0, qkv_panels_, 1,
                [&](long r, long n, long panel, float* tile) {
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
    team.loop(count_, [&](long r) { rotate_and_store(r); });
    if (l_.kv_only) return;
    attention.run(team);
    long width = g_.heads() * g_.head_dim;
    lower(team, kO, attended_, width);
    multiply<E>(team, count_, attended_, width, l_.o, width, 0, panels(l_.embed), 1,
                [&](long r, long n, long panel, float* tile) {
                  adapt(kO, r, n, panel, tile, kPanel);
                  add_to_residual(r, n, panel, tile);
                });
  }

  void mlp_block(Team& team) {
    norm(team, l_.mlp_norm);
    lower(team, kGate, normed_, l_.embed);
    lower(team, kUp, normed_, l_.embed);
    long stride = round_up(l_.mlp, 2);
    // Panels of gate and up alternate.
    multiply<E>(team, count_, normed_, embed_stride(), l_.gate_up, l_.embed, 0,
                2 * panels(l_.mlp), 2, [&](long r, long n, long panel, float* tile) {
                  adapt(kGate, r, n, panel / 2, tile, 2 * kPanel);
                  adapt(kUp, r, n, panel / 2, tile + kPanel, 2 * kPanel);
                  long column = panel / 2 * kPanel;
                  long width = std::min<long>(kPanel, stride - column);
                  for (long i = 0; i < n; i++) {
                    float* gate = tile + i * 2 * kPanel;
                    for (int v = 0; v < kVectors; v++) {
                      VF g = load<VF>(gate + v * kWidth);
                      VF up = load<VF>(gate + kPanel + v * kWidth);
                      store(gate + v * kWidth, g / (1.0f + exp(-g)) * up);
                    }
                    convert(gate, hidden_ + (r + i) * stride + column, width);
                  }
                });
    lower(team, kDown, hidden_, l_.mlp);
    multiply<E>(team, count_, hidden_, stride, l_.down, l_.mlp, 0, panels(l_.embed), 1,
                [&](long r, long n, long panel, float* tile) {
                  adapt(kDown, r, n, panel, tile, kPanel);
                  add_to_residual(r, n, panel, tile);
                });
  }

  void norm(Team& team, const float* scale) {
    team.loop(count_, [&](long r) {
      norm_row(row(r), scale, l_.embed, l_.eps, normed_ + r * embed_stride());
      if (l_.embed % 2) normed_[(r + 1) * embed_stride() - 1] = E{};
    });
  }

  void add_to_residual(long r, long n, long panel, const float* tile) {
    long width = std::min<long>(kPanel, l_.embed - panel * kPanel);
    for (long i = 0; i < n; i++) {
      float* to = row(r + i) + panel * kPanel;
      for (long j = 0; j < width; j++) to[j] += tile[i * kPanel + j];
    }
  }

  void rotate_and_store(long r) {
    long half = g_.head_dim / 2, b = row_[r], position = rows_.start[b] + r - first_[b];
    const float *cos = cos_ + index_[r] * half, *sin = sin_ + index_[r] * half;
    float* all = qkv_ + r * qkv_panels_ * kPanel;
    auto rotate = [&](float* head, const float* scale) {
      if (scale != nullptr) normalise(head, scale, g_.head_dim, l_.eps, head);
      for (long i = 0; i < half; i++) {
        float x = head[i], y = head[half + i];
        head[i] = x * cos[i] - y * sin[i];
        head[half + i] = y * cos[i] + x * sin[i];
      }
    };
    for (long h = 0; h < g_.kv_heads; h++) {
      float* k = all + k_panel_ * kPanel + h * g_.head_dim;
      rotate(k, l_.k_norm);
      convert(k, slot(pages_, rows_, g_, b, position, 0, h), g_.head_dim);
      convert(all + v_panel_ * kPanel + h * g_.head_dim,
              slot(pages_, rows_, g_, b, position, 1, h), g_.head_dim);
    }
    if (l_.kv_only) return;
    for (long h = 0; h < g_.heads(); h++) {
      rotate(all + h * g_.head_dim, l_.q_norm);
      convert(all + h * g_.head_dim, q_ + (r * g_.heads() + h) * g_.head_dim, g_.head_dim);
    }
  }

  // The adapters that some row uses.
  void find_adapters() {
    std::vector<bool> used(l_.num_adapters, false);
    for (long b = 0; b < rows_.batch && l_.num_adapters > 0; b++) {
      if (rows_.lens[b] > 0 && l_.adapter_index[b] >= 0) used[l_.adapter_index[b]] = true;
    }
    for (long i = 0; i < l_.num_adapters; i++) {
      if (used[i]) used_.push_back(i);
    }
  }

  // x times the A factors of every adapter in use; a row keeps its own adapter's part.
  void lower(Team& team, Target target, const E* x, long inputs) {
    const E* a = l_.adapters[target].a;
    if (used_.empty() || a == nullptr) return;
    E* low = low_ + target * count_ * low_stride();
    multiply<E>(team, count_, x, round_up(inputs, 2), a, inputs, 0, panels(low_stride()), 1,
                [&](long r, long n, long panel, float* tile) {
                  long begin = panel * kPanel, end = std::min(begin + kPanel, low_stride());
                  for (long i = 0; i < n; i++) {
                    long mine = l_.adapter_index[row_[r + i]];
                    for (long c = begin; c < end; c++) {
                      bool keep = mine >= 0 && c / l_.rank == mine;
                      low[(r + i) * low_stride() + c] =
                          from_float<E>(keep ? tile[i * kPanel + c - begin] : 0.0f);
                    }
                  }
                });
  }

  // Adds the B factors' part to a tile of the target's output.
  void adapt(Target target, long r, long n, long panel, float* tile, long ldt) {
    const E* b = l_.adapters[target].b;
    if (used_.empty() || b == nullptr) return;
    const E* low = low_ + (target * count_ + r) * low_stride();
    b += panel * panel_size<E>(low_stride());
    for (long i : used_) {
      multiply_panel<E>(n, low + i * l_.rank, low_stride(), b + i * l_.rank * kPanel,
                        l_.rank / Unit<E>::size, tile, ldt, true);
    }
  }

  const Layer<E>& l_;
  const Rows& rows_;
  const Geometry& g_;
  float* x_;
  const float *cos_, *sin_;
  E* pages_;
  bool one_query_ = false;
  long count_ = 0, k_panel_ = 0, v_panel_ = 0, qkv_panels_ = 0;
  std::vector<long> index_, row_, first_, used_;
  E *normed_ = nullptr, *q_ = nullptr, *attended_ = nullptr, *hidden_ = nullptr, *low_ = nullptr;
  float* qkv_ = nullptr;
};

// The most likely token of each row with lens > 0, and its logits [batch, vocab] if they are wanted:
// final norm, then the head. Other rows get 0.
template <class E>
void head(const float* x, const float* scale, const E* packed, const int32_t* lens, long batch,
          long embed, long vocab, float eps, bool wanted, float* logits, int32_t* best) {
  std::vector<long> rows;
  for (long b = 0; b < batch; b++) {
    best[b] = 0;
    if (lens[b] > 0) rows.push_back(b);
    else if (wanted) std::fill_n(logits + b * vocab, vocab, 0.0f);
  }
  long count = static_cast<long>(rows.size()), stride = round_up(embed, 2), all = panels(vocab);
  static thread_local Buffer<E> memory;
  static thread_local Buffer<float> tops;
  E* normed = memory.get(count * stride);
  float* top = tops.get(all * count);  // of each panel
  Pool::instance().run([&](Team& team) {
    team.loop(count, [&](long r) {
      norm_row(x + rows[r] * embed, scale, embed, eps, normed + r * stride);
      if (embed % 2) normed[(r + 1) * stride - 1] = E{};
    });
    multiply<E>(team, count, normed, stride, packed, embed, 0, all, 1,
                [&](long r, long n, long panel, float* tile) {
                  long width = std::min<long>(kPanel, vocab - panel * kPanel);
                  for (long i = 0; i < n; i++) {
                    const float* from = tile + i * kPanel;
                    top[panel * count + r + i] = *std::max_element(from, from + width);
                    if (!wanted) continue;
                    float* to = logits + rows[r + i] * vocab + panel * kPanel;
                    std::memcpy(to, from, width * sizeof(float));
                  }
                });
    // The first of the highest: its panel is computed again.
    team.loop(count, [&](long r) {
      long panel = 0;
      for (long p = 1; p < all; p++) {
        if (top[p * count + r] > top[panel * count + r]) panel = p;
      }
      float tile[kPanel];
      multiply_panel<E>(1, normed + r * stride, stride, packed + panel * panel_size<E>(embed),
                        units<E>(embed), tile, kPanel, false);
      long width = std::min<long>(kPanel, vocab - panel * kPanel);
      best[rows[r]] = panel * kPanel + (std::max_element(tile, tile + width) - tile);
    });
  });
}

}  // namespace pshare
