"""The decoder: one module for every family of `models/families`.

Layers are unrolled: a scan over layers would pass the KV cache through its carry and copy it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pshare_jax.models.attention import AttentionIO
from pshare_jax.models.blocks.attention import RopeTables
from pshare_jax.models.blocks.experts import ExpertsBackend
from pshare_jax.models.blocks.layer import DecoderLayer
from pshare_jax.models.blocks.linear import ROUNDED, Embedding, Projection, RMSNorm
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.lora import Adapters
from pshare_jax.models.quantise import quantise
from pshare_jax.models.recompute import Apply
from pshare_jax.models.registry import family
from pshare_jax.models.rope import Rope
from pshare_jax.models.rotation import RopeTable, rope_table
from pshare_jax.models.weight_formats import rounds
from pshare_jax.models.weights import (
    Weights,
    abstract_weights,
    check_weights,
    weight_specs,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def rope_tables(config: ModelConfig, positions: jax.Array) -> RopeTables:
    """The tables of every rotary embedding that some layer has, for positions `[B, T]`."""
    return {rope: rope_table(rope, config.head_dim, positions) for rope in _ropes(config)}


def _ropes(config: ModelConfig) -> list[Rope]:
    return list(dict.fromkeys(spec.rope for spec in config.layer_specs if spec.rope is not None))


def looped_rope_tables(config: ModelConfig, positions: jax.Array) -> RopeTables:
    """The same, row by row in a loop, for many layers on CPUs.

    XLA for CPUs merges a table with each loop that reads it, so that every layer computes its
    sines and cosines anew, for every head; what a loop gives it does not merge.
    """
    ropes = _ropes(config)

    def row(positions: jax.Array) -> list[RopeTable]:
        return [rope_table(rope, config.head_dim, positions) for rope in ropes]

    return dict(zip(ropes, jax.lax.map(row, positions), strict=True))


def make_layer(
    path: str,
    weights: Weights,
    config: ModelConfig,
    layer: int,
    backend: str = "xla",
    experts: ExpertsBackend = ExpertsBackend(),  # noqa: B008 - immutable
) -> DecoderLayer:
    """Layer number `layer` of a decoder, whose weights begin with `path`."""
    kind = family(config.architecture).decoder_layer or DecoderLayer
    return kind(path, weights, config, layer, _products(config, backend), experts)


def _products(config: ModelConfig, backend: str) -> str:
    """The backend of a decoder's products, given the one for products that round nothing."""
    return ROUNDED if rounds(config.weight_format) else backend


def scaled_embedding(config: ModelConfig, x: jax.Array) -> jax.Array:
    """Token embeddings as they enter the first layer."""
    if config.embedding_scale == 1.0:
        return x
    return x * jnp.asarray(config.embedding_scale, x.dtype)


def scaled_logits(config: ModelConfig, logits: jax.Array) -> jax.Array:
    """Logits, float32, as the head's products become those of the model."""
    if config.logit_divisor != 1.0:
        logits = logits / config.logit_divisor
    if (cap := config.logit_soft_cap) is not None:
        logits = cap * jnp.tanh(logits / cap)
    return logits


class Decoder(nnx.Module):
    """A decoder-only transformer over weights as described by `weights.weight_specs`.

    The path of every parameter is its name in the flat dict. Use `bind` to make one: it checks the
    weights and is cheap enough for every trace.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        backend: str = "xla",
        experts: ExpertsBackend = ExpertsBackend(),  # noqa: B008 - immutable
    ):
        self.config = config
        dtype = jnp.dtype(weights["final_norm.scale"].dtype)
        self.embed = Embedding("embed", weights, backend, dtype)
        self.layers = nnx.List(
            [
                make_layer(f"layers.{i}", weights, config, i, backend, experts)
                for i in range(config.num_layers)
            ]
        )
        self.final_norm = RMSNorm(
            "final_norm", weights, config.rms_norm_eps, adds_one=config.norm_adds_one
        )
        tied = config.tie_word_embeddings
        head = _products(config, backend)
        self.lm_head = None if tied else Projection("lm_head", weights, head)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attention: AttentionIO,
        adapters: Adapters | None = None,
        *,
        remat: Callable[[Apply], Apply] | None = None,
        ropes: RopeTables | None = None,
    ) -> Float[Array, "B T embed"]:
        """The last hidden states, after the final norm; KV of every layer goes to `attention`.

        Args:
            tokens: `[B, T]` int32 ids.
            positions: `[B, T]` int32, the position of each token in its sequence.
            attention: where earlier KV is and new KV goes.
            adapters: LoRA updates of each row, if any.
            remat: makes a layer keep only its input for the gradient and compute the rest again:
                `jax.checkpoint`, or `recomputed` on CPUs. Then `attention` may not change while
                the layers run.
            ropes: `rope_tables` of the positions, where they are there already.

        Returns:
            `[B, T, embed]` of the weights' dtype.
        """
        if ropes is None:
            ropes = rope_tables(self.config, positions)
        x = scaled_embedding(self.config, self.embed(tokens))
        for layer in self.layers:
            apply = functools.partial(layer, ropes=ropes, attention=attention, adapters=adapters)
            x = (apply if remat is None else remat(apply))(x)
        return self.final_norm(x)

    def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """`[..., embed]` hidden states -> `[..., vocab]` float32 logits."""
        head = self.embed.logits if self.lm_head is None else self.lm_head.product
        return scaled_logits(self.config, head(hidden))

    def write_kv(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attention: AttentionIO,
        adapters: Adapters | None = None,
    ) -> None:
        """Gives the KV of `tokens` to `attention`, and computes nothing else.

        That is `hidden` without what only its result needs: the last layer's attention and
        feed-forward block and the final norm. Arguments as for `hidden`.
        """
        ropes = rope_tables(self.config, positions)
        x = scaled_embedding(self.config, self.embed(tokens))
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, ropes, attention, adapters)
        attention.store(len(layers), *last.kv(x, ropes, adapters))


@functools.lru_cache(maxsize=16)
def _structure(
    config: ModelConfig, backend: str, experts: ExpertsBackend
) -> tuple[nnx.GraphDef[Decoder], list[tuple[tuple, str]]]:
    """The decoder without its weights, and the path and name of each weight in NNX's order."""
    decoder = Decoder(config, abstract_weights(weight_specs(config), jnp.float32), backend, experts)
    graphdef, state = nnx.split(decoder)
    paths = [path for path, _ in nnx.to_flat_state(state)]
    return graphdef, [(path, ".".join(map(str, path))) for path in paths]


def bind(
    config: ModelConfig,
    weights: Weights,
    backend: str = "xla",
    experts: ExpertsBackend = ExpertsBackend(),  # noqa: B008 - immutable
) -> Decoder:
    """A decoder over `weights`; a few milliseconds, so that functions under jit can start with it.

    Args:
        config: the architecture.
        weights: a full module's.
        backend: of its products, see `kernels/matmul`.
        experts: of its experts, if it has some; by default one that has gradients.

    Raises:
        CheckpointError: names the first weight that is missing, unexpected or misshapen.
    """
    check_weights(config, weights)
    graphdef, names = _structure(config, backend, experts)
    state = nnx.from_flat_state([(path, nnx.Param(weights[name])) for path, name in names])
    return nnx.merge(graphdef, state)


def init_weights(config: ModelConfig, seed: int, dtype: jnp.dtype = jnp.float32) -> Weights:
    """Random weights that keep activations near unit scale; the same for the same seed.

    Kernels and embeddings are normal with variance 1 / inputs, biases normal with deviation 0.1,
    norm factors uniform in 0.75 .. 1.25, so that no part of the computation is an identity.
    """
    if config.weight_format != "plain":
        return quantise(config, init_weights(config.with_weights("plain"), seed, dtype))
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for name, spec in weight_specs(config).items():
        if name.endswith(".scale"):
            value = rng.uniform(0.75, 1.25, spec.shape) - config.norm_adds_one
        elif name.endswith((".bias", ".sinks")):
            value = 0.1 * rng.standard_normal(spec.shape)
        else:
            value = rng.standard_normal(spec.shape, np.float32) * spec.inputs**-0.5
        # Converted on the host: on a device each shape would be a program, as with `jnp.asarray`.
        weights[name] = jax.device_put(value.astype(np.float32).astype(jnp.dtype(dtype)))
    return weights
