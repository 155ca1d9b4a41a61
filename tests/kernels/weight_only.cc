// What test_weight_only.py calls: products with weights of 8 bits, and the same by the products of
// gemm.h with a panel of the numbers that these are.

#include <vector>

#include "fp8.h"
#include "tile_check.h"
#include "weight_only.h"

using namespace pshare;

namespace {

// Rows of k numbers as products read them, with NaN behind each of them.
template <class E>
std::vector<Left<E>> rows_of(const float* x, long rows, long k, long stride) {
  std::vector<Left<E>> held(rows * stride, from_float<Left<E>>(NAN));
  long padded = units<E>(k) * Unit<E>::size;
  for (long r = 0; r < rows; r++) {
    std::fill_n(held.begin() + r * stride, padded, Left<E>{});
    convert(x + r * k, held.data() + r * stride, k);
  }
  return held;
}

float number(WholeNumbers, uint8_t byte) { return static_cast<float>(byte) - 128; }
float number(SmallFloats, uint8_t byte) { return to_float(fp8{byte}); }

// A panel of numbers in E, out of one of bytes.
template <class N, class E>
std::vector<E> numbers(const uint8_t* bytes, long k) {
  constexpr int unit = Unit<E>::size;
  std::vector<E> made(panel_size<E>(k));
  for (long i = 0; i < k; i++) {
    for (long c = 0; c < kPanel; c++) {
      uint8_t byte = bytes[(i / 4 * kPanel + c) * 4 + i % 4];
      made[(i / unit * kPanel + c) * unit + i % unit] = from_float<E>(number(N{}, byte));
    }
  }
  return made;
}

template <class N, class E>
void multiply_all(const float* x, long rows, long k, const uint8_t* bytes, const float* scales,
                  long columns, float* out, bool by_numbers) {
  using W = Narrow<N, E>;
  long stride = round_up(k, 2) + 2;
  std::vector<Left<E>> a = rows_of<E>(x, rows, k, stride);
  Matrix<W> m{reinterpret_cast<const W*>(bytes), scales};
  for (long p = 0; p < columns / kPanel; p++) {
    float* c = out + p * kPanel;
    if (!by_numbers) {
      multiply_panel(rows, a.data(), stride, m, p, k, c, columns);
      continue;
    }
    std::vector<E> panel = numbers<N, E>(bytes + p * panel_size<W>(k), k);
    multiply_panel<E>(rows, a.data(), stride, panel.data(), units<E>(k), c, columns, false);
    for (long i = 0; i < rows * kPanel; i++) {
      c[i / kPanel * columns + i % kPanel] *= scales[p * kPanel + i % kPanel];
    }
  }
}

}  // namespace

extern "C" {

int panel_columns() { return kPanel; }
int start() { return static_cast<int>(start_tiles(true)); }

void product(int half, int small_floats, const float* x, long rows, long k, const uint8_t* bytes,
             const float* scales, long columns, float* out, int by_numbers) {
  auto of = [&](auto kind, auto element) {
    multiply_all<decltype(kind), decltype(element)>(x, rows, k, bytes, scales, columns, out, by_numbers);
  };
  auto with = [&](auto kind) { half ? of(kind, bf16{}) : of(kind, float{}); };
  small_floats ? with(SmallFloats{}) : with(WholeNumbers{});
}
}
