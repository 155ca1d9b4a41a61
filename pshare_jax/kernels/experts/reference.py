"""Grouped experts by their definition: all experts of all tokens, of which most count nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pshare_jax.kernels.experts.gating import Biases, gated


def experts(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    biases: Biases | None = None,
    limit: float | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """See `api.experts`; everything in float32."""
    del mesh  # XLA splits the work as its operands lie.
    x, gate, up, down = (a.astype(jnp.float32) for a in (x, gate, up, down))
    of_gate, of_up, of_down = (b.astype(jnp.float32) for b in biases) if biases else (0.0,) * 3
    gates = jnp.einsum("ne,xef->nxf", x, gate, precision="highest") + of_gate
    ups = jnp.einsum("ne,xef->nxf", x, up, precision="highest") + of_up
    hidden = gated(gates, ups, limit)
    outputs = jnp.einsum("nxf,xfe->nxe", hidden, down, precision="highest") + of_down
    one_hot = jax.nn.one_hot(chosen, gate.shape[0], dtype=jnp.float32)
    shares = jnp.einsum("nk,nkx->nx", weights, one_hot)
    return jnp.einsum("nx,nxe->ne", shares, outputs, precision="highest")
