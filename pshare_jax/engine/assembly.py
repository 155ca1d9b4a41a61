"""Builds the workers of one process: meshes, pools, programs, cores and connectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from pshare_jax.cluster.worker import DecodeWorker, PrefillWorker, Worker
from pshare_jax.config import ServeConfig
from pshare_jax.core.buckets import TRANSFER_BUCKETS
from pshare_jax.core.connector import Connector
from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.one_pool import OnePool
from pshare_jax.core.pages.allocator import PADDING_PAGE
from pshare_jax.core.pages.page_cache import PageCache
from pshare_jax.core.plans import Offer, Pull
from pshare_jax.core.prefill import PrefillCore
from pshare_jax.core.router import WorkerInfo
from pshare_jax.engine.devices import Meshes
from pshare_jax.engine.limits import PoolSizes
from pshare_jax.engine.loader import WeightLoader
from pshare_jax.kernels.backends import on_mesh
from pshare_jax.kv.local import DevicePut, Exchange, SamePool
from pshare_jax.models.config import ModelConfig
from pshare_jax.runtime.executor import DecodeExecutor, PrefillExecutor
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.masks import Masks
from pshare_jax.runtime.pool import PagePool
from pshare_jax.runtime.programs import Programs
from pshare_jax.runtime.steps import StepSpec
from pshare_jax.text.grammar import GrammarCompiler

NewEnd = Callable[[str, Programs, PagePool], Connector]
"""Makes a worker's end of a connector: of its name, the programs of its mesh, and its pool."""


@dataclass(frozen=True)
class Workers:
    """All workers of an engine, what the router is told of them, and where pages are on offer.

    Where a mesh may do either, the first `num_prefill` begin with prefill; else that is 0.
    """

    prefill: list[PrefillWorker[PrefillExecutor]]
    decode: list[DecodeWorker[DecodeExecutor]]
    one_pool: bool
    exchange: Exchange
    num_prefill: int = 0

    @property
    def pairs(self) -> bool:
        """Whether the prefill and the decode worker of each number share a mesh and its pool."""
        return self.one_pool or self.num_prefill > 0

    def threads(self, one_processor: bool) -> list[tuple[str, list[Worker]]]:
        """Which workers share a thread, since they share what computes."""
        every: list[Worker] = [*self.decode, *self.prefill]
        if one_processor:
            return [("engine", every)]
        if self.pairs:
            pairs = zip(self.decode, self.prefill, strict=True)
            return [(f"engine{i}", [d, p]) for i, (d, p) in enumerate(pairs)]
        return [(worker.name, [worker]) for worker in every]

    def warm_up(self, *, stores: bool = False) -> None:
        """Compiles everything that serving runs; with `stores` what the KV store needs, too."""
        for worker in self.decode:
            worker.executor.warm_up(receives=not self.one_pool)
        for worker in self.prefill:
            worker.executor.warm_up(sends=stores or not self.one_pool, receives=stores)
        if not self.one_pool:
            for prefill, decode in itertools.product(self.prefill, self.decode):
                if prefill.cache is not decode.cache:
                    _move_padding(prefill, decode)

    def prefill_info(self) -> list[WorkerInfo]:
        """The prefill workers as the router sees them."""
        if self.num_prefill:
            return self._either(self.prefill, self.decode, range(self.num_prefill))
        partners = [w.name for w in self.decode] if self.one_pool else [""] * len(self.prefill)
        return [_info(w, p) for w, p in zip(self.prefill, partners, strict=True)]

    def decode_info(self) -> list[WorkerInfo]:
        """The decode workers as the router sees them."""
        if self.num_prefill:
            numbers = range(self.num_prefill, len(self.decode))
            return self._either(self.decode, self.prefill, numbers)
        return [_info(worker) for worker in self.decode]

    def _either(
        self, workers: Sequence[Worker], twins: Sequence[Worker], working: range
    ) -> list[WorkerInfo]:
        """Workers of meshes that may do either; those of some numbers begin to work."""
        pairs = enumerate(zip(workers, twins, strict=True))
        return [
            WorkerInfo(
                worker.name,
                worker.cache.num_usable,
                worker.cache.page_size,
                twin=twin.name,
                rests=number not in working,
            )
            for number, (worker, twin) in pairs
        ]


def _move_padding(
    prefill: PrefillWorker[PrefillExecutor], decode: DecodeWorker[DecodeExecutor]
) -> None:
    """Moves the padding page, so that what `device_put` compiles between two meshes is there."""
    for executor in (prefill.executor, decode.executor):
        executor.pool.own()
    for count in TRANSFER_BUCKETS:
        pages, keys, transfer = [PADDING_PAGE] * count, [b""] * count, -1
        offer = Offer(transfer, decode.name, pages, keys)
        descriptors = prefill.executor.connector.offer(offer)
        end = decode.executor.connector
        end.accept(Pull(transfer, prefill.name, descriptors, keys, pages))
        end.commit(transfer)
    for executor in (prefill.executor, decode.executor):
        executor.pool.disown()


def _info(worker: Worker, partner: str = "") -> WorkerInfo:
    return WorkerInfo(worker.name, worker.cache.num_usable, worker.cache.page_size, partner)


class Assembly:
    """Builds workers.

    Args:
        config: the serving configuration.
        model: architecture of the base.
        layout: page shape.
        sizes: pages of each pool.
        backend: kernel backend.
        loader: loads weights onto meshes.
        models: the served models by name.
        grammars: compiles the grammars that answers are to follow.
    """

    def __init__(
        self,
        config: ServeConfig,
        model: ModelConfig,
        layout: PageLayout,
        sizes: PoolSizes,
        backend: str,
        loader: WeightLoader,
        models: Mapping[str, ModelSpec],
        grammars: GrammarCompiler | None = None,
    ):
        self._config = config
        self._model = model
        self._layout = layout
        self._sizes = sizes
        self._backend = backend
        self._loader = loader
        self._models = models
        self._grammars = grammars
        self._exchange = Exchange()

    def build(self, meshes: Meshes) -> Workers:
        """All workers on their meshes, weights loaded, nothing compiled."""
        if meshes.one_pool or meshes.either:
            moves = not meshes.one_pool
            names = [(f"prefill{i}", f"decode{i}") for i in range(len(meshes.decode))]
            pairs = [
                self.pair(names[i], i, mesh, moves=moves) for i, mesh in enumerate(meshes.decode)
            ]
            prefill, decode = [p for p, _ in pairs], [d for _, d in pairs]
            return Workers(prefill, decode, meshes.one_pool, self._exchange, meshes.num_prefill)
        decode = [
            self.decode(f"decode{i}", i, mesh, self._device_put)
            for i, mesh in enumerate(meshes.decode)
        ]
        prefill = [
            self.prefill(f"prefill{i}", mesh, self._device_put)
            for i, mesh in enumerate(meshes.prefill)
        ]
        return Workers(prefill, decode, False, self._exchange)

    def prefill(self, name: str, mesh: Mesh, new_end: NewEnd) -> PrefillWorker[PrefillExecutor]:
        """A prefill worker over a pool of its own."""
        programs, pool, cache = self._pool(mesh, self._sizes.prefill)
        core = self._prefill_core(name, cache, pads=not programs.spec.packed)
        end = new_end(name, programs, pool)
        executor = PrefillExecutor(programs, pool, self._loader.prefill(mesh), end)
        return PrefillWorker(core, executor)

    def decode(
        self, name: str, index: int, mesh: Mesh, new_end: NewEnd
    ) -> DecodeWorker[DecodeExecutor]:
        """A decode worker over a pool of its own, for the models of engine `index`."""
        programs, pool, cache = self._pool(mesh, self._sizes.decode)
        core = self._decode_core(name, cache, self._layout.bytes_per_page, owns_cache=True)
        end = new_end(name, programs, pool)
        groups = self._loader.decode(mesh, index, self._models)
        return DecodeWorker(core, DecodeExecutor(programs, pool, groups, end, self._masks()))

    def pair(
        self, names: tuple[str, str], index: int, mesh: Mesh, *, moves: bool = False
    ) -> tuple[PrefillWorker[PrefillExecutor], DecodeWorker[DecodeExecutor]]:
        """A prefill and a decode worker over one pool, for the models of engine `index`; `moves`
        says whether pages come from other pools, and rows go there."""
        programs, pool, cache = self._pool(mesh, self._sizes.shared)
        cores = OnePool(
            self._prefill_core(names[0], cache, pads=not programs.spec.packed),
            self._decode_core(
                names[1], cache, self._layout.bytes_per_page if moves else 0, owns_cache=False
            ),
            moves=moves,
        )
        if moves:
            ends = [DevicePut(name, programs, pool, self._exchange) for name in names]
        else:
            ends = [SamePool(names[0], programs, pool, self._exchange)] * 2
        prefill = PrefillExecutor(programs, pool, self._loader.prefill(mesh), ends[0])
        groups = self._loader.decode(mesh, index, self._models)
        decode = DecodeExecutor(programs, pool, groups, ends[1], self._masks())
        return (
            PrefillWorker(cores.prefill, prefill, cores.schedule_prefill),
            DecodeWorker(cores.decode, decode, cores.schedule_decode),
        )

    def _device_put(self, name: str, programs: Programs, pool: PagePool) -> Connector:
        return DevicePut(name, programs, pool, self._exchange)

    def _masks(self) -> Masks:
        return Masks(self._model.vocab_size, self._grammars)

    def _pool(self, mesh: Mesh, num_pages: int) -> tuple[Programs, PagePool, PageCache]:
        programs = Programs(
            StepSpec(self._model, on_mesh(self._backend, mesh.size), mesh),
            self._layout,
            mesh,
            self._config.max_model_len,
            self._config.prefill.chunk_buckets,
            self._config.decode,
        )
        pool = PagePool(self._layout, num_pages, programs.pool_sharding)
        share = self._config.sessions.pinned_share
        return programs, pool, PageCache(num_pages, self._layout.page_size, share)

    def _prefill_core(self, name: str, cache: PageCache, *, pads: bool) -> PrefillCore:
        return PrefillCore(name, cache, self._models, self._config.prefill.chunk_buckets, pads=pads)

    def _decode_core(
        self, name: str, cache: PageCache, bytes_per_page: int, *, owns_cache: bool
    ) -> DecodeCore:
        return DecodeCore(
            name,
            cache,
            self._models,
            self._config.decode,
            bytes_per_page,
            owns_cache=owns_cache,
        )
