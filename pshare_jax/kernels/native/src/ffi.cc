// The XLA FFI handlers of the CPU kernels; pshare_jax/kernels/native/library.py registers them.

#include "call.h"
#include "computed.h"
#include "masked_attention.h"
#include "matmul.h"

namespace ffi = xla::ffi;
using namespace pshare;

namespace {

// pages, k, v, page_table, start, lens -> pages
ffi::Error kv_write(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs) {
  Call call(args, rets, attrs);
  return typed_pages(call, 0, [&](auto element) {
    using E = decltype(element);
    E* pages = static_cast<E*>(updated(call.arg(0), call.ret(0)));
    Rows rows = call.rows(3);
    long tokens = call.dim(1, 1);
    // A window of one token: earlier pages are none of its business.
    Geometry g{call.dim(0, 2), 1, call.dim(0, 3), call.dim(0, 4), 1, 0};
    const E* given[] = {call.data<E>(1, "keys"), call.data<E>(2, "values")};
    if (!call.good("") || !call.good(problem(rows, tokens, g, call.dim(0, 0)))) return;
    for (int part = 0; part < 2; part++) {
      const E* from = given[part];
      for (long b = 0; b < rows.batch; b++) {
        for (long t = 0; t < std::min<long>(rows.lens[b], tokens); t++) {
          for (long h = 0; h < g.kv_heads; h++) {
            std::memcpy(slot(pages, rows, g, b, rows.start[b] + t, part, h),
                        from + ((b * tokens + t) * g.kv_heads + h) * g.head_dim,
                        g.head_dim * sizeof(E));
          }
        }
      }
    }
  });
}

// q, pages, page_table, start, lens, sinks of no or all heads -> out
ffi::Error paged_attention(ffi::RemainingArgs args, ffi::RemainingRets rets,
                           ffi::Dictionary attrs) {
  Call call(args, rets, attrs);
  return typed(call, 0, [&](auto element) {
    using E = decltype(element);
    Rows rows = call.rows(2);
    long tokens = call.dim(0, 1);
    Geometry g = call.geometry(1, call.dim(0, 2));
    g.sinks = call.data<float>(5, "sinks");
    bool of_heads = g.sinks == nullptr || call.dim(5, 0) == g.heads();
    if (!call.good(of_heads ? "" : "there must be a sink for each head, or none")) return;
    E* out = static_cast<E*>(call.ret(0).untyped_data());
    if (!call.good("") || !call.good(problem(rows, tokens, g, call.dim(1, 0)))) return;
    std::vector<long> first;
    for (long b = 0; b < rows.batch; b++) {
      first.push_back(b * tokens);
      long valid = std::max(0, rows.lens[b]), width = g.heads() * g.head_dim;
      std::fill(out + (b * tokens + valid) * width, out + (b + 1) * tokens * width, E{});
    }
    const E* q = call.data<E>(0);
    bool small = has_small_pages(call, 1);
    bool alike = small || call.arg(1).element_type() == call.arg(0).element_type();
    if (!call.good(alike ? "" : "pages are of another dtype than queries")) return;
    attend(q, small ? nullptr : call.data<E>(1), small ? call.data<fp8>(1) : nullptr, rows, g,
           first, tokens == 1, out);
  });
}

// A layer that computes in E, over pages of E or of 8 bits, and weights of W.
template <class E, class W>
void run_layer(Call& call) {
  bool small = has_small_pages(call, 1);
  bool alike = small || call.arg(1).element_type() == call.arg(9).element_type();
  if (!call.good(alike ? "" : "pages are of another dtype than weights")) return;
  call.data<float>(0, "x");
  call.data<W>(8, "matrices");
  if (!call.good("")) return;
  float* x = static_cast<float*>(updated(call.arg(0), call.ret(0)));
  void* pages = updated(call.arg(1), call.ret(1));
  Rows rows = call.rows(2);
  Layer<E, W> layer{};
  layer.embed = call.dim(0, 2);
  layer.mlp = call.attr<int64_t>("mlp");
  layer.geometry = call.geometry(1, call.attr<int64_t>("heads"));
  layer.rotated = 2 * call.dim(5, 3);
  layer.eps = call.attr<float>("eps");
  layer.query_factor = call.attr<float>("query_factor");
  layer.residual_scale = call.attr<float>("residual_scale");
  layer.gelu = call.attr<bool>("gelu");
  layer.kv_only = call.attr<bool>("kv_only");
  layer.norm_all_heads = call.attr<bool>("norm_all_heads");
  layer.experts.count = call.attr<int64_t>("experts");
  layer.experts.per_token = call.attr<int64_t>("experts_per_token");
  layer.experts.normalised = call.attr<bool>("experts_normalised");
  layer.experts.limit = call.attr<float>("experts_limit");
  const Parts parts{call.attr<bool>("pre_norms"), call.attr<bool>("bias"),
                    call.attr<bool>("qk_norm"),   call.attr<bool>("post_norms"),
                    call.attr<bool>("o_bias"),    call.attr<bool>("mlp_bias"),
                    call.attr<bool>("sinks"),     call.attr<bool>("expert_biases")};
  layer.num_adapters = call.attr<int64_t>("num_adapters");
  layer.rank = call.attr<int64_t>("rank");
  layer.adapter_index = call.data<int32_t>(10, "adapter index");
  long number = call.attr<int64_t>("layer"), tokens = call.dim(0, 1);
  long vectors = call.dim(7, 1), matrices = call.dim(8, 1), factors = call.dim(9, 1);
  if (number < 0 || number >= call.dim(7, 0)) call.good("no such layer");
  if (layer.rotated > layer.geometry.head_dim) call.good("more rotates than a head has");
  const float *cosine = call.data<float>(5, "cosine"), *sine = call.data<float>(6, "sine");
  if (!call.good("") || !call.good(problem(rows, tokens, layer.geometry, call.dim(1, 0))) ||
      !call.good(locate(layer, call.data<float>(7, "vectors") + number * vectors, vectors,
                        call.data<W>(8, "matrices") + number * matrices, matrices, parts)) ||
      !call.good(locate_adapters(layer, call.data<E>(9, "adapters") + number * factors, factors,
                                 rows.batch, call.attr<int64_t>("targets")))) {
    return;
  }
  run(layer, rows, tokens, x, cosine, sine, small ? nullptr : static_cast<E*>(pages),
      small ? static_cast<fp8*>(pages) : nullptr);
}

// See decoder_layer/cpu_ffi.py for the operands -> x, pages
ffi::Error decoder_layer(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs) {
  Call call(args, rets, attrs);
  // Adapters, of which there may be none, have the dtype that is computed in.
  return typed(call, 9, [&](auto element) {
    using E = decltype(element);
    ffi::DataType weights = call.arg(8).element_type();
    if (weights == narrow_dtype<Fp8As<E>>) return run_layer<E, Fp8As<E>>(call);
    if (weights != narrow_dtype<Int8>) return run_layer<E, E>(call);
    call.attr<bool>("rounds") ? run_layer<E, Int8>(call) : run_layer<E, Int8As<E>>(call);
  });
}

// Page `index` of one layer's array, as bytes.
char* page(ffi::AnyBuffer pages, long index) {
  long size = static_cast<long>(pages.size_bytes()) / pages.dimensions()[0];
  return static_cast<char*>(pages.untyped_data()) + index * size;
}

// Whether all of `count` page numbers are in the pool, and nothing was wrong before.
bool in_pool(Call& call, const int32_t* index, long count) {
  if (!call.good("")) return false;
  long num_pages = call.dim(0, 0);
  for (long i = 0; i < count; i++) {
    if (index[i] < 0 || index[i] >= num_pages) return call.good("a page number is out of range");
  }
  return call.good("");
}

// Calls `move(layer, i, bytes of a page)` for `count` pages of every layer.
template <class Move>
ffi::Error for_pages(Call& call, long layers, long count, Move move) {
  if (!call.error().empty()) return ffi::Error::InvalidArgument(call.error());
  ffi::AnyBuffer pages = call.arg(0);
  size_t bytes = pages.size_bytes() / pages.dimensions()[0];
  Pool::instance().run([&](Team& team) {
    team.loop(layers * count, [&](long item) { move(item / count, item % count, bytes); });
  });
  return call.error().empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(call.error());
}

// layers of pages, indices -> staged [layers, n, ...]
ffi::Error gather_pages(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs) {
  Call call(args, rets, attrs);
  long layers = static_cast<long>(args.size()) - 1, count = call.dim(layers, 0);
  const int32_t* index = call.data<int32_t>(layers);
  char* staged = static_cast<char*>(call.ret(0).untyped_data());
  in_pool(call, index, count);
  return for_pages(call, layers, count, [&](long layer, long i, size_t bytes) {
    std::memcpy(staged + (layer * count + i) * bytes, page(call.arg(layer), index[i]), bytes);
  });
}

// layers of pages, staged, indices -> layers of pages
ffi::Error scatter_pages(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs) {
  Call call(args, rets, attrs);
  long layers = static_cast<long>(rets.size()), count = call.dim(layers, 1);
  const int32_t* index = call.data<int32_t>(layers + 1);
  const char* staged = call.data<char>(layers);
  in_pool(call, index, count);
  for (long layer = 0; layer < layers; layer++) updated(call.arg(layer), call.ret(layer));
  return for_pages(call, layers, count, [&](long layer, long i, size_t bytes) {
    // Padding, all of which goes to page 0, may be written by several threads: leave it out.
    if (index[i] == 0) return;
    std::memcpy(page(call.ret(layer), index[i]), staged + (layer * count + i) * bytes, bytes);
  });
}

// The sum of w_i (2 i + 1) over a page's values as unsigned integers, `first` being its first i.
template <class Word>
uint32_t weighted_sum(const Word* words, long count, long first) {
  uint32_t sum = 0, factor = static_cast<uint32_t>(2 * first + 1);
  for (long i = 0; i < count; i++) sum += words[i] * (factor + 2 * static_cast<uint32_t>(i));
  return sum;
}

// staged [layers, n, ...] -> checksums [n]; `alone` leaves the team to other callers
ffi::Error page_checksums(ffi::RemainingArgs args, ffi::RemainingRets rets,
                          ffi::Dictionary attrs) {
  Call call(args, rets, attrs);
  ffi::AnyBuffer staged = call.arg(0);
  bool alone = call.attr<bool>("alone");
  if (!call.error().empty()) return ffi::Error::InvalidArgument(call.error());
  long layers = call.dim(0, 0), count = call.dim(0, 1);
  auto* sums = static_cast<uint32_t*>(call.ret(0).untyped_data());
  if (count == 0) return ffi::Error::Success();
  long values = static_cast<long>(staged.element_count()) / (layers * count);
  long width = static_cast<long>(staged.size_bytes() / staged.element_count());
  const char* data = static_cast<const char*>(staged.untyped_data());
  auto sum_page = [&](long i) {
    uint32_t sum = 0;
    for (long layer = 0; layer < layers; layer++) {
      const char* from = data + (layer * count + i) * values * width;
      long first = layer * values;
      if (width == 1) {
        sum += weighted_sum(reinterpret_cast<const uint8_t*>(from), values, first);
      } else if (width == 2) {
        sum += weighted_sum(reinterpret_cast<const uint16_t*>(from), values, first);
      } else {
        sum += weighted_sum(reinterpret_cast<const uint32_t*>(from), values, first);
      }
    }
    sums[i] = sum;
  };
  if (alone) {
    for (long i = 0; i < count; i++) sum_page(i);
  } else {
    Pool::instance().run([&](Team& team) { team.loop(count, sum_page); });
  }
  return ffi::Error::Success();
}

// layers of pages, sources, targets -> layers of pages
ffi::Error copy_pages(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs) {
  Call call(args, rets, attrs);
  long layers = static_cast<long>(rets.size()), count = call.dim(layers, 0);
  const int32_t* from = call.data<int32_t>(layers);
  const int32_t* to = call.data<int32_t>(layers + 1);
  in_pool(call, from, count);
  in_pool(call, to, count);
  for (long layer = 0; layer < layers; layer++) updated(call.arg(layer), call.ret(layer));
  return for_pages(call, layers, count, [&](long layer, long i, size_t bytes) {
    if (to[i] == 0) return;
    std::memcpy(page(call.ret(layer), to[i]), page(call.ret(layer), from[i]), bytes);
  });
}

template <class W>
void run_head(Call& call) {
  long vocab = call.ret(0).dimensions()[1], scales = call.dim(6, 0);
  bool fits = call.dim(2, 0) == panels(vocab) * panel_size<W>(call.dim(0, 1)) &&
              scales == (is_narrow<W> ? panels(vocab) * kPanel : 0);
  if (!call.good(fits ? "" : "the packed head is of another model")) return;
  long words = call.dim(5, 1);
  bool covers = words == 0 || (words * 32 >= vocab && call.dim(5, 0) == call.dim(0, 0));
  const float *x = call.data<float>(0, "x"), *scale = call.data<float>(1, "scale");
  Matrix<W> matrix{call.data<W>(2, "head"), call.data<float>(6, "head scales")};
  const int32_t* lens = call.data<int32_t>(3, "lens");
  const bool* wanted = call.data<bool>(4, "wanted");
  const uint32_t* mask = call.data<uint32_t>(5, "mask");
  if (!call.good(covers ? "" : "the mask is of another vocabulary or batch")) return;
  head<W>(x, scale, matrix, lens, call.dim(0, 0), call.dim(0, 1), vocab, call.attr<float>("eps"),
          *wanted, mask, words,
          static_cast<float*>(call.ret(0).untyped_data()),
          static_cast<int32_t*>(call.ret(1).untyped_data()));
}

// x, scale, head, lens, whether logits are wanted, mask of no or enough words, scales of a head of
// 8 bits or none; attributes say what such a head multiplies -> logits, best tokens
ffi::Error lm_head(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs) {
  Call call(args, rets, attrs);
  ffi::DataType weights = call.arg(2).element_type();
  bool rounds = call.attr<bool>("rounds"), half = call.attr<bool>("bfloat16");
  if (weights == narrow_dtype<Fp8As<bf16>>) {
    half ? run_head<Fp8As<bf16>>(call) : run_head<Fp8As<float>>(call);
  } else if (weights != narrow_dtype<Int8>) {
    return typed(call, 2, [&](auto element) { run_head<decltype(element)>(call); });
  } else if (rounds) {
    run_head<Int8>(call);
  } else {
    half ? run_head<Int8As<bf16>>(call) : run_head<Int8As<float>>(call);
  }
  return call.error().empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(call.error());
}

// Operands `first` and the next one of a product.
Pair pair_of(Call& call, size_t first) {
  bool turn_left = call.attr<bool>("transpose_left"), turn_right = call.attr<bool>("transpose_right");
  size_t second = first + 1;
  Side left{call.data<bf16>(first), call.dim(first, turn_left), call.dim(first, !turn_left),
            !turn_left};
  Side right{call.data<bf16>(second), call.dim(second, !turn_right), call.dim(second, turn_right),
             turn_right};
  call.good(left.depth == right.depth ? "" : "the inner axes differ");
  return {left, right};
}

// left, right, and possibly two more -> out, the product or the sum of both; attributes say which
// operands are transposed
ffi::Error matmul_handler(ffi::RemainingArgs args, ffi::RemainingRets rets,
                          ffi::Dictionary attrs) {
  Call call(args, rets, attrs);
  Pair pair = pair_of(call, 0), second{};
  const Pair* more = nullptr;
  if (args.size() > 2) {
    second = pair_of(call, 2);
    more = &second;
    bool same = second.left.lines == pair.left.lines && second.right.lines == pair.right.lines;
    call.good(same ? "" : "the two products have different shapes");
  }
  if (!call.error().empty()) return ffi::Error::InvalidArgument(call.error());
  ffi::AnyBuffer out = call.ret(0);
  if (out.element_type() == ffi::DataType::F32) {
    matmul(pair, more, static_cast<float*>(out.untyped_data()));
  } else if (out.element_type() == ffi::DataType::BF16) {
    matmul(pair, more, static_cast<bf16*>(out.untyped_data()));
  } else {
    return ffi::Error::InvalidArgument("the result must be float32 or bfloat16");
  }
  return ffi::Error::Success();
}

// What q, k, v and mask, the first operands of a call, say.
MaskedAttention masked_operands(Call& call) {
  for (size_t i = 0; i < 3; i++) {
    bool bfloat16 = call.arg(i).element_type() == ffi::DataType::BF16;
    call.good(bfloat16 && call.arg(i).dimensions().size() == 4
                  ? "" : "q, k and v must be bfloat16 with four axes");
  }
  auto mask = call.arg(3);
  bool bytes = mask.element_type() == ffi::DataType::PRED && mask.dimensions().size() == 3;
  if (!call.good(bytes ? "" : "the mask must be bool with three axes")) return {};
  long heads = call.dim(0, 2), kv_heads = call.dim(1, 2);
  MaskedAttention a{call.dim(0, 0), call.dim(0, 1), call.dim(1, 1), kv_heads,
                    kv_heads == 0 ? 0 : heads / kv_heads, call.dim(0, 3),
                    call.attr<int64_t>("constant_keys"), call.data<bf16>(0), call.data<bf16>(1),
                    call.data<bf16>(2), reinterpret_cast<const uint8_t*>(call.data<bool>(3))};
  bool fits = kv_heads > 0 && heads % kv_heads == 0 && call.dim(1, 0) == a.batch &&
              call.dim(1, 3) == a.dims && mask.dimensions()[0] == a.batch &&
              mask.dimensions()[1] == a.queries && mask.dimensions()[2] == a.keys;
  for (size_t axis = 0; axis < 4; axis++) fits = fits && call.dim(2, axis) == call.dim(1, axis);
  call.good(fits ? "" : "the shapes of q, k, v and mask do not belong together");
  return a;
}

// q, k, v, mask -> out
ffi::Error masked_attention_handler(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                    ffi::Dictionary attrs) {
  Call call(args, rets, attrs);
  MaskedAttention a = masked_operands(call);
  if (!call.error().empty()) return ffi::Error::InvalidArgument(call.error());
  masked_attention(a, static_cast<bf16*>(call.ret(0).untyped_data()));
  return ffi::Error::Success();
}

// q, k, v, mask, gradient of out -> gradients of q, k and v
ffi::Error masked_attention_gradient_handler(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                             ffi::Dictionary attrs) {
  Call call(args, rets, attrs);
  MaskedAttention a = masked_operands(call);
  auto out = [&](size_t i) { return static_cast<bf16*>(call.ret(i).untyped_data()); };
  const bf16* gradient = call.data<bf16>(4);
  if (!call.error().empty()) return ffi::Error::InvalidArgument(call.error());
  masked_attention_gradient(a, gradient, out(0), out(1), out(2));
  return ffi::Error::Success();
}

}  // namespace

PSHARE_HANDLER(pshare_kv_write, kv_write);
PSHARE_HANDLER(pshare_paged_attention, paged_attention);
PSHARE_HANDLER(pshare_decoder_layer, decoder_layer);
PSHARE_HANDLER(pshare_lm_head, lm_head);
PSHARE_HANDLER(pshare_matmul, matmul_handler);
PSHARE_HANDLER(pshare_masked_attention, masked_attention_handler);
PSHARE_HANDLER(pshare_masked_attention_gradient, masked_attention_gradient_handler);
PSHARE_HANDLER(pshare_gather_pages, gather_pages);
PSHARE_HANDLER(pshare_scatter_pages, scatter_pages);
PSHARE_HANDLER(pshare_copy_pages, copy_pages);
PSHARE_HANDLER(pshare_page_checksums, page_checksums);
