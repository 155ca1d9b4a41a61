"""Attention over keys and values that live somewhere: rotary embedding, masks, and where KV goes.

A decoder layer computes q, k and v and hands them to an `AttentionIO`, which alone knows where the
KV of earlier positions is: nowhere (`CausalAttention`), in one dense array a layer (`DenseCache`),
or in an engine's pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.models.config import ModelConfig

KV = tuple[jax.Array, jax.Array]
"""Keys and values of one layer, each `[B, S, kv_heads, head_dim]`."""


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequencies of the rotary embedding, `[head_dim / 2]` float32, radians a position.

    Rotary embedding as in Su et al., arXiv 2104.09864. With `config.rope_scaling` the frequencies
    are stretched as Llama 3.1 does: wavelengths that fit `high_freq_factor` times into the
    original context stay, those that fit less than `low_freq_factor` times grow by `factor`, those
    between are interpolated (arXiv 2407.21783).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        band = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / band, 0.0, 1.0)
        frequencies = frequencies * (keep + (1.0 - keep) / scaling.factor)
    return frequencies.astype(np.float32)


def rope_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle: positions `[B, T]` -> two `[B, T, 1, head_dim / 2]` float32.

    One table serves all layers of a forward pass.
    """
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates `x [B, T, heads, head_dim]` by `table`, in float32; the dtype of x is kept.

    Component i of the first half is paired with component i of the second half.
    """
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def causal_mask(
    query_positions: jax.Array, key_positions: jax.Array, sliding_window: int | None
) -> jax.Array:
    """True where a query may look: `[..., T]` and `[S]` int32 positions -> `[..., T, S]` bool.

    A query sees keys at its own and earlier positions; with a sliding window only the
    `sliding_window` most recent of them, its own included.
    """
    query = query_positions[..., None]
    visible = key_positions <= query
    if sliding_window is not None:
        visible &= key_positions > query - sliding_window
    return visible


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled dot-product attention with grouped KV heads; scores and softmax in float32.

    Args:
        q: `[B, T, heads, head_dim]`; query head h reads KV head h // (heads // kv_heads).
        k: `[B, S, kv_heads, head_dim]`, dtype of q.
        v: like k.
        mask: `[B, T, S]` or `[T, S]` bool, True where a query may look.

    Returns:
        `[B, T, heads, head_dim]`, dtype of q.
    """
    # Heads are the second axis of a four-dimensional mask; one mask serves them all.
    mask = jnp.expand_dims(mask, -3 if mask.ndim == 3 else (0, 1))
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


class AttentionIO(Protocol):
    """Where a forward pass finds and leaves KV. Objects live for one trace and may be mutated.

    q, k and v are `[B, T, heads or kv_heads, head_dim]`, q and k rotated already; scores are
    scaled by 1 / sqrt(head_dim). Layers call in order, each at most once.
    """

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Stores k and v of `layer`, then attends; gives `[B, T, heads, head_dim]`."""
        ...

    def store(self, layer: int, k: jax.Array, v: jax.Array) -> None:
        """Stores k and v of `layer` without attending."""
        ...


class CausalAttention:
    """Attention within the T tokens alone: an ordinary forward pass. Keeps no KV.

    Token t of a row sees tokens 0 .. t of that row, the sliding window permitting.
    """

    def __init__(self, config: ModelConfig):
        self._window = config.sliding_window
        self._mask: jax.Array | None = None

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """See `AttentionIO.attend`."""
        del layer
        if self._mask is None:
            steps = jnp.arange(q.shape[1])
            self._mask = causal_mask(steps, steps, self._window)
        return dense_attention(q, k, v, self._mask)

    def store(self, layer: int, k: jax.Array, v: jax.Array) -> None:
        """Drops k and v: there is nowhere to keep them."""


def init_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> list[KV]:
    """An empty dense cache: a pair of `[batch, length, kv_heads, head_dim]` zeros a layer."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)]


class DenseCache:
    """KV in one dense array pair a layer, updated functionally.

    Slot j of a row is position j. The T tokens of a forward pass stand at positions
    `start .. start + T - 1`, overwrite those slots, and see every slot up to their own; later slots
    may hold anything finite. `start + T` must not exceed the cache's length S.

    Args:
        config: the decoder's.
        cache: one KV pair a layer (see `init_cache`); not modified.
        start: position of each row's first token: int32 scalar for all rows, or `[B]`.

    Raises:
        ValueError: (on use) more tokens than slots.
    """

    def __init__(self, config: ModelConfig, cache: Sequence[KV], start: jax.Array | int):
        self.cache = list(cache)
        """The updated cache; complete when the forward pass is."""
        self._window = config.sliding_window
        self._start = jnp.asarray(start, jnp.int32)
        self._mask: jax.Array | None = None

    def _write(self, slots: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(slots.dtype)
        if new.shape[1] > slots.shape[1]:
            raise ValueError(f"{new.shape[1]} tokens do not fit a cache of {slots.shape[1]} slots")
        if self._start.ndim == 0:
            return jax.lax.dynamic_update_slice_in_dim(slots, new, self._start, axis=1)
        return jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))(
            slots, new, self._start, 0
        )

    def store(self, layer: int, k: jax.Array, v: jax.Array) -> None:
        """See `AttentionIO.store`."""
        keys, values = self.cache[layer]
        self.cache[layer] = (self._write(keys, k), self._write(values, v))

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """See `AttentionIO.attend`."""
        self.store(layer, k, v)
        keys, values = self.cache[layer]
        if self._mask is None:
            positions = self._start[..., None] + jnp.arange(q.shape[1])
            self._mask = causal_mask(positions, jnp.arange(keys.shape[1]), self._window)
        return dense_attention(q, keys.astype(q.dtype), values.astype(q.dtype), self._mask)
