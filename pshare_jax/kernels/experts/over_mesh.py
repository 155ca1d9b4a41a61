"""Grouped experts on a mesh: a device computes its part of its experts, then parts are summed.

The axis `tensor` splits every expert's hidden units, the axis `expert` the experts, as
`sharding/rules.py` lays the kernels out. Tokens are everywhere, so nothing but the sums is
communicated.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pshare_jax.kernels.experts.gating import Biases
from pshare_jax.sharding.rules import EXPERT, TENSOR

_WHOLE = PartitionSpec()


def over_mesh(compute: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A backend of `experts` from one for one device, which gives float32."""

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
        if mesh is None or mesh.size == 1:
            return compute(x, weights, chosen, gate, up, down, biases, limit)

        def axis(name: str, size: int) -> str | None:
            return name if name in mesh.shape and size % mesh.shape[name] == 0 else None

        of_experts, of_units = axis(EXPERT, gate.shape[0]), axis(TENSOR, gate.shape[2])

        def local(
            x: jax.Array,
            weights: jax.Array,
            chosen: jax.Array,
            gate: jax.Array,
            up: jax.Array,
            down: jax.Array,
            biases: Biases | None,
        ) -> jax.Array:
            if of_experts is not None:
                count = gate.shape[0]
                chosen = chosen - lax.axis_index(of_experts) * count
                mine = (chosen >= 0) & (chosen < count)
                chosen = jnp.where(mine, chosen, count)
                weights = jnp.where(mine, weights, 0)
            if biases is not None and of_units is not None:
                # Once in the sum over the devices that share an expert's units.
                first = (lax.axis_index(of_units) == 0).astype(biases.down.dtype)
                biases = biases._replace(down=biases.down * first)
            out = compute(x, weights, chosen, gate, up, down, biases, limit)
            names = tuple(name for name in (of_experts, of_units) if name is not None)
            return lax.psum(out, names) if names else out

        into, back = (of_experts, None, of_units), (of_experts, of_units, None)
        units, whole = PartitionSpec(of_experts, of_units), PartitionSpec(of_experts, None)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(
                *(_WHOLE,) * 3,
                PartitionSpec(*into),
                PartitionSpec(*into),
                PartitionSpec(*back),
                None if biases is None else Biases(units, units, whole),  # type: ignore[arg-type]
            ),
            out_specs=_WHOLE,
            check_vma=False,
        )(x, weights, chosen, gate, up, down, biases)

    return experts
