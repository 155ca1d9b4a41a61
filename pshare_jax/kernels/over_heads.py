"""Single-device kernels on a mesh: every device runs the kernel on the heads that it holds.

XLA cannot split a Pallas kernel, so it runs under `shard_map` in the layout of `sharding/rules.py`:
heads over the axis `tensor`, page tables everywhere. No device needs another's KV, so nothing is
communicated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pshare_jax.sharding.rules import TENSOR

T = TypeVar("T")
Kernel = Callable[..., jax.Array]

_HEADS = PartitionSpec(None, None, TENSOR)
"""Both of `[B, T, heads, head_dim]` and of pages: the third axis is split."""
_WHOLE = PartitionSpec()


def for_device_kind(table: Mapping[str, T], mesh: Mesh | None, default: T) -> T:
    """The entry of `table` for the devices of `mesh`, by JAX's name of their kind.

    The mesh is the one that is compiled for; the running device is never asked.
    """
    if mesh is None:
        return default
    return table.get(mesh.devices.flat[0].device_kind, default)


def attention_over_heads(
    kernel: Kernel, tiles: Mapping[str, Any], default: Any, *, interpret: bool = False
) -> Kernel:
    """A backend of `paged_attention` from a kernel for one device.

    Args:
        kernel: takes the op's arguments but for `mesh`, and `first_kv_head`, `kv_heads`, `tiles`
            and `interpret`; see `pallas_tpu.paged_attention`.
        tiles: tile sizes by device kind.
        default: tile sizes of other kinds.
        interpret: run in Pallas' interpreter.
    """

    def attend(
        q: jax.Array,
        pages: jax.Array,
        *rows: jax.Array,
        sliding_window: int | None,
        soft_cap: float | None,
        mesh: Mesh | None,
        sinks: jax.Array | None = None,
    ) -> jax.Array:
        def call(q: jax.Array, pages: jax.Array, *rows: jax.Array, **heads: Any) -> jax.Array:
            if sinks is not None:
                rows, heads["sinks"] = rows[:-1], rows[-1]
            return kernel(
                q,
                pages,
                *rows,
                sliding_window=sliding_window,
                soft_cap=soft_cap,
                tiles=for_device_kind(tiles, mesh, default),
                interpret=interpret,
                **heads,
            )

        of_heads = () if sinks is None else (sinks,)
        if mesh is None or mesh.size == 1:
            return call(q, pages, *rows, *of_heads)
        degree, heads, kv_heads = mesh.shape[TENSOR], q.shape[2], pages.shape[2]
        group = heads // kv_heads

        def of_one_kv_head(q: jax.Array, *rest: jax.Array) -> jax.Array:
            first = lax.axis_index(TENSOR) * q.shape[2] // group
            return call(q, *rest, first_kv_head=first, kv_heads=1)

        q_spec, pages_spec, local = _HEADS, _HEADS, call
        sinks_spec = PartitionSpec(TENSOR)
        if kv_heads % degree:
            # KV heads are replicated. A device's query heads share one of them, or straddle
            # several unevenly: then every device computes all heads.
            pages_spec = _WHOLE
            if heads % degree == 0 and group % (heads // degree) == 0:
                local = of_one_kv_head
            else:
                q_spec = sinks_spec = _WHOLE
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(
                q_spec,
                pages_spec,
                *(_WHOLE for _ in rows),
                *(sinks_spec for _ in of_heads),
            ),
            out_specs=q_spec,
            check_vma=False,
        )(q, pages, *rows, *of_heads)

    return attend


def write_over_heads(kernel: Kernel, *, interpret: bool = False) -> Kernel:
    """A backend of `kv_write` from a kernel for one device."""

    def write(
        pages: jax.Array, k: jax.Array, v: jax.Array, *rows: jax.Array, mesh: Mesh | None
    ) -> jax.Array:
        call = partial(kernel, interpret=interpret)
        if mesh is None or mesh.size == 1:
            return call(pages, k, v, *rows)
        spec = _WHOLE if k.shape[2] % mesh.shape[TENSOR] else _HEADS
        return jax.shard_map(
            call,
            mesh=mesh,
            in_specs=(spec, spec, spec, *(_WHOLE for _ in rows)),
            out_specs=spec,
            check_vma=False,
        )(pages, k, v, *rows)

    return write
