"""Compiles programs by running them once."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from pshare_jax.kernels.decoder_layer.packing import PackedAdapters
from pshare_jax.models.weights import Weights
from pshare_jax.runtime.pool import PagePool, Pages
from pshare_jax.runtime.programs import Call, Programs, Slot


class WarmUp:
    """What lies on the devices while programs are compiled by running them."""

    def __init__(
        self,
        programs: Programs,
        pool: PagePool,
        weights: Weights,
        adapters: Weights | PackedAdapters | None = None,
        history: Any = None,
    ):
        self.history = history
        self.programs = programs
        self._pool = pool
        self._weights = weights
        self._adapters = adapters
        self._left: jax.Array | None = None

    def run(self, call: Call) -> None:
        """Runs a program once, so that it is compiled."""

        def update(pages: Pages) -> tuple[Pages, Any]:
            given = {
                Slot.WEIGHTS: self._weights,
                Slot.ADAPTERS: self._adapters,
                Slot.POOL: pages,
                Slot.HISTORY: self.history,
            }
            if self._left is not None:
                given[Slot.LEFT] = self._left
            if any(argument is Slot.STAGED for argument in call.arguments):
                given[Slot.STAGED] = self._staged(call.size[0])
            arguments = [given[a] if isinstance(a, Slot) else a for a in call.arguments]
            results = call.function(*arguments)
            if len(call.results) == 1:
                results = (results,)
            for slot, result in zip(call.results, results, strict=True):
                if slot is Slot.HISTORY:
                    self.history = result
                elif slot is Slot.POOL:
                    pages = result
                elif slot is Slot.LEFT:
                    self._left = result
            return pages, results

        jax.block_until_ready(self._pool.update(update))

    def _staged(self, count: int) -> jax.Array:
        zeros = np.zeros(self.programs.staged_shape(count), self.programs.layout.dtype)
        return self.programs.stage(zeros)
