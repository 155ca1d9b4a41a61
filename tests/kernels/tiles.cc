// What test_tiles.py calls: tiles of every kind against each other, and single results of the twin.

#if defined(__x86_64__) && defined(__linux__)
#include "amx_emulator.h"
#endif
#include "attention.h"
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

// Sums of attention of the last tokens over a chunk of keys: over pages that the unit reads as they lie,
// or is given copies of.
template <class Kind>
std::vector<float> attended(long page_size, long dims, long window, long tokens, long start) {
  const Geometry g{2, 3, page_size, dims, window, 0};
  const long width = 300 / page_size + 1, queries = tokens * g.group;
  std::vector<bf16> pages((width + 1) * 4 * page_size * dims), rows(queries * dims);
  Numbers numbers;
  for (bf16& x : pages) x = numbers.next();
  for (bf16& x : rows) x = numbers.next();
  std::vector<int32_t> table(width), first{static_cast<int32_t>(start)}, lens{1};
  for (long i = 0; i < width; i++) table[i] = static_cast<int32_t>(width - i);
  Rows batch{table.data(), first.data(), lens.data(), 1, width};
  TileScratch scratch;
  Sums sums;
  sums.reset(queries, dims);
  pack_queries(rows.data(), queries, g.group, dims, scratch);
  long from = window > 0 ? std::max(start - window + 1, 0L) : 0;
  TileAttention<Kind>{pages.data(), batch, g, 0, 1, start, queries, scratch}.run(
      from, std::min(start + tokens, kChunkKeys), sums);
  release_shape<Kind>();
  std::vector<float> all(sums.values);
  all.insert(all.end(), sums.highest.begin(), sums.highest.end());
  all.insert(all.end(), sums.total.begin(), sums.total.end());
  return all;
}

template <class One, class Other>
bool attention_agrees() {
  const long cases[][5] = {{64, 64, 0, 1, 200}, {16, 64, 0, 21, 40}, {4, 32, 50, 5, 130},
                           {48, 80, 0, 11, 100}, {64, 8, 0, 1, 3}};
  for (auto& c : cases) {
    auto a = attended<One>(c[0], c[1], c[2], c[3], c[4]);
    auto b = attended<Other>(c[0], c[1], c[2], c[3], c[4]);
    bool finite = std::all_of(a.begin(), a.end(), [](float x) { return std::isfinite(x); });
    if (!finite || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) != 0) return false;
  }
  return true;
}

}  // namespace

extern "C" {

// Instructions that were emulated while unit and twin agreed; 0 if they did not, -1 if there is no
// such unit to compile for.
long amx_agrees() {
#if defined(__x86_64__) && defined(__linux__)
  amx_emulator::Installed installed;
  amx_emulator::count() = 0;
  bool same = agree<AmxTiles, TwinTiles>() && attention_agrees<AmxTiles, TwinTiles>();
  return same ? std::max(1L, amx_emulator::count()) : 0;
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

// Bit 0: registers are in use after a product, bit 1: after the call that it is part of.
int shaped_while_and_after_a_call() {
  bf16 a[32] = {}, b[16 * 64] = {};
  float c[32];
  int shaped = 0;
  Pool::instance().run([&](Team&) {
    multiply_panel<bf16>(1, a, 32, b, 16, c, 32, false);
    shaped = TwinTiles::state().configured;
  });
  return shaped | TwinTiles::state().configured << 1;
}

float fused_step(float a, float b, float c) { return fused(a, b, c); }

void powers(int base_two, const float* x, float* y, long count) {
  for (long i = 0; i + kWidth <= count; i += kWidth) {
    VF v = load<VF>(x + i);
    store(y + i, base_two ? exp2(v) : exp(v));
  }
}
}
