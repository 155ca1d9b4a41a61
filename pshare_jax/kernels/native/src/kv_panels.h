// Keys and values of a block of positions, rearranged as matrix products read them.
#pragma once

#include "gemm.h"

namespace pshare {

// [kPanel keys][dims] -> [units of dims][kPanel]; `keys` are pointers to rows of E.
template <class E>
void transpose_panel(const E* const* keys, long dims, uint32_t* out) {
  constexpr int U = Unit<E>::size;
  long count = dims / U, done = 0;
#if defined(__AVX512F__)
  for (; done + 16 <= count; done += 16) {
    for (int half = 0; half < 2; half++) {
      __m512i r[16], t[16];
      for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(keys[half * 16 + i] + done * U);
#pragma GCC unroll 8
      for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        __m512i b = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        __m512i c = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        __m512i d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        uint32_t* to = out + (done + i) * kPanel + half * 16;
        _mm512_storeu_si512(to, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(to + 8 * kPanel, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(to + 4 * kPanel, _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_storeu_si512(to + 12 * kPanel, _mm512_shuffle_i32x4(c, d, 0xdd));
      }
    }
  }
#else
  for (; done + kWidth <= count; done += kWidth) {
    for (long j = 0; j < kPanel; j += kWidth) {
      VU square[kWidth];
      for (int i = 0; i < kWidth; i++) square[i] = load<VU>(keys[j + i] + done * U);
      transpose(square);
      for (int i = 0; i < kWidth; i++) store(out + (done + i) * kPanel + j, square[i]);
    }
  }
#endif
  for (long k = done; k < count; k++) {
    for (long j = 0; j < kPanel; j++) out[k * kPanel + j] = load<uint32_t>(keys[j] + k * U);
  }
}

// Values of keys -> panels of [units of keys][kPanel], as products read them. The columns of a panel
// come out in the order of `column_order`, which interleaving two rows without a shuffle more gives.
inline void pack_values(const float* const* rows, long keys, long dims, float* out) {
  for (long p = 0; p < panels(dims); p++) {
    long width = std::min<long>(kPanel, dims - p * kPanel);
    for (long j = 0; j < keys; j++, out += kPanel) {
      std::memcpy(out, rows[j] + p * kPanel, width * sizeof(float));
      std::fill(out + width, out + kPanel, 0.0f);
    }
  }
}
inline void pack_values(const bf16* const* rows, long keys, long dims, bf16* out) {
  for (long p = 0; p < panels(dims); p++) {
    long width = std::min<long>(kPanel, dims - p * kPanel);
#if defined(__AVX512BW__)
    __mmask32 mask = width == 32 ? ~0u : (1u << width) - 1;
    for (long j = 0; j < keys; j += 2, out += 2 * kPanel) {
      __m512i a = _mm512_maskz_loadu_epi16(mask, rows[j] + p * kPanel);
      __m512i b = _mm512_maskz_loadu_epi16(mask, rows[j + 1] + p * kPanel);
      _mm512_storeu_si512(out, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(out + kPanel, _mm512_unpackhi_epi16(a, b));
    }
#else
    for (long j = 0; j < keys; j += 2, out += 2 * kPanel) {
      const bf16 *a = rows[j] + p * kPanel, *b = rows[j + 1] + p * kPanel;
      if (width == kPanel) {  // known to the compiler: vectors
        for (long i = 0; i < kPanel; i++) out[2 * i] = a[i], out[2 * i + 1] = b[i];
        continue;
      }
      for (long i = 0; i < width; i++) out[2 * i] = a[i], out[2 * i + 1] = b[i];
      std::fill(out + 2 * width, out + 2 * kPanel, bf16{0});
    }
#endif
  }
}

// The column of a panel of values that comes i-th.
template <class E>
constexpr long column_order(long i) {
#if defined(__AVX512BW__)
  if (Unit<E>::size == 2) return i % 16 / 4 * 8 + i / 16 * 4 + i % 4;
#endif
  return i;
}

}  // namespace pshare
