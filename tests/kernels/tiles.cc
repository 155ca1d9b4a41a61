// What test_tiles.py calls: tiles of every kind against each other, and single results of the twin.

#if defined(__x86_64__) && defined(__linux__)
#include "amx_emulator.h"
#endif
#include "tile_check.h"

using namespace pshare;

namespace {

// A unit that forgets the order of its sums.
struct Backwards : Twin<2> {
  template <int sum, int left, int right>
  static void dot() {
    for (int t : {left, right}) {
      for (auto& line : at(t).lines) {
        if (t == left) std::reverse(line, line + 16);
      }
      if (t == right) std::reverse(at(t).lines, at(t).lines + 16);
    }
    Twin<2>::dot(sum, left, right);
    for (auto& line : at(left).lines) std::reverse(line, line + 16);
    std::reverse(at(right).lines, at(right).lines + 16);
  }
};

// One that keeps denormals, as most processors do by default.
struct KeepsDenormals : Twin<3> {
  template <int sum, int left, int right>
  static void dot() {
    Register &c = at(sum), &a = at(left), &b = at(right);
    auto wide = [](uint32_t bits) { return load<float>(&bits); };
    for (int m = 0; m < c.rows; m++) {
      for (int n = 0; n < 16; n++) {
        float even = 0, odd = 0, before = wide(c.lines[m][n]);
        for (int k = 0; k < 16; k++) {
          even = std::fma(wide(a.lines[m][k] << 16), wide(b.lines[k][n] << 16), even);
          odd = std::fma(wide(a.lines[m][k] & 0xffff0000u), wide(b.lines[k][n] & 0xffff0000u), odd);
        }
        float after = before + (even + odd);
        std::memcpy(&c.lines[m][n], &after, 4);
      }
    }
  }

  template <class V>
  static V load(const void* from) {
    return pshare::load<V>(from);
  }
  template <int t>
  static void load(const void* from, long stride) {
    Twin<3>::load(t, from, stride);
  }
};

}  // namespace

extern "C" {

// Instructions that were emulated while unit and twin agreed; 0 if they did not, -1 if there is no
// such unit to compile for.
long amx_agrees() {
#if defined(__x86_64__) && defined(__linux__)
  amx_emulator::Installed installed;
  amx_emulator::count() = 0;
  return agree<AmxTiles, TwinTiles>() ? std::max(1L, amx_emulator::count()) : 0;
#else
  return -1;
#endif
}

int backwards_agrees() { return agree<Backwards, TwinTiles>(); }
int denormals_agree() { return agree<KeepsDenormals, TwinTiles>(); }
int twins_agree() { return agree<Twin<4>, TwinTiles>(); }

// c[rows, 32] += a[rows, 2 units] b[units, 32, 2] by the twin.
void panel(long rows, const uint16_t* a, long lda, const uint16_t* b, long units, float* c, int add) {
  tile_panel<TwinTiles>(rows, reinterpret_cast<const bf16*>(a), lda, reinterpret_cast<const bf16*>(b),
                        units, c, kTileColumns, add != 0);
  release_shape<TwinTiles>();
}

int start(int wanted) { return static_cast<int>(start_tiles(wanted != 0)); }
int in_use() { return has_tiles(); }

float fused_step(float a, float b, float c) { return fused(a, b, c); }

void powers(int base_two, const float* x, float* y, long count) {
  for (long i = 0; i + kWidth <= count; i += kWidth) {
    VF v = load<VF>(x + i);
    store(y + i, base_two ? exp2(v) : exp(v));
  }
}
}
