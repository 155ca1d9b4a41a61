// Numbers of 8 bits, for pages of KV: one of sign, four of exponent, three of mantissa ("e4m3fn").
//
// The largest is 448, which larger ones become; there are no infinities, and NaN stays NaN. Loops
// have neither branches nor tables, so that compilers make vectors of them.
#pragma once

#include <cmath>

#include "simd.h"

namespace pshare {

struct fp8 {
  uint8_t bits;
};

inline float to_float(fp8 x) {
  uint32_t size = x.bits & 0x7f;
  // Normal numbers by their exponent, the few below by their mantissa.
  uint32_t normal = (size << 20) + (120u << 23);
  float value = size < 8 ? static_cast<float>(size) * 0x1p-9f : load<float>(&normal);
  uint32_t bits = size == 0x7f ? 0x7fc00000u : load<uint32_t>(&value);
  bits |= static_cast<uint32_t>(x.bits & 0x80) << 24;
  return load<float>(&bits);
}

// Rounds to nearest, ties to even.
template <>
inline fp8 from_float<fp8>(float x) {
  uint32_t all = load<uint32_t>(&x), size = all & 0x7fffffffu;
  bool is_nan = size > 0x7f800000u;
  float value = std::fmin(load<float>(&size), 448.0f);
  uint32_t bits = load<uint32_t>(&value);
  uint32_t normal = ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120u << 3);
  // Adding 2^23 leaves no bits for a fraction.
  uint32_t small = static_cast<uint32_t>((value * 512.0f + 8388608.0f) - 8388608.0f);
  uint32_t rounded = value < 0x1p-6f ? small : normal;
  return fp8{static_cast<uint8_t>((is_nan ? 0x7fu : rounded) | (all >> 24 & 0x80u))};
}

inline void convert(const fp8* from, float* to, long count) {
  for (long i = 0; i < count; i++) to[i] = to_float(from[i]);
}
inline void convert(const float* from, fp8* to, long count) {
  for (long i = 0; i < count; i++) to[i] = from_float<fp8>(from[i]);
}
// Exact: a bfloat16 has more of everything.
inline void convert(const fp8* from, bf16* to, long count) {
  for (long i = 0; i < count; i++) {
    float wide = to_float(from[i]);
    to[i] = bf16{static_cast<uint16_t>(load<uint32_t>(&wide) >> 16)};
  }
}

}  // namespace pshare
