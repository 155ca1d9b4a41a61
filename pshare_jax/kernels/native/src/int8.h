// Products of weights of 8 bits with rows that are rounded to 8 bits as well.
//
// A weight is a whole number from -128 to 127 times the scale of its column. A row is cut into
// groups of inputs, and each is rounded to whole numbers with a scale of its own, so that an input
// that is far from the others costs its group alone their precision. The sums of a group are whole
// numbers below 2^24, exact in any order and on any CPU; groups are added in float32, in the order of
// K, and the column's scale comes last: a row's result depends on no other row.
//
// Panels are those of gemm.h with units of four weights, each stored plus 128: the instruction for
// them (vpdpbusd) multiplies unsigned bytes by signed ones. 128 times the sum of the row's group is
// taken off beforehand. CPUs that have only products of pairs of 16 bits get the even and the odd
// numbers of a unit one after the other (as do those that PSHARE_PAIRS is defined for).
#pragma once

#include <limits>
#include <type_traits>

#include "gemm.h"
#include "norm.h"

namespace pshare {

constexpr long kGroupInputs = 32;  // that share a scale

// A weight plus 128.
struct Int8 {
  uint8_t bits;
};

#if !defined(PSHARE_PAIRS) && \
    (defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__)))
using Rounded = int8_t;
constexpr int kDotPasses = 1;
inline VU unit_bytes(VU b, int) { return b; }
inline VI dot(VI acc, VU b, VU a) {
#if defined(__AVX512VNNI__)
  return (VI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)b, (__m512i)a);
#else
  return (VI)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)b, (__m256i)a);
#endif
}
#else
using Rounded = int16_t;  // of a unit: 0, 2, 1, 3
constexpr int kDotPasses = 2;
inline VU unit_bytes(VU b, int pass) { return (pass == 0 ? b : b >> 8) & 0x00ff00ffu; }
inline VI dot(VI acc, VU b, VU a) {
#if defined(__AVX512BW__)
  return acc + (VI)_mm512_madd_epi16((__m512i)b, (__m512i)a);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return acc + (VI)_mm256_madd_epi16((__m256i)b, (__m256i)a);
#elif defined(__SSE2__) && !defined(__AVX__)
  return acc + (VI)_mm_madd_epi16((__m128i)b, (__m128i)a);
#else
  VI low = (VI)(a << 16) >> 16, high = (VI)a >> 16;
  return acc + (VI)(b & 0xffff) * low + (VI)(b >> 16) * high;
#endif
}
#endif

template <>
struct Unit<Int8> {
  using Left = Rounded;
  static constexpr int size = 4;
};

// A packed matrix; weights of 8 bits have a scale for each column of their panels.
template <class W>
struct Matrix {
  const W* panels = nullptr;
  const float* scales = nullptr;
};

// Rounded rows of k inputs: of each row whole groups, and for each group its scale and minus 128
// times its sum.
struct RoundedRows {
  Rounded* data = nullptr;
  float* scale = nullptr;
  int32_t* start = nullptr;
  long k = 0;
  long groups() const { return (k + kGroupInputs - 1) / kGroupInputs; }
};

// Memory of rounded rows that lasts as that of `Buffer`.
struct RoundedBuffer {
  Buffer<Rounded> data;
  Buffer<float> scale;
  Buffer<int32_t> start;
  RoundedRows get(long rows, long k) {
    RoundedRows made{nullptr, nullptr, nullptr, k};
    long count = rows * made.groups();
    made.data = data.get(count * kGroupInputs);
    made.scale = scale.get(count), made.start = start.get(count);
    return made;
  }
};

inline int32_t highest(VI v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t top = v[0];
  for (int j = 1; j < kWidth; j++) top = std::max<int32_t>(top, v[j]);
  return top;
#endif
}

inline int32_t sum(VI v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t total = 0;
  for (int j = 0; j < kWidth; j++) total += v[j];
  return total;
#endif
}

// Rounds the numbers of a group. The scale of one in which something is not finite is NaN, so that
// what is computed of it shows that; a group of next to nothing is zero.
inline void round_group(const float* x, Rounded* to, float* scale, int32_t* start) {
  constexpr int vectors = kGroupInputs / kWidth;
  VI tops{}, total{}, whole[vectors];
  for (int v = 0; v < vectors; v++) {
    VI bits = (VI)(load<VU>(x + v * kWidth) & 0x7fffffffu);  // ordered as the numbers, NaN above all
    tops = bits > tops ? bits : tops;
  }
  int32_t top = highest(tops);
  float largest = load<float>(&top);
  bool finite = top < 0x7f800000, used = finite && largest >= 1e-30f;
  float factor = used ? 127.0f / largest : 0.0f;
  VF magic = splat(12582912.0f);
  alignas(64) int32_t apart[kGroupInputs];
  for (int v = 0; v < vectors; v++) {
    VF rounded = (load<VF>(x + v * kWidth) * factor + magic) - magic;
    whole[v] = used ? __builtin_convertvector(rounded, VI) : VI{};
    total += whole[v];
    if constexpr (kDotPasses == 1) {
      typedef int8_t Bytes __attribute__((vector_size(kWidth)));
      store(to + v * kWidth, __builtin_convertvector(whole[v], Bytes));
    } else {
      store(apart + v * kWidth, whole[v]);
    }
  }
  for (long i = 0; kDotPasses == 2 && i < kGroupInputs; i++) {
    long in_unit = i % 4;
    to[i] = static_cast<Rounded>(apart[i - in_unit + in_unit % 2 * 2 + in_unit / 2]);
  }
  *scale = used ? largest / 127.0f : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  *start = -128 * sum(total);
}

// Rounds row r, given as k numbers.
inline void round_row(const float* x, const RoundedRows& rows, long r) {
  long count = rows.groups();
  for (long g = 0; g < count; g++) {
    alignas(64) float padded[kGroupInputs];
    const float* from = x + g * kGroupInputs;
    long rest = rows.k - g * kGroupInputs, at = r * count + g;
    if (rest < kGroupInputs) {
      std::copy_n(from, rest, padded);
      std::fill(padded + rest, padded + kGroupInputs, 0.0f);
      from = padded;
    }
    round_group(from, rows.data + at * kGroupInputs, rows.scale + at, rows.start + at);
  }
}

// c[R, kPanel] = rows row .. row + R - 1 times one panel.
template <int R>
inline void int8_tile(const RoundedRows& a, long row, const Int8* b, const float* scales, float* c,
                      long ldc) {
  // As in gemm.h.
  constexpr long ahead = R <= 4 ? 96 : 256;
  constexpr int level = R <= 4 ? 3 : 2;
  long count = a.groups(), all = units<Int8>(a.k), stride = count * kGroupInputs;
  VF sum[R][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) sum[i][j] = VF{};
  }
  for (long g = 0; g < count; g++) {
    const Rounded* from = a.data + row * stride + g * kGroupInputs;
    VI acc[R][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) acc[i][j] = VI{} + a.start[(row + i) * count + g];
    }
    long last = std::min(all, (g + 1) * kGroupInputs / 4);
    for (long k = g * kGroupInputs / 4; k < last; k++, from += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) {
        __builtin_prefetch(b + ((k + ahead) * kPanel + j * kWidth) * 4, 0, level);
      }
#pragma GCC unroll 2
      for (int pass = 0; pass < kDotPasses; pass++) {
        VU right[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) {
          right[j] = unit_bytes(load<VU>(b + (k * kPanel + j * kWidth) * 4), pass);
        }
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
          VU left = VU{} + load<uint32_t>(from + i * stride + pass * 2);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; j++) acc[i][j] = dot(acc[i][j], right[j], left);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      VF scale = splat(a.scale[(row + i) * count + g]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) {
        sum[i][j] += __builtin_convertvector(acc[i][j], VF) * scale;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) {
      store(c + i * ldc + j * kWidth, sum[i][j] * load<VF>(scales + j * kWidth));
    }
  }
}

constexpr int kInt8Rows = kTileRows<float>;

template <int R = kInt8Rows>
inline void int8_tile_of(long rows, const RoundedRows& a, long row, const Int8* b,
                         const float* scales, float* c, long ldc) {
  if (rows == R) return int8_tile<R>(a, row, b, scales, c, ldc);
  if constexpr (R > 1) int8_tile_of<R - 1>(rows, a, row, b, scales, c, ldc);
}

// As `int8_tile`, for any number of rows and panel number `panel`.
inline void multiply_panel(const RoundedRows& a, long row, long rows, const Matrix<Int8>& m,
                           long panel, float* c, long ldc) {
  const Int8* b = m.panels + panel * panel_size<Int8>(a.k);
  for (long i = 0; i < rows; i += kInt8Rows) {
    int8_tile_of<>(std::min<long>(kInt8Rows, rows - i), a, row + i, b, m.scales + panel * kPanel,
                   c + i * ldc, ldc);
  }
}

// As `multiply` of gemm.h.
template <class Done>
void multiply(Team& team, long rows, const RoundedRows& a, const Matrix<Int8>& m, long first,
              long last, int group, Done done) {
  share_panels(team, rows, first, last, group, done,
               [&](long row, long count, long panel, float* out, long ldc) {
                 multiply_panel(a, row, count, m, panel, out, ldc);
               });
}

}  // namespace pshare
