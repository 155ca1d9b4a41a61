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

inline void convert(const float* from, float* to, long count) {
  std::memcpy(to, from, count * sizeof(float));
}
inline void convert(const float* from, bf16* to, long count) {
  long i = 0;
#if defined(__AVX512BF16__)
  for (; i + 16 <= count; i += 16) {
    __m256bh packed = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
    std::memcpy(to + i, &packed, sizeof(packed));
  }
#endif
  for (; i < count; i++) to[i] = from_float<bf16>(from[i]);
}

// What a matrix product takes at a time along its inner axis: one float32 or two bfloat16,
// four bytes either way.
template <class E>
struct Unit;
template <>
struct Unit<float> {
  static constexpr int size = 1;
  static VF multiply_add(VF acc, uint32_t a, VU b) {
    float x = load<float>(&a);
    return acc + splat(x) * (VF)b;
  }
};
template <>
struct Unit<bf16> {
  static constexpr int size = 2;
  static VF multiply_add(VF acc, uint32_t a, VU b) {
#if defined(__AVX512BF16__)
    return (VF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    uint32_t low = a << 16, high = a & 0xffff0000u;
    acc += splat(load<float>(&low)) * (VF)(b << 16);
    return acc + splat(load<float>(&high)) * (VF)(b & 0xffff0000u);
#endif
  }
};

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
