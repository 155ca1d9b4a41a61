"""Moving whole pages: out of a pool, into a pool, and within one; checksums of what moves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import jax

from pshare_jax.kernels.backends import BACKEND_NAMES, select_backend
from pshare_jax.kernels.page_transfer import cpu_ffi, reference, xla

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt32

Pool = tuple[jax.Array, ...]
"""One page array a layer, each `[num_pages, 2, kv_heads, page_size, head_dim]`."""

F = TypeVar("F", bound=Callable)


def _backends(xla: F, reference: F, cpu_ffi: F) -> dict[str, F]:
    """XLA serves the accelerators too: a page is one contiguous slice, and on TPU and GPU alike
    XLA compiles the loop to one copy of it at a time, in place."""
    own = {"reference": reference, "cpu_ffi": cpu_ffi}
    return {name: own.get(name, xla) for name in BACKEND_NAMES}


GATHER = _backends(xla.gather_pages, reference.gather_pages, cpu_ffi.gather_pages)
SCATTER = _backends(xla.scatter_pages, reference.scatter_pages, cpu_ffi.scatter_pages)
COPY = _backends(xla.copy_pages, reference.copy_pages, cpu_ffi.copy_pages)
CHECKSUM = _backends(xla.page_checksums, reference.page_checksums, cpu_ffi.page_checksums)
CHECKSUM_ALONE = {
    **CHECKSUM,
    "cpu_ffi": functools.partial(cpu_ffi.page_checksums, alone=True),
}


def gather_pages(
    pool: Pool, indices: Int[Array, " n"], *, backend: str = "auto"
) -> Float[Array, "L n 2 kv_heads page_size head_dim"]:
    """Copies pages of all layers into one staging array.

    Args:
        pool: L page arrays.
        indices: `[n]` int32; pad with 0.
        backend: a key of the table, or `auto`.

    Returns:
        `[L, n, 2, kv_heads, page_size, head_dim]`.

    Raises:
        ValueError: an unknown backend.
    """
    return select_backend("gather_pages", GATHER, backend)(pool, indices)


def scatter_pages(
    pool: Pool,
    staged: Float[Array, "L n 2 kv_heads page_size head_dim"],
    indices: Int[Array, " n"],
    *,
    backend: str = "auto",
) -> Pool:
    """Writes a staging array's pages into the pool, in place when the pool is donated.

    Args:
        pool: L page arrays.
        staged: `[L, n, 2, kv_heads, page_size, head_dim]`, as `gather_pages` gives it.
        indices: `[n]` int32, distinct but for the padding, which is 0.
        backend: a key of the table, or `auto`.

    Returns:
        The updated pool.

    Raises:
        ValueError: an unknown backend.
    """
    return select_backend("scatter_pages", SCATTER, backend)(pool, staged, indices)


def copy_pages(
    pool: Pool, src: Int[Array, " n"], dst: Int[Array, " n"], *, backend: str = "auto"
) -> Pool:
    """Copies page src[i] to page dst[i] in all layers, in place when the pool is donated.

    Args:
        pool: L page arrays.
        src: `[n]` int32; pad with 0.
        dst: `[n]` int32, distinct but for the padding, which is 0; no page may be in both.
        backend: a key of the table, or `auto`.

    Returns:
        The updated pool.

    Raises:
        ValueError: an unknown backend.
    """
    return select_backend("copy_pages", COPY, backend)(pool, src, dst)


def page_checksums(
    staged: Float[Array, "L n 2 kv_heads page_size head_dim"],
    *,
    backend: str = "auto",
    alone: bool = False,
) -> UInt32[Array, " n"]:
    """A checksum of each page of a staging array, the same on every backend and mesh.

    The bits of the page's values, in order over all layers, are taken as unsigned integers w_i; the
    checksum is the sum of w_i (2 i + 1) modulo 2^32. An odd factor is invertible, so any change of
    a single value is noticed, and different factors notice values that changed places.

    Args:
        staged: `[L, n, 2, kv_heads, page_size, head_dim]`, of 1, 2 or 4 bytes a value.
        backend: a key of the table, or `auto`.
        alone: leaves the C++ kernels' team of threads to other callers, for whoever sums beside
            an engine: without the team that computes on one thread.

    Returns:
        `[n]` uint32.

    Raises:
        ValueError: an unknown backend.
    """
    return select_backend("page_checksums", CHECKSUM_ALONE if alone else CHECKSUM, backend)(staged)
