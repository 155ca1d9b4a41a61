// Vectors of float32, and products of pairs of bfloat16, for the CPU that this is compiled on.
//
// Everything is written with the compiler's vector types, so that it compiles for any CPU; where
// AVX-512 or AVX512-BF16 is there, the few operations that profit are written for it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pshare {

#if defined(__AVX512F__) || defined(PSHARE_TILES_TWIN)  // panels as wide as two tile registers
#define PSHARE_WIDTH 16
#elif defined(__AVX__)
#define PSHARE_WIDTH 8
#else
#define PSHARE_WIDTH 4
#endif
constexpr int kWidth = PSHARE_WIDTH;

typedef float VF __attribute__((vector_size(kWidth * 4)));
typedef int32_t VI __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VU __attribute__((vector_size(kWidth * 4)));

struct bf16 {
  uint16_t bits;
};

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

inline VF splat(float x) { return x - VF{}; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  return load<float>(&bits);
}

// Rounds to nearest even; NaN stays NaN.
template <class E>
inline E from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits = load<uint32_t>(&x);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16{0x7fc0};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// The same for vectors; the bits of a bfloat16 in each lane.
inline VU half_bits(VU bits) {
  VI is_nan = (VI)((bits & 0x7fffffff) > 0x7f800000);
  return is_nan ? VU{} + 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <class T>
void convert(const T* from, T* to, long count) {
  std::memcpy(to, from, count * sizeof(T));
}
inline void convert(const bf16* from, float* to, long count) {
  for (long i = 0; i < count; i++) to[i] = to_float(from[i]);
}
inline void convert(const float* from, bf16* to, long count) {
  long i = 0;
#if defined(__AVX512BF16__)
  for (; i + 16 <= count; i += 16) {
    __m256bh packed = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
    std::memcpy(to + i, &packed, sizeof(packed));
  }
#else
  typedef uint16_t Half __attribute__((vector_size(kWidth * 2)));
  for (; i + kWidth <= count; i += kWidth) {
    store(to + i, __builtin_convertvector(half_bits(load<VU>(from + i)), Half));
  }
#endif
  for (; i < count; i++) to[i] = from_float<bf16>(from[i]);
}

// What a matrix product takes at a time along its inner axis: one float32 or two bfloat16,
// four bytes either way. The left-hand side of a product with E is held as `Left`. A CPU that does
// not multiply pairs of bfloat16 itself multiplies float32: the right-hand side, which comes from
// memory, is widened in registers, first the first element of each unit, then the second.
template <class E>
struct Unit;
template <>
struct Unit<float> {
  using Left = float;
  static constexpr int size = 1, passes = 1;
  static VF left(const float* a, int) { return splat(*a); }
  static VF right(VU b, int) { return (VF)b; }
  static VF multiply_add(VF acc, VF a, VF b) { return acc + a * b; }
};
#if defined(__AVX512BF16__)
template <>
struct Unit<bf16> {
  using Left = bf16;
  static constexpr int size = 2, passes = 1;
  static VF left(const bf16* a, int) { return (VF)_mm512_set1_epi32(load<int32_t>(a)); }
  static VF right(VU b, int) { return (VF)b; }
  static VF multiply_add(VF acc, VF a, VF b) {
    return (VF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
};
#elif defined(PSHARE_TILES_TWIN)
template <>
struct Unit<bf16> {
  using Left = bf16;
  static constexpr int size = 2, passes = 2;
  static VF left(const bf16* a, int pass) { return splat(to_float(a[pass])); }
  static VF right(VU b, int pass) { return (VF)(pass == 0 ? b << 16 : b & 0xffff0000u); }
  static VF multiply_add(VF acc, VF a, VF b) { return acc + a * b; }
};
#else
template <>
struct Unit<bf16> {
  using Left = float;
  static constexpr int size = 2, passes = 2;
  static VF left(const float* a, int pass) { return splat(a[pass]); }
  static VF right(VU b, int pass) { return (VF)(pass == 0 ? b << 16 : b & 0xffff0000u); }
  static VF multiply_add(VF acc, VF a, VF b) { return acc + a * b; }
};
#endif
template <class E>
using Left = typename Unit<E>::Left;

// rows[i][j] = rows[j][i]
#if defined(__AVX512F__)
inline void transpose(__m512i rows[kWidth]) {
#pragma GCC unroll 4
  for (int step = 1; step < kWidth; step *= 2) {
    alignas(64) int32_t low[kWidth], high[kWidth];
    for (int l = 0; l < kWidth; l++) {
      low[l] = l & step ? kWidth + l - step : l;
      high[l] = l & step ? kWidth + l : l + step;
    }
    __m512i pick_low = _mm512_load_si512(low), pick_high = _mm512_load_si512(high);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++) {
      if (i & step) continue;
      __m512i a = rows[i], b = rows[i + step];
      rows[i] = _mm512_permutex2var_epi32(a, pick_low, b);
      rows[i + step] = _mm512_permutex2var_epi32(a, pick_high, b);
    }
  }
}
#elif defined(__AVX2__) && PSHARE_WIDTH == 8
inline void transpose(VU rows[8]) {
  __m256i r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = (__m256i)rows[i];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    rows[i] = (VU)_mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    rows[i + 4] = (VU)_mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
}
#else
inline void transpose(VU rows[kWidth]) {
  for (int i = 0; i < kWidth; i++) {
    for (int j = 0; j < i; j++) {
      uint32_t x = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = x;
    }
  }
}
#endif

inline float sum(VF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kWidth; i++) total += v[i];
  return total;
#endif
}

inline float largest(VF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < kWidth; i++) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

inline VF choose(VI mask, VF yes, VF no) { return mask ? yes : no; }

// What exp and exp2 are made of. `raised` and `lowered` keep a number at or above, or below, a limit
// and leave NaN as it is; `scaled` is 2^n p for whole n, and 0 outside the given lanes. Without
// them a result below the least normal number would cost as much as a hundred others.
#if defined(__AVX512F__)
using Lanes = __mmask16;
inline Lanes at_least(VF x, float least) {  // or NaN
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_NLT_UQ);
}
// Of two operands these instructions give the second one where any is NaN.
inline VF raised(VF x, float least) {
  return (VF)_mm512_max_ps(_mm512_set1_ps(least), (__m512)x);
}
inline VF lowered(VF x, float most) { return (VF)_mm512_min_ps(_mm512_set1_ps(most), (__m512)x); }
inline VF nearest(VF x) {
  return (VF)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline VF scaled(Lanes lanes, VF p, VF n) {
  return (VF)_mm512_maskz_scalef_ps(lanes, (__m512)p, (__m512)n);
}
#else
using Lanes = VI;
inline Lanes at_least(VF x, float least) { return ~(x < least); }
inline VF raised(VF x, float least) { return choose(x < least, splat(least), x); }
inline VF lowered(VF x, float most) { return choose(x > most, splat(most), x); }
inline VF nearest(VF x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }
inline VF scaled(Lanes lanes, VF p, VF n) {
  VI scale = (__builtin_convertvector(n, VI) + 127) << 23;
  return choose(lanes, p * (VF)scale, VF{});
}
#endif

// 2^x of x <= 0 within 2 units in the last place, exactly 1 of 0; 0 below -126.
inline VF exp2(VF x) {
  Lanes normal = at_least(x, -126.0f);
  x = raised(x, -126.0f);
  VF n = nearest(x), r = x - n;
  VF p = splat(1.32647271e-3f);
  p = p * r + 9.67151264e-3f;
  p = p * r + 5.55073374e-2f;
  p = p * r + 2.40222421e-1f;
  p = p * r + 6.93146978e-1f;
  p = p * r + 1.0f;
  return scaled(normal, p, n);
}

// exp(x) within 2 units in the last place; 0 below -87.3. Range reduction by ln 2 in two parts
// and a polynomial of degree 6.
inline VF exp(VF x) {
  Lanes normal = at_least(x, -87.3f);
  x = raised(lowered(x, 88.0f), -87.3f);
  VF n = nearest(x * 1.44269504f);
  VF r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VF p = splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return scaled(normal, p, n);
}

}  // namespace pshare
