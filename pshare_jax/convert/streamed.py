"""Logits of a model that is read layer by layer, so that it need not fit into memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.convert.tensors import DTYPES, LazyTensor
from pshare_jax.models.attention import CausalAttention
from pshare_jax.models.blocks.linear import RMSNorm
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import make_layer, rope_tables, scaled_embedding, scaled_logits
from pshare_jax.models.weights import Weights

COLUMNS = 4096
"""Rows of the vocabulary that are float32 at once."""

SHORTEST = 32
"""Tokens to which shorter prompts are padded: to compile for them alone takes longer."""


def hidden_states(
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    prompts: Sequence[Sequence[int]],
    kv_dtype: Any = None,
) -> np.ndarray:
    """The last hidden states of each prompt on its own, in float32.

    Args:
        config: the architecture.
        tensors: its weights by native name; one layer of them is in memory at a time.
        prompts: token ids, at least one each.
        kv_dtype: what keys and values are rounded to.

    Returns:
        `[tokens of all prompts, embed]` float32, in the order of the prompts.
    """
    embedding = tensors["embed.embedding"].read()
    states = []
    for tokens in prompts:
        # Lengths are padded to powers of two to compile few shapes; attention is causal.
        padded = np.zeros(max(1 << (len(tokens) - 1).bit_length(), SHORTEST), np.int32)
        padded[: len(tokens)] = tokens
        rows = np.clip(padded, 0, config.vocab_size - 1)
        states.append(jax.device_put(embedding[rows].astype(np.float32)[None]))
    del embedding
    states = [scaled_embedding(config, x) for x in states]
    for i, spec in enumerate(config.layer_specs):
        prefix = f"layers.{i}."
        weights = {
            f"layer.{name.removeprefix(prefix)}": _float32(tensor)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        # The first layer of its kind stands for all: one program serves them.
        kind = config.layer_specs.index(spec)
        states = [jax.block_until_ready(_layer(config, kind, kv_dtype, weights, x)) for x in states]
        # Before the next layer is read: arrays may be what was read, not copies.
        del weights
    rows = [np.asarray(x)[0, : len(p)] for x, p in zip(states, prompts, strict=True)]
    scale = _float32(tensors["final_norm.scale"])
    return np.asarray(_normed(config, scale, np.concatenate(rows)))


def _float32(tensor: LazyTensor) -> jax.Array:
    return jax.device_put(tensor.astype(DTYPES["float32"]).read())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(
    config: ModelConfig, index: int, kv_dtype: Any, weights: Weights, x: jax.Array
) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    layer = make_layer("layer", weights, config, index)
    return layer(x, rope_tables(config, positions), CausalAttention(config, kv_dtype), None)


@functools.partial(jax.jit, static_argnums=0)
def _normed(config: ModelConfig, scale: jax.Array, x: jax.Array) -> jax.Array:
    weights = {"final_norm.scale": scale}
    norm = RMSNorm("final_norm", weights, config.rms_norm_eps, adds_one=config.norm_adds_one)
    return norm(x)


class Head:
    """The output head of a model, kept in the dtype in which it is stored.

    Args:
        config: the architecture.
        tensors: its weights by native name.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, LazyTensor]):
        self._config = config
        if config.tie_word_embeddings:
            self._matrix = tensors["embed.embedding"].read()
        else:
            self._matrix = tensors["lm_head.kernel"].read().T

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """`[T, embed]` float32 -> `[T, vocab]` float32."""
        parts = [
            hidden @ self._matrix[i : i + COLUMNS].astype(np.float32).T
            for i in range(0, len(self._matrix), COLUMNS)
        ]
        whole = jax.device_put(np.concatenate(parts, axis=1))
        return np.asarray(scaled_logits(self._config, whole))
