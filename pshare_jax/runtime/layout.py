"""The shape of a KV page, defined once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

from pshare_jax.models.config import ModelConfig

KV_HEADS_AXIS = 2
"""Axis of one layer's page array that is sharded over the tensor axis of a mesh."""

TPU_LANES = 128
"""Width of a TPU's vector register, to which the innermost axis of an array is padded."""


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

    def placement(self, sharding: Sharding) -> Sharding | Format:
        """How one layer's array lies on the devices of `sharding`, for `out_shardings` of jit.

        Pages are contiguous everywhere. On a TPU that must be said for head sizes that do not fill
        a vector register: XLA would rather make another axis the innermost one, and kernels would
        copy the whole pool to undo that. A page then takes the memory of the next full size.
        """
        on_tpu = next(iter(sharding.device_set)).platform == "tpu"
        if on_tpu and self.head_dim % TPU_LANES:
            return Format(Layout(tuple(range(len(self.layer_shape(1))))), sharding)
        return sharding

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
