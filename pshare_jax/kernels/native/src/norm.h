// RMS normalisation, and memory that calls use again.
#pragma once

#include <vector>

#include "simd.h"

namespace pshare {

inline float mean_square(const float* x, long count) {
  VF total[2] = {};
  long i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    VF a = load<VF>(x + i), b = load<VF>(x + i + kWidth);
    total[0] += a * a;
    total[1] += b * b;
  }
  float rest = 0;
  for (; i < count; i++) rest += x[i] * x[i];
  return (sum(total[0] + total[1]) + rest) / static_cast<float>(count);
}

// RMS normalisation (arXiv 1910.07467) of one row; x and out may be the same.
inline void normalise(const float* x, const float* scale, long count, float eps, float* out) {
  float factor = 1.0f / std::sqrt(mean_square(x, count) + eps);
  for (long i = 0; i < count; i++) out[i] = x[i] * factor * scale[i];
}

template <class E>
void norm_row(const float* x, const float* scale, long count, float eps, E* out) {
  static thread_local std::vector<float> wide;
  wide.resize(count);
  normalise(x, scale, count, eps, wide.data());
  convert(wide.data(), out, count);
}

// Memory of a call that lasts until the next one of the same size or less in this thread.
template <class T>
struct Buffer {
  std::vector<T> data;
  T* get(long count) {
    if (static_cast<long>(data.size()) < count) data.resize(count);
    return data.data();
  }
};

}  // namespace pshare
