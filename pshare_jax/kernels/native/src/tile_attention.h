// Sums of attention over one chunk of keys, by tiles.
//
// Keys are the left-hand side of the scores, so that the rows of a page are read as they lie, and 16
// queries are the columns: their softmax runs down the vectors, a lane each. Weights are turned
// once, 32 keys by 16 queries at a time, to be the left-hand side of the values. All that a query
// gets is in the order of keys, in steps of 32 from a multiple of 32 on, whatever is beside it.
#pragma once

#include "paged_rows.h"
#include "tile_gemm.h"

#if defined(PSHARE_TILES)

namespace pshare {

constexpr long kTileKeys = 128;  // of a block
constexpr long kStripKeys = 2 * kTileLines;
constexpr long kTileQueries = 2 * kTileLines;  // columns of a block of scores
static_assert(kWidth == kTileLines && kChunkKeys % kTileKeys == 0);

struct TileScratch {
  std::vector<bf16> queries, keys, values, zeros;
  std::vector<int32_t> tokens;  // whose query it is, counted from the first
  alignas(64) bf16 weights[kTileQueries * kTileKeys];
  alignas(64) float scores[kTileKeys * kTileQueries];
};

inline long tile_steps(long dims) { return (dims + 31) / 32; }

// Rows of queries, `group` a token -> panels of 32 columns, zeros below the last component and beside
// the last query. What is beside may see what the last query does.
inline void pack_queries(const bf16* rows, long count, long group, long dims, TileScratch& s) {
  long size = tile_steps(dims) * 32 * kTileQueries, all = (count + kTileQueries - 1) / kTileQueries;
  s.queries.resize(all * size);
  s.zeros.assign(tile_steps(dims) * 32, bf16{});
  s.tokens.resize(all * kTileQueries);
  for (long i = 0; i < all * kTileQueries; i++) {
    s.tokens[i] = static_cast<int32_t>(std::min(i, count - 1) / group);
  }
  for (long p = 0; p < all; p++) {
    const bf16* from[kTileQueries];
    for (long i = 0; i < kTileQueries; i++) {
      long query = p * kTileQueries + i;
      from[i] = query < count ? rows + query * dims : s.zeros.data();
    }
    bf16* panel = &s.queries[p * size];
    transpose_panel<bf16>(from, dims, reinterpret_cast<uint32_t*>(panel));
    std::fill(panel + dims * kTileQueries, panel + size, bf16{});
  }
}

#if defined(__AVX512F__)
using Pairs = __m512i;
#else
using Pairs = VU;
#endif

// Both rounded to bfloat16: of a lane's pair the first and the second one.
inline Pairs pair_up(VF first, VF second) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t order[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
#else
  return (Pairs)(half_bits((VU)first) | half_bits((VU)second) << 16);
#endif
}

template <class Tiles>
class TileAttention {
 public:
  // For queries of one row and KV head, packed in `s`; the first of them is at position `start`.
  TileAttention(const bf16* pages, const Rows& rows, const Geometry& g, long row, long head,
                long start, long queries, TileScratch& s)
      : pages_(pages), rows_(rows), g_(g), row_(row), head_(head), start_(start),
        queries_(queries), s_(s) {}

  // The sums over keys from .. to - 1, which are of one chunk; keys outside are seen by no query.
  void run(long from, long to, Sums& sums) {
    shape_tiles<Tiles>(kTileLines, kTileLines);
    s_.keys.resize(kTileKeys * tile_steps(g_.head_dim) * 32);
    s_.values.resize(panels(g_.head_dim) * panel_size<bf16>(kTileKeys));
    KeyBlock<bf16, kTileKeys> at[2];
    auto find = [&](int i, long block) {
      at[i].find(pages_, rows_, g_, row_, head_, block, from, to, s_.zeros.data());
    };
    long block = from / kTileKeys * kTileKeys;
    find(0, block);
    fetch(at[0].values, kTileKeys, g_.head_dim);
    for (int now = 0; block < to; block += kTileKeys, now = 1 - now) {
      const auto &here = at[now], &next = at[1 - now];
      find(1 - now, block + kTileKeys);
      // Strips of keys that nobody sees are left out: they would add zeros.
      low_ = std::max(from - block, 0L) / kStripKeys * kStripKeys;
      high_ = round_up(std::min(to - block, kTileKeys), kStripKeys);
      find_lines(block, from, to, here.keys);
      for (long q = 0; q < queries_; q += kTileQueries) {
        bool wide = queries_ - q > kTileLines;
        wide ? score<true>(q) : score<false>(q);
        for (long c = 0; c < (wide ? 2 : 1) * kTileLines; c += kTileLines) weigh(q, c, block, sums);
        if (q == 0) {
          // What comes from memory was asked for long before.
          fetch(next.keys, kTileKeys, g_.head_dim);
          pack_values(here.values + low_, high_ - low_, g_.head_dim, s_.values.data());
          fetch(next.values, kTileKeys, g_.head_dim);
        }
        wide ? add_values<true>(q, sums) : add_values<false>(q, sums);
      }
    }
  }

 private:
  // Of up to 32 queries from q on; `wide`: more than 16.
  template <bool wide>
  void score(long q) {
    long steps = tile_steps(g_.head_dim);
    for (long j = low_; j < high_; j += kStripKeys) {
      tile_rows<Tiles, true, wide, false>(lines_[j / 16], lines_[j / 16 + 1],
                                          &s_.queries[q * steps * 32], steps * kTileUnits,
                                          s_.scores + j * kTileQueries, kTileQueries, false);
    }
  }
  template <bool wide>
  void add_values(long q, Sums& sums) {
    long size = panel_size<bf16>(high_ - low_), stride = sums.stride;
    TileLeft first{s_.weights + low_, 2 * kTileKeys};
    TileLeft second{s_.weights + kTileLines * kTileKeys + low_, 2 * kTileKeys};
    for (long p = 0; p < panels(g_.head_dim); p++) {
      tile_rows<Tiles, wide, true, false>(first, second, &s_.values[p * size], (high_ - low_) / 2,
                                          &sums.values[q * stride + p * kPanel], stride, true);
    }
  }

  // Where 16 keys lie, for each 16 of the block: in their page, or in a copy.
  void find_lines(long block, long from, long to, const bf16* const* keys) {
    long dims = g_.head_dim, width = tile_steps(dims) * 32;
    for (long j = low_; j < high_; j += kTileLines) {
      long key = block + j, page = key / g_.page_size;
      TileLeft& lines = lines_[j / kTileLines];
      if (key >= to || key + kTileLines <= from) {
        lines = {s_.zeros.data(), 0};
      } else if (dims % 32 == 0 && page == (key + kTileLines - 1) / g_.page_size) {
        lines = {slot(pages_, rows_, g_, row_, key, 0, head_), 2 * dims};
      } else {
        bf16* copy = &s_.keys[j * width];
        lines = {copy, 2 * width};
        for (long i = 0; i < kTileLines; i++, copy += width) {
          std::memcpy(copy, keys[j + i], dims * sizeof(bf16));
          std::fill(copy + dims, copy + width, bf16{});
        }
      }
    }
  }

  // Scores of 16 queries -> weights. Which keys they see counts from the block's first.
  void weigh(long q, long column, long block, Sums& sums) {
    VI last = load<VI>(&s_.tokens[q + column]) + static_cast<int32_t>(start_ - block);
    long first = g_.window > 0 ? last[kTileLines - 1] - g_.window + 1 : 0;
    bool all = last[0] >= high_ - 1 && first <= low_;
    float* highest = &sums.highest[q + column];
    float* total = &sums.total[q + column];
    VF factor = all ? weigh_seen<true>(column, last, highest, total)
                    : weigh_seen<false>(column, last, highest, total);
    for (long n = 0; n < std::min<long>(kTileLines, queries_ - q - column); n++) {
      if (factor[n] == 1.0f) continue;
      scale_row(&sums.values[(q + column + n) * sums.stride], sums.stride, factor[n]);
    }
  }

  // Returns what earlier sums count from now on. `all`: every query sees every key.
  template <bool all>
  VF weigh_seen(long column, VI last, float* highest, float* total) {
    float* scores = s_.scores + column;
    const float scale = kLog2E / std::sqrt(static_cast<float>(g_.head_dim));
    const long window = g_.window, low = low_, high = high_;
    if (g_.soft_cap > 0) cap(scores);
    auto visible = [&](long j) {
      int32_t key = static_cast<int32_t>(j);
      VI seen = last >= key;
      return window > 0 ? seen & (last - static_cast<int32_t>(window) < key) : seen;
    };
    VF top[4];
    for (VF& t : top) t = splat(kMasked);
    for (long j = low; j < high; j += 4) {
#pragma GCC unroll 4
      for (long i = 0; i < 4; i++) {
        float* at = scores + (j + i) * kTileQueries;
        VF score = load<VF>(at) * scale;
        if (!all) score = choose(visible(j + i), score, splat(kMasked));
        store(at, score);
        top[i] = choose(score > top[i], score, top[i]);  // a NaN is none
      }
    }
    for (int i = 1; i < 4; i++) top[0] = choose(top[i] > top[0], top[i], top[0]);
    VF before = load<VF>(highest), now = choose(top[0] > before, top[0], before);
    VF sum[4] = {};
    for (long j = low; j < high; j += kStripKeys) {
      Pairs pairs[kTileLines];
#pragma GCC unroll 16
      for (long i = 0; i < kTileLines; i++) {
        VF weight[2];
#pragma GCC unroll 2
        for (long k = 0; k < 2; k++) {
          long key = j + 2 * i + k;
          weight[k] = exp2(load<VF>(scores + key * kTileQueries) - now);
          if (!all) weight[k] = choose(visible(key), weight[k], VF{});
          sum[(2 * i + k) % 4] += weight[k];
        }
        pairs[i] = pair_up(weight[0], weight[1]);
      }
      transpose(pairs);
      bf16* weights = s_.weights + column * kTileKeys + j;
      for (long n = 0; n < kTileLines; n++) store(weights + n * kTileKeys, pairs[n]);
    }
    VF factor = exp2(before - now);
    store(total, load<VF>(total) * factor + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    store(highest, now);
    return factor;
  }

  // tanh(x) is (1 - t) / (1 + t) with t = exp(-2 |x|), of the sign of x.
  void cap(float* scores) const {
    float cap = g_.soft_cap * std::sqrt(static_cast<float>(g_.head_dim));
    for (long j = low_; j < high_; j++) {
      VF x = load<VF>(scores + j * kTileQueries) * (2 * kLog2E / cap);
      VF t = exp2(choose(x > 0, -x, x));
      VF tanh = (1.0f - t) / (1.0f + t);
      store(scores + j * kTileQueries, cap * choose(x > 0, tanh, -tanh));
    }
  }

  const bf16* pages_;
  const Rows& rows_;
  const Geometry& g_;
  const long row_, head_, start_, queries_;
  TileScratch& s_;
  long low_ = 0, high_ = 0;  // the keys of the block that are computed
  TileLeft lines_[kTileKeys / kTileLines];
};

}  // namespace pshare

#endif
