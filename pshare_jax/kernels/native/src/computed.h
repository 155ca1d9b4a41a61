// What handlers call and other files compile, side by side: the decoder layer and attention, by
// dtype, in bfloat16.cc and float32.cc, and the head, in head.cc.
#pragma once

#include <vector>

#include "layer_weights.h"
#include "small_pages.h"

namespace pshare {

// A layer's call, see layer.h. Of the two kinds of pages one is null.
template <class E, class W>
void run(const Layer<E, W>& layer, const Rows& rows, long tokens, float* x, const float* cos,
         const float* sin, E* pages, fp8* small_pages);

// Attention alone, see attention.h; pages as for a layer.
template <class E>
void attend(const E* q, const E* pages, const fp8* small_pages, const Rows& rows,
            const Geometry& geometry, const std::vector<long>& first, bool one_query, E* out);

// See head.h.
template <class W>
void head(const float* x, const float* scale, const Matrix<W>& m, const int32_t* lens, long batch,
          long embed, long vocab, float eps, bool wanted, const uint32_t* mask, long words,
          float* logits, int32_t* best);

}  // namespace pshare
