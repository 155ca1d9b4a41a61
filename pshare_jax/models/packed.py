"""A decoder over packed weights: the C++ layers of a CPU, with the numbers of `decoder.Decoder`.

Weights are packed once, when they are loaded, and are arguments of a step like any others: one
executable serves every module of a shape here too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from pshare_jax.kernels.backends import CPU_FFI
from pshare_jax.kernels.decoder_layer.cpu_ffi import LayerShape, Rows, decoder_layer, lm_head
from pshare_jax.kernels.decoder_layer.packing import (
    TARGETS,
    PackedAdapters,
    PackedLayers,
    Parts,
    alternate_columns,
    pad_columns,
    unpack_columns,
)
from pshare_jax.kernels.native.library import Library, require_library
from pshare_jax.kernels.native.loading import aligned, pack_into, packed_dtype, packed_size
from pshare_jax.models.blocks.attention import query_factor
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import rope_tables, scaled_embedding, scaled_logits
from pshare_jax.models.registry import family
from pshare_jax.models.rotation import unrotated
from pshare_jax.models.weight_formats import rounds
from pshare_jax.models.weights import SCALE, Weights, check_weights, projection_path

LARGE_PAGE = 2 << 20
"""Bytes of a large memory page."""


def unsupported(config: ModelConfig) -> str | None:
    """What of a decoder the C++ layers do not compute; None if they compute all of it.

    Such a decoder runs in XLA, over the C++ kernels for pages.
    """
    problems = {
        "layers of its own": family(config.architecture).decoder_layer is not None,
        "experts in some layers only": len({spec.experts for spec in config.layer_specs}) > 1,
    }
    return next((name for name, present in problems.items() if present), None)


def is_packed(backend: str, config: ModelConfig) -> bool:
    """Whether steps of a decoder on a kernel backend read packed weights."""
    return backend == CPU_FFI and unsupported(config) is None


def holds_packed(weights: Weights) -> bool:
    """Whether `pack_weights` has made them."""
    return "layers" in weights


def pack_weights(config: ModelConfig, weights: Weights, nice: int = 0) -> Weights:
    """A full module's weights as `PackedDecoder` reads them.

    A tied embedding is in memory once, as the packed head; another is kept as it is too. Scales of
    weights of 8 bits are among the vectors, those of the head in an array of their own.

    Args:
        config: the decoder's.
        weights: of `weight_specs(config)`, whole, on a CPU.
        nice: steps by which the thread that packs has a lower priority, see `native.loading`.

    Raises:
        CheckpointError: names the first weight that is missing, unexpected or misshapen.
        ConfigError: the C++ library cannot be had on this machine.
    """
    check_weights(config, weights)
    library = require_library()
    sharding = _replicated(weights["final_norm.scale"].sharding)
    host = {name: np.asarray(weight) for name, weight in weights.items()}
    layers = [_own(host, i) for i in range(config.num_layers)]
    rows = _packed([_layer_matrices(own) for own in layers], library, nice)
    columns = library.panel_columns
    norms = [np.concatenate(_layer_vectors(columns, config, own)) for own in layers]
    vectors = aligned((len(norms), len(norms[0])), np.float32)
    np.stack(norms, out=vectors)
    tied = config.tie_word_embeddings
    name = "embed.embedding" if tied else "lm_head.kernel"
    kernel = host[name].T if tied else host[name]
    head = _packed([[_Block([kernel])]], library, nice)[0]
    scale = _norm_factors(config, host["final_norm.scale"])
    computed = weights["final_norm.scale"].dtype.name
    vectors, matrices, head, scale = jax.device_put([vectors, rows, head, scale], sharding)
    layers = PackedLayers(vectors, matrices, _parts(config), computed, rounds(config.weight_format))
    library.advise_large_pages([layers.matrices, head])
    arrays = {"layers": layers, "final_norm.scale": scale, "head": head}
    if (head_scales := host.get(name + SCALE)) is not None:
        arrays["head_scales"] = jax.device_put(pad_columns([head_scales], columns), sharding)
    return arrays if tied else arrays | {"embed.embedding": weights["embed.embedding"]}


def _replicated(sharding: Sharding) -> Sharding:
    """Where what is made of such an array lies: whole, on the same devices."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


class _Block(NamedTuple):
    """Matrices that are packed together, see `pack_into`."""

    matrices: list[np.ndarray]
    interleave: bool = False


def _packed(layers: Sequence[Sequence[_Block]], library: Library, nice: int) -> np.ndarray:
    """`[layers, n]`: the blocks of each layer, one after the other."""
    sizes = [packed_size(library, block.matrices) for block in layers[0]]
    ends = list(itertools.accumulate(sizes))
    dtype = packed_dtype(layers[0][0].matrices[0].dtype)
    rows = aligned((len(layers), ends[-1]), dtype, LARGE_PAGE)
    for row, blocks in zip(rows, layers, strict=True):
        for block, size, end in zip(blocks, sizes, ends, strict=True):
            out = row[end - size : end]
            pack_into(library, block.matrices, out, interleave=block.interleave, nice=nice)
    return rows


def _norm_factors(config: ModelConfig, scale: np.ndarray) -> np.ndarray:
    return scale.astype(np.float32) + np.float32(config.norm_adds_one)


Named = Mapping[str, np.ndarray]


def _own(host: Named, layer: int) -> Named:
    """The weights of one layer, by their names within it."""
    prefix = f"layers.{layer}."
    return {n.removeprefix(prefix): w for n, w in host.items() if n.startswith(prefix)}


def _parts(config: ModelConfig) -> Parts:
    parts = Parts(
        pre_norms=config.norms != "after",
        bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        norm_all_heads=config.qk_norm_scope == "all_heads",
        post_norms=config.norms != "before",
        o_bias=config.o_bias,
        mlp_bias=config.mlp_bias,
        sinks=config.attention_sinks,
    )
    if (experts := config.layer(0).experts) is None:
        return parts
    return replace(
        parts,
        mlp_bias=False,
        experts=experts.count,
        experts_per_token=experts.per_token,
        experts_normalised=experts.normalised,
        expert_biases=experts.biases,
        experts_limit=float(experts.limit or 0),
    )


def _layer_vectors(columns: int, config: ModelConfig, own: Named) -> list[np.ndarray]:
    """The parts of one layer's row of `PackedLayers.vectors`."""
    parts = _parts(config)

    def norms(*names: str) -> list[np.ndarray]:
        return [_norm_factors(config, own[f"{name}.scale"]).reshape(-1) for name in names]

    def wide(name: str) -> np.ndarray:
        return own[name].astype(np.float32)

    def padded(*names: str) -> np.ndarray:
        return pad_columns([wide(name).reshape(-1) for name in names], columns)

    vectors = norms("attn_norm", "mlp_norm") if parts.pre_norms else []
    if parts.bias:
        vectors.append(padded(*(f"attn.{t}.bias" for t in "qkv")))
    if parts.qk_norm:
        vectors += norms("attn.q_norm", "attn.k_norm")
    if parts.post_norms:
        vectors += norms("attn_post_norm", "mlp_post_norm")
    if parts.sinks:
        vectors.append(wide("attn.sinks"))
    if parts.o_bias:
        vectors.append(padded("attn.o.bias"))
    if parts.mlp_bias:
        gate, up = wide("mlp.gate.bias"), wide("mlp.up.bias")
        vectors += [alternate_columns(gate, up, columns), padded("mlp.down.bias")]
    if parts.expert_biases:
        pairs = zip(wide("experts.gate.bias"), wide("experts.up.bias"), strict=True)
        vectors.append(padded("experts.router.bias"))
        vectors += [alternate_columns(gate, up, columns) for gate, up in pairs]
        vectors.append(pad_columns(list(wide("experts.down.bias")), columns))
    if config.weight_format != "plain":
        vectors += _column_scales(columns, own)
    return vectors


def _column_scales(columns: int, own: Named) -> list[np.ndarray]:
    """The scales of one layer's matrices of 8 bits, laid out as the columns of their panels."""

    def of(target: str) -> np.ndarray:
        return own[f"{projection_path(target)}.kernel{SCALE}"].reshape(-1)

    alternating = alternate_columns(of("gate"), of("up"), columns)
    attention = pad_columns([of(target) for target in "qkvo"], columns)
    return [attention, alternating, pad_columns([of("down")], columns)]


def _layer_matrices(own: Named) -> list[_Block]:
    """The blocks of one layer's row of `PackedLayers.matrices`."""

    def matrix(target: str) -> np.ndarray:
        kernel = own[f"{projection_path(target)}.kernel"]
        # `o` alone has two input axes.
        return kernel.reshape((-1, kernel.shape[-1]) if target == "o" else (kernel.shape[0], -1))

    attention = [_Block([matrix(target) for target in "qkv"]), _Block([matrix("o")])]
    if (router := own.get("experts.router.kernel")) is not None:
        gates, ups, downs = (own[f"experts.{name}.kernel"] for name in ("gate", "up", "down"))
        pairs = [_Block([gate, up], interleave=True) for gate, up in zip(gates, ups, strict=True)]
        return [*attention, _Block([router]), *pairs, *(_Block([down]) for down in downs)]
    return [
        *attention,
        _Block([matrix("gate"), matrix("up")], interleave=True),
        _Block([matrix("down")]),
    ]


def pack_adapters(config: ModelConfig, stacked: Weights, nice: int = 0) -> PackedAdapters:
    """Adapters of `lora.stack_adapters` as `PackedDecoder` reads them.

    Args:
        config: the base's.
        stacked: the adapters, as arrays of a device or of numpy.
        nice: as of `pack_weights`.

    Raises:
        ConfigError: the C++ library cannot be had on this machine.
    """
    library = require_library()
    targets = tuple(t for t in TARGETS if f"layers.0.{projection_path(t)}.lora_a" in stacked)
    first = stacked[f"layers.0.{projection_path(targets[0])}.lora_a"]
    num, rank = first.shape[-2:]
    layers = [
        [
            block
            for path in [f"layers.{i}.{projection_path(t)}" for t in targets]
            for block in _factors(
                np.asarray(stacked[f"{path}.lora_a"]), np.asarray(stacked[f"{path}.lora_b"])
            )
        ]
        for i in range(config.num_layers)
    ]
    rows = _packed(layers, library, nice)
    if isinstance(first, jax.Array):
        factors = jax.device_put(rows, _replicated(first.sharding))
    else:
        factors = jax.device_put(rows)
    library.advise_large_pages([factors])
    return PackedAdapters(factors, num, rank + rank % 2, targets)


def _factors(a: np.ndarray, b: np.ndarray) -> list[_Block]:
    """The blocks of one target's factors, `[*in, n, r]` and `[n, r, *out]`."""
    num, rank = b.shape[:2]
    both = num * (rank + rank % 2)
    if rank % 2:
        a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, 1)])
        b = np.pad(b, [(0, 0), (0, 1)] + [(0, 0)] * (b.ndim - 2))
    return [_Block([a.reshape(-1, both)]), _Block([b.reshape(both, -1)])]


class PackedDecoder:
    """What `Decoder` is, over packed weights and pages. Lives for one trace.

    Args:
        config: the decoder's.
        weights: as made by `pack_weights`.
        adapters: as made by `pack_adapters`, if any.
        adapter_index: `[B]` int32, each row's adapter; -1 for none.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        adapters: PackedAdapters | None = None,
        adapter_index: jax.Array | None = None,
    ):
        self._config = config
        self._weights = weights
        self._adapters = adapters
        self._index = adapter_index

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
        config = self._config
        experts = config.layer(0).experts
        units = config.intermediate_size if experts is None else experts.intermediate_size
        ropes = rope_tables(config, positions)
        x = scaled_embedding(config, self._embed(tokens)).astype(jnp.float32)
        written = list(pages)
        last = len(written) - 1
        for i, layer in enumerate(written):
            spec = config.layer(i)
            x, written[i] = decoder_layer(
                x,
                layer,
                rows,
                unrotated(config.head_dim, positions) if spec.rope is None else ropes[spec.rope],
                i,
                self._weights["layers"],
                self._adapters,
                self._index,
                LayerShape(
                    config.num_heads,
                    units,
                    config.rms_norm_eps,
                    spec.sliding_window,
                    config.attention_soft_cap,
                    query_factor(config),
                    config.residual_scale,
                    config.activation == "gelu_tanh",
                ),
                kv_only=kv_only and i == last,
            )
        return x, tuple(written)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        if (embedding := self._weights.get("embed.embedding")) is not None:
            return jnp.take(embedding, tokens, axis=0, mode="clip")
        columns = require_library().panel_columns
        found = unpack_columns(self._weights["head"], self._config.hidden_size, columns, tokens)
        if (scales := self._weights.get("head_scales")) is None:
            return found
        return found * jnp.take(scales, tokens, mode="clip")[..., None]

    def logits(
        self, x: jax.Array, lens: jax.Array, wanted: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """`[B, embed]` of `hidden` -> logits `[B, vocab]` float32 and most likely tokens `[B]`.

        Logits are undefined unless the bool scalar `wanted` is true; 0 where `lens [B]` is 0. The
        tokens are among those that `mask` allows, see `lm_head`.
        """
        layers: PackedLayers = self._weights["layers"]
        logits, tokens = lm_head(
            x,
            self._weights["final_norm.scale"],
            self._weights["head"],
            lens,
            wanted,
            mask,
            self._weights.get("head_scales"),
            vocab_size=self._config.vocab_size,
            eps=self._config.rms_norm_eps,
            computed=layers.computed,
            rounds=layers.rounds,
        )
        return scaled_logits(self._config, logits), tokens
