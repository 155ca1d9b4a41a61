"""Grouped experts in plain XLA: one loop over tiles of rows that chose the same expert.

The trip count is a run-time value: only experts that some token chose are read, each once a tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pshare_jax.kernels.experts.gating import Biases, gated
from pshare_jax.kernels.experts.grouped import combine, sort_by_expert

MOST_ROWS = 64
"""Of one tile: enough for a product to be bound by arithmetic."""
FEWEST_ROWS = 8


def experts(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    biases: Biases | None = None,
    limit: float | None = None,
) -> jax.Array:
    """See `api.experts`; float32."""
    num_experts, count = gate.shape[0], chosen.size
    tile = FEWEST_ROWS
    while tile < MOST_ROWS and tile * num_experts < count:
        tile *= 2
    rows = sort_by_expert(chosen, num_experts)
    tiles = -(-rows.sizes // tile)
    ends = jnp.cumsum(tiles)
    # Each group begins with a tile of its own.
    first_row = jnp.cumsum(rows.sizes) - rows.sizes
    first_slot = (ends - tiles) * tile
    slots = (count // tile + min(num_experts, count)) * tile
    expert = jnp.minimum(rows.expert, num_experts - 1)
    within = jnp.arange(count, dtype=jnp.int32) - first_row[expert]
    slot = jnp.where(rows.expert < num_experts, first_slot[expert] + within, slots)
    token = jnp.zeros(slots, jnp.int32).at[slot].set(rows.token, mode="drop")

    of_gate, of_up, of_down = biases or (None,) * 3

    def product(
        a: jax.Array, kernels: jax.Array, bias: jax.Array | None, of: jax.Array
    ) -> jax.Array:
        kernel = lax.dynamic_index_in_dim(kernels, of, keepdims=False)
        precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
        out = jnp.dot(a, kernel, precision=precision, preferred_element_type=jnp.float32)
        return out if bias is None else out + bias[of].astype(jnp.float32)

    def compute(i: jax.Array, out: jax.Array) -> jax.Array:
        of = jnp.searchsorted(ends, i, side="right").astype(jnp.int32)
        inputs = x[lax.dynamic_slice(token, (i * tile,), (tile,))]
        hidden = gated(product(inputs, gate, of_gate, of), product(inputs, up, of_up, of), limit)
        outputs = product(hidden.astype(x.dtype), down, of_down, of)
        return lax.dynamic_update_slice(out, outputs, (i * tile, jnp.int32(0)))

    out = lax.fori_loop(0, ends[-1], compute, jnp.zeros((slots, x.shape[1]), jnp.float32))
    place = jnp.minimum(slot, slots - 1)[rows.place]
    return combine(out, weights, place, chosen < num_experts)
