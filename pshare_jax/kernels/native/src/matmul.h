// Products of two bfloat16 matrices, either of them transposed, packed for this one product: what
// training needs, whose weights change with every step.
//
// The right-hand side is packed some panels at a time, by all threads, then multiplied. A left-hand
// side whose rows are not adjacent in memory is turned block by block, by whoever multiplies it.
// Every element is summed in the order of the inner axis, whoever computes it, so results do not
// depend on the threads.
#pragma once

#include "gemm.h"
#include "norm.h"

namespace pshare {

constexpr long kPackedElements = 2 << 20;  // that much of the right-hand side stays in the caches
constexpr long kLeastPanels = 8;

// One side of a product. A line is a row of the left-hand side or a column of the right-hand one:
// what is summed along, `depth` elements. Either the elements of a line are adjacent in memory
// (by_line), or those of all lines at one depth are.
struct Side {
  const bf16* data;
  long lines, depth;
  bool by_line;

  // Zero outside.
  bf16 at(long line, long k) const {
    if (line >= lines || k >= depth) return bf16{};
    return data[by_line ? line * depth + k : k * lines + line];
  }
};

using Square = uint32_t[kWidth][kWidth];

// The units of kWidth lines by kWidth units from (line, unit) on, zero outside the matrix:
// square[unit][line], or square[line][unit] if `lines_first`.
inline void read_square(const Side& side, long line, long unit, bool lines_first, Square square) {
#if defined(__AVX512F__)
  if (line + kWidth <= side.lines && 2 * (unit + kWidth) <= side.depth) {
    __m512i rows[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++) {
      if (side.by_line) {
        rows[i] = _mm512_loadu_si512(side.data + (line + i) * side.depth + 2 * unit);
      } else {
        const bf16* first = side.data + 2 * (unit + i) * side.lines + line;
        __m512i even = _mm512_cvtepu16_epi32(load<__m256i>(first));
        __m512i odd = _mm512_cvtepu16_epi32(load<__m256i>(first + side.lines));
        rows[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
      }
    }
    if (side.by_line != lines_first) transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++) _mm512_storeu_si512(square[i], rows[i]);
    return;
  }
#else
  if (line + kWidth <= side.lines && 2 * (unit + kWidth) <= side.depth) {
    VU rows[kWidth];
    for (int i = 0; i < kWidth; i++) {
      const bf16* first = side.by_line ? side.data + (line + i) * side.depth + 2 * unit
                                       : side.data + 2 * (unit + i) * side.lines + line;
      if (side.by_line) {
        rows[i] = load<VU>(first);
      } else {
        for (int l = 0; l < kWidth; l++) {
          rows[i][l] = first[l].bits | static_cast<uint32_t>(first[side.lines + l].bits) << 16;
        }
      }
    }
    if (side.by_line != lines_first) transpose(rows);
    for (int i = 0; i < kWidth; i++) store(square[i], rows[i]);
    return;
  }
#endif
  for (int l = 0; l < kWidth; l++) {
    for (int u = 0; u < kWidth; u++) {
      uint32_t even = side.at(line + l, 2 * (unit + u)).bits;
      uint32_t odd = side.at(line + l, 2 * (unit + u) + 1).bits;
      (lines_first ? square[l][u] : square[u][l]) = even | odd << 16;
    }
  }
}

inline void pack_panel(const Side& right, long panel, bf16* packed) {
  long count = units<bf16>(right.depth);
  Square square;
  for (long unit = 0; unit < count; unit += kWidth) {
    long rows = std::min<long>(kWidth, count - unit);
    for (int j = 0; j < kVectors; j++) {
      read_square(right, panel * kPanel + j * kWidth, unit, false, square);
      for (long i = 0; i < rows; i++) {
        std::memcpy(packed + ((unit + i) * kPanel + j * kWidth) * 2, square[i], sizeof(square[i]));
      }
    }
  }
}

// Rows of a left-hand side, each a whole number of units: as they lie, or copied.
struct LeftRows {
  const Left<bf16>* data;
  long stride;
};

inline void spread(const uint32_t* units, long count, bf16* to) {
  std::memcpy(to, units, count * sizeof(uint32_t));
}
inline void spread(const uint32_t* units, long count, float* to) {
  for (long i = 0; i < count; i++) {
    uint32_t low = units[i] << 16, high = units[i] & 0xffff0000u;
    to[2 * i] = load<float>(&low);
    to[2 * i + 1] = load<float>(&high);
  }
}

inline LeftRows left_rows(const Side& left, long first, long rows,
                          Buffer<Left<bf16>>& memory) {
#if defined(__AVX512BF16__)
  if (left.by_line && left.depth % 2 == 0) return {left.data + first * left.depth, left.depth};
#endif
  long count = units<bf16>(left.depth), stride = 2 * count;
  Left<bf16>* copy = memory.get(rows * stride);
  Square square;
  for (long row = 0; row < rows; row += kWidth) {
    for (long unit = 0; unit < count; unit += kWidth) {
      read_square(left, first + row, unit, true, square);
      long width = std::min<long>(kWidth, count - unit);
      for (long i = 0; i < std::min<long>(kWidth, rows - row); i++) {
        spread(square[i], width, copy + (row + i) * stride + 2 * unit);
      }
    }
  }
  return {copy, stride};
}

// Two matrices to multiply. One product may be the sum of two such pairs, whose inner axes differ.
struct Pair {
  Side left, right;

  long size() const { return panel_size<bf16>(right.depth); }
};

// out[:, first * kPanel ..] = left times `count` packed panels, the first of them number `first`, plus
// the same of `more` if it is there, whose packed panels lie behind the others.
template <class Out>
void multiply_side(Team& team, const Pair& pair, const Pair* more, const bf16* packed, long first,
                   long count, Out* out) {
  long lines = pair.left.lines, columns = pair.right.lines;
  long blocks = (lines + kBlockRows - 1) / kBlockRows;
  if (blocks == 0) return;
  long block = round_up((lines + blocks - 1) / blocks, kWholeTiles);
  // Four items a thread or more, for an even end.
  long shares = std::min(count, std::max<long>(1, (4 * team.size() + blocks - 1) / blocks));
  team.loop(blocks * shares, [&](long item) {
    long row = item / shares * block, share = item % shares;
    long rows = std::min(block, lines - row);
    if (rows <= 0) return;
    static thread_local Buffer<Left<bf16>> memory, memory_of_more;
    LeftRows from = left_rows(pair.left, row, rows, memory);
    LeftRows other = more ? left_rows(more->left, row, rows, memory_of_more) : LeftRows{};
    const bf16* packed_more = packed + count * pair.size();
    for (long p = count * share / shares; p < count * (share + 1) / shares; p++) {
      alignas(64) float tile[kBlockRows * kPanel];
      multiply_panel<bf16>(rows, from.data, from.stride, packed + p * pair.size(),
                           units<bf16>(pair.left.depth), tile, kPanel, false);
      if (more) {
        multiply_panel<bf16>(rows, other.data, other.stride, packed_more + p * more->size(),
                             units<bf16>(more->left.depth), tile, kPanel, true);
      }
      long column = (first + p) * kPanel, width = std::min<long>(kPanel, columns - column);
      for (long i = 0; i < rows; i++) {
        convert(tile + i * kPanel, out + (row + i) * columns + column, width);
      }
    }
  });
}

// out[left.lines, right.lines] = left times right, plus that of `more` if it is there; summed in
// float32.
template <class Out>
void matmul(const Pair& pair, const Pair* more, Out* out) {
  static thread_local Buffer<bf16> memory;
  long all = panels(pair.right.lines), size = pair.size(), size_of_more = more ? more->size() : 0;
  long part = std::min(all, std::max(kLeastPanels, kPackedElements / std::max<long>(1, size)));
  bf16* packed = memory.get(part * (size + size_of_more));
  Pool::instance().run([&](Team& team) {
    for (long first = 0; first < all; first += part) {
      long count = std::min(part, all - first);
      team.loop(count, [&](long p) {
        pack_panel(pair.right, first + p, packed + p * size);
        if (more) pack_panel(more->right, first + p, packed + count * size + p * size_of_more);
      });
      multiply_side(team, pair, more, packed, first, count, out);
    }
  });
}

}  // namespace pshare
