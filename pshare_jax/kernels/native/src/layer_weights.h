// The weights of a decoder layer, and where they lie in the arrays of all layers.
#pragma once

#include <string>

#include "experts.h"
#include "attention.h"
#include "weight_only.h"

namespace pshare {

constexpr int kTargets = 7;
enum Target { kQ, kK, kV, kO, kGate, kUp, kDown };

template <class E>
struct Adapter {
  const E *a = nullptr, *b = nullptr;  // packed [inputs, num * rank] and [num * rank, outputs]
};

template <class E, class W = E>
struct Layer {
  long embed, mlp, rotated;  // rotated: components of a head, its first; the others stay
  Geometry geometry;
  float eps;
  float query_factor, residual_scale;  // of rotated queries; of what is added to x
  bool gelu;     // the gate's activation: tanh-approximated GELU, or SiLU
  bool kv_only;  // write K and V and compute nothing else
  // Vectors are null where there are none; biases are as long as their products' panels.
  const float *attn_norm, *mlp_norm;
  const float *bias, *q_norm, *k_norm;
  bool norm_all_heads;  // q and k are normalised over all heads together
  const float *attn_post_norm, *mlp_post_norm;  // of a block's output
  const float *o_bias, *gate_up_bias, *down_bias;
  Matrix<W> qkv, o, gate_up, down;  // gate_up and down of a dense block
  Experts<E> experts;
  long num_adapters = 0, rank = 0;
  const int32_t* adapter_index = nullptr;  // [batch], -1 for none
  Adapter<E> adapters[kTargets];
};

// What a layer has besides projections.
struct Parts {
  bool pre_norms, bias, qk_norm, post_norms, o_bias, mlp_bias, sinks, expert_biases;
};

// Where a layer's weights begin in the vectors and matrices of all layers, see
// decoder_layer/packing.py. Returns what is wrong, or nothing.
template <class E, class W>
std::string locate(Layer<E, W>& l, const float* vectors, long num_vectors, const W* matrices,
                   long num_matrices, const Parts& has) {
  const float* vectors_end = vectors + num_vectors;
  const W* matrices_end = matrices + num_matrices;
  const Geometry& g = l.geometry;
  long heads = g.heads() * g.head_dim, kv = g.kv_heads * g.head_dim;
  long qkv = panels(heads) + 2 * panels(kv), count = l.experts.count;
  auto take = [](auto& from, long size, bool there = true) {
    auto at = from;
    from += there ? size : 0;
    return there ? at : nullptr;
  };
  auto take_biases = [&](long columns, bool there) {
    return take(vectors, panels(columns) * kPanel, there);
  };
  l.attn_norm = take(vectors, l.embed, has.pre_norms);
  l.mlp_norm = take(vectors, l.embed, has.pre_norms);
  l.bias = take(vectors, qkv * kPanel, has.bias);
  l.q_norm = take(vectors, l.norm_all_heads ? heads : g.head_dim, has.qk_norm);
  l.k_norm = take(vectors, l.norm_all_heads ? kv : g.head_dim, has.qk_norm);
  l.attn_post_norm = take(vectors, l.embed, has.post_norms);
  l.mlp_post_norm = take(vectors, l.embed, has.post_norms);
  l.geometry.sinks = take(vectors, g.heads(), has.sinks);
  l.o_bias = take_biases(l.embed, has.o_bias);
  l.gate_up_bias = take(vectors, 2 * panels(l.mlp) * kPanel, has.mlp_bias);
  l.down_bias = take_biases(l.embed, has.mlp_bias);
  Experts<E>& x = l.experts;
  x.router_bias = take_biases(count, has.expert_biases);
  x.gate_up_bias = take(vectors, count * 2 * panels(l.mlp) * kPanel, has.expert_biases);
  x.down_bias = take(vectors, count * panels(l.embed) * kPanel, has.expert_biases);
  auto matrix = [&](long columns, long inputs) {
    const float* scales = take(vectors, columns * kPanel, !std::is_same_v<W, E>);
    return Matrix<W>{take(matrices, columns * panel_size<W>(inputs)), scales};
  };
  l.qkv = matrix(qkv, l.embed);
  l.o = matrix(panels(l.embed), heads);
  if (count == 0) {
    l.gate_up = matrix(2 * panels(l.mlp), l.embed);
    l.down = matrix(panels(l.embed), l.mlp);
  } else if constexpr (std::is_same_v<W, E>) {
    x.router = take(matrices, panels(count) * panel_size<E>(l.embed));
    x.gate_up = take(matrices, count * 2 * panels(l.mlp) * panel_size<E>(l.embed));
    x.down = take(matrices, count * panels(l.embed) * panel_size<E>(l.mlp));
    if (x.per_token < 1 || x.per_token > count) return "no such number of experts";
  } else {
    return "experts have no weights of 8 bits";
  }
  bool fits = vectors == vectors_end && matrices == matrices_end;
  return fits ? "" : "the packed weights are of another model";
}

// The same for the factors of the targets in the bit set `targets`.
template <class E, class W>
std::string locate_adapters(Layer<E, W>& l, const E* factors, long count, long batch, long targets) {
  const E* end = factors + count;
  const Geometry& g = l.geometry;
  long heads = g.heads() * g.head_dim, kv = g.kv_heads * g.head_dim;
  const long inputs[kTargets] = {l.embed, l.embed, l.embed, heads, l.embed, l.embed, l.mlp};
  const long outputs[kTargets] = {heads, kv, kv, l.embed, l.mlp, l.mlp, l.embed};
  long low = l.num_adapters * l.rank;
  for (int t = 0; t < kTargets; t++) {
    if ((targets >> t & 1) == 0) continue;
    l.adapters[t].a = factors;
    factors += panels(low) * panel_size<E>(inputs[t]);
    l.adapters[t].b = factors;
    factors += panels(outputs[t]) * panel_size<E>(low);
  }
  if (factors != end) return "the packed adapters are of another model";
  for (long b = 0; b < batch && low > 0; b++) {
    if (l.adapter_index[b] >= l.num_adapters) return "an adapter's index is out of range";
  }
  return "";
}

}  // namespace pshare
