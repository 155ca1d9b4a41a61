"""Shared-prefix attention by two calls of a kernel: a pass over runs, a pass over tails, a merge.

In the first pass a row of the kernel is a group, and its queries are those of all members: the
pages of the run are read once for each tile of them. In the second a row is a sequence, and its
keys begin where its group's run ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pshare_jax.kernels.partial_softmax import (
    MASKED,
    PartialSoftmax,
    merge,
    merge_first_axis,
    with_sinks,
)


class _Runs(NamedTuple):
    """The groups as rows of the kernel, int32.

    `rows [E, R]` are the members, `leaders [E]` the member whose page table is read; keys
    `first .. end - 1` `[E]` are seen by some member, from `seen_from [E, R]` on by each; `counts
    [E]` places hold all members. `place [B]` is where among the `E * R` a row is, `E * R` for none.
    """

    rows: jax.Array
    leaders: jax.Array
    first: jax.Array
    end: jax.Array
    seen_from: jax.Array
    counts: jax.Array
    place: jax.Array


def shared_prefix_attention(
    partial_attention: Callable[..., PartialSoftmax],
    splits: int,
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    q_start: jax.Array,
    q_lens: jax.Array,
    members: jax.Array,
    run_lens: jax.Array,
    *,
    sliding_window: int | None,
    sinks: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """See `api.shared_prefix_attention`.

    Args:
        partial_attention: the kernel; see `paged_attention.pallas_tpu.partial_attention`.
        splits: parts of each run that are attended to separately, and may be in parallel.
        q: see api, as all arguments that are not named here.
        pages: see api.
        page_table: see api.
        q_start: see api.
        q_lens: see api.
        members: see api.
        run_lens: see api.
        sliding_window: see api.
        sinks: see api; of q's heads.
        options: further arguments of the kernel.
    """
    B, _, H, D = q.shape
    (E, R), page_size = members.shape, pages.shape[3]
    attend = functools.partial(partial_attention, **options)
    seen_from = jnp.zeros_like(q_start)
    if sliding_window is not None:
        seen_from = jnp.maximum(q_start - (sliding_window - 1), 0)
    runs = _runs(q_start, q_lens, members, run_lens, seen_from)

    first, end = _split(runs.first, runs.end, splits, page_size)

    def of_splits(x: jax.Array) -> jax.Array:
        return jnp.tile(x, (splits, *(1 for _ in x.shape[1:])))

    of_parts = attend(
        of_splits(q[runs.rows, 0]),
        pages,
        of_splits(page_table[runs.leaders]),
        first,
        end,
        of_splits(runs.counts),
        # Without a window all members see all of the run.
        None if sliding_window is None else of_splits(runs.seen_from),
    )
    of_runs = merge_first_axis(
        PartialSoftmax(*(x.reshape(splits, E * R, *x.shape[2:]) for x in of_parts))
    )
    of_rows = PartialSoftmax(
        *(
            x.at[runs.place].get(mode="fill", fill_value=fill)
            for x, fill in zip(of_runs, (MASKED, 0.0, 0.0), strict=True)
        )
    )

    run_of_row = run_lens.at[runs.place // R].get(mode="fill", fill_value=0)
    end = jnp.where(q_lens > 0, q_start + 1, 0)
    tail_first = jnp.minimum(jnp.maximum(seen_from, run_of_row), end)
    tails = attend(q, pages, page_table, tail_first, end, q_lens)
    tails = PartialSoftmax(*(x[:, 0] for x in tails))
    whole = merge(of_rows, tails)
    if sinks is not None:
        whole = with_sinks(whole, sinks)
    return whole.result(q.dtype).reshape(B, 1, H, D)


def _runs(
    q_start: jax.Array,
    q_lens: jax.Array,
    members: jax.Array,
    run_lens: jax.Array,
    seen_from: jax.Array,
) -> _Runs:
    B, (E, R) = q_start.shape[0], members.shape
    rows = jnp.minimum(members, B - 1)
    valid = (members < B) & (q_lens[rows] > 0)
    # The member of the lowest position sees all of the run that any member sees.
    lowest = jnp.argmin(jnp.where(valid, q_start[rows], jnp.iinfo(jnp.int32).max), axis=1)
    leaders = jnp.take_along_axis(rows, lowest[:, None], axis=1)[:, 0]
    end = jnp.where(valid.any(axis=1), run_lens, 0)
    counts = jnp.where(valid, jnp.arange(1, R + 1, dtype=jnp.int32), 0).max(axis=1)
    # Places that are not valid go to row B, which does not exist, and are dropped.
    places = jnp.arange(E * R, dtype=jnp.int32).reshape(E, R)
    place = jnp.full(B, E * R, jnp.int32)
    place = place.at[jnp.where(valid, members, B)].set(places, mode="drop")
    first = jnp.minimum(seen_from[leaders], end)
    return _Runs(rows, leaders, first, end, seen_from[rows], counts, place)


def _split(
    first: jax.Array, end: jax.Array, splits: int, page_size: int
) -> tuple[jax.Array, jax.Array]:
    """Ranges of keys `[E]` in equal parts of whole pages: first and end `[splits * E]`."""
    first_page = first // page_size
    share = (-(-end // page_size) - first_page + splits - 1) // splits
    bounds = (first_page + jnp.arange(splits + 1, dtype=jnp.int32)[:, None] * share) * page_size
    bounds = jnp.clip(bounds, first, end)
    return bounds[:-1].reshape(-1), bounds[1:].reshape(-1)
