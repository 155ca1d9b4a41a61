// What bfloat16.cc and float32.cc compile, each for its own dtype.
#pragma once

#include "computed.h"
#include "layer.h"

namespace pshare {

template <class E, class W>
void run(const Layer<E, W>& layer, const Rows& rows, long tokens, float* x, const float* cos,
         const float* sin, E* pages, fp8* small_pages) {
  LayerCall<E, W>(layer, rows, tokens, x, cos, sin, pages, small_pages).run();
}

template <class E>
void attend(const E* q, const E* pages, const fp8* small_pages, const Rows& rows,
            const Geometry& geometry, const std::vector<long>& first, bool one_query, E* out) {
  if (small_pages == nullptr) {
    Attention<E, E> attention(q, out, pages, rows, geometry, first, one_query);
    Pool::instance().run([&](Team& team) { attention.run(team); });
    return;
  }
  WidenedPages<E> wide(small_pages, rows, geometry);
  Attention<E, E> attention(q, out, wide.pages(), wide.rows(), geometry, first, one_query);
  Pool::instance().run([&](Team& team) {
    wide.widen(team);
    attention.run(team);
  });
}

}  // namespace pshare

// The layer over weights of every kind, and attention, in E.
#define PSHARE_LAYER(E, W)                                                                     \
  template void run(const Layer<E, W>&, const Rows&, long, float*, const float*, const float*, \
                    E*, fp8*);
#define PSHARE_DTYPE(E)                                                                        \
  namespace pshare {                                                                           \
  PSHARE_LAYER(E, E)                                                                           \
  PSHARE_LAYER(E, Fp8As<E>)                                                                    \
  PSHARE_LAYER(E, Int8)                                                                        \
  PSHARE_LAYER(E, Int8As<E>)                                                                   \
  template void attend(const E*, const E*, const fp8*, const Rows&, const Geometry&,           \
                       const std::vector<long>&, bool, E*);                                    \
  }
