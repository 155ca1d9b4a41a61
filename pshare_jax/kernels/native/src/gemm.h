// Matrix products with packed right-hand sides.
//
// A matrix [K, N] is packed into panels of kPanel columns: [N / kPanel, K / unit, kPanel, unit],
// zero-padded, where a unit is one float32 or two bfloat16. A product keeps a tile of rows by one
// panel in registers and runs along K once. Every element is summed in the order of K in one
// float32 accumulator, whatever the tile: a row's result depends on no other row. Where the CPU has a
// matrix unit bfloat16 goes through that instead (tile_gemm.h).
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"
#include "threads.h"
#include "tile_gemm.h"

namespace pshare {

constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kWidth;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32 of them
#else
constexpr bool kManyRegisters = false;  // 16
#endif
// Rows of a tile: 24 accumulators of 32 registers, 12 of 16. Two elements of a unit that are widened
// one after the other need a register besides: one accumulator in memory takes twice the time.
template <class E>
constexpr int kTileRows = kManyRegisters ? 12 : Unit<E>::passes == 2 ? 5 : 6;
constexpr long kWholeTiles = kManyRegisters ? 12 : 30;  // rows that are whole tiles of each height
constexpr long kBlockRows = kManyRegisters ? 96 : 90;   // whose left-hand side stays in the second-level cache
constexpr long kBlockUnits = 1024;  // units whose part of a panel does

inline long round_up(long x, long multiple) { return (x + multiple - 1) / multiple * multiple; }
inline long panels(long columns) { return (columns + kPanel - 1) / kPanel; }

template <class E>
long units(long k) {
  return (k + Unit<E>::size - 1) / Unit<E>::size;
}

// Elements of one panel of a matrix with k rows.
template <class E>
long panel_size(long k) {
  return units<E>(k) * kPanel * Unit<E>::size;
}

// c[R, kPanel] = (add ? c : 0) + a[R, count units] b[count units, kPanel].
template <class E, int R>
inline void tile(const Left<E>* a, long lda, const E* b, long count, float* c, long ldc, bool add) {
  constexpr int U = Unit<E>::size;
  // Panels come from memory. With few rows that is all that counts, and they are fetched into the
  // first-level cache; with more there is time to fetch them from the second level.
  constexpr long ahead = R <= 4 ? 96 : 128;
  constexpr int level = R <= 4 ? 3 : 2;
  VF acc[R][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) {
      acc[i][j] = add ? load<VF>(c + i * ldc + j * kWidth) : VF{};
    }
  }
  for (long k = 0; k < count; k++) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) {
      __builtin_prefetch(b + ((k + ahead) * kPanel + j * kWidth) * U, 0, level);
    }
#pragma GCC unroll 4
    for (int pass = 0; pass < Unit<E>::passes; pass++) {
      VF right[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) {
        right[j] = Unit<E>::right(load<VU>(b + (k * kPanel + j * kWidth) * U), pass);
      }
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) {
        VF left = Unit<E>::left(a + i * lda + k * U, pass);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) {
          acc[i][j] = Unit<E>::multiply_add(acc[i][j], left, right[j]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) store(c + i * ldc + j * kWidth, acc[i][j]);
  }
}

template <class E, int R = kTileRows<E>>
inline void tile_of(long rows, const Left<E>* a, long lda, const E* b, long count, float* c, long ldc,
                    bool add) {
  if (rows == R) return tile<E, R>(a, lda, b, count, c, ldc, add);
  if constexpr (R > 1) tile_of<E, R - 1>(rows, a, lda, b, count, c, ldc, add);
}

// As `tile`, for any number of rows. `lda` is a whole number of units.
template <class E>
void multiply_panel(long rows, const Left<E>* a, long lda, const E* b, long count, float* c, long ldc,
                    bool add) {
  constexpr int U = Unit<E>::size;
  if (count == 0 && !add) {
    for (long i = 0; i < rows; i++) std::fill_n(c + i * ldc, kPanel, 0.0f);
  }
#if defined(PSHARE_TILES)
  static_assert(kPanel == kTileColumns);
  if constexpr (std::is_same_v<E, bf16>) {
    if (has_tiles()) return tile_panel<Tiles>(rows, a, lda, b, count, c, ldc, add);
  }
#endif
  for (long k = 0; k < count; k += kBlockUnits) {
    long part = std::min(kBlockUnits, count - k);
    for (long i = 0; i < rows; i += kTileRows<E>) {
      tile_of<E>(std::min<long>(kTileRows<E>, rows - i), a + i * lda + k * U, lda,
                 b + k * kPanel * U, part, c + i * ldc, ldc, add || k > 0);
    }
  }
}

#if defined(PSHARE_TILES)
// As `share_panels`, for products by tiles with k inputs. The unit is quick: panels come from memory
// once for up to 256 rows, and any number of threads gets shares.
template <class Done, class Product>
void share_by_tiles(Team& team, long rows, long k, long first, long last, int group, Done done,
                    Product product) {
  long fit = kTileLeftBytes / (4 * std::max(units<bf16>(k), 1L));
  long most = std::clamp(fit / 64 * 64, 64L, kTileBlockRows);
  long blocks = std::max(1L, (rows + most - 1) / most), groups = (last - first) / group;
  long block = round_up((rows + blocks - 1) / blocks, 2 * kTileLines);
  long shares = std::min(groups, (4 * team.size() + blocks - 1) / blocks);
  team.loop(rows == 0 ? 0 : blocks * shares, [&](long item) {
    alignas(64) float out[kTileBlockRows * 2 * kPanel];
    long row = item / shares * block, share = item % shares;
    long count = std::min(block, rows - row), ldc = group * kPanel;
    if (count <= 0) return;
    for (long g = groups * share / shares; g < groups * (share + 1) / shares; g++) {
      long panel = first + g * group;
      for (int p = 0; p < group; p++) product(row, count, panel + p, out + p * kPanel, ldc);
      done(row, count, panel, out);
    }
  });
}
#endif

// Shares out panels `first .. last - 1` of a product of `rows` rows, `group` adjacent ones at a time:
// `product(row, rows, panel, tile, stride)` gives one panel's part of a tile, and
// `done(row, rows, panel, tile)` gets the whole [rows, group * kPanel]. Followed by a barrier.
template <class Done, class Product>
void share_panels(Team& team, long rows, long first, long last, int group, Done done,
                  Product product) {
  long blocks = (rows + kBlockRows - 1) / kBlockRows;
  if (blocks == 0) return team.loop(0, [](long) {});
  long block = round_up((rows + blocks - 1) / blocks, kWholeTiles);
  long groups = (last - first) / group;
  // Enough shares for an even end. With many rows there are at least some, small enough to keep
  // their panels in the cache.
  long enough = (4 * team.size() + blocks - 1) / blocks;
  long shares = std::min(groups, blocks > 1 ? std::max(enough, groups / 8) : enough);
  team.loop(blocks * shares, [&](long item) {
    alignas(64) float out[kBlockRows * 2 * kPanel];
    long row = item / shares * block, share = item % shares;
    long count = std::min(block, rows - row), ldc = group * kPanel;
    if (count <= 0) return;
    for (long g = groups * share / shares; g < groups * (share + 1) / shares; g++) {
      long panel = first + g * group;
      for (int p = 0; p < group; p++) product(row, count, panel + p, out + p * kPanel, ldc);
      done(row, count, panel, out);
    }
  });
}

// Computes a[rows, k] times panels `first .. last - 1` of a packed matrix, see `share_panels`.
template <class E, class Done>
void multiply(Team& team, long rows, const Left<E>* a, long lda, const E* packed, long k, long first,
              long last, int group, Done done) {
  auto product = [&](long row, long count, long panel, float* out, long ldc) {
    multiply_panel<E>(count, a + row * lda, lda, packed + panel * panel_size<E>(k), units<E>(k), out,
                      ldc, false);
  };
#if defined(PSHARE_TILES)
  if constexpr (std::is_same_v<E, bf16>) {
    if (has_tiles()) return share_by_tiles(team, rows, k, first, last, group, done, product);
  }
#endif
  share_panels(team, rows, first, last, group, done, product);
}

}  // namespace pshare
