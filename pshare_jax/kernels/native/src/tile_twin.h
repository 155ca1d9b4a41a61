// The matrix unit in plain C++: the bits that Intel's manual gives for TDPBF16PS.
//
// For each row of the left-hand side and column of the right-hand one, the first elements of all
// pairs are summed in order, and so are the second ones; then both sums are added, and that to the
// accumulator. Every step rounds to nearest even; numbers below the least normal one count as zeros
// of their sign, as operands and as results (DAZ, FTZ), whatever the thread's mode is. Which NaN
// comes of a NaN is not stated there: a NaN stands for any other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tile_unit.h"

namespace pshare {

constexpr float kLeastNormal = 0x1p-126f;

inline float flushed(float x) { return std::fabs(x) < kLeastNormal ? std::copysign(0.0f, x) : x; }

// a * b + c of numbers that are no denormals. A result counts as tiny if it is below the least normal
// number when rounded to 24 bits of any exponent; rounded as a denormal it may just reach it.
inline float fused(float a, float b, float c) {
  float sum = std::fma(a, b, c);
  if (std::fabs(sum) != kLeastNormal) return flushed(sum);
  float scaled = std::fma(a * 0x1p32f, b * 0x1p32f, c * 0x1p64f);
  return std::fabs(scaled) < kLeastNormal * 0x1p64f ? std::copysign(0.0f, sum) : sum;
}

// Adds a b of 16 columns to their sums.
inline void fuse(float a, const float (&b)[16], float (&sum)[16]) {
  float next[16];
  int corners = 0;
  for (int n = 0; n < 16; n++) {
    next[n] = std::fma(a, b[n], sum[n]);
    corners += std::fabs(next[n]) == kLeastNormal;
  }
  if (corners == 0) {
    for (int n = 0; n < 16; n++) sum[n] = flushed(next[n]);
    return;
  }
  for (int n = 0; n < 16; n++) sum[n] = fused(a, b[n], sum[n]);
}

// The registers of a thread; another `id` is another set of them.
template <int id>
struct Twin {
  struct Register {
    int rows = 0, bytes = 0;
    alignas(64) uint32_t lines[16][16] = {};
  };
  struct State {
    bool configured = false;
    Register tile[8];
  };
  static State& state() {
    static thread_local State state;
    return state;
  }

  // The unit raises an exception where this is false, which ends the process.
  static void expect(bool legal, const char* what) {
    if (legal) return;
    std::fprintf(stderr, "tile registers: %s\n", what);
    std::abort();
  }
  static Register& at(int t) {
    expect(state().configured, "used before they are configured");
    return state().tile[t];
  }

  static void configure(const TileConfig& config) {
    expect(config.palette == 1 && config.start_row == 0, "an unknown palette");
    for (int t = 0; t < 8; t++) {
      int rows = config.rows[t], bytes = config.row_bytes[t];
      expect(0 < rows && rows <= 16 && 0 < bytes && bytes <= 64, "of no size, or larger than one");
      state().tile[t] = Register{rows, bytes};
    }
    state().configured = true;
  }
  static void release() { state() = State{}; }
  static void zero(int t) { std::memset(at(t).lines, 0, sizeof(Register::lines)); }
  static void load(int t, const void* from, long stride) {
    Register& r = at(t);
    const char* line = static_cast<const char*>(from);
    zero(t);
    for (int i = 0; i < r.rows; i++) std::memcpy(r.lines[i], line + i * stride, r.bytes);
  }
  static void store(int t, void* to, long stride) {
    const Register& r = at(t);
    char* line = static_cast<char*>(to);
    for (int i = 0; i < r.rows; i++) std::memcpy(line + i * stride, r.lines[i], r.bytes);
  }
  static void dot(int sum, int left, int right) {
    Register &c = at(sum), &a = at(left), &b = at(right);
    expect(a.rows == c.rows && b.bytes == c.bytes && a.bytes == 4 * b.rows, "shapes do not fit");
    float first[16][16], second[16][16];  // of the right-hand side's pairs
    for (int k = 0; k < 16; k++) {
      for (int n = 0; n < 16; n++) {
        first[k][n] = first_of(b.lines[k][n]);
        second[k][n] = second_of(b.lines[k][n]);
      }
    }
    for (int m = 0; m < c.rows; m++) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < a.bytes / 4; k++) {
        fuse(first_of(a.lines[m][k]), first[k], even);
        fuse(second_of(a.lines[m][k]), second[k], odd);
      }
      for (int n = 0; n < c.bytes / 4; n++) {
        float before = flushed(as_float(c.lines[m][n]));
        float after = flushed(before + flushed(even[n] + odd[n]));
        std::memcpy(&c.lines[m][n], &after, sizeof(after));
      }
    }
  }

  // As those of `AmxTiles`.
  template <int t>
  static void zero() {
    zero(t);
  }
  template <int t>
  static void load(const void* from, long stride) {
    load(t, from, stride);
  }
  template <int t>
  static void store(void* to, long stride) {
    store(t, to, stride);
  }
  template <int sum, int left, int right>
  static void dot() {
    dot(sum, left, right);
  }

 private:
  static float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
  static float first_of(uint32_t pair) { return flushed(as_float(pair << 16)); }
  static float second_of(uint32_t pair) { return flushed(as_float(pair & 0xffff0000u)); }
};

using TwinTiles = Twin<0>;

}  // namespace pshare
