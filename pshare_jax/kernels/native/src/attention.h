// Causal attention over paged KV, for any number of queries a row.
//
// Queries of one row that share a KV head are the rows of one matrix: up to kTileTokens tokens of
// `group` heads. Keys are taken in blocks of kBlockKeys and sums begin anew every kChunkKeys
// positions, counted from position 0; a chunk's sums are then merged into the row's (online
// softmax, Milakov and Gimelshein, arXiv 1805.02867). With one query a row, chunks are shared out
// over threads, otherwise tiles are, smaller ones where threads are many; the sums are the same ones in the same order, so a query's
// result does not depend on what it is computed beside. Where there is a matrix unit, the sums over
// a chunk of bfloat16 are those of tile_attention.h.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "paged_rows.h"
#include "tile_attention.h"

namespace pshare {

constexpr long kTileTokens = 64, kLeastTileTokens = 16;
constexpr long kTilesOfThread = 2;
constexpr long kBlockKeys = 2 * kPanel;
static_assert(kChunkKeys % kBlockKeys == 0);

// Over pages of E, with queries and results of T.
template <class E, class T>
class Attention {
 public:
  // Queries and results are [rows, heads, head_dim]; those of row b begin at first[b].
  Attention(const T* q, T* out, const E* pages, const Rows& rows, const Geometry& g,
            const std::vector<long>& first, bool one_query)
      : q_(q), out_(out), pages_(pages), rows_(rows), g_(g), first_(first), one_query_(one_query) {
    stride_ = round_up(g.head_dim, kPanel);
  }

  void run(Team& team) {
    one_query_ ? list_chunks() : list_tiles(team.size());
    long heads = g_.kv_heads, count = items_.size() * heads;
    team.at("attention");
    if (!one_query_) {
      team.loop(count, [&](long i) { tile(items_[i / heads], i % heads); });
      return;
    }
    team.loop(count, [&](long i) { part(i / heads, i % heads); });
    team.at("attention merged");
    team.rows(count, [&](long i) {
      if (items_[i / heads].chunks > 0) merge_parts(i / heads, i % heads);
    });
  }

 private:
  // Of a row: a chunk of keys (with the number of chunks, in the first one), or a tile of tokens.
  struct Item {
    long row, index, chunks;
  };
  using Block = KeyBlock<E, kBlockKeys>;
  // Whether a chunk's sums are computed by tiles.
  static bool by_tiles() { return std::is_same_v<E, bf16> && has_tiles(); }
  struct Scratch {
    std::vector<E> keys, values, zeros;
    std::vector<Left<E>> queries, weights;
    std::vector<float> scores, ordered;
    Sums chunk, row;
#if defined(PSHARE_TILES)
    TileScratch tiles;
#endif
  };

  void list_chunks() {
    for (long b = 0; b < rows_.batch; b++) {
      if (rows_.lens[b] <= 0) continue;
      long from = chunk_of_first_key(rows_.start[b]), to = rows_.start[b] / kChunkKeys;
      for (long c = from; c <= to; c++) items_.push_back({b, c, c == from ? to - from + 1 : 0});
    }
    parts_.resize(items_.size() * g_.heads() * (stride_ + 2));
  }

  // Keys are packed anew for each tile, so tiles are large where there are enough of them.
  void list_tiles(long threads) {
    long tokens = 0;
    for (long b = 0; b < rows_.batch; b++) tokens += std::max(0, rows_.lens[b]);
    tile_tokens_ = kTileTokens;
    while (tile_tokens_ > kLeastTileTokens &&
           tokens * g_.kv_heads < kTilesOfThread * threads * tile_tokens_) {
      tile_tokens_ /= 2;
    }
    for (long b = 0; b < rows_.batch; b++) {
      for (long t = 0; t < rows_.lens[b]; t += tile_tokens_) items_.push_back({b, t, 0});
    }
    // Later tiles see more keys: they come first, so that threads end together.
    std::reverse(items_.begin(), items_.end());
  }

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
    long count = std::min(tile_tokens_, rows_.lens[at.row] - at.index);
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
      s.row.highest[i] = kLog2E * g_.sinks[head * g_.group + i % g_.group];
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
#if defined(PSHARE_TILES)
    if constexpr (std::is_same_v<E, bf16>) {
      if (by_tiles()) pack_queries(s.queries.data(), count * g_.group, g_.group, dims, s.tiles);
    }
#endif
  }

  void finish(Scratch& s, long row, long token, long count, long head) {
    s.ordered.resize(s.row.stride);
    for (long i = 0; i < count * g_.group; i++) {
      float* values = &s.row.values[i * s.row.stride];
      scale_row(values, s.row.stride, 1.0f / std::max(s.row.total[i], 1e-37f));
      long r = first_[row] + token + i / g_.group, h = head * g_.group + i % g_.group;
      float* ordered = s.ordered.data();
      for (long p = 0; p < s.row.stride; p += kPanel) {
        for (long j = 0; j < kPanel; j += 4) {  // four stay together in any order of columns
          std::memcpy(ordered + p + column_order<E>(j), values + p + j, 4 * sizeof(float));
        }
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
#if defined(PSHARE_TILES)
    if constexpr (std::is_same_v<E, bf16>) {
      if (by_tiles()) {
        TileAttention<Tiles>{pages_, rows_, g_, row, head, start, queries, s.tiles}.run(from, to,
                                                                                       s.chunk);
        return;
      }
    }
#endif
    // Queries whose scores and weights stay in the nearest cache.
    long some = std::min<long>(queries, 2 * kTileRows<E>);
    s.scores.resize(some * kBlockKeys);
    s.weights.resize(some * kBlockKeys);
    s.keys.resize(kBlockKeys * dims);
    s.values.resize(panels(dims) * panel_size<E>(kBlockKeys));
    s.zeros.assign(dims, E{});
    Block at[2];
    long block = from / kBlockKeys * kBlockKeys;
    at[0].find(pages_, rows_, g_, row, head, block, from, to, s.zeros.data());
    for (int now = 0; block < to; block += kBlockKeys, now = 1 - now) {
      // The next block is fetched while this one is computed.
      const Block &here = at[now], &next = at[1 - now];
      at[1 - now].find(pages_, rows_, g_, row, head, block + kBlockKeys, from, to, s.zeros.data());
      for (long p = 0; p < 2; p++) {
        fetch(next.keys + p * kPanel, kPanel, dims);
        transpose_panel<E>(here.keys + p * kPanel, dims,
                           reinterpret_cast<uint32_t*>(&s.keys[p * kPanel * dims]));
      }
      fetch(next.values, kPanel, dims);
      pack_values(here.values, kBlockKeys, dims, s.values.data());
      fetch(next.values + kPanel, kPanel, dims);
      for (long q = 0; q < queries; q += some) {
        attend(s, q, std::min(some, queries - q), start - block);
      }
    }
  }

  // Adds a block of keys and values to the sums of `count` queries from q on; the tile's first token
  // is at position `start`, counted from the block's first.
  void attend(Scratch& s, long q, long count, long start) {
    long dims = g_.head_dim;
    for (long p = 0; p < 2; p++) {
      multiply_panel<E>(count, &s.queries[q * dims], dims, &s.keys[p * kPanel * dims],
                        dims / Unit<E>::size, &s.scores[p * kPanel], kBlockKeys, false);
    }
    for (long i = 0; i < count; i++) {
      long last = start + (q + i) / g_.group, first = g_.window > 0 ? last - g_.window + 1 : 0;
      if (g_.soft_cap > 0) cap(&s.scores[i * kBlockKeys]);
      if (first <= 0 && last >= kBlockKeys - 1) weigh<true>(s, q, i, first, last);
      else weigh<false>(s, q, i, first, last);
    }
    for (long p = 0; p < panels(dims); p++) {
      multiply_panel<E>(count, s.weights.data(), kBlockKeys,
                        &s.values[p * panel_size<E>(kBlockKeys)], units<E>(kBlockKeys),
                        &s.chunk.values[q * s.chunk.stride + p * kPanel], s.chunk.stride, true);
    }
  }

  void cap(float* scores) const {
    float cap = g_.soft_cap * std::sqrt(static_cast<float>(g_.head_dim));
    for (long j = 0; j < kBlockKeys; j++) scores[j] = cap * std::tanh(scores[j] / cap);
  }

  // Scores of the i-th query of those from q on -> weights; it sees keys first .. last, or all.
  template <bool all>
  void weigh(Scratch& s, long q, long i, long first, long last) {
    constexpr long kVecs = kBlockKeys / kWidth;
    const float* scores = &s.scores[i * kBlockKeys];
    const float scale = kLog2E / std::sqrt(static_cast<float>(g_.head_dim));
    VF score[kVecs], top = splat(kMasked);
    VI seen[kVecs], lane;
    for (int j = 0; j < kWidth; j++) lane[j] = j;
#pragma GCC unroll 8
    for (long v = 0; v < kVecs; v++) {
      score[v] = load<VF>(scores + v * kWidth) * scale;
      if (!all) {
        VI key = lane + static_cast<int32_t>(v * kWidth);
        seen[v] = (key <= static_cast<int32_t>(last)) & (key >= static_cast<int32_t>(first));
        score[v] = choose(seen[v], score[v], splat(kMasked));
      }
      top = choose(score[v] > top, score[v], top);
    }
    float before = s.chunk.highest[q + i], highest = std::max(before, largest(top));
    VF total = {};
#pragma GCC unroll 8
    for (long v = 0; v < kVecs; v++) {
      score[v] = exp2(score[v] - highest);
      if (!all) score[v] = choose(seen[v], score[v], VF{});
      total += score[v];
    }
    convert(reinterpret_cast<const float*>(score), &s.weights[i * kBlockKeys], kBlockKeys);
    if (highest != before) {
      float factor = exp2(before - highest);
      s.chunk.total[q + i] *= factor;
      scale_row(&s.chunk.values[(q + i) * s.chunk.stride], s.chunk.stride, factor);
    }
    s.chunk.highest[q + i] = highest;
    s.chunk.total[q + i] += sum(total);
  }

  const T* q_;
  T* out_;
  const E* pages_;
  const Rows& rows_;
  const Geometry& g_;
  const std::vector<long>& first_;
  const bool one_query_;
  long stride_ = 0, tile_tokens_ = kTileTokens;
  std::vector<Item> items_;
  std::vector<float> parts_;
};

}  // namespace pshare
