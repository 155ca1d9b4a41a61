"""The page pool of one mesh: the device arrays, and the rule that one thread owns them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from pshare_jax.runtime.layout import PageLayout

Pages = tuple[jax.Array, ...]
"""One page array a layer, see PageLayout.layer_shape."""

R = TypeVar("R")


@functools.lru_cache(maxsize=16)
def _allocating(layout: PageLayout, num_pages: int, sharding: Sharding) -> Callable[[], jax.Array]:
    """Makes the pages of a layer; kept, so that pools alike compile it once."""
    shape, placement = layout.layer_shape(num_pages), layout.placement(sharding)
    return jax.jit(lambda: jnp.zeros(shape, layout.dtype), out_shardings=placement)


class PagePool:
    """All pages of one mesh.

    Steps donate the arrays, which makes every older reference invalid. So one thread owns the
    pool (`own()` claims it) and only that thread may read or replace the arrays.
    """

    def __init__(self, layout: PageLayout, num_pages: int, sharding: Sharding):
        self.layout = layout
        self.num_pages = num_pages
        self.placement = layout.placement(sharding)
        """For the `out_shardings` of steps that return the arrays."""
        allocate = _allocating(layout, num_pages, sharding)
        self._pages: Pages = tuple(allocate() for _ in range(layout.num_layers))
        self._owner: int | None = None

    def own(self) -> None:
        """Makes the calling thread the owner.

        Raises:
            RuntimeError: another thread owns the pool already.
        """
        me = threading.get_ident()
        if self._owner not in (None, me):
            raise RuntimeError("the page pool is owned by another thread")
        self._owner = me

    def disown(self) -> None:
        """Gives ownership up, so that another thread may claim it."""
        self._check_owner()
        self._owner = None

    def update(self, step: Callable[[Pages], tuple[Pages, R]]) -> R:
        """Replaces the arrays by what `step` makes of them (it may donate them).

        Raises:
            RuntimeError: the calling thread is not the owner.
        """
        self._check_owner()
        self._pages, result = step(self._pages)
        return result

    def read(self, function: Callable[[Pages], R]) -> R:
        """Applies `function`, which must not donate, to the arrays.

        Raises:
            RuntimeError: the calling thread is not the owner.
        """
        self._check_owner()
        return function(self._pages)

    def _check_owner(self) -> None:
        if self._owner != threading.get_ident():
            raise RuntimeError(
                "only the thread that owns a page pool may touch its arrays; call own() first"
            )
