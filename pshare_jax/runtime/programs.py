"""Every jitted program that serving runs, with its shapes, donation and shardings.

Executors run them, warm-up compiles them, and `bench compile` compiles them for hardware that is
not there; all of them read this list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pshare_jax.config import DecodeConfig
from pshare_jax.core.buckets import TRANSFER_BUCKETS
from pshare_jax.core.chunk_planner import chunk_shapes
from pshare_jax.core.requests import MAX_LOGIT_BIAS
from pshare_jax.kernels.page_transfer.api import (
    copy_pages,
    gather_pages,
    page_checksums,
    scatter_pages,
)
from pshare_jax.models.config import ModelConfig
from pshare_jax.runtime.decode_inputs import DecodeInputs
from pshare_jax.runtime.host_arrays import host_array
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.masks import mask_words
from pshare_jax.runtime.sampler import empty_history
from pshare_jax.runtime.steps import (
    Rows,
    StepSpec,
    admit,
    choose,
    decode_steps,
    prefill_chunk,
    replay_chunk,
)
from pshare_jax.sharding.mesh import put, spans_processes
from pshare_jax.sharding.rules import pool_sharding, replicated

T = TypeVar("T")

NAMES = (
    "chunk",
    "copy",
    "gather",
    "checksum",
    "scatter",
    "admit",
    "replay",
    "decode",
    "choose",
    "stage",
)
"""Of what runs on a mesh again and again, in `Programs`."""


class Slot(Enum):
    """An argument or result that lies on the devices from call to call."""

    WEIGHTS = "weights"
    ADAPTERS = "adapters"
    POOL = "pool"
    HISTORY = "history"
    STAGED = "staged"
    LEFT = "left"
    """What a step whose choice is deferred leaves to it."""


@dataclass(frozen=True)
class Call:
    """One shape of one program.

    Args:
        name: of the program.
        function: under jit.
        arguments: slots, and host arrays that are padding throughout, so that a call changes
            nothing but page 0 and the spare row of the history.
        results: the slots that the results replace, None for others.
        size: what tells it from other calls of the program: rows, tokens or pages.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    results: tuple[Slot | None, ...]
    size: tuple[int, ...]


class Programs:
    """The programs of one mesh.

    Args:
        spec: model and kernel backend.
        layout: page shape.
        mesh: its devices.
        max_model_len: most tokens of a sequence.
        chunk_buckets: lengths of prefill chunks, in tokens.
        decode: batch sizes and limits of a decode worker.
    """

    def __init__(
        self,
        spec: StepSpec,
        layout: PageLayout,
        mesh: Mesh,
        max_model_len: int,
        chunk_buckets: list[int],
        decode: DecodeConfig,
    ):
        self.spec = spec
        self.mesh = mesh
        self.layout = layout
        self.max_model_len = max_model_len
        self.chunk_buckets = chunk_buckets
        self.config = decode
        self.inputs = DecodeInputs(
            decode.max_num_seqs, layout, max_model_len, spec, decode.shared_prefix
        )
        self.pool_sharding = pool_sharding(mesh, layout.num_kv_heads)
        self.staging = _staging(self.pool_sharding)
        """How pages lie that are on their way to or from a pool of this mesh."""
        self.everywhere = replicated(mesh)
        moving = _moving(layout, mesh, spec.backend)
        self.copy = moving.copy
        self.gather = moving.gather
        self.checksum = moving.checksum
        self._checksum_beside = moving.checksum_beside
        self.scatter = moving.scatter
        self.history = _empty_history(mesh, decode.max_num_seqs, max_model_len)
        self.admit = _admit(mesh)
        self.chunk = _chunk(spec, layout, mesh)
        self.replay = _replay(spec, layout, mesh)
        self.decode = _decode(spec, layout, mesh, decode.steps_per_dispatch)
        self.choose = _choose(spec.config if spec.packed else None, spec.mesh, mesh)
        self.stage = functools.partial(put, sharding=self.staging)
        """Puts pages of the host on the mesh, `staged_shape(count)`."""

    def wrap(self, wrapper: Callable[[str, Any], Any]) -> None:
        """Replaces everything that runs on the mesh from now on by what `wrapper` makes of it.

        Args:
            wrapper: gets the name of a program, and what runs it.
        """
        for name in NAMES:
            setattr(self, name, wrapper(name, getattr(self, name)))

    @property
    def checksum_beside(self) -> Any:
        """`checksum` for threads beside the one that computes: see `page_checksums`."""
        return self.checksum if self._checksum_beside is None else self._checksum_beside

    def staged_shape(self, count: int) -> tuple[int, ...]:
        """Shape of `count` pages of all layers on their way."""
        return (self.layout.num_layers, *self.layout.layer_shape(count))

    def prefill_calls(self) -> Iterator[Call]:
        """What covering prompts runs."""
        for rows, tokens in chunk_shapes(self.chunk_buckets):
            arguments = (Slot.WEIGHTS, Slot.POOL, _ints(rows, tokens), self._no_rows(rows))
            yield Call("chunk", self.chunk, arguments, (Slot.POOL, None), (rows, tokens))
        yield self.copy_call()

    def copy_call(self) -> Call:
        """Copying one page within the pool."""
        return Call("copy", self.copy, (Slot.POOL, _ints(1), _ints(1)), (Slot.POOL,), (1,))

    def sending_calls(self) -> Iterator[Call]:
        """What putting pages on offer runs."""
        for count in TRANSFER_BUCKETS:
            arguments = (Slot.POOL, _ints(count))
            yield Call("gather", self.gather, arguments, (Slot.STAGED,), (count,))
            yield Call("checksum", self.checksum, (Slot.STAGED,), (None,), (count,))

    def receiving_calls(self) -> Iterator[Call]:
        """What storing pages that have come runs."""
        for count in TRANSFER_BUCKETS:
            yield Call("checksum", self.checksum, (Slot.STAGED,), (None,), (count,))
            if (beside := self._checksum_beside) is not None:
                yield Call("checksum", beside, (Slot.STAGED,), (None,), (count,))
            arguments = (Slot.POOL, Slot.STAGED, _ints(count))
            yield Call("scatter", self.scatter, arguments, (Slot.POOL,), (count,))

    def all_calls(self) -> Iterator[Call]:
        """What any worker may run, but for `stage`."""
        yield from self.prefill_calls()
        yield from self.sending_calls()
        yield from self.receiving_calls()
        yield from self.decode_calls()

    def decode_calls(self) -> Iterator[Call]:
        """What generating runs."""
        bias = np.full(MAX_LOGIT_BIAS, -1, np.int32), np.zeros(MAX_LOGIT_BIAS, np.float32)
        spare = np.int32(self.config.max_num_seqs)
        tokens = _ints(self.max_model_len)
        arguments = (Slot.HISTORY, spare, tokens, *bias)
        yield Call("admit", self.admit, arguments, (Slot.HISTORY,), (1,))
        modules = (Slot.WEIGHTS, Slot.ADAPTERS, Slot.POOL)
        for bucket in self.config.replay_buckets:
            index = host_array([-1], np.int32)
            arguments = (*modules, _ints(1, bucket), self._no_rows(1), index)
            yield Call("replay", self.replay, arguments, (Slot.POOL, None), (1, bucket))
        for bucket in self.config.batch_buckets:
            for inputs in self.inputs.warm_up(bucket):
                yield Call(
                    "decode" if inputs.runs is None else "decode, shared pages",
                    self.decode,
                    (*modules, Slot.HISTORY, inputs),
                    (Slot.POOL, Slot.HISTORY, None, Slot.LEFT),
                    (bucket,),
                )
            yield self._choose_call(bucket)

    def head_of(self, weights: T) -> T | None:
        """What `choose` reads of a step's weights: nothing where steps leave logits to it."""
        return weights if self.spec.packed else None

    def _choose_call(self, bucket: int) -> Call:
        """Choosing the tokens of the decode call before it."""
        inputs = next(self.inputs.warm_up(bucket))
        mask = np.zeros((bucket, mask_words(self.spec.config.vocab_size)), np.uint32)
        choice = self.inputs.choice(inputs, mask)
        weights = self.head_of(Slot.WEIGHTS)
        return Call(
            "choose",
            self.choose,
            (weights, Slot.HISTORY, Slot.LEFT, choice),
            (Slot.HISTORY, None),
            (bucket,),
        )

    def _no_rows(self, batch: int) -> Rows:
        return self.inputs.rows([], [], [], batch)


# What is under jit is kept, so that an engine like an earlier one of this process compiles nothing
# anew; and each by no more than it depends on, so that unlike engines share what they can.


@dataclass(frozen=True)
class _Moving:
    """What moves pages on a mesh, under jit; see `Programs`."""

    copy: Any
    gather: Any
    checksum: Any
    checksum_beside: Any | None
    scatter: Any


@functools.lru_cache(maxsize=16)
def _moving(layout: PageLayout, mesh: Mesh, backend: str) -> _Moving:
    sharding, pages = pool_sharding(mesh, layout.num_kv_heads), _pages(layout, mesh)
    return _Moving(
        copy=jax.jit(
            functools.partial(copy_pages, backend=backend), donate_argnums=0, out_shardings=pages
        ),
        gather=jax.jit(
            functools.partial(gather_pages, backend=backend), out_shardings=_staging(sharding)
        ),
        checksum=_checksum(mesh, backend, alone=False),
        # One program where there is no team to be left to others.
        checksum_beside=_checksum(mesh, backend, alone=True) if backend == "cpu_ffi" else None,
        scatter=jax.jit(
            functools.partial(scatter_pages, backend=backend),
            donate_argnums=0,
            out_shardings=pages,
        ),
    )


@functools.lru_cache(maxsize=16)
def _checksum(mesh: Mesh, backend: str, *, alone: bool) -> Any:
    checksums = functools.partial(page_checksums, backend=backend, alone=alone)
    return jax.jit(checksums, out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=16)
def _empty_history(mesh: Mesh, max_num_seqs: int, max_model_len: int) -> Any:
    empty = functools.partial(empty_history, max_num_seqs, max_model_len)
    return jax.jit(empty, out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=16)
def _admit(mesh: Mesh) -> Any:
    return jax.jit(admit, donate_argnums=0, out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=16)
def _chunk(spec: StepSpec, layout: PageLayout, mesh: Mesh) -> Any:
    return jax.jit(
        functools.partial(prefill_chunk, spec),
        donate_argnums=1,
        out_shardings=(_pages(layout, mesh), replicated(mesh)),
    )


@functools.lru_cache(maxsize=16)
def _replay(spec: StepSpec, layout: PageLayout, mesh: Mesh) -> Any:
    return jax.jit(
        functools.partial(replay_chunk, spec),
        donate_argnums=2,
        out_shardings=(_pages(layout, mesh), replicated(mesh)),
    )


@functools.lru_cache(maxsize=16)
def _decode(spec: StepSpec, layout: PageLayout, mesh: Mesh, steps_per_dispatch: int) -> Any:
    everywhere = replicated(mesh)
    return jax.jit(
        functools.partial(decode_steps, spec, steps_per_dispatch),
        donate_argnums=(2, 3),
        # What is left to `choose` stays as it is: split over the vocabulary, if on a mesh.
        out_shardings=(_pages(layout, mesh), everywhere, everywhere, None),
    )


@functools.lru_cache(maxsize=16)
def _choose(config: ModelConfig | None, split: Mesh | None, mesh: Mesh) -> Any:
    return jax.jit(
        functools.partial(choose, config, split), donate_argnums=1, out_shardings=replicated(mesh)
    )


def _pages(layout: PageLayout, mesh: Mesh) -> Any:
    """How the pages of a layer lie on a mesh, for `out_shardings`."""
    return layout.placement(pool_sharding(mesh, layout.num_kv_heads))


def _staging(pool: NamedSharding) -> NamedSharding:
    mesh = pool.mesh
    assert isinstance(mesh, Mesh)
    if spans_processes(mesh):
        # The process that speaks to others must have the whole pages.
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(None, *pool.spec))


def _ints(*shape: int) -> jax.Array:
    return host_array(np.zeros(shape), np.int32)
