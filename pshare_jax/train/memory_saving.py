"""Long examples in less memory: attention in blocks of queries, logits in chunks of targets.

Each block is computed again for the gradient, so that neither scores nor logits of all are kept.
The results are those of the whole, within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pshare_jax.models.attention import CausalAttention, causal_mask, dense_attention

BLOCK = 256
"""Queries of a block; fewer are one call, whose scores are kept."""
CHUNK = 1024
"""Targets of a chunk, over all rows of a batch."""


def blocked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, soft_cap: float | None
) -> jax.Array:
    """See `models.attention.dense_attention`; `mask` is `[B, T, S]` or `[T, S]`."""
    B, T = q.shape[:2]
    if T <= BLOCK:
        return dense_attention(q, k, v, mask, soft_cap)
    padding = -T % BLOCK
    mask = jnp.broadcast_to(mask, (B, *mask.shape[-2:]))
    # A padded query sees all keys: one that sees none would divide by zero.
    mask = jnp.pad(mask, ((0, 0), (0, padding), (0, 0)), constant_values=True)
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))

    @jax.checkpoint
    def attend(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, visible = block
        return dense_attention(queries, k, v, visible, soft_cap)

    out = jax.lax.map(attend, (_blocks(q, BLOCK), _blocks(mask, BLOCK)))
    return jnp.moveaxis(out, 0, 1).reshape(B, T + padding, *out.shape[3:])[:, :T]


class BlockedCausalAttention(CausalAttention):
    """`CausalAttention` in blocks of queries."""

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """See `AttentionIO.attend`."""
        steps = jnp.arange(q.shape[1])
        mask = self._masks.of(layer, lambda window: causal_mask(steps, steps, window))
        return blocked_attention(q, k, v, mask, self._config.attention_soft_cap)


def sum_over_chunks(
    losses: Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array],
    hidden: jax.Array,
    targets: Mapping[str, jax.Array],
) -> jax.Array:
    """The sum of a loss over all targets, some at a time; float32 scalar.

    Args:
        losses: gives the sum of some: from `[B, c, embed]` and arrays `[B, c, ...]`.
        hidden: `[B, Y, embed]`.
        targets: arrays `[B, Y, ...]`; `weights`, 0 for padding, is one of them.
    """
    B, Y = hidden.shape[:2]
    size = max(CHUNK // B, 1)
    if size >= Y:
        return losses(hidden, targets)
    arrays = {"hidden": hidden, **targets}
    chunks = {}
    for name, array in arrays.items():
        padded = jnp.pad(array, ((0, 0), (0, -Y % size), *((0, 0),) * (array.ndim - 2)))
        chunks[name] = _blocks(padded, size)

    @jax.checkpoint
    def add(total: jax.Array, chunk: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        rest = dict(chunk)
        return total + losses(rest.pop("hidden"), rest), None

    total, _ = jax.lax.scan(add, jnp.float32(0), chunks)
    return total


def _blocks(array: jax.Array, size: int) -> jax.Array:
    """`[B, n * size, ...]` -> `[n, B, size, ...]`."""
    B, length = array.shape[:2]
    return jnp.moveaxis(array.reshape(B, length // size, size, *array.shape[2:]), 1, 0)
