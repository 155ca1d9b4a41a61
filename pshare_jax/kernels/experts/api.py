"""Grouped experts: each token's weighted sum of the gated feed-forward blocks that it chose."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from pshare_jax.kernels.backends import select_backend
from pshare_jax.kernels.experts import grouped, reference, tiles
from pshare_jax.kernels.experts.gating import Biases
from pshare_jax.kernels.experts.over_mesh import over_mesh

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

BACKENDS = {
    "xla": over_mesh(tiles.experts),
    "reference": reference.experts,
    "cpu_ffi": over_mesh(tiles.experts),
    "pallas_tpu": over_mesh(grouped.with_megablox),
    # XLA's grouped product would compute every expert for every row there.
    "pallas_gpu": over_mesh(tiles.experts),
    "pallas_tpu_interpret": over_mesh(grouped.with_interpreted_megablox),
    "pallas_gpu_interpret": over_mesh(tiles.experts),
    "ragged_dot": over_mesh(grouped.with_ragged_dot),
}
"""`ragged_dot` is XLA's own grouped product, which alone has gradients: the one for training."""


# Under jit: layers alike are traced once, and a program has them once, which XLA inlines.
@functools.partial(jax.jit, static_argnames=("limit", "mesh", "backend"))
def experts(
    x: Float[Array, "N embed"],
    weights: Float[Array, "N k"],
    chosen: Int[Array, "N k"],
    gate: Float[Array, "X embed mlp"],
    up: Float[Array, "X embed mlp"],
    down: Float[Array, "X mlp embed"],
    *,
    biases: Biases | None = None,
    limit: float | None = None,
    mesh: Mesh | None = None,
    backend: str = "auto",
) -> Float[Array, "N embed"]:
    """`sum_i weights[n, i] * down(silu(gate(x[n])) * up(x[n]))` of expert `chosen[n, i]`.

    Products accumulate in float32. What a token gets does not depend on the others but for the
    order of sums within a product.

    Args:
        x: `[N, embed]`, float32 or bfloat16.
        weights: `[N, k]` float32.
        chosen: `[N, k]` int32, 0 .. X - 1, no expert twice.
        gate: `[X, embed, mlp]` of x's dtype.
        up: like gate.
        down: `[X, mlp, embed]` of x's dtype.
        biases: of the three products.
        limit: see `gating.gated`.
        mesh: the mesh that the arrays live on, as `sharding/rules.py` lays them out; None for one
            device.
        backend: a key of `BACKENDS`, or `auto`.

    Returns:
        `[N, embed]` of x's dtype.

    Raises:
        ValueError: an unknown backend.
    """
    compute = select_backend("experts", BACKENDS, backend)
    out = compute(x, weights, chosen, gate, up, down, biases=biases, limit=limit, mesh=mesh)
    return out.astype(x.dtype)
