"""A decoder layer over paged KV, and the head, in C++: `native/src/layer.h`.

One call does what some fifteen operations of XLA would: on a CPU the layers of a decode step are so
short that what lies between operations counts. Only the tokens that `q_lens` calls valid are
computed. The residual stream is float32; what enters a product has the dtype of the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.kernels.native.library import require_library

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections that adapters may be on, in the order of the C++ side."""


class LayerWeights(NamedTuple):
    """One layer's weights: matrices as `packing.pack` makes them, vectors float32.

    `bias` is laid out like qkv's columns; `bias`, `q_norm` and `k_norm` have length 0 where the
    architecture has none. Panels of gate and up alternate in `gate_up`.
    """

    attn_norm: jax.Array
    mlp_norm: jax.Array
    bias: jax.Array
    q_norm: jax.Array
    k_norm: jax.Array
    qkv: jax.Array
    o: jax.Array
    gate_up: jax.Array
    down: jax.Array


class LayerAdapters(NamedTuple):
    """Packed LoRA factors of one layer, of n modules of rank r (even, zero-padded).

    `factors` maps a target to A `[inputs, n * r]` and B `[n * r, outputs]`, both packed, scales
    folded into B; `index [B]` int32 names each row's module, -1 for none.
    """

    factors: dict[str, tuple[jax.Array, jax.Array]]
    index: jax.Array
    num: int
    rank: int


class LayerShape(NamedTuple):
    """What the shapes of packed weights do not tell."""

    num_heads: int
    intermediate_size: int
    rms_norm_eps: float
    sliding_window: int | None


def decoder_layer(
    x: jax.Array,
    pages: jax.Array,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    rope: tuple[jax.Array, jax.Array],
    weights: LayerWeights,
    adapters: LayerAdapters | None,
    shape: LayerShape,
    *,
    kv_only: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Writes the tokens' KV into pages, attends, and applies the feed-forward block.

    Args:
        x: `[B, T, embed]` float32, updated in place where XLA allows it.
        pages: `[num_pages, 2, kv_heads, page_size, head_dim]` of the weights' dtype; in place when
            donated to the surrounding jit.
        rows: page table `[B, N]`, position of the first token `[B]` and number of valid tokens
            `[B]`, int32.
        rope: cosine and sine, each `[B, T, 1, head_dim / 2]` float32.
        weights: the layer's.
        adapters: LoRA updates of each row, if any.
        shape: the rest.
        kv_only: write K and V and compute nothing else; x stays as it is.

    Returns:
        x and pages; x of tokens that are not valid stays as it is.

    Raises:
        ConfigError: the C++ library cannot be had on this machine.
    """
    require_library()
    dtype = weights.qkv.dtype
    if pages.dtype != dtype:
        raise ValueError(f"decoder_layer: pages are {pages.dtype}, but weights are {dtype}")
    nothing = jnp.zeros(0, dtype)
    index, num, rank, factors = jnp.zeros(0, jnp.int32), 0, 0, {}
    if adapters is not None:
        factors, index, num, rank = adapters
    ab = [array for target in TARGETS for array in factors.get(target, (nothing, nothing))]
    call = jax.ffi.ffi_call(
        "pshare_decoder_layer",
        (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(pages.shape, dtype)),
        input_output_aliases={0: 0, 1: 1},
    )
    return call(
        x,
        pages,
        *rows,
        *rope,
        *weights,
        index,
        *ab,
        heads=np.int64(shape.num_heads),
        mlp=np.int64(shape.intermediate_size),
        eps=np.float32(shape.rms_norm_eps),
        window=np.int64(shape.sliding_window or 0),
        soft_cap=np.float32(0),
        kv_only=kv_only,
        num_adapters=np.int64(num),
        rank=np.int64(rank),
    )


def lm_head(
    x: jax.Array,
    scale: jax.Array,
    head: jax.Array,
    lens: jax.Array,
    *,
    vocab_size: int,
    eps: float,
) -> jax.Array:
    """Final norm and logits of the rows with `lens > 0`; 0 for the others.

    Args:
        x: `[B, embed]` float32, the last layer's output.
        scale: `[embed]` float32, of the norm.
        head: packed `[embed, vocab]`.
        lens: `[B]` int32.
        vocab_size: columns of the head without padding.
        eps: of the norm.

    Returns:
        `[B, vocab]` float32.

    Raises:
        ConfigError: the C++ library cannot be had on this machine.
    """
    require_library()
    out = jax.ShapeDtypeStruct((x.shape[0], vocab_size), jnp.float32)
    return jax.ffi.ffi_call("pshare_lm_head", out)(x, scale, head, lens, eps=np.float32(eps))
