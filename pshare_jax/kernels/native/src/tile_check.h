// Whether this process computes by tiles: once, before its first product.
//
// A unit is used only if it gives the bits of its twin for a few small products of every kind that the
// kernels are made of, so that a unit, a kernel of the operating system, a hypervisor or a compiler
// that does anything else costs speed and no token.
#pragma once

#include <memory>
#include <type_traits>

#include "tile_gemm.h"

namespace pshare {

// What bfloat16 is multiplied by, and why not by tiles; library.py has the words.
enum class Multiplier : int {
  vectors = 0,  // there is no unit, or the library is not compiled for one
  amx = 1,
  twin = 2,      // the unit's twin, in a library for tests
  off = -1,      // the caller does not want the unit
  refused = -2,  // the operating system does not let this process use it
  differs = -3,  // it does not do what its twin does
};

// Numbers between 2^-12 and 2^4, so that sums round and their order shows; and some of what is treated
// specially: zeros, denormals, numbers whose products are denormals. Always the same ones.
class Numbers {
 public:
  bf16 next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 17;
    state_ ^= state_ << 5;
    unsigned sign = state_ >> 16 & 0x8000, fraction = state_ >> 8 & 0x7f, exponent = 0;
    switch (state_ % 64) {
      case 0: fraction = 0; break;
      case 1: break;  // a denormal
      case 2: exponent = 63; break;
      case 3: exponent = 64; break;
      default: exponent = 115 + (state_ >> 24 & 15);
    }
    return {static_cast<uint16_t>(sign | exponent << 7 | fraction)};
  }

 private:
  uint32_t state_ = 2463534242u;
};

inline bool same_bits(const float* a, const float* b, long count) {
  for (long i = 0; i < count; i++) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (std::memcmp(a + i, b + i, sizeof(float)) != 0) return false;
  }
  return true;
}

// Whether two kinds of tiles give the same bits: sums anew and added to, few and many rows, whole steps
// and the rest of one, more than a block of the inner axis, and one register of columns.
template <class One, class Other>
bool agree() {
  constexpr long rows = 70, units = 2 * kTileBlockUnits + 21, lda = 2 * units;
  struct Memory {
    bf16 a[rows * lda], b[(units + 16) * 2 * kTileColumns];
    float c[2][rows * kTileColumns];
  };
  auto m = std::make_unique<Memory>();
  Numbers numbers;
  for (bf16& x : m->a) x = numbers.next();
  for (bf16& x : m->b) x = numbers.next();
  m->a[3 * lda + 1] = bf16{0x7f80};  // infinity, in a row of its own
  m->a[4 * lda + 5] = bf16{0x7fc0};  // NaN
  m->a[5 * lda + 2] = bf16{0x7f00};  // so large that it gives infinity
  auto reset = [&] {
    for (long i = 0; i < rows * kTileColumns; i++) m->c[0][i] = m->c[1][i] = 0.25f * (i % 13);
  };
  const long some[] = {1, 7, 16, 17, 32, 33, 70}, depths[] = {1, 16, 37, units};
  for (bool add : {false, true}) {
    for (long n : some) {
      for (long depth : depths) {
        reset();
        tile_panel<One>(n, m->a, lda, m->b, depth, m->c[0], kTileColumns, add);
        tile_panel<Other>(n, m->a, lda, m->b, depth, m->c[1], kTileColumns, add);
        if (!same_bits(m->c[0], m->c[1], rows * kTileColumns)) return false;
      }
    }
  }
  reset();
  shape_tiles<One>(kTileLines, kTileLines);
  shape_tiles<Other>(kTileLines, kTileLines);
  TileLeft first{m->a, 2 * lda}, second{m->a + 20 * lda, 2 * lda};
  tile_rows<One, true, false, false>(first, second, m->b, 48, m->c[0], kTileColumns, false);
  tile_rows<Other, true, false, false>(first, second, m->b, 48, m->c[1], kTileColumns, false);
  release_shape<One>();
  release_shape<Other>();
  return same_bits(m->c[0], m->c[1], rows * kTileColumns);
}

#if defined(PSHARE_AMX)

// Whether the CPU has the unit and the system saves its registers (XCR0).
inline bool amx_exists() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_OSXSAVE) == 0) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, registers = 3u << 17;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16) == 0 || (d & tile) == 0) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & registers) == registers;
}

// Linux gives each process its tile registers when it asks for them: for all threads, for good.
inline bool amx_permitted() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

#endif

// Decides, for all of the process; to be called once, before anything is computed.
inline Multiplier start_tiles(bool wanted) {
#if !defined(PSHARE_TILES)
  (void)wanted;
  return Multiplier::vectors;
#else
#if defined(PSHARE_AMX)
  if (!amx_exists()) return Multiplier::vectors;
  if (!wanted) return Multiplier::off;
  if (!amx_permitted()) return Multiplier::refused;
#else
  if (!wanted) return Multiplier::off;
#endif
  if (!agree<Tiles, TwinTiles>()) return Multiplier::differs;
  use_tiles = true;
  return std::is_same_v<Tiles, TwinTiles> ? Multiplier::twin : Multiplier::amx;
#endif
}

}  // namespace pshare
