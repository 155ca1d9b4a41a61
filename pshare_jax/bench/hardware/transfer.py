"""Moving pages of KV: out of a pool, to another device or to the host, and into a pool again."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.bench.hardware.device import mesh, seconds
from pshare_jax.bench.hardware.kernels import Keep, own_backend
from pshare_jax.bench.hardware.scale import Scale
from pshare_jax.kernels.page_transfer.api import gather_pages, page_checksums, scatter_pages
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.sharding.rules import replicated


def run(scale: Scale, keep: Keep) -> None:
    """Keeps `bytes`, of one handoff; GB/s of each of its steps (`gather`, `checksum`,
    `to device`, where there are two, `to host`, `to device from host`, `scatter`); and `whole`,
    of a handoff: all of it but the host, to the other device where there is one."""
    model, backend = scale.large, own_backend()
    layout = PageLayout.of(model, scale.page_size, jnp.dtype(scale.dtype))
    place = layout.placement(replicated(mesh()))
    shape = layout.layer_shape(2 * scale.pages + 1)
    make = jax.jit(
        lambda: tuple(jnp.full(shape, i, scale.dtype) for i in range(model.num_layers)),
        out_shardings=place,
    )
    pool = [make()]
    pages = np.random.default_rng(0).permutation(np.arange(1, shape[0]))[: scale.pages]
    indices = jnp.asarray(pages, jnp.int32)
    gather = jax.jit(functools.partial(gather_pages, backend=backend))
    checksum = jax.jit(functools.partial(page_checksums, backend=backend))
    scatter = jax.jit(functools.partial(scatter_pages, backend=backend), donate_argnums=0)
    staged = jax.block_until_ready(gather(pool[0], indices))
    keep("bytes", staged.nbytes)
    gb_s: dict[str, float] = {}

    def write(what: str, call: Any) -> None:
        gb_s[what] = staged.nbytes / seconds(call, scale.repeats, scale.least_seconds) / 1e9
        keep("gb_s", gb_s)

    def scattered(new: jax.Array) -> Any:
        pool[0] = scatter(pool[0], new, indices)
        return pool[0]

    write("gather", lambda: gather(pool[0], indices))
    write("checksum", lambda: checksum(staged))
    write("scatter", lambda: scattered(staged))
    write("to host", lambda: _on_host(staged))
    host = np.asarray(staged)
    write("to device from host", lambda: jax.device_put(host, jax.devices()[0]))
    devices = jax.devices()
    if len(devices) > 1:
        write("to device", lambda: jax.device_put(staged, devices[1]))
    there = devices[1 if len(devices) > 1 else 0]

    def whole() -> Any:
        """As between meshes; back on the first device, whose pool takes what comes."""
        moved = jax.device_put(gather(pool[0], indices), there)
        sums = checksum(moved)
        return scattered(jax.device_put(moved, devices[0])), sums

    write("whole", whole)


def _on_host(staged: jax.Array) -> np.ndarray:
    """A copy in host memory; of new arrays each time, since JAX keeps the copy of an old one."""
    return np.array(jax.device_get(staged + 0))
