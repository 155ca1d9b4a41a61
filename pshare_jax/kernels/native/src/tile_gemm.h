// Products of bfloat16 by tiles, and whether this process computes them so.
//
// A packed panel (gemm.h) is as the unit reads it: 16 units of 16 columns are one register, whose
// rows of 64 bytes lie a panel's width apart. So the same weights serve every CPU. The unit sums in
// another order than the vectors do; a process that has tiles uses them for every product of
// bfloat16, whatever the number of rows. A row's sums depend on no other row, nor on how many there
// are, nor on where the inner axis is cut, as long as that is at a multiple of 16 units.
#pragma once

#include "simd.h"
#include "tile_twin.h"
#include "tile_unit.h"

#if defined(PSHARE_AMX) || defined(PSHARE_TILES_TWIN)
#define PSHARE_TILES 1
#endif

namespace pshare {

constexpr long kTileColumns = 32;       // of a panel: two registers
constexpr long kTileBlockUnits = 256;   // units whose part of a panel stays in the first-level cache
constexpr long kTileBlockRows = 256;    // rows of a left-hand side whose panels are shared, at most
constexpr long kTileLeftBytes = 1 << 20;  // of such rows; they stay in the second-level cache

#if defined(PSHARE_TILES)
#if defined(PSHARE_AMX)
using Tiles = AmxTiles;
#else
using Tiles = TwinTiles;
#endif
// Set once, before anything is computed, by `start_tiles` (tile_check.h). Of this library alone: an
// inline variable that is visible is one for all libraries of a process.
[[gnu::visibility("hidden")]] inline bool use_tiles = false;
inline bool has_tiles() { return use_tiles; }
inline void release_tiles() { release_shape<Tiles>(); }
#else
constexpr bool has_tiles() { return false; }
inline void release_tiles() {}
#endif

// Rows of a left-hand side for 16 rows of sums; the stride is in bytes.
struct TileLeft {
  const void* at;
  long stride;

  TileLeft step(long units) const { return {static_cast<const char*>(at) + 4 * units, stride}; }
};

// sums += left right over 16 units. `two`: there are second rows; `wide`: two registers of columns.
template <class Tiles, bool two, bool wide>
void tile_step(TileLeft first, TileLeft second, const bf16* b) {
  constexpr long line = 4 * kTileColumns;
  Tiles::template load<4>(first.at, first.stride);
  Tiles::template load<6>(b, line);
  Tiles::template dot<0, 4, 6>();
  if constexpr (wide) {
    Tiles::template load<7>(b + 32, line);
    Tiles::template dot<1, 4, 7>();
  }
  if constexpr (two) {
    Tiles::template load<5>(second.at, second.stride);
    Tiles::template dot<2, 5, 6>();
    if constexpr (wide) Tiles::template dot<3, 5, 7>();
  }
}

// The registers of sums, from c or zeros, and back.
template <class Tiles, bool two, bool wide>
void begin_sums(const float* c, long ldc, bool add) {
  const long stride = 4 * ldc;
  const float* below = c + kTileLines * ldc;
  if (!add) {
    Tiles::template zero<0>();
    if constexpr (wide) Tiles::template zero<1>();
    if constexpr (two) Tiles::template zero<2>();
    if constexpr (two && wide) Tiles::template zero<3>();
    return;
  }
  Tiles::template load<0>(c, stride);
  if constexpr (wide) Tiles::template load<1>(c + 16, stride);
  if constexpr (two) Tiles::template load<2>(below, stride);
  if constexpr (two && wide) Tiles::template load<3>(below + 16, stride);
}
template <class Tiles, bool two, bool wide>
void end_sums(float* c, long ldc) {
  const long stride = 4 * ldc;
  float* below = c + kTileLines * ldc;
  Tiles::template store<0>(c, stride);
  if constexpr (wide) Tiles::template store<1>(c + 16, stride);
  if constexpr (two) Tiles::template store<2>(below, stride);
  if constexpr (two && wide) Tiles::template store<3>(below + 16, stride);
}

// c = (add ? c : 0) + left b over `count` units, a multiple of 16, of a panel; the registers have
// their shape. `fetch`: the panel comes from memory.
template <class Tiles, bool two, bool wide, bool fetch>
void tile_rows(TileLeft first, TileLeft second, const bf16* b, long count, float* c, long ldc,
               bool add) {
  constexpr long step = kTileUnits * 2 * kTileColumns, ahead = 6 * step;
  begin_sums<Tiles, two, wide>(c, ldc, add);
  for (long k = 0; k < count; k += kTileUnits, b += step) {
    if constexpr (fetch) {
#pragma GCC unroll 32
      for (long i = 0; i < step; i += 32) __builtin_prefetch(b + ahead + i, 0, 3);
    }
    tile_step<Tiles, two, wide>(first.step(k), second.step(k), b);
  }
  end_sums<Tiles, two, wide>(c, ldc);
}

// c += a b over the last units of an inner axis, fewer than 16: zeros stand for the others, since
// what follows them in memory may be anything.
template <class Tiles, bool two>
void tile_rest(long rows, const bf16* a, long lda, const bf16* b, long count, float* c, long ldc) {
  alignas(64) bf16 left[2 * kTileLines * 2 * kTileUnits] = {};
  alignas(64) bf16 right[kTileUnits * 2 * kTileColumns] = {};
  for (long i = 0; i < rows; i++) std::memcpy(left + 32 * i, a + i * lda, 4 * count);
  std::memcpy(right, b, 4 * kTileColumns * count);
  tile_rows<Tiles, two, true, false>({left, 64}, {left + kTileLines * 32, 64}, right, kTileUnits, c,
                                     ldc, true);
}

// c[rows, 32] = (add ? c : 0) + a[rows, count units] b[count units, 32] for up to 32 rows.
template <class Tiles, bool two>
void tile_strip(long rows, const bf16* a, long lda, const bf16* b, long count, float* c, long ldc,
                bool add, bool fetch) {
  int lines = static_cast<int>(rows);
  shape_tiles<Tiles>(two ? kTileLines : lines, two ? lines - kTileLines : 0);
  TileLeft first{a, 2 * lda}, second{a + kTileLines * lda, 2 * lda};
  long whole = count / kTileUnits * kTileUnits;
  if (fetch) tile_rows<Tiles, two, true, true>(first, second, b, whole, c, ldc, add);
  else tile_rows<Tiles, two, true, false>(first, second, b, whole, c, ldc, add);
  if (whole == count) return;
  tile_rest<Tiles, two>(rows, a + 2 * whole, lda, b + whole * 2 * kTileColumns, count - whole, c,
                        ldc);
}

// The same for any number of rows: `multiply_panel` (gemm.h) by tiles.
template <class Tiles>
void tile_panel(long rows, const bf16* a, long lda, const bf16* b, long count, float* c, long ldc,
                bool add) {
  constexpr long most = 2 * kTileLines;
  long block = rows > most ? kTileBlockUnits : std::max(count, 1L);
  for (long k = 0; k < count || (k == 0 && !add); k += block) {
    long part = std::min(block, count - k);
    for (long i = 0; i < rows; i += most) {
      long n = std::min(most, rows - i);
      const bf16* left = a + i * lda + 2 * k;
      const bf16* right = b + k * 2 * kTileColumns;
      // Only for the first rows does the panel come from memory.
      if (n > kTileLines) {
        tile_strip<Tiles, true>(n, left, lda, right, part, c + i * ldc, ldc, add || k > 0, i == 0);
      } else {
        tile_strip<Tiles, false>(n, left, lda, right, part, c + i * ldc, ldc, add || k > 0, i == 0);
      }
    }
  }
}

}  // namespace pshare
