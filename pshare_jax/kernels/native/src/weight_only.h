// Products of weights of 8 bits with rows that are not rounded to 8 bits.
//
// A weight is a number of 8 bits times the scale of its column. What the number is, its kind says: a
// whole number or an FP8 one. bfloat16 has all of them exactly, so a product is that of gemm.h with a
// panel of them, to the bit, times the scales at the end: here too a row's result depends on no other
// row. Panels are those of int8.h. A few rows widen them in registers; more rows, and a matrix unit
// whatever their number, read parts of a panel that have been widened into the first-level cache.
#pragma once

#include <type_traits>

#include "int8.h"

namespace pshare {

constexpr long kWidenedUnits = 64;  // of a panel at a time: 16 KB, and whole steps of a matrix unit

// Each kind of number gives weight `i` of all units in float32, and weights `i` and `i + 1`, where i
// is even, as two bfloat16.

// From -128 to 127, stored plus 128.
struct WholeNumbers {
  // The byte becomes the ones of a number with a known first bit.
  static VF one(VU units, int i) {
    return (VF)((units >> (8 * i) & 0xffu) | 0x4b000000u) - (0x1p23f + 128);
  }
  static VU pair(VU units, int i) {
    units = units >> (8 * i);
    VF second = (VF)((units & 0xff00u) | 0x47000000u) - (0x1p15f + 128);
    return (VU)one(units, 0) >> 16 | (VU)second;
  }
};

#if defined(__AVX512VBMI__)
// Both bytes of the bfloat16 that is as large as each FP8 number without its sign.
struct SmallFloatBytes {
  alignas(64) uint8_t low[128], high[128];
  constexpr SmallFloatBytes() : low(), high() {
    for (int size = 1; size < 128; size++) {
      int shift = size == 1 ? 3 : size < 4 ? 2 : 1;  // of one that is not normal, to its first bit
      int bits = size < 8 ? ((121 - shift) << 7) + ((size << shift & 7) << 4)
                          : (120 << 7) + (size << 4);
      low[size] = static_cast<uint8_t>(bits), high[size] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
constexpr SmallFloatBytes kSmallFloatBytes;

// The byte of each number in a table of 128, in the places of the numbers.
inline __m512i looked_up(const uint8_t* table, VU units) {
  return _mm512_permutex2var_epi8(load<__m512i>(table), (__m512i)units, load<__m512i>(table + 64));
}
#endif

// Those of fp8.h, none of them NaN.
struct SmallFloats {
  static VF one(VU units, int i) {
    VU bits = units >> (8 * i), size = (bits & 0x7fu) << 20;
    // The first is right for normal numbers and too large for those below, the second the reverse.
    VI normal = (VI)(size + (120u << 23));
    VI small = (VI)((VF)(size + (121u << 23)) - 0x1p-6f);
    return (VF)((VU)(normal < small ? normal : small) | (bits & 0x80u) << 24);
  }
  static VU pair(VU units, int i) {
#if defined(__AVX512VBMI__)
    // Both bytes of each number by a table, the sign into the upper one, and then the two together.
    __m512i low = looked_up(kSmallFloatBytes.low, units);
    __m512i high = looked_up(kSmallFloatBytes.high, units);
    high = (__m512i)((VU)high | (units & 0x80808080u));
    const VU unit = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    VU places = 0x41014000u + unit * 0x04040404u + static_cast<uint32_t>(i) * 0x01010101u;
    return (VU)_mm512_permutex2var_epi8(low, (__m512i)places, high);
#else
    return (VU)one(units, i) >> 16 | (VU)one(units, i + 1);
#endif
  }
};

// A weight of a kind N, for rows of E.
template <class N, class E>
struct Narrow {
  uint8_t bits;
};
template <class E>
using Int8As = Narrow<WholeNumbers, E>;
template <class E>
using Fp8As = Narrow<SmallFloats, E>;

// What panels are widened to: float32 where rows are held as that.
template <class E>
using Wide = std::conditional_t<std::is_same_v<Left<E>, float>, float, E>;

template <class N, class E>
struct Unit<Narrow<N, E>> {
#if defined(__AVX512BF16__)
  static constexpr bool pairs = std::is_same_v<E, bf16>;
#else
  static constexpr bool pairs = false;
#endif
  using Left = typename Unit<E>::Left;
  static constexpr int size = 4, passes = pairs ? 2 : 4;
  static VF left(const Left* a, int pass) {
    if constexpr (pairs) return Unit<E>::left(a + 2 * pass, 0);
    else return splat(to_float(a[pass]));
  }
  static VF right(VU b, int pass) {
    if constexpr (pairs) return (VF)N::pair(b, 2 * pass);
    else return N::one(b, pass);
  }
  static VF multiply_add(VF acc, VF a, VF b) {
    if constexpr (pairs) return Unit<E>::multiply_add(acc, a, b);
    else return acc + a * b;
  }
};

// Widens `count` units of a panel.
template <class N, class E>
void widen(const Narrow<N, E>* b, long count, Wide<E>* to) {
  constexpr long ahead = 128;
  for (long k = 0; k < count; k++) {
    for (int j = 0; j < kVectors; j++) {
      const Narrow<N, E>* from = b + (k * kPanel + j * kWidth) * 4;
      __builtin_prefetch(from + ahead * kPanel * 4, 0, 2);
      VU units = load<VU>(from);
      if constexpr (std::is_same_v<Wide<E>, float>) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) store(to + (4 * k + i) * kPanel + j * kWidth, N::one(units, i));
      } else {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          store(to + ((2 * k + i) * kPanel + j * kWidth) * 2, N::pair(units, 2 * i));
        }
      }
    }
  }
}

// Whether products with rows of E go through a matrix unit.
template <class E>
bool by_tiles() {
  return std::is_same_v<E, bf16> && has_tiles();
}

// c[rows, kPanel] = a[rows, k] times panel number `panel`. `lda` is a whole number of E's units.
template <class N, class E>
void multiply_panel(long rows, const Left<E>* a, long lda, const Matrix<Narrow<N, E>>& m, long panel,
                    long k, float* c, long ldc) {
  using W = Narrow<N, E>;
  const W* b = m.panels + panel * panel_size<W>(k);
  long all = units<W>(k), done = 0;
  if (rows <= kTileRows<W> && !by_tiles<E>()) {
    // Whole units: behind those of a row lies anything.
    done = k / 4;
    if (done > 0) tile_of<W>(rows, a, lda, b, done, c, ldc, false);
  }
  for (long part; done < all; done += part) {
    alignas(64) Wide<E> wide[kWidenedUnits * 4 * kPanel];
    part = std::min(kWidenedUnits, all - done);
    widen(b + done * kPanel * 4, part, wide);
    long inputs = std::min(4 * part, k - 4 * done);
    multiply_panel<Wide<E>>(rows, a + 4 * done, lda, wide, units<Wide<E>>(inputs), c, ldc, done > 0);
  }
  for (long i = 0; i < rows; i++) {
    for (int j = 0; j < kVectors; j++) {
      float* to = c + i * ldc + j * kWidth;
      store(to, load<VF>(to) * load<VF>(m.scales + panel * kPanel + j * kWidth));
    }
  }
}

// The same for a matrix of E.
template <class E>
void multiply_panel(long rows, const Left<E>* a, long lda, const Matrix<E>& m, long panel, long k,
                    float* c, long ldc) {
  multiply_panel<E>(rows, a, lda, m.panels + panel * panel_size<E>(k), units<E>(k), c, ldc, false);
}

// As `multiply` of gemm.h, for matrices of 8 bits and of E.
template <class N, class E, class Done>
void multiply(Team& team, long rows, const Left<E>* a, long lda, const Matrix<Narrow<N, E>>& m, long k,
              long first, long last, int group, Done done) {
  auto product = [&](long row, long count, long panel, float* out, long ldc) {
    multiply_panel(count, a + row * lda, lda, m, panel, k, out, ldc);
  };
#if defined(PSHARE_TILES)
  if (by_tiles<E>()) return share_by_tiles(team, rows, k, first, last, group, done, product);
#endif
  share_panels(team, rows, first, last, group, done, product);
}
template <class E, class Done>
void multiply(Team& team, long rows, const Left<E>* a, long lda, const Matrix<E>& m, long k,
              long first, long last, int group, Done done) {
  multiply<E>(team, rows, a, lda, m.panels, k, first, last, group, done);
}

}  // namespace pshare
