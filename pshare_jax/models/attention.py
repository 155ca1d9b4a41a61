"""Attention over keys and values that live somewhere: masks, scores, and where KV goes.

A decoder layer computes q, k and v and hands them to an `AttentionIO`, which alone knows where the
KV of earlier positions is: nowhere (`CausalAttention`), in one dense array a layer (`DenseCache`),
or in an engine's pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp

from pshare_jax.kernels.kv_dtype import as_kv
from pshare_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

KV = tuple[jax.Array, jax.Array]
"""Keys and values of one layer, each `[B, S, kv_heads, head_dim]`."""


def causal_mask(
    query_positions: Int[Array, "*batch T"],
    key_positions: Int[Array, " S"],
    sliding_window: int | None,
) -> Bool[Array, "*batch T S"]:
    """True where a query may look: `[..., T]` and `[S]` int32 positions -> `[..., T, S]` bool.

    A query sees keys at its own and earlier positions; with a sliding window only the
    `sliding_window` most recent of them, its own included.
    """
    query = query_positions[..., None]
    visible = key_positions <= query
    if sliding_window is not None:
        visible &= key_positions > query - sliding_window
    return visible


def dense_attention(
    q: Float[Array, "B T heads head_dim"],
    k: Float[Array, "B S kv_heads head_dim"],
    v: Float[Array, "B S kv_heads head_dim"],
    mask: Bool[Array, "B T S"] | Bool[Array, "T S"],
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "B T heads head_dim"]:
    """Scaled dot-product attention with grouped KV heads; scores and softmax in float32.

    Args:
        q: `[B, T, heads, head_dim]`; query head h reads KV head h // (heads // kv_heads).
        k: `[B, S, kv_heads, head_dim]`, dtype of q.
        v: like k.
        mask: `[B, T, S]` or `[T, S]` bool, True where a query may look.
        soft_cap: scores are bounded to c * tanh(score / c).
        sinks: `[heads]`, a score of each head's that takes weight and gives nothing.

    Returns:
        `[B, T, heads, head_dim]`, dtype of q.
    """
    # Heads are the second axis of a four-dimensional mask; one mask serves them all.
    mask = jnp.expand_dims(mask, -3 if mask.ndim == 3 else (0, 1))
    if soft_cap is None and sinks is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    B, T, H, D = q.shape
    grouped = q.reshape(B, T, k.shape[2], -1, D)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * D**-0.5
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        own = sinks.astype(jnp.float32).reshape(1, k.shape[2], -1, 1, 1)
        own = jnp.broadcast_to(own, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, own], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)[..., : k.shape[1]]
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(B, T, H, D).astype(q.dtype)


class AttentionIO(Protocol):
    """Where a forward pass finds and leaves KV. Objects live for one trace and may be mutated.

    q, k and v are `[B, T, heads or kv_heads, head_dim]`, q and k rotated already; scores are
    scaled by 1 / sqrt(head_dim). The window of a layer, and the bound of its scores, are those of
    `ModelConfig`. Layers call in order, each at most once.
    """

    def attend(
        self,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        sinks: jax.Array | None = None,
    ) -> jax.Array:
        """Stores k and v of `layer`, then attends; gives `[B, T, heads, head_dim]`.

        `sinks` are as for `dense_attention`.
        """
        ...

    def store(self, layer: int, k: jax.Array, v: jax.Array) -> None:
        """Stores k and v of `layer` without attending."""
        ...


class Masks:
    """The masks of a forward pass: layers of one window share theirs."""

    def __init__(self, config: ModelConfig):
        self._config = config
        self._made: dict[int | None, jax.Array] = {}

    def of(self, layer: int, make: Callable[[int | None], jax.Array]) -> jax.Array:
        """The mask of a layer; `make` gives that of a window."""
        window = self._config.layer(layer).sliding_window
        if window not in self._made:
            self._made[window] = make(window)
        return self._made[window]


class CausalAttention:
    """Attention within the T tokens alone: an ordinary forward pass. Keeps no KV.

    Token t of a row sees tokens 0 .. t of that row, the sliding window permitting.

    Args:
        config: the decoder's.
        kv_dtype: what keys and values are rounded to first, as pages would.
    """

    def __init__(self, config: ModelConfig, kv_dtype: Any = None):
        self._config = config
        self._kv_dtype = kv_dtype
        self._masks = Masks(config)

    def attend(
        self,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        sinks: jax.Array | None = None,
    ) -> jax.Array:
        """See `AttentionIO.attend`."""
        if self._kv_dtype is not None:
            k, v = (as_kv(x, self._kv_dtype).astype(q.dtype) for x in (k, v))
        steps = jnp.arange(q.shape[1])
        mask = self._masks.of(layer, lambda window: causal_mask(steps, steps, window))
        return dense_attention(q, k, v, mask, self._config.attention_soft_cap, sinks)

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
        self._config = config
        self._start = jnp.asarray(start, jnp.int32)
        self._masks = Masks(config)

    def _write(self, slots: jax.Array, new: jax.Array) -> jax.Array:
        new = as_kv(new, slots.dtype)
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

    def attend(
        self,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        sinks: jax.Array | None = None,
    ) -> jax.Array:
        """See `AttentionIO.attend`."""
        self.store(layer, k, v)
        keys, values = self.cache[layer]
        positions, slots = self._start[..., None] + jnp.arange(q.shape[1]), keys.shape[1]
        mask = self._masks.of(layer, lambda w: causal_mask(positions, jnp.arange(slots), w))
        soft_cap = self._config.attention_soft_cap
        keys, values = keys.astype(q.dtype), values.astype(q.dtype)
        return dense_attention(q, keys, values, mask, soft_cap, sinks)
