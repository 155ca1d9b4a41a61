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

// Operands of the check's products, and both results.
struct CheckedProducts {
  static constexpr long rows = 70, units = 2 * kTileBlockUnits + 21, lda = 2 * units;
  bf16 a[rows * lda], b[(units + 16) * 2 * kTileColumns];
  float c[2][rows * kTileColumns];

  CheckedProducts() {
    Numbers numbers;
    for (bf16& x : a) x = numbers.next();
    for (bf16& x : b) x = numbers.next();
    a[3 * lda + 1] = bf16{0x7f80};  // infinity, in a row of its own
    a[4 * lda + 5] = bf16{0x7fc0};  // NaN
    a[5 * lda + 2] = bf16{0x7f00};  // so large that it gives infinity
  }

  // Whether `one(c)` and `other(c)` give the same bits.
  template <class F, class G>
  bool same(F one, G other) {
    constexpr long count = rows * kTileColumns;
    for (long i = 0; i < count; i++) c[0][i] = c[1][i] = 0.25f * (i % 13);
    one(c[0]);
    other(c[1]);
    return same_bits(c[0], c[1], count);
  }
};

// `depth` units of `n` rows, added to what is there or not.
template <class One, class Other>
bool panels_agree(CheckedProducts& p, long n, long depth, bool add) {
  auto product = [&](auto multiply) {
    return [&, multiply](float* c) { multiply(n, p.a, p.lda, p.b, depth, c, kTileColumns, add); };
  };
  return p.same(product(tile_panel<One>), product(tile_panel<Other>));
}

// Two times 16 rows from different places, one register of columns: as scores are computed.
template <class Tiles>
void multiply_scores(CheckedProducts& p, float* c) {
  shape_tiles<Tiles>(kTileLines, kTileLines);
  TileLeft first{p.a, 2 * p.lda}, second{p.a + 20 * p.lda, 2 * p.lda};
  tile_rows<Tiles, true, false, false>(first, second, p.b, 48, c, kTileColumns, false);
}

// Whether two kinds of tiles give the same bits: few and many rows, whole steps and the rest of one, and
// more than a block of the inner axis.
template <class One, class Other>
bool agree() {
  auto p = std::make_unique<CheckedProducts>();
  bool same = p->same([&](float* c) { multiply_scores<One>(*p, c); },
                      [&](float* c) { multiply_scores<Other>(*p, c); });
  for (bool add : {false, true}) {
    for (long n : {1, 7, 16, 17, 32, 33, 70}) {
      for (long depth : {1L, 16L, 37L, CheckedProducts::units}) {
        same = same && panels_agree<One, Other>(*p, n, depth, add);
      }
    }
  }
  release_shape<One>();
  release_shape<Other>();
  return same;
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
