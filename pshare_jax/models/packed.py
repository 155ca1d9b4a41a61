"""A decoder over packed weights: the C++ layers of a CPU, with the numbers of `decoder.Decoder`.

Weights are packed once, when they are loaded, and are then ordinary arrays of a flat dict: one
executable serves every module of a shape here too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pshare_jax.kernels.backends import CPU_FFI
from pshare_jax.kernels.decoder_layer.cpu_ffi import (
    LayerAdapters,
    LayerShape,
    LayerWeights,
    decoder_layer,
    lm_head,
)
from pshare_jax.kernels.decoder_layer.packing import pack, pad_columns
from pshare_jax.kernels.native.library import require_library
from pshare_jax.models.attention import rope_table
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.weights import LORA_TARGETS, Weights, check_weights, projection_path

Rows = tuple[jax.Array, jax.Array, jax.Array]
"""Page table `[B, N]`, position of each row's first token `[B]`, valid tokens `[B]`; int32."""


def is_packed(backend: str) -> bool:
    """Whether steps on a kernel backend read packed weights."""
    return backend == CPU_FFI


def pack_weights(config: ModelConfig, weights: Weights) -> Weights:
    """A full module's weights as `PackedDecoder` reads them; the embedding is kept as it is too.

    Raises:
        CheckpointError: names the first weight that is missing, unexpected or misshapen.
        ConfigError: the C++ library cannot be had on this machine.
    """
    check_weights(config, weights)
    columns = require_library().panel_columns
    packed: Weights = {"embed.embedding": weights["embed.embedding"]}
    for i in range(config.num_layers):
        prefix = f"layers.{i}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        layer = _pack_layer(columns, own)
        packed |= {prefix + name: array for name, array in layer._asdict().items()}
    packed["final_norm.scale"] = weights["final_norm.scale"].astype(jnp.float32)
    tied = weights.get("lm_head.kernel") is None
    head = weights["embed.embedding" if tied else "lm_head.kernel"]
    packed["head"] = _pack_head(columns, tied, head)
    return packed


@functools.partial(jax.jit, static_argnums=0)
def _pack_layer(columns: int, own: Weights) -> LayerWeights:
    def matrix(target: str) -> jax.Array:
        kernel = own[f"{projection_path(target)}.kernel"]
        # `o` alone has two input axes.
        return kernel.reshape((-1, kernel.shape[-1]) if target == "o" else (kernel.shape[0], -1))

    def vector(name: str) -> jax.Array:
        return own.get(name, jnp.zeros(0)).astype(jnp.float32)

    qkv = ("q", "k", "v")
    biases = [vector(f"attn.{target}.bias").reshape(-1) for target in qkv]
    return LayerWeights(
        attn_norm=vector("attn_norm.scale"),
        mlp_norm=vector("mlp_norm.scale"),
        bias=pad_columns(biases, columns),
        q_norm=vector("attn.q_norm.scale"),
        k_norm=vector("attn.k_norm.scale"),
        qkv=pack([matrix(target) for target in qkv], columns),
        o=pack([matrix("o")], columns),
        gate_up=pack([matrix("gate"), matrix("up")], columns, interleave=True),
        down=pack([matrix("down")], columns),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pack_head(columns: int, tied: bool, head: jax.Array) -> jax.Array:
    return pack([head.T if tied else head], columns)


@functools.partial(jax.jit, static_argnums=0)
def _pack_factor(columns: int, factor: jax.Array) -> jax.Array:
    return pack([factor], columns)


def pack_adapters(stacked: Weights) -> Weights:
    """Adapters of `lora.stack_adapters` as `PackedDecoder` reads them.

    `lora_a [*in, n, r]` becomes packed `[inputs, n * r]`, `lora_b [n, r, *out]` packed
    `[n * r, outputs]`, with r padded to an even number; their number and rank are the shape of
    `shape`, an empty array.

    Raises:
        ConfigError: the C++ library cannot be had on this machine.
    """
    columns = require_library().panel_columns
    packed: Weights = {}
    for name, factor in stacked.items():
        is_a = name.endswith(".lora_a")
        num, rank = factor.shape[-2:] if is_a else factor.shape[:2]
        padding = [(0, 0)] * factor.ndim
        padding[-1 if is_a else 1] = (0, rank % 2)
        wide = jnp.pad(factor, padding)
        both = num * (rank + rank % 2)
        matrix = wide.reshape((-1, both) if is_a else (both, -1))
        packed[name] = _pack_factor(columns, matrix)
        packed["shape"] = jnp.zeros((num, rank + rank % 2, 0))
    return packed


class PackedDecoder:
    """What `Decoder` is, over packed weights and pages. Lives for one trace.

    Args:
        config: the decoder's.
        weights: as made by `pack_weights`.
        adapters: as made by `pack_adapters`, if any, with `adapter_index`.
        adapter_index: `[B]` int32, each row's adapter; -1 for none.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        adapters: Weights | None = None,
        adapter_index: jax.Array | None = None,
    ):
        self._config = config
        self._weights = weights
        self._adapters = adapters
        self._index = adapter_index
        self._shape = LayerShape(
            config.num_heads,
            config.intermediate_size,
            config.rms_norm_eps,
            config.sliding_window,
        )

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        pages: Sequence[jax.Array],
        rows: Rows,
        *,
        kv_only: bool = False,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The last layer's output, before the final norm, and the pages with the tokens' KV.

        Args:
            tokens: `[B, T]` int32 ids; those past a row's length may be anything.
            positions: `[B, T]` int32.
            pages: one array a layer.
            rows: where the tokens live.
            kv_only: leave out what only the output needs.

        Returns:
            `[B, T, embed]` float32, and the pages.
        """
        rope = rope_table(self._config, positions)
        embedding = self._weights["embed.embedding"]
        x = jnp.take(embedding, tokens, axis=0, mode="clip").astype(jnp.float32)
        written = list(pages)
        last = len(written) - 1
        for i, layer in enumerate(written):
            weights = LayerWeights(
                *(self._weights[f"layers.{i}.{name}"] for name in LayerWeights._fields)
            )
            x, written[i] = decoder_layer(
                x,
                layer,
                rows,
                rope,
                weights,
                self._layer_adapters(i),
                self._shape,
                kv_only=kv_only and i == last,
            )
        return x, tuple(written)

    def logits(self, x: jax.Array, lens: jax.Array) -> jax.Array:
        """`[B, embed]` of `hidden` -> `[B, vocab]` float32; 0 where `lens [B]` is 0."""
        return lm_head(
            x,
            self._weights["final_norm.scale"],
            self._weights["head"],
            lens,
            vocab_size=self._config.vocab_size,
            eps=self._config.rms_norm_eps,
        )

    def _layer_adapters(self, layer: int) -> LayerAdapters | None:
        if self._adapters is None or self._index is None:
            return None
        factors = {}
        for target in LORA_TARGETS:
            path = f"layers.{layer}.{projection_path(target)}"
            if f"{path}.lora_a" in self._adapters:
                factors[target] = (
                    self._adapters[f"{path}.lora_a"],
                    self._adapters[f"{path}.lora_b"],
                )
        num, rank, _ = self._adapters["shape"].shape
        return LayerAdapters(factors, self._index, num, rank)
