// Rows of a batch over paged KV: where their keys and values are, and sums over them.
#pragma once

#include <string>
#include <vector>

#include "kv_panels.h"

namespace pshare {

constexpr long kChunkKeys = 256;
constexpr float kMasked = -1e30f;
constexpr float kLog2E = 1.44269504f;

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

// Sums of one chunk, or of a whole row: highest score (as a power of 2) and total weight a query, and
// weighted values. There may be more queries than are asked for: whole vectors of them.
struct Sums {
  std::vector<float> highest, total, values;
  long stride = 0;
  void reset(long queries, long dims) {
    queries = round_up(queries, kWidth);
    stride = round_up(dims, kPanel);
    highest.assign(queries, kMasked);
    total.assign(queries, 0.0f);
    values.assign(queries * stride, 0.0f);
  }
};

inline float exp2(float x) { return exp2(splat(x))[0]; }

inline void scale_row(float* row, long count, float factor) {
  for (long i = 0; i < count; i++) row[i] *= factor;
}

// Adds the sums of a later chunk to `into`.
inline void merge(Sums& into, const float* highest, const float* total, const float* values,
                  long queries) {
  for (long i = 0; i < queries; i++) {
    float top = std::max(into.highest[i], highest[i]);
    float mine = exp2(into.highest[i] - top), theirs = exp2(highest[i] - top);
    into.highest[i] = top;
    into.total[i] = into.total[i] * mine + total[i] * theirs;
    float* to = &into.values[i * into.stride];
    const float* from = values + i * into.stride;
    for (long d = 0; d < into.stride; d++) to[d] = to[d] * mine + from[d] * theirs;
  }
}

// Pointers to the keys and values of a block of `size` positions from `first` on, page by page. Slots
// outside of from .. to - 1 may hold NaN, or be of no page at all: zeros take their place.
template <class E, long size>
struct KeyBlock {
  const E *keys[size], *values[size];

  void find(const E* pages, const Rows& rows, const Geometry& g, long row, long head, long first,
            long from, long to, const E* zeros) {
    long value = g.kv_heads * g.page_size * g.head_dim;
    from = std::max(from, first);
    to = std::min(to, first + size);
    std::fill_n(keys, size, zeros);
    std::fill_n(values, size, zeros);
    while (from < to) {
      const E* key = slot(pages, rows, g, row, from, 0, head);
      long count = std::min(to - from, g.page_size - from % g.page_size);
      for (long j = from - first; j < from - first + count; j++, key += g.head_dim) {
        keys[j] = key;
        values[j] = key + value;
      }
      from += count;
    }
  }
};

// Into the caches: rows that are needed soon.
template <class E>
void fetch(const E* const* rows, long count, long dims) {
  for (long j = 0; j < count; j++) {
    for (long d = 0; d < dims; d += 64 / sizeof(E)) __builtin_prefetch(rows[j] + d, 0, 2);
  }
}

}  // namespace pshare
