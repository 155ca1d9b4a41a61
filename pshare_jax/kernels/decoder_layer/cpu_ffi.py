"""A decoder layer over paged KV, and the head, in C++: `native/src/layer.h`.

One call does what some fifteen operations of XLA would: on a CPU the layers of a decode step are so
short that what lies between operations counts. Only the tokens that `q_lens` calls valid are
computed. The residual stream is float32; what enters a product has the dtype of the weights. That
of weights of 8 bits has the dtype that is computed in, or is rounded to 8 bits too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.kernels.decoder_layer.packing import TARGETS, PackedAdapters, PackedLayers, Parts
from pshare_jax.kernels.kv_dtype import FP8
from pshare_jax.kernels.native.library import require_library

Rows = tuple[jax.Array, jax.Array, jax.Array]
"""Page table `[B, N]`, position of each row's first token `[B]`, valid tokens `[B]`; int32."""


class LayerShape(NamedTuple):
    """What the shapes of packed weights do not tell."""

    num_heads: int
    intermediate_size: int
    rms_norm_eps: float
    sliding_window: int | None
    soft_cap: float | None
    query_factor: float
    residual_scale: float
    gelu: bool


def decoder_layer(
    x: jax.Array,
    pages: jax.Array,
    rows: Rows,
    rope: tuple[jax.Array, jax.Array],
    layer: int,
    layers: PackedLayers,
    adapters: PackedAdapters | None,
    adapter_index: jax.Array | None,
    shape: LayerShape,
    *,
    kv_only: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Writes the tokens' KV into pages, attends, and applies the feed-forward block.

    Args:
        x: `[B, T, embed]` float32, updated in place where XLA allows it.
        pages: `[num_pages, 2, kv_heads, page_size, head_dim]` of the weights' dtype, any of both
            where weights have 8 bits, or of 8 bits themselves; in place when donated to the
            surrounding jit.
        rows: where the tokens live.
        rope: cosine and sine, each `[B, T, 1, R / 2]` float32; the first R components of a head
            rotate.
        layer: number of the layer.
        layers: the weights of all layers.
        adapters: LoRA modules, if any.
        adapter_index: `[B]` int32, each row's module; -1 for none.
        shape: the rest.
        kv_only: write K and V and compute nothing else; x stays as it is.

    Returns:
        x and pages; x of tokens that are not valid stays as it is.

    Raises:
        ValueError: pages of another dtype than the weights, and not of 8 bits.
        ConfigError: the C++ library cannot be had on this machine.
    """
    require_library()
    dtype = jnp.dtype(layers.computed) if pages.dtype == FP8 else pages.dtype
    if layers.matrices.dtype != dtype and layers.matrices.dtype.itemsize != 1:
        raise ValueError(
            f"decoder_layer: pages are {pages.dtype}, but weights are {layers.matrices.dtype}"
        )
    if adapters is None or adapter_index is None:
        adapters = PackedAdapters(jnp.zeros((1, 0), dtype), 0, 0, ())
        adapter_index = jnp.zeros(0, jnp.int32)
    call = jax.ffi.ffi_call(
        "pshare_decoder_layer",
        (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(pages.shape, pages.dtype)),
        input_output_aliases={0: 0, 1: 1},
    )
    x, pages = call(
        x,
        pages,
        *rows,
        *rope,
        layers.vectors,
        layers.matrices,
        adapters.factors,
        adapter_index,
        layer=np.int64(layer),
        heads=np.int64(shape.num_heads),
        mlp=np.int64(shape.intermediate_size),
        eps=np.float32(shape.rms_norm_eps),
        window=np.int64(shape.sliding_window or 0),
        soft_cap=np.float32(shape.soft_cap or 0),
        **_attributes(layers.parts),
        query_factor=np.float32(shape.query_factor),
        residual_scale=np.float32(shape.residual_scale),
        gelu=shape.gelu,
        rounds=layers.rounds,
        kv_only=kv_only,
        num_adapters=np.int64(adapters.num),
        rank=np.int64(adapters.rank),
        targets=np.int64(sum(1 << TARGETS.index(target) for target in adapters.targets)),
    )
    return x, pages


def _attributes(parts: Parts) -> dict[str, Any]:
    """The parts with the types that the C++ side reads."""
    kinds = {bool: bool, int: np.int64, float: np.float32}
    return {name: kinds[type(value)](value) for name, value in vars(parts).items()}


def lm_head(
    x: jax.Array,
    scale: jax.Array,
    head: jax.Array,
    lens: jax.Array,
    wanted: jax.Array,
    mask: jax.Array | None = None,
    head_scales: jax.Array | None = None,
    *,
    vocab_size: int,
    eps: float,
    computed: str = "float32",
    rounds: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Final norm, logits and most likely token of the rows with `lens > 0`; 0 for the others.

    Args:
        x: `[B, embed]` float32, the last layer's output.
        scale: `[embed]` float32, of the norm.
        head: packed `[embed, vocab]`.
        lens: `[B]` int32.
        wanted: bool scalar, whether logits are looked at; if not they are left undefined.
        mask: `[B, words]` uint32, from which tokens the most likely is taken, as in
            `runtime.sampler.sample`; logits are those without it.
        head_scales: `[columns of all panels]` float32 of a head of 8 bits.
        vocab_size: columns of the head without padding.
        eps: of the norm.
        computed: name of the dtype that a head of 8 bits multiplies, float32 or bfloat16.
        rounds: that is rounded to 8 bits instead.

    Returns:
        Logits `[B, vocab]` float32 and tokens `[B]` int32, the lowest id of equals.

    Raises:
        ConfigError: the C++ library cannot be had on this machine.
    """
    require_library()
    out = (
        jax.ShapeDtypeStruct((x.shape[0], vocab_size), jnp.float32),
        jax.ShapeDtypeStruct((x.shape[0],), jnp.int32),
    )
    call = jax.ffi.ffi_call("pshare_lm_head", out)
    if mask is None:
        mask = jnp.zeros((x.shape[0], 0), jnp.uint32)
    if head_scales is None:
        head_scales = jnp.zeros(0, jnp.float32)
    operands = (x, scale, head, lens, wanted, mask, head_scales)
    half = computed == "bfloat16"
    logits, tokens = call(*operands, eps=np.float32(eps), rounds=rounds, bfloat16=half)
    return logits, tokens
