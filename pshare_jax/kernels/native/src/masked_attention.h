// Attention of training: every query of a row over every key of it that a mask lets it see, and its
// gradient. Operands and results are bfloat16, scores, softmax and sums float32.
//
// One thread takes a row's KV head with the queries that share it, a block of tokens at a time, so
// that scores stay in the second-level cache; they are computed again for the gradient. Keys that no
// token of a block sees are left out of its products. Where heads are few they are cut into parts,
// each some tokens with sums of its own, by a rule that knows the shape alone: every sum has one
// order, and results do not depend on the threads.
#pragma once

#include <limits>

#include "matmul.h"

namespace pshare {

// q and out [batch, queries, kv_heads, group, dims], k and v [batch, keys, kv_heads, dims],
// mask [batch, queries, keys]; the first `constant` keys get no gradient.
struct MaskedAttention {
  long batch, queries, keys, kv_heads, group, dims, constant;
  const bf16 *q, *k, *v;
  const uint8_t* mask;

  const bf16* query_rows(const bf16* from, long b, long t, long head) const {
    return from + ((b * queries + t) * kv_heads + head) * group * dims;
  }
  long key_row(long b, long s, long head) const {
    return ((b * keys + s) * kv_heads + head) * dims;
  }
};

namespace masked {

constexpr long kRows = 96;   // queries of a block
constexpr long kItems = 32;  // parts of all heads together, or more

// A matrix [depth, lines] of which products take columns `lines`: its panels.
struct Packed {
  Buffer<bf16> memory;
  long size = 0;

  void pack(const Side& side) {
    size = panel_size<bf16>(side.depth);
    bf16* to = memory.get(panels(side.lines) * size);
    for (long p = 0; p < panels(side.lines); p++) pack_panel(side, p, to + p * size);
  }
  // Panel p from the row `depth` on, which is even.
  const bf16* panel(long p, long depth = 0) { return memory.data.data() + p * size + depth * kPanel; }
};

// Copies `count` lines of `dims`, `stride` apart, and zeros up to `most` lines.
inline void gather(const bf16* from, long count, long stride, long dims, long most, bf16* to) {
  for (long i = 0; i < count; i++) std::memcpy(to + i * dims, from + i * stride, dims * sizeof(bf16));
  std::fill(to + count * dims, to + most * dims, bf16{});
}

struct Scratch {
  Buffer<bf16> keys, values, queries, gradients, weights, score_gradients;
  Buffer<float> scores, weight_gradients, out, sums;
  Buffer<Left<bf16>> lines;
  Buffer<uint8_t> seen;
  Packed keys_by_dim, values_by_key, values_by_dim, keys_by_key, right;
};

inline Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}

// c[rows, count panels] = left times panels `first ..` of `right`, of which the rows from `from` on
// are taken: as many as `left` has columns.
inline void multiply_all(const Side& left, Packed& right, long first, long count, long from, float* c,
                         long ldc) {
  for (long row = 0; row < left.lines; row += kBlockRows) {
    long rows = std::min(kBlockRows, left.lines - row);
    LeftRows lines = left_rows(left, row, rows, scratch().lines);
    for (long p = 0; p < count; p++) {
      multiply_panel<bf16>(rows, lines.data, lines.stride, right.panel(first + p, from),
                           units<bf16>(left.depth), c + row * ldc + p * kPanel, ldc, false);
    }
  }
}

inline VI lanes(const uint8_t* mask) {
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  return __builtin_convertvector(load<Bytes>(mask), VI) != 0;
}

// Scores, not yet scaled, to weights in place and, rounded, to `rounded`; `width` is a multiple of
// kWidth. All are 0 where no key is seen.
inline void softmax(float* scores, const uint8_t* mask, long width, float scale, bf16* rounded) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  VF highest = splat(lowest);
  for (long i = 0; i < width; i += kWidth) {
    VF x = choose(lanes(mask + i), load<VF>(scores + i) * scale, splat(lowest));
    highest = choose(x > highest, x, highest);
    store(scores + i, x);
  }
  float most = largest(highest);
  VF total{};
  // Not where a NaN hides the highest score: it has to come out.
  bool any = most > lowest;
  for (long i = 0; i < width; i += kWidth) {
    VF x = load<VF>(scores + i);
    VF weight = any ? exp(x - most) : choose(x == lowest, VF{}, x);
    total += weight;
    store(scores + i, weight);
  }
  float sums = sum(total), factor = sums == 0 ? 0 : 1 / sums;
  for (long i = 0; i < width; i += kWidth) store(scores + i, load<VF>(scores + i) * factor);
  convert(scores, rounded, width);
}

// Gradients of the weights to those of the scores before scaling, rounded.
inline void softmax_gradient(const float* weights, float* gradients, long width, float scale,
                             bf16* rounded) {
  VF total{};
  for (long i = 0; i < width; i += kWidth) {
    total += load<VF>(weights + i) * load<VF>(gradients + i);
  }
  float mean = sum(total);
  for (long i = 0; i < width; i += kWidth) {
    store(gradients + i, load<VF>(weights + i) * (load<VF>(gradients + i) - mean) * scale);
  }
  convert(gradients, rounded, width);
}

// One KV head of a row.
class Head {
 public:
  Head(const MaskedAttention& a, long b, long head)
      : a_(a), b_(b), head_(head), s_(scratch()), all_(round_up(a.keys, kPanel)),
        dims_(round_up(a.dims, kPanel)), scale_(1 / std::sqrt(static_cast<float>(a.dims))) {
    long stride = a.kv_heads * a.dims, first = a.key_row(b, 0, head);
    gather(a.k + first, a.keys, stride, a.dims, all_, s_.keys.get(all_ * a.dims));
    gather(a.v + first, a.keys, stride, a.dims, all_, s_.values.get(all_ * a.dims));
    s_.keys_by_dim.pack(keys(true));
  }

  // Of tokens begin .. end - 1.
  void forward(long begin, long end, bf16* out) {
    s_.values_by_key.pack(values(false));
    blocks(begin, end, [&] {
      weigh();
      float* sums = s_.out.get(rows_ * dims_);
      multiply_all({s_.weights.data.data(), rows_, width_, true}, s_.values_by_key, 0,
                   panels(a_.dims), first_, sums, dims_);
      scatter(sums, out);
    });
  }

  // Of tokens begin .. end - 1; their part of the gradients of keys and values goes to two arrays of
  // float32, of whole panels.
  void backward(long begin, long end, const bf16* gradient, bf16* dq, float* key_sums,
                float* value_sums) {
    s_.values_by_dim.pack(values(true));
    s_.keys_by_key.pack(keys(false));
    std::fill_n(key_sums, all_ * dims_, 0.0f);
    std::fill_n(value_sums, all_ * dims_, 0.0f);
    blocks(begin, end, [&] {
      weigh();
      bf16* above = s_.gradients.get(padded_ * a_.dims);
      block_rows(gradient, above);
      float* weights = s_.weight_gradients.get(rows_ * width_);
      multiply_all({above, rows_, a_.dims, true}, s_.values_by_dim, first_ / kPanel,
                   width_ / kPanel, 0, weights, width_);
      bf16* scores = s_.score_gradients.get(padded_ * width_);
      for (long r = 0; r < rows_; r++) {
        softmax_gradient(s_.scores.data.data() + r * width_, weights + r * width_, width_, scale_,
                         scores + r * width_);
      }
      std::fill(scores + rows_ * width_, scores + padded_ * width_, bf16{});
      float* sums = s_.out.get(rows_ * dims_);
      multiply_all({scores, rows_, width_, true}, s_.keys_by_key, 0, panels(a_.dims), first_, sums,
                   dims_);
      scatter(sums, dq);
      add_to_keys(scores, s_.queries.data.data(), key_sums);
      add_to_keys(s_.weights.data.data(), above, value_sums);
    });
  }

 private:
  Side keys(bool by_line) const { return side(s_.keys, by_line); }
  Side values(bool by_line) const { return side(s_.values, by_line); }
  // Columns are keys if by_line, otherwise dimensions.
  Side side(const Buffer<bf16>& rows, bool by_line) const {
    const bf16* data = rows.data.data();
    return by_line ? Side{data, all_, a_.dims, true} : Side{data, a_.dims, all_, false};
  }

  // Calls `body` for each block of tokens begin .. end - 1.
  template <class Body>
  void blocks(long begin, long end, Body body) {
    long most = std::max(1L, kRows / a_.group);
    for (token_ = begin; token_ < end; token_ += tokens_) {
      tokens_ = std::min(most, end - token_);
      rows_ = tokens_ * a_.group;
      padded_ = round_up(rows_, kPanel);
      find_keys();
      body();
    }
  }

  // The keys that some token of the block sees, widened to whole panels, at least one.
  void find_keys() {
    long low = a_.keys, high = 0;
    for (long t = token_; t < token_ + tokens_; t++) {
      const uint8_t* mask = mask_row(t);
      const void* found = std::memchr(mask, 1, a_.keys);
      if (found == nullptr) continue;
      low = std::min<long>(low, static_cast<const uint8_t*>(found) - mask);
      long last = a_.keys;
      while (!mask[last - 1]) last--;
      high = std::max(high, last);
    }
    first_ = std::min(low, a_.keys - 1) / kPanel * kPanel;
    width_ = std::max(round_up(high, kPanel) - first_, static_cast<long>(kPanel));
  }

  const uint8_t* mask_row(long token) const {
    return a_.mask + (b_ * a_.queries + token) * a_.keys;
  }

  // The block's queries, their weights over the keys, and these rounded.
  void weigh() {
    bf16* queries = s_.queries.get(padded_ * a_.dims);
    block_rows(a_.q, queries);
    float* scores = s_.scores.get(rows_ * width_);
    multiply_all({queries, rows_, a_.dims, true}, s_.keys_by_dim, first_ / kPanel, width_ / kPanel, 0,
                 scores, width_);
    bf16* weights = s_.weights.get(padded_ * width_);
    uint8_t* seen = s_.seen.get(width_);
    for (long t = 0; t < tokens_; t++) {
      long count = std::min(width_, a_.keys - first_);
      std::memcpy(seen, mask_row(token_ + t) + first_, count);
      std::fill(seen + count, seen + width_, 0);
      for (long r = t * a_.group; r < (t + 1) * a_.group; r++) {
        softmax(scores + r * width_, seen, width_, scale_, weights + r * width_);
      }
    }
    std::fill(weights + rows_ * width_, weights + padded_ * width_, bf16{});
  }

  // sums[keys, dims] += columns[queries, keys]^T right[queries, dims]
  void add_to_keys(const bf16* columns, const bf16* right, float* sums) {
    s_.right.pack({right, a_.dims, padded_, false});
    long skipped = std::clamp(a_.constant / kWidth * kWidth - first_, 0L, width_);
    Side left{columns, width_, padded_, false};
    for (long row = skipped; row < width_; row += kBlockRows) {
      long rows = std::min(kBlockRows, width_ - row);
      LeftRows lines = left_rows(left, row, rows, s_.lines);
      for (long p = 0; p < panels(a_.dims); p++) {
        multiply_panel<bf16>(rows, lines.data, lines.stride, s_.right.panel(p),
                             units<bf16>(padded_), sums + (first_ + row) * dims_ + p * kPanel, dims_,
                             true);
      }
    }
  }

  // The block's part of an array like q, [tokens, group, dims], and zeros.
  void block_rows(const bf16* from, bf16* to) const {
    gather(a_.query_rows(from, b_, token_, head_), tokens_, a_.kv_heads * a_.group * a_.dims,
           a_.group * a_.dims, tokens_, to);
    std::fill(to + rows_ * a_.dims, to + padded_ * a_.dims, bf16{});
  }

  void scatter(const float* sums, bf16* to) const {
    for (long t = 0; t < tokens_; t++) {
      bf16* row = const_cast<bf16*>(a_.query_rows(to, b_, token_ + t, head_));
      for (long g = 0; g < a_.group; g++) {
        convert(sums + (t * a_.group + g) * dims_, row + g * a_.dims, a_.dims);
      }
    }
  }

  const MaskedAttention& a_;
  const long b_, head_;
  Scratch& s_;
  const long all_, dims_;  // keys and dimensions, in whole panels
  const float scale_;
  // Of a block: its tokens, rows, rows with padding, and the keys that it sees.
  long token_ = 0, tokens_ = 0, rows_ = 0, padded_ = 0, first_ = 0, width_ = 0;
};

// Sums of the gradients of keys, or of values, to where they belong.
inline void finish(const MaskedAttention& a, long b, long head, const float* sums, bf16* to) {
  long stride = round_up(a.dims, kPanel);
  for (long s = 0; s < a.keys; s++) {
    bf16* row = to + a.key_row(b, s, head);
    if (s < a.constant) std::fill_n(row, a.dims, bf16{});
    else convert(sums + s * stride, row, a.dims);
  }
}

// Parts of a head, and the tokens of each.
struct Parts {
  long count, tokens;

  explicit Parts(const MaskedAttention& a) {
    long block = std::max(1L, kRows / a.group), heads = std::max(1L, a.batch * a.kv_heads);
    long blocks = std::max(1L, (a.queries + block - 1) / block);
    long wanted = std::min(blocks, (kItems + heads - 1) / heads);
    tokens = (blocks + wanted - 1) / wanted * block;
    count = std::max(1L, (a.queries + tokens - 1) / tokens);
  }
};

inline void fill_zeros(const MaskedAttention& a, bf16* to) {
  std::fill_n(to, a.batch * a.queries * a.kv_heads * a.group * a.dims, bf16{});
}

}  // namespace masked

inline void masked_attention(const MaskedAttention& a, bf16* out) {
  if (a.keys == 0) return masked::fill_zeros(a, out);
  masked::Parts parts(a);
  Pool::instance().run([&](Team& team) {
    team.loop(a.batch * a.kv_heads * parts.count, [&](long i) {
      long item = i / parts.count, begin = i % parts.count * parts.tokens;
      masked::Head head(a, item / a.kv_heads, item % a.kv_heads);
      head.forward(begin, std::min(begin + parts.tokens, a.queries), out);
    });
  });
}

inline void masked_attention_gradient(const MaskedAttention& a, const bf16* gradient, bf16* dq,
                                      bf16* dk, bf16* dv) {
  if (a.keys == 0) return masked::fill_zeros(a, dq);
  masked::Parts parts(a);
  long size = round_up(a.keys, kPanel) * round_up(a.dims, kPanel), items = a.batch * a.kv_heads;
  // Of several parts: sums of keys, then of values, part after part.
  static thread_local Buffer<float> memory;
  float* shared = parts.count > 1 ? memory.get(items * parts.count * 2 * size) : nullptr;
  Pool::instance().run([&](Team& team) {
    team.loop(items * parts.count, [&](long i) {
      long item = i / parts.count, begin = i % parts.count * parts.tokens;
      long b = item / a.kv_heads, h = item % a.kv_heads;
      masked::Head head(a, b, h);
      float* sums = shared ? shared + i * 2 * size : masked::scratch().sums.get(2 * size);
      head.backward(begin, std::min(begin + parts.tokens, a.queries), gradient, dq, sums,
                    sums + size);
      if (shared) return;
      masked::finish(a, b, h, sums, dk);
      masked::finish(a, b, h, sums + size, dv);
    });
    if (!shared) return;
    team.loop(items * 2, [&](long i) {
      long item = i / 2, b = item / a.kv_heads, h = item % a.kv_heads;
      float* sums = shared + item * parts.count * 2 * size + i % 2 * size;
      for (long part = 1; part < parts.count; part++) {
        const float* more = sums + part * 2 * size;
        for (long k = 0; k < size; k++) sums[k] += more[k];
      }
      masked::finish(a, b, h, sums, i % 2 == 0 ? dk : dv);
    });
  });
}

}  // namespace pshare
