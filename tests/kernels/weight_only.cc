// What test_weight_only.py calls: products with weights of 8 bits, and the same by the products of
// gemm.h with a panel of whole numbers.

#include <vector>

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

// A panel of whole numbers in E, out of one of bytes.
template <class E>
std::vector<E> whole_numbers(const uint8_t* bytes, long k) {
  constexpr int unit = Unit<E>::size;
  std::vector<E> made(panel_size<E>(k));
  for (long i = 0; i < k; i++) {
    for (long c = 0; c < kPanel; c++) {
      float weight = static_cast<float>(bytes[(i / 4 * kPanel + c) * 4 + i % 4]) - 128;
      made[(i / unit * kPanel + c) * unit + i % unit] = from_float<E>(weight);
    }
  }
  return made;
}

template <class E>
void multiply_all(const float* x, long rows, long k, const uint8_t* bytes, const float* scales,
                  long columns, float* out, bool by_whole_numbers) {
  long stride = round_up(k, 2) + 2;
  std::vector<Left<E>> a = rows_of<E>(x, rows, k, stride);
  Matrix<Int8As<E>> m{reinterpret_cast<const Int8As<E>*>(bytes), scales};
  for (long p = 0; p < columns / kPanel; p++) {
    float* c = out + p * kPanel;
    if (!by_whole_numbers) {
      multiply_panel(rows, a.data(), stride, m, p, k, c, columns);
      continue;
    }
    std::vector<E> panel = whole_numbers<E>(bytes + p * panel_size<Int8As<E>>(k), k);
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

void product(int half, const float* x, long rows, long k, const uint8_t* bytes, const float* scales,
             long columns, float* out, int by_whole_numbers) {
  if (half) multiply_all<bf16>(x, rows, k, bytes, scales, columns, out, by_whole_numbers);
  else multiply_all<float>(x, rows, k, bytes, scales, columns, out, by_whole_numbers);
}
}
