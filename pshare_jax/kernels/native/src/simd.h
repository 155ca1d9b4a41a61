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

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

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
    VU bits = load<VU>(from + i);
    VU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    VI is_nan = (VI)((bits & 0x7fffffff) > 0x7f800000);
    VU result = is_nan ? VU{} + 0x7fc0 : rounded;
    store(to + i, __builtin_convertvector(result, Half));
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

#if defined(__AVX2__) && !defined(__AVX512F__)
// rows[i][j] = rows[j][i]
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
#elif !defined(__AVX512F__)
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

// exp(x) within 2 units in the last place; 0 below -87.3. Range reduction by ln 2 in two parts
// and a polynomial of degree 6.
inline VF exp(VF x) {
  VI tiny = x < -87.3f;
  x = choose(x > 88.0f, splat(88.0f), choose(tiny, splat(-87.3f), x));
  VF magic = splat(12582912.0f);
  VF n = (x * 1.44269504f + magic) - magic;
  VF r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VF p = splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  VI scale = (__builtin_convertvector(n, VI) + 127) << 23;
  return choose(tiny, VF{}, p * (VF)scale);
}

}  // namespace pshare
