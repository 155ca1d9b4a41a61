"""The decoder: one module for the Llama, Mistral, Qwen2 and Qwen3 families.

Layers are unrolled: a scan over layers would pass the KV cache through its carry and copy it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pshare_jax.kernels.matmul.api import matmul
from pshare_jax.models.attention import AttentionIO, apply_rope, rope_table
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.layers import MLP, Embedding, Projection, RMSNorm
from pshare_jax.models.lora import Adapters
from pshare_jax.models.weights import (
    Weights,
    abstract_weights,
    check_weights,
    weight_specs,
)

RopeTable = tuple[jax.Array, jax.Array]


class Attention(nnx.Module):
    """Projections around an `AttentionIO`; with qk-norm, heads are normalised before rotation."""

    def __init__(self, path: str, weights: Weights, config: ModelConfig, backend: str):
        self.q = Projection(f"{path}.q", weights, backend)
        self.k = Projection(f"{path}.k", weights, backend)
        self.v = Projection(f"{path}.v", weights, backend)
        self.o = Projection(f"{path}.o", weights, backend, input_axes=2)
        eps = config.rms_norm_eps
        self.q_norm = RMSNorm(f"{path}.q_norm", weights, eps) if config.qk_norm else None
        self.k_norm = RMSNorm(f"{path}.k_norm", weights, eps) if config.qk_norm else None

    def kv(
        self, x: jax.Array, rope: RopeTable, adapters: Adapters | None
    ) -> tuple[jax.Array, jax.Array]:
        """Rotated keys and values of `x [B, T, embed]`, each `[B, T, kv_heads, head_dim]`."""
        k = self.k(x, adapters)
        if self.k_norm is not None:
            k = self.k_norm(k)
        return apply_rope(k, rope), self.v(x, adapters)

    def __call__(
        self,
        x: jax.Array,
        layer: int,
        rope: RopeTable,
        attention: AttentionIO,
        adapters: Adapters | None,
    ) -> jax.Array:
        """`[B, T, embed]` -> `[B, T, embed]`."""
        q = self.q(x, adapters)
        if self.q_norm is not None:
            q = self.q_norm(q)
        k, v = self.kv(x, rope, adapters)
        return self.o(attention.attend(layer, apply_rope(q, rope), k, v), adapters)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward blocks, each with a residual."""

    def __init__(self, path: str, weights: Weights, config: ModelConfig, backend: str):
        self.attn_norm = RMSNorm(f"{path}.attn_norm", weights, config.rms_norm_eps)
        self.attn = Attention(f"{path}.attn", weights, config, backend)
        self.mlp_norm = RMSNorm(f"{path}.mlp_norm", weights, config.rms_norm_eps)
        self.mlp = MLP(f"{path}.mlp", weights, backend)

    def __call__(
        self,
        x: jax.Array,
        layer: int,
        rope: RopeTable,
        attention: AttentionIO,
        adapters: Adapters | None,
    ) -> jax.Array:
        """`[B, T, embed]` -> `[B, T, embed]`."""
        x = x + self.attn(self.attn_norm(x), layer, rope, attention, adapters)
        return x + self.mlp(self.mlp_norm(x), adapters)


class Decoder(nnx.Module):
    """A decoder-only transformer over weights as described by `weights.weight_specs`.

    The path of every parameter is its name in the flat dict. Use `bind` to make one: it checks the
    weights and is cheap enough for every trace.
    """

    def __init__(self, config: ModelConfig, weights: Weights, backend: str = "xla"):
        self.config = config
        self.embed = Embedding("embed", weights, backend)
        self.layers = nnx.List(
            [
                DecoderLayer(f"layers.{i}", weights, config, backend)
                for i in range(config.num_layers)
            ]
        )
        self.final_norm = RMSNorm("final_norm", weights, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Projection("lm_head", weights, backend)

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attention: AttentionIO,
        adapters: Adapters | None = None,
        *,
        remat: bool = False,
    ) -> jax.Array:
        """The last hidden states, after the final norm; KV of every layer goes to `attention`.

        Args:
            tokens: `[B, T]` int32 ids.
            positions: `[B, T]` int32, the position of each token in its sequence.
            attention: where earlier KV is and new KV goes.
            adapters: LoRA updates of each row, if any.
            remat: keep only each layer's input for the gradient and compute the rest again. Then
                `attention` may not change while the layers run.

        Returns:
            `[B, T, embed]` of the weights' dtype.
        """
        rope = rope_table(self.config, positions)
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            apply = functools.partial(
                layer, layer=i, rope=rope, attention=attention, adapters=adapters
            )
            x = (jax.checkpoint(apply) if remat else apply)(x)
        return self.final_norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., embed]` hidden states -> `[..., vocab]` float32 logits."""
        if self.lm_head is None:
            return self.embed.logits(hidden)
        return matmul(hidden, self.lm_head.kernel[...], backend=self.lm_head.backend)

    def write_kv(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attention: AttentionIO,
        adapters: Adapters | None = None,
    ) -> None:
        """Gives the KV of `tokens` to `attention`, and computes nothing else.

        That is `hidden` without what only its result needs: the last layer's attention and
        feed-forward block and the final norm. Arguments as for `hidden`.
        """
        rope = rope_table(self.config, positions)
        x = self.embed(tokens)
        *layers, last = self.layers
        for i, layer in enumerate(layers):
            x = layer(x, i, rope, attention, adapters)
        attention.store(len(layers), *last.attn.kv(last.attn_norm(x), rope, adapters))


@functools.lru_cache(maxsize=16)
def _structure(
    config: ModelConfig, backend: str
) -> tuple[nnx.GraphDef[Decoder], list[tuple[tuple, str]]]:
    """The decoder without its weights, and the path and name of each weight in NNX's order."""
    decoder = Decoder(config, abstract_weights(weight_specs(config), jnp.float32), backend)
    graphdef, state = nnx.split(decoder)
    paths = [path for path, _ in nnx.to_flat_state(state)]
    return graphdef, [(path, ".".join(map(str, path))) for path in paths]


def bind(config: ModelConfig, weights: Weights, backend: str = "xla") -> Decoder:
    """A decoder over `weights`; a few milliseconds, so that functions under jit can start with it.

    Args:
        config: the architecture.
        weights: a full module's.
        backend: of its products, see `kernels/matmul`.

    Raises:
        CheckpointError: names the first weight that is missing, unexpected or misshapen.
    """
    check_weights(config, weights)
    graphdef, names = _structure(config, backend)
    state = nnx.from_flat_state([(path, nnx.Param(weights[name])) for path, name in names])
    return nnx.merge(graphdef, state)


def init_weights(config: ModelConfig, seed: int, dtype: jnp.dtype = jnp.float32) -> Weights:
    """Random weights that keep activations near unit scale; the same for the same seed.

    Kernels and embeddings are normal with variance 1 / inputs, biases normal with deviation 0.1,
    norm scales uniform in 0.75 .. 1.25, so that no part of the computation is an identity.
    """
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for name, spec in weight_specs(config).items():
        if name.endswith(".scale"):
            value = rng.uniform(0.75, 1.25, spec.shape)
        elif name.endswith(".bias"):
            value = 0.1 * rng.standard_normal(spec.shape)
        else:
            fan_in = {"embed.embedding": config.hidden_size}.get(name) or int(
                np.prod(spec.shape[: 2 if name.endswith("attn.o.kernel") else 1])
            )
            value = rng.standard_normal(spec.shape, np.float32) * fan_in**-0.5
        weights[name] = jnp.asarray(value, dtype)
    return weights
