"""Shared-prefix attention by its definition: plain paged attention, whatever is shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def without_runs(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A backend of `shared_prefix_attention` from one of `paged_attention`."""

    def shared_prefix_attention(
        q: jax.Array,
        pages: jax.Array,
        page_table: jax.Array,
        q_start: jax.Array,
        q_lens: jax.Array,
        members: jax.Array,
        run_lens: jax.Array,
        **options: Any,
    ) -> jax.Array:
        del members, run_lens  # They change what is read how often, not the result.
        return attend(q, pages, page_table, q_start, q_lens, **options)

    return shared_prefix_attention
