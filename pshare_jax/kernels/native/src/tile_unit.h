// The matrix unit of a CPU (Intel AMX) as a handful of operations on eight tile registers.
//
// Whatever is computed by tiles is written once, over a type with the operations of `AmxTiles`:
// that one runs on the unit, `TwinTiles` (tile_twin.h) computes the same bits anywhere.
//
// The operations are assembly rather than the compiler's intrinsics: those of GCC 12 and 13 do not
// say that a load reads memory, so that a store before it may come after it, and that of the
// configuration claims 8 bytes of 64.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define PSHARE_AMX 1  // compiled for a CPU that has the unit; PSHARE_TILES_TWIN: for the twin
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pshare {

constexpr long kTileLines = 16;  // rows of a register, of 64 bytes each
constexpr long kTileUnits = 16;  // pairs of bfloat16 in a row; rows of a right-hand side

// What `ldtilecfg` reads. Registers 0 and 1 hold sums of `first` rows, 2 and 3 those of `second`
// rows; 4 and 5 their left-hand sides; 6 and 7 right-hand sides. All rows have 64 bytes.
struct TileConfig {
  alignas(64) uint8_t palette = 1;
  uint8_t start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig(int first, int second) {
    // A register without rows must not be touched, not even by a step that nobody needs.
    const int lines[8] = {first, first, second, second, first, second, kTileUnits, kTileUnits};
    for (int t = 0; t < 8; t++) {
      rows[t] = static_cast<uint8_t>(std::max(lines[t], 1));
      row_bytes[t] = 64;
    }
  }
};
static_assert(sizeof(TileConfig) == 64);

#if defined(__x86_64__)

// Strides are in bytes. `dot`: sum += left right, see tile_twin.h.
struct AmxTiles {
  static void configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  static void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int t>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t) : "memory");
  }
  template <int t>
  static void load(const void* from, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  static void store(void* to, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(t) : "memory");
  }
  template <int sum, int left, int right>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right)
                 : "memory");
  }
};

#endif

// Shapes the registers of this thread, unless they have that shape.
struct TileShape {
  int first = 0, second = 0;  // no first row: released
};
template <class Tiles>
TileShape& tile_shape() {
  static thread_local TileShape shape;
  return shape;
}
template <class Tiles>
void shape_tiles(int first, int second) {
  TileShape& now = tile_shape<Tiles>();
  if (now.first == first && now.second == second) return;
  Tiles::configure(TileConfig(first, second));
  now = {first, second};
}
template <class Tiles>
void release_shape() {
  if (tile_shape<Tiles>().first == 0) return;
  Tiles::release();
  tile_shape<Tiles>() = {};
}

}  // namespace pshare
