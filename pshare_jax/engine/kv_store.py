"""The KV store of an engine: opened, calibrated and measured, then given to its workers."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from types import ModuleType

import jax
import msgspec
import numpy as np

from pshare_jax.cluster.worker import PrefillWorker
from pshare_jax.config import KvStoreConfig
from pshare_jax.core import messages as m
from pshare_jax.core import plans, prefill, router, scheduling, split_rule
from pshare_jax.core.prefetch import Prefetch
from pshare_jax.core.prices import Prices
from pshare_jax.core.stats import TierStats
from pshare_jax.core.store_client import StoreClient
from pshare_jax.engine.numerics import computed_by
from pshare_jax.engine.prompt_pages import chunk_plan, prompt_pages
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.kv_codec.codebook import Codebook, calibrate, supported
from pshare_jax.kernels.kv_codec.reference import encode
from pshare_jax.kernels.native.library import load_library
from pshare_jax.kv.store.end import WorkerEnd
from pshare_jax.kv.store.file import ESCAPES, VERSION, PoolRequest
from pshare_jax.kv.store.pool import Pool
from pshare_jax.kv.store.service import PLACES, StoreService
from pshare_jax.kv.store.tier import Tier, TierCounters
from pshare_jax.runtime.executor import PrefillExecutor
from pshare_jax.runtime.layout import PageLayout
from pshare_jax.runtime.pool import Pages
from pshare_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Worker = PrefillWorker[PrefillExecutor]

PAYING_RATIO = 1.15
"""Pages that compress less are stored as they are."""

SAMPLE_TOKENS = 1024
"""Tokens whose KV codebooks are calibrated on, at most."""

_PROBES = (1, 4)
"""Pages that are written and read to measure a tier."""

_REPEATS = 3

ANSWER_SECONDS = 1.0
"""How long a measurement waits for an answer of the store."""

_TEXT: tuple[ModuleType, ...] = (prefill, plans, router, scheduling, split_rule, inspect)
"""Whose documentation is the text that codebooks are calibrated on."""


def page_shape(layout: PageLayout) -> tuple[int, ...]:
    """`[L, 2, kv_heads, page_size, head_dim]`."""
    return (layout.num_layers, *layout.layer_shape(1)[1:])


def store_root(layout: PageLayout, computed: str, backend: str, mesh_size: int) -> bytes:
    """What the contents of a page depend on beside weights, tokens and tenant, as a key.

    Those are in the page's own key. Here are the format, the page's shape and dtype, the dtype that
    was computed in, which pages of 8 bits do not say, and who computed it: other kernels, devices
    or versions round otherwise, and other code may do anything.
    """
    by = computed_by(backend, mesh_size)
    names = [VERSION, page_shape(layout), np.dtype(layout.dtype).name, computed, by]
    return hashlib.blake2b(msgspec.json.encode(names), digest_size=16).digest()


class EngineStore:
    """The store of one engine. Prices are measured with the first prefill worker.

    Args:
        config: where it is.
        layout: of pages.
        computed: name of the dtype that is computed in.
        workers: the prefill workers, warmed up and not started.
        tokenizer: of the base, for calibration on text; None takes the bytes for tokens.

    Raises:
        ConfigError: a file that cannot be made or used, or a codec that is not for these pages.
    """

    def __init__(
        self,
        config: KvStoreConfig,
        layout: PageLayout,
        computed: str,
        workers: Sequence[Worker],
        tokenizer: Tokenizer | None,
    ):
        self._config = config
        self._layout = layout
        self._computed = computed
        self._workers = workers
        self._ends: list[WorkerEnd] = []
        self._tokens = _calibration_tokens(workers[0], tokenizer)
        self._sample = prompt_pages(workers[0], self._tokens)
        shape, dtype = page_shape(layout), np.dtype(layout.dtype)
        tiers = [Tier("shared", self._open(config.path, config.bytes, config.codec))]
        if config.disk_path:
            try:
                pool = self._open(config.disk_path, config.disk_bytes, config.codec, direct=True)
            except ConfigError:
                tiers[0].close()
                raise
            tiers.append(Tier("disk", pool))
        self.service = StoreService(tiers, shape, dtype, config.admission == "always")
        self.prices = self._measure(tiers)
        del self._sample
        for tier in tiers:
            logger.info(
                "KV store, %s: %s, %d slots of %d bytes, codec %s, %s",
                tier.name,
                "adopted" if tier.pool.warm else "new",
                tier.pool.spec.slots,
                tier.pool.spec.slot_bytes,
                tier.pool.spec.codec,
                f"{1e3 * self.prices.page[_place(tier)]:.2f} ms a page",
            )

    def attach(self, send: Callable[[str, m.Message], None]) -> None:
        """Gives each worker its side of the store; `send` carries a message to a worker."""
        for worker in self._workers:
            programs, name = worker.executor.programs, worker.name
            backend, devices = programs.spec.backend, programs.staging.mesh.size
            root = store_root(self._layout, self._computed, backend, devices)
            end = WorkerEnd(
                programs,
                worker.executor.pool,
                self.service,
                root,
                lambda message, name=name: send(name, message),
            )
            self._ends.append(end)
            worker.executor.store = end
            ids = (secrets.randbits(63) for _ in itertools.count())
            client = StoreClient(worker.cache, self.prices, ids)
            if self._config.prefetch == "next-agent":
                budget, page_bytes = self._config.prefetch_bytes, self._layout.bytes_per_page
                client.ahead = Prefetch(client, worker.cache, budget, page_bytes)
            worker.core.store = client

    def stats(self) -> tuple[dict[str, dict[str, float]], dict[str, TierStats]]:
        """What each worker has asked for, and what each tier has done."""
        asked = {w.name: dict(vars(w.core.store.stats)) for w in self._workers if w.core.store}
        return asked, self.service.stats()

    def held(self, keys: Sequence[bytes]) -> dict[str, list[bool]]:
        """Which pages of prefill workers each tier has; from any thread."""
        return self.service.held(self._ends[0].store_keys(keys)) if self._ends else {}

    def close(self) -> None:
        """Writes what was to be written, and leaves the pools; the workers have stopped."""
        self.service.close()

    def _open(self, path: str, num_bytes: int, codec: str, *, direct: bool = False) -> Pool:
        layout = self._layout
        shape, dtype = page_shape(layout), np.dtype(layout.dtype).name
        can = supported(shape, dtype)
        if codec in ("planes", "top16") and not can:
            raise ConfigError(
                f"kv_store.codec: {codec} is for bfloat16 pages of a multiple of 64 values a head, "
                f"but they are {dtype} {shape}; use `auto` or `raw`"
            )
        if codec == "auto":
            # Without C++ coding a page takes longer than computing it.
            able = can and load_library() is not None
            codecs = ("planes", "raw") if able else ("raw",)
        else:
            codecs = (codec,)
        request = PoolRequest(
            shape,
            dtype,
            layout.bytes_per_page,
            num_bytes,
            codecs,
            lambda: self._codebook(codecs[0], must=codec != "auto"),
            direct,
        )
        return Pool.open(path, request)

    def _codebook(self, codec: str, *, must: bool) -> Codebook | None:
        """A codebook for the base's KV; None where pages had better be stored as they are."""
        if codec == "raw":
            return None
        sample = self._sample.view(np.uint16)
        half = max(len(sample) // 2, 1)
        book = calibrate(codec, sample[:half])
        # What it was not calibrated on; one page only if there is no more.
        rest = sample[half:] if len(sample) > half else sample
        records = [len(encode(book, page)) for page in rest]
        ratio = rest.nbytes / sum(records)
        escapes = sum(records) / rest.size - book.fixed_bytes(rest.size) / rest.size
        logger.info(
            "KV store: %s compresses to 1/%.3f, %.1f %% escapes", codec, ratio, 100 * escapes
        )
        if must or (ratio >= PAYING_RATIO and escapes < ESCAPES):
            return calibrate(codec, sample)
        return None

    def _measure(self, tiers: Sequence[Tier]) -> Prices:
        """Prices of computing and of fetching on this machine, as it is now."""
        executor = self._workers[0].executor
        executor.pool.own()
        token, pair = self._compute_prices()
        scatter = min(self._scatter_seconds() for _ in range(_REPEATS))
        executor.pool.disown()
        hop = min(self._hop() for _ in range(_REPEATS))
        call: dict[int, float] = {}
        page: dict[int, float] = {}
        for tier in tiers:
            one, several = self._read_seconds(tier)
            each = max(several - one, 0.0) / (_PROBES[1] - _PROBES[0])
            page[_place(tier)] = each + scatter
            call[_place(tier)] = max(one - each, 0.0) + 2 * hop
        return Prices(token, pair, call, page)

    def _compute_prices(self) -> tuple[float, float]:
        executor = self._workers[0].executor
        bucket, longest = max(executor.programs.chunk_buckets), executor.programs.max_model_len
        length = min(bucket, longest)
        tokens = (self._tokens * length)[:length]
        last = (longest - length) // self._layout.page_size * self._layout.page_size
        pages = list(range(1, self._layout.pages_for(last + length) + 1))

        def seconds(start: int) -> float:
            plan = chunk_plan(executor, pages, start, tokens)
            return min(_timed(lambda: executor.compute(plan)) for _ in range(_REPEATS))

        near = seconds(0)
        if not last:
            return near / length, 0.0
        pair = max(seconds(last) - near, 0.0) / (2 * last * length)
        return max(near - pair * length**2, 0.0) / length, pair

    def _scatter_seconds(self) -> float:
        """Of a page, from the host's memory into the pool."""
        executor, count = self._workers[0].executor, _PROBES[1]
        programs = executor.programs
        staged = np.zeros(programs.staged_shape(count), self._layout.dtype)

        def act(pages: Pages) -> tuple[Pages, None]:
            there = jax.device_put(staged, programs.staging)
            indices = np.arange(1, count + 1, dtype=np.int32)
            return jax.block_until_ready(programs.scatter(pages, there, indices)), None

        return _timed(lambda: executor.pool.update(act)) / count

    def _hop(self) -> float:
        """From a thread to a thread of the store and back."""
        done = threading.Event()

        def act() -> None:
            self.service.look([bytes(16)], lambda places: done.set())
            done.wait(ANSWER_SECONDS)

        return _timed(act)

    def _read_seconds(self, tier: Tier) -> tuple[float, float]:
        """Of one and of several pages, from a tier into the host's memory."""
        count = _PROBES[1]
        chosen_pages = self._sample[np.arange(count) % len(self._sample)]
        staged = np.ascontiguousarray(np.moveaxis(chosen_pages, 0, 1))
        keys = [secrets.token_bytes(16) for _ in range(count)]
        buffer, tokens = tier.pool.buffer(), [tuple(range(self._layout.page_size))] * count
        written = [tier.put(k, tokens[i], staged, i, buffer) for i, k in enumerate(keys)]

        def seconds(number: int) -> float:
            chosen = range(number)
            return _timed(lambda: tier.get(keys[:number], tokens[:number], staged, chosen, buffer))

        found = tuple(min(seconds(n) for _ in range(_REPEATS)) for n in _PROBES)
        tier.pool.drop(keys)
        tier.counters = TierCounters()
        if any(written):
            logger.warning("KV store, %s: could not be measured: %s", tier.name, written)
            return float("inf"), float("inf")
        return found[0], found[1]


def _calibration_tokens(worker: Worker, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Of plain English, as many as there is room for."""
    text = "\n\n".join(inspect.getdoc(module) or "" for module in _TEXT)
    text += "\n\n".join(
        inspect.getdoc(thing) or "" for module in _TEXT for thing in vars(module).values()
    )
    programs, cache = worker.executor.programs, worker.cache
    room = min(SAMPLE_TOKENS, programs.max_model_len, cache.num_usable * cache.page_size)
    room = max(room, cache.page_size)
    if tokenizer is not None:
        tokens = tokenizer.encode(text)
    else:
        tokens = [byte % programs.spec.config.vocab_size for byte in text.encode()]
    return tuple((tokens * (room // len(tokens) + 1))[:room])


def _place(tier: Tier) -> int:
    return PLACES[tier.name]


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
