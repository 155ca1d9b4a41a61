"""The shape of a KV page, defined once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pshare_jax.models.config import ModelConfig

KV_HEADS_AXIS = 2
"""Axis of one layer's page array that is sharded over the tensor axis of a mesh."""


@dataclass(frozen=True)
class PageLayout:
    """Shape of the pages of one model; it does not depend on the mesh.

    One layer's pages are one array `[num_pages, 2, num_kv_heads, page_size, head_dim]`; index 0
    of axis 1 is K (rotated), index 1 is V. A page is contiguous, so a handoff copies whole
    pages, and its innermost two axes are the tile that an accelerator's kernel loads.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: Any

    @classmethod
    def of(cls, config: ModelConfig, page_size: int, dtype: Any) -> PageLayout:
        """The layout of `config`'s KV with pages of `page_size` token slots."""
        return cls(config.num_layers, config.num_kv_heads, config.head_dim, page_size, dtype)

    def layer_shape(self, num_pages: int) -> tuple[int, int, int, int, int]:
        """Shape of one layer's array of `num_pages` pages."""
        return (num_pages, 2, self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers (kappa of docs/architecture.md)."""
        itemsize = jnp.dtype(self.dtype).itemsize
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    @property
    def bytes_per_page(self) -> int:
        """KV bytes of one page over all layers."""
        return self.bytes_per_token * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Number of pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)
