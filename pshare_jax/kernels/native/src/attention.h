// Causal attention over paged KV, for any number of queries a row.
//
// Queries of one row that share a KV head are the rows of one matrix: up to kTileTokens tokens of
// `group` heads. Keys are taken in blocks of kBlockKeys and sums begin anew every kChunkKeys
// positions, counted from position 0; a chunk's sums are then merged into the row's (online
// softmax, Milakov and Gimelshein, arXiv 1805.02867). With one query a row, chunks are shared out
// over threads, otherwise tiles are; the sums are the same ones in the same order, so a query's
// result does not depend on what it is computed beside.
#pragma once

#include <string>
#include <vector>

#include "kv_panels.h"

namespace pshare {

constexpr long kTileTokens = 64;
constexpr long kBlockKeys = 2 * kPanel;
constexpr long kChunkKeys = 256;
constexpr float kMasked = -1e30f;
static_assert(kChunkKeys % kBlockKeys == 0);

// The rows of a batch; position j of row b is in page table[b * width + j / page_size].
struct Rows {
  const int32_t *table, *start, *lens;
  long batch, width;
};

// Pages [num_pages, 2, kv_heads, page_size, head_dim]; heads = kv_heads * group.
struct Geometry {
  long kv_heads, group, page_size, head_dim, window;  // window 0: unlimited
  float soft_cap;                                     // 0: none
  const float* sinks = nullptr;  // [heads], scores that take weight and give nothing; null: none
  long heads() const { return kv_heads * group; }
};

template <class E>
E* slot(E* pages, const Rows& rows, const Geometry& g, long row, long position, int part,
        long head) {
  long page = rows.table[row * rows.width + position / g.page_size];
  return pages + (((page * 2 + part) * g.kv_heads + head) * g.page_size + position % g.page_size) *
                     g.head_dim;
}

// What is wrong with the rows of a call of `tokens` tokens a row, if anything: nothing outside of
// the pool and the page table may be touched, whatever a caller does.
inline std::string problem(const Rows& rows, long tokens, const Geometry& g, long num_pages) {
  for (long b = 0; b < rows.batch; b++) {
    long start = rows.start[b], end = start + rows.lens[b];
    if (rows.lens[b] <= 0) continue;
    if (rows.lens[b] > tokens) return "q_lens exceeds the tokens of the call";
    if (start < 0 || end > rows.width * g.page_size) return "positions exceed the page table";
    long first = g.window > 0 ? std::max<long>(start - g.window + 1, 0) : 0;
    for (long n = first / g.page_size; n * g.page_size < end; n++) {
      long page = rows.table[b * rows.width + n];
      if (page < 0 || page >= num_pages) return "a page number is out of range";
    }
  }
  return "";
}

// Sums of one chunk, or of a whole row: highest score and total weight a query, and weighted values.
struct Sums {
  std::vector<float> highest, total, values;
  long stride = 0;
  void reset(long queries, long dims) {
    stride = round_up(dims, kPanel);
    highest.assign(queries, kMasked);
    total.assign(queries, 0.0f);
    values.assign(queries * stride, 0.0f);
  }
};

inline void scale_row(float* row, long count, float factor) {
  for (long i = 0; i < count; i++) row[i] *= factor;
}

// Adds the sums of a later chunk to `into`.
inline void merge(Sums& into, const float* highest, const float* total, const float* values,
                  long queries) {
  for (long i = 0; i < queries; i++) {
    float top = std::max(into.highest[i], highest[i]);
    float mine = std::exp(into.highest[i] - top), theirs = std::exp(highest[i] - top);
    into.highest[i] = top;
    into.total[i] = into.total[i] * mine + total[i] * theirs;
    float* to = &into.values[i * into.stride];
    const float* from = values + i * into.stride;
    for (long d = 0; d < into.stride; d++) to[d] = to[d] * mine + from[d] * theirs;
  }
}

// Over pages of E, with queries and results of T.
template <class E, class T>
class Attention {
 public:
  // Queries and results are [rows, heads, head_dim]; those of row b begin at first[b].
  Attention(const T* q, T* out, const E* pages, const Rows& rows, const Geometry& g,
            const std::vector<long>& first, bool one_query)
      : q_(q), out_(out), pages_(pages), rows_(rows), g_(g), first_(first), one_query_(one_query) {
    for (long b = 0; b < rows.batch; b++) {
      if (rows.lens[b] <= 0) continue;
      long from = chunk_of_first_key(rows.start[b]), to = rows.start[b] / kChunkKeys;
      if (one_query) {
        for (long c = from; c <= to; c++) items_.push_back({b, c, c == from ? to - from + 1 : 0});
      } else {
        for (long t = 0; t < rows.lens[b]; t += kTileTokens) items_.push_back({b, t, 0});
      }
    }
    // Later tiles see more keys: they come first, so that threads end together.
    if (!one_query) std::reverse(items_.begin(), items_.end());
    stride_ = round_up(g.head_dim, kPanel);
    if (one_query) parts_.resize(items_.size() * g.heads() * (stride_ + 2));
  }

  void run(Team& team) {
    long heads = g_.kv_heads, count = items_.size() * heads;
    if (!one_query_) {
      team.loop(count, [&](long i) { tile(items_[i / heads], i % heads); });
      return;
    }
    team.loop(count, [&](long i) { part(i / heads, i % heads); });
    team.loop(count, [&](long i) {
      if (items_[i / heads].chunks > 0) merge_parts(i / heads, i % heads);
    });
  }

 private:
  // Of a row: a chunk of keys (with the number of chunks, in the first one), or a tile of tokens.
  struct Item {
    long row, index, chunks;
  };
  struct Block {
    const E *keys[kBlockKeys], *values[kBlockKeys];
  };
  struct Scratch {
    std::vector<E> keys, values, zeros;
    std::vector<Left<E>> queries, weights;
    std::vector<float> scores, ordered;
    Sums chunk, row;
  };

  long first_key(long position) const {
    return g_.window > 0 ? std::max<long>(position - g_.window + 1, 0) : 0;
  }
  long chunk_of_first_key(long position) const { return first_key(position) / kChunkKeys; }

  float* part_of(long item, long head) {
    return &parts_[(item * g_.kv_heads + head) * g_.group * (stride_ + 2)];
  }

  static Scratch& scratch() {
    static thread_local Scratch s;
    return s;
  }

  void part(long item, long head) {
    Scratch& s = scratch();
    const Item& at = items_[item];
    load_queries(s, at.row, 0, 1, head);
    chunk(s, at.row, 0, 1, head, at.index);
    float* to = part_of(item, head);
    std::memcpy(to, s.chunk.highest.data(), g_.group * sizeof(float));
    std::memcpy(to + g_.group, s.chunk.total.data(), g_.group * sizeof(float));
    std::memcpy(to + 2 * g_.group, s.chunk.values.data(), g_.group * stride_ * sizeof(float));
  }

  void merge_parts(long item, long head) {
    Scratch& s = scratch();
    begin_row(s, 1, head);
    for (long c = 0; c < items_[item].chunks; c++) {
      const float* from = part_of(item + c, head);
      merge(s.row, from, from + g_.group, from + 2 * g_.group, g_.group);
    }
    finish(s, items_[item].row, 0, 1, head);
  }

  void tile(const Item& at, long head) {
    Scratch& s = scratch();
    long start = rows_.start[at.row] + at.index;
    long count = std::min(kTileTokens, rows_.lens[at.row] - at.index);
    load_queries(s, at.row, at.index, count, head);
    begin_row(s, count, head);
    for (long c = chunk_of_first_key(start); c <= (start + count - 1) / kChunkKeys; c++) {
      chunk(s, at.row, at.index, count, head, c);
      merge(s.row, s.chunk.highest.data(), s.chunk.total.data(), s.chunk.values.data(),
            count * g_.group);
    }
    finish(s, at.row, at.index, count, head);
  }

  // A sink is a score that has been seen before all others, with nothing to give.
  void begin_row(Scratch& s, long count, long head) {
    s.row.reset(count * g_.group, g_.head_dim);
    for (long i = 0; i < count * g_.group && g_.sinks != nullptr; i++) {
      s.row.highest[i] = g_.sinks[head * g_.group + i % g_.group];
      s.row.total[i] = 1.0f;
    }
  }

  void load_queries(Scratch& s, long row, long token, long count, long head) {
    long dims = g_.head_dim, width = g_.group * dims;
    s.queries.resize(count * width);
    for (long t = 0; t < count; t++) {
      const T* from = q_ + ((first_[row] + token + t) * g_.heads() + head * g_.group) * dims;
      convert(from, &s.queries[t * width], width);
    }
  }

  void finish(Scratch& s, long row, long token, long count, long head) {
    s.ordered.resize(s.row.stride);
    for (long i = 0; i < count * g_.group; i++) {
      float* values = &s.row.values[i * s.row.stride];
      scale_row(values, s.row.stride, 1.0f / std::max(s.row.total[i], 1e-37f));
      long r = first_[row] + token + i / g_.group, h = head * g_.group + i % g_.group;
      float* ordered = s.ordered.data();
      for (long p = 0; p < s.row.stride; p += kPanel) {
        for (long j = 0; j < kPanel; j++) ordered[p + column_order<E>(j)] = values[p + j];
      }
      convert(ordered, out_ + (r * g_.heads() + h) * g_.head_dim, g_.head_dim);
    }
  }

  // The sums over one chunk of keys, into s.chunk.
  void chunk(Scratch& s, long row, long token, long count, long head, long number) {
    long dims = g_.head_dim, queries = count * g_.group;
    long start = rows_.start[row] + token, end = start + count;
    long from = std::max(first_key(start), number * kChunkKeys);
    long to = std::min(end, (number + 1) * kChunkKeys);
    s.chunk.reset(queries, dims);
    s.scores.resize(queries * kBlockKeys);
    s.weights.resize(queries * kBlockKeys);
    s.keys.resize(kBlockKeys * dims);
    s.values.resize(panels(dims) * panel_size<E>(kBlockKeys));
    s.zeros.assign(dims, E{});
    Block at[2];
    long block = from / kBlockKeys * kBlockKeys;
    find_keys(s, row, head, block, from, to, at[0]);
    for (int now = 0; block < to; block += kBlockKeys, now = 1 - now) {
      // The next block is fetched while this one is computed.
      const Block &here = at[now], &next = at[1 - now];
      find_keys(s, row, head, block + kBlockKeys, from, to, at[1 - now]);
      for (long p = 0; p < 2; p++) {
        E* packed = &s.keys[p * kPanel * dims];
        fetch(next.keys + p * kPanel, dims);
        transpose_panel<E>(here.keys + p * kPanel, dims, reinterpret_cast<uint32_t*>(packed));
        multiply_panel<E>(queries, s.queries.data(), dims, packed, dims / Unit<E>::size,
                          &s.scores[p * kPanel], kBlockKeys, false);
      }
      for (long i = 0; i < queries; i++) weigh(s, i, start + i / g_.group - block);
      fetch(next.values, dims);
      pack_values(here.values, kBlockKeys, dims, s.values.data());
      fetch(next.values + kPanel, dims);
      for (long p = 0; p < panels(dims); p++) {
        multiply_panel<E>(queries, s.weights.data(), kBlockKeys,
                          &s.values[p * panel_size<E>(kBlockKeys)], units<E>(kBlockKeys),
                          &s.chunk.values[p * kPanel], s.chunk.stride, true);
      }
    }
  }

  static void fetch(const E* const* rows, long dims) {
    for (long j = 0; j < kPanel; j++) {
      for (long d = 0; d < dims; d += 64 / sizeof(E)) __builtin_prefetch(rows[j] + d, 0, 2);
    }
  }

  // Pointers to the keys and values of a block, page by page. Slots outside of what the tile sees,
  // from .. to - 1, may hold NaN: zeros take their place.
  void find_keys(Scratch& s, long row, long head, long block, long from, long to, Block& out) {
    long value = g_.kv_heads * g_.page_size * g_.head_dim;
    from = std::max(from, block);
    to = std::min(to, block + kBlockKeys);
    std::fill_n(out.keys, kBlockKeys, s.zeros.data());
    std::fill_n(out.values, kBlockKeys, s.zeros.data());
    while (from < to) {
      const E* key = slot(pages_, rows_, g_, row, from, 0, head);
      long count = std::min(to - from, g_.page_size - from % g_.page_size);
      for (long j = from - block; j < from - block + count; j++, key += g_.head_dim) {
        out.keys[j] = key;
        out.values[j] = key + value;
      }
      from += count;
    }
  }

  // Scores of query i -> weights; it sees the keys up to `last`, counted from the block's first.
  void weigh(Scratch& s, long i, long last) {
    constexpr long kVecs = kBlockKeys / kWidth;
    float* scores = &s.scores[i * kBlockKeys];
    long first = g_.window > 0 ? last - g_.window + 1 : 0;
    VF score[kVecs], top = splat(kMasked);
    VI seen[kVecs], lane;
    for (int j = 0; j < kWidth; j++) lane[j] = j;
    float scale = 1.0f / std::sqrt(static_cast<float>(g_.head_dim));
    for (long v = 0; v < kVecs; v++) {
      VI key = lane + static_cast<int32_t>(v * kWidth);
      seen[v] = (key <= static_cast<int32_t>(last)) & (key >= static_cast<int32_t>(first));
      score[v] = load<VF>(scores + v * kWidth) * scale;
      if (g_.soft_cap > 0) {
        for (int j = 0; j < kWidth; j++) {
          score[v][j] = g_.soft_cap * std::tanh(score[v][j] / g_.soft_cap);
        }
      }
      score[v] = choose(seen[v], score[v], splat(kMasked));
      top = choose(score[v] > top, score[v], top);
    }
    float before = s.chunk.highest[i], highest = std::max(before, largest(top));
    VF total = {};
    for (long v = 0; v < kVecs; v++) {
      VF weight = choose(seen[v], exp(score[v] - highest), VF{});
      total += weight;
      store(scores + v * kWidth, weight);
    }
    convert(scores, &s.weights[i * kBlockKeys], kBlockKeys);
    if (highest != before) {
      float factor = std::exp(before - highest);
      s.chunk.total[i] *= factor;
      scale_row(&s.chunk.values[i * s.chunk.stride], s.chunk.stride, factor);
    }
    s.chunk.highest[i] = highest;
    s.chunk.total[i] += sum(total);
  }

  const T* q_;
  T* out_;
  const E* pages_;
  const Rows& rows_;
  const Geometry& g_;
  const std::vector<long>& first_;
  const bool one_query_;
  long stride_ = 0;
  std::vector<Item> items_;
  std::vector<float> parts_;
};

}  // namespace pshare
