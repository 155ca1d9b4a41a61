"""`bench pool`: an engine answers over contexts that another process of its host has computed.

The pages come from the pool in shared memory; over a loopback socket, as workers of different hosts
get them; or not at all, where each process has a cache of its own, so that they are computed again.
The second engine is the same one each time, asked one prompt at a time, and its answers must be the
first one's. Time is from submission to the first token, in turn for each way.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pshare_jax.bench import pool_steady
from pshare_jax.bench.first_token import FirstToken, engine_of, first_token, settle
from pshare_jax.bench.micro_rates import Rate
from pshare_jax.bench.pool_first import EngineSpec, FirstEngine, first_engine
from pshare_jax.bench.pool_socket import Piece, SocketEnd
from pshare_jax.config import DType, KvCodec, KvStoreConfig
from pshare_jax.core.buckets import TRANSFER_BUCKETS
from pshare_jax.engine.orchestrator import Orchestrator
from pshare_jax.errors import BenchmarkError
from pshare_jax.kernels.kv_codec.codebook import calibrate, supported
from pshare_jax.kv.offers import OfferFolder
from pshare_jax.kv.remote import RemotePages
from pshare_jax.kv.store.end import WorkerEnd

POOL, SOCKET, OWN = "shared pool", "socket", "own cache"
WAYS = (POOL, SOCKET, OWN)
_SALT = "the first engine's own"
_KEPT_PROMPTS = 2


@dataclass(frozen=True)
class PoolOptions:
    """What is measured.

    Args:
        base: the prefill checkpoint.
        lengths: tokens of the contexts.
        repeats: contexts of each length and way.
        page_size: token slots of a KV page.
        codec: of the pool that both engines share, as in the server's configuration.
        dtype: likewise.
        folder: where files in shared memory are made, and removed in the end.
        store_bytes: of the pool.
        rounds: of each measurement in the steady state.
        seed: of the random contexts.
    """

    base: str = "checkpoints/smollm2-135m"
    lengths: list[int] = field(default_factory=lambda: [512, 2000])
    repeats: int = 3
    page_size: int = 64
    codec: KvCodec = "auto"
    dtype: DType = "auto"
    folder: str = "/dev/shm"
    store_bytes: int = 2**30
    rounds: int = 20
    seed: int = 0


@dataclass(frozen=True)
class _Context:
    """A context, how the second engine gets it, and what the first one has on offer of it."""

    id: str
    way: str
    tokens: tuple[int, ...]
    answer: tuple[int, ...]
    pieces: list[Piece]


def run(options: PoolOptions) -> dict[str, Any]:
    """Measures all ways.

    Returns:
        `{"options", "first_token": {length: {way: {"seconds": rate, "cpu_seconds": rate,
        "computed": tokens of each}}}, "ratio": {length: {way: rate / that of the pool}},
        "steady": {way: figures, see `pool_steady.Way`}, "compute_cpu_ms": of a page, "page_bytes",
        "codec", "prices"}`. Processor seconds are the second process's.

    Raises:
        CheckpointError: the base cannot be loaded.
        ConfigError: the store cannot be made.
        BenchmarkError: the engines' answers differ, or one of them does not answer.
    """
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="pshare-bench-pool-") as name:
        folder = Path(name)
        store = KvStoreConfig(
            path=str(folder / "pool"), bytes=options.store_bytes, codec=options.codec
        )
        longest = max(options.lengths)
        spec = EngineSpec(
            options.base, options.dtype, longest, _KEPT_PROMPTS, options.page_size, store
        )
        for side in ("first", "second"):
            (folder / side).mkdir()
        with first_engine(spec, folder / "first") as first:
            first.wait_until_ready()
            sizes = longest, _KEPT_PROMPTS, options.page_size
            with (
                engine_of(options.base, options.dtype, *sizes, store) as engine,
                _socket(engine, folder / "second") as (end, remote),
            ):
                contexts = list(_contexts(options, engine, first))
                end.know([piece for context in contexts for piece in context.pieces])
                found = [(context, _ask(engine, context)) for context in contexts]
                steady = _steady(options, engine, first, remote, contexts, folder)
                assert engine.store is not None
                prices = msgspec.to_builtins(engine.store.prices, str_keys=True)
                page_bytes = engine._layout.bytes_per_page
                codec = engine.store.service.tiers[0].pool.spec.codec
    return {
        "options": asdict(options),
        **figures([(c.way, len(c.tokens), answer) for c, answer in found], options.page_size),
        "steady": steady,
        "page_bytes": page_bytes,
        "codec": codec,
        "prices": prices,
    }


def figures(found: Sequence[tuple[str, int, FirstToken]], page_size: int) -> dict[str, Any]:
    """What the first tokens come to.

    Args:
        found: the way, the context's tokens, and what was measured.
        page_size: tokens of a page.
    """
    first_token: dict[str, dict[str, Any]] = {}
    ratio: dict[str, dict[str, float]] = {}
    computing: list[float] = []
    for length in sorted({length for _, length, _ in found}):
        ways = first_token[str(length)] = {}
        for way in WAYS:
            ones = [one for w, n, one in found if (w, n) == (way, length)]
            ways[way] = {
                "seconds": asdict(Rate.of([one.seconds for one in ones])),
                "cpu_seconds": asdict(Rate.of([one.cpu_seconds for one in ones])),
                "computed": [one.computed for one in ones],
            }
            if way == OWN:
                computing += [1e3 * one.cpu_seconds / one.computed * page_size for one in ones]
        shared = ways[POOL]["seconds"]["median"]
        ratio[str(length)] = {way: ways[way]["seconds"]["median"] / shared for way in WAYS}
    return {
        "first_token": first_token,
        "ratio": ratio,
        "compute_cpu_ms": statistics.median(computing),
    }


@contextmanager
def _socket(engine: Orchestrator, folder: Path) -> Iterator[tuple[SocketEnd, RemotePages]]:
    """Lets an engine get pages over a socket, of those that it is told of."""
    executor = engine.workers.prefill[0].executor
    inner = executor.store
    assert isinstance(inner, WorkerEnd)
    offers = OfferFolder(folder)
    remote = RemotePages("second", executor.programs, executor.pool, offers)
    executor.store = end = SocketEnd(inner, remote, inner.send)
    try:
        yield end, remote
    finally:
        executor.store = inner
        end.close()
        offers.close()


def _contexts(options: PoolOptions, engine: Orchestrator, first: FirstEngine) -> Iterator[_Context]:
    """Random contexts, which the first engine answers."""
    rng = np.random.default_rng(options.seed)
    vocabulary = engine.model_config.vocab_size
    for length in options.lengths:
        for repeat in range(options.repeats):
            for way in WAYS:
                id = f"{way}, {length}, {repeat}"
                prompt = tuple(rng.integers(0, vocabulary, length).tolist())
                # What has another salt the second engine cannot find.
                salt = _SALT if way == OWN else ""
                answer, pieces = first.ask(id, prompt, salt, offering=way == SOCKET)
                yield _Context(id, way, prompt, answer.tokens, pieces)


def _ask(engine: Orchestrator, context: _Context) -> FirstToken:
    found = first_token(engine, context.id, context.tokens)
    settle(engine)
    if found.tokens != context.answer:
        raise BenchmarkError(
            f"{context.id}: the engines' answers differ, {found.tokens} and {context.answer}"
        )
    return found


def _steady(
    options: PoolOptions,
    engine: Orchestrator,
    first: FirstEngine,
    remote: RemotePages,
    contexts: Sequence[_Context],
    folder: Path,
) -> dict[str, dict[str, float]]:
    """Of each way that pages go, with the pages of a piece that was on offer."""
    piece = max((p for c in contexts for p in c.pieces), key=lambda piece: len(piece.keys))
    staged = _pages(engine, piece)
    count = staged.shape[1]
    ways = {"pool, raw": pool_steady.through_pool("raw", None, staged, folder, options.rounds)}
    if supported(staged[:, 0].shape, staged.dtype.name):
        sample = np.ascontiguousarray(np.moveaxis(staged.view(np.uint16), 1, 0))
        book = calibrate("planes", sample)
        ways["pool, planes"] = pool_steady.through_pool(
            "planes", book, staged, folder, options.rounds
        )
    page_bytes = staged.nbytes // count
    ways["socket"] = pool_steady.through_socket(first, remote, count, page_bytes, options.rounds)
    return {name: asdict(way) for name, way in ways.items()}


def _pages(engine: Orchestrator, piece: Piece) -> np.ndarray:
    """The pages of a piece, out of the pool that the engines share; as many as a transfer takes."""
    assert engine.store is not None
    service, executor = engine.store.service, engine.workers.prefill[0].executor
    assert isinstance(executor.store, SocketEnd)
    count = max(bucket for bucket in TRANSFER_BUCKETS if bucket <= len(piece.keys))
    staged = np.zeros(executor.programs.staged_shape(count), executor.programs.layout.dtype)
    tier = service.tiers[0]
    keys = executor.store.store_keys(piece.keys[:count])
    wrong, _ = tier.get(keys, piece.tokens[:count], staged, range(count), tier.pool.buffer())
    if any(wrong):
        raise BenchmarkError(f"the pool has lost pages: {wrong}; give it more `store_bytes`")
    return staged


def lines(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    shown = ["First token of a second engine over contexts that the first has computed:"]
    for length, ways in result["first_token"].items():
        for way, found in ways.items():
            rate, cpu = found["seconds"], found["cpu_seconds"]
            ratio = result["ratio"][length][way]
            shown.append(
                f"  {length} tokens, {way}: {1e3 * rate['median']:.0f} ms ({1e3 * rate['low']:.0f}"
                f" .. {1e3 * rate['high']:.0f}), {ratio:.1f} times the pool's, processor "
                f"{1e3 * cpu['median']:.0f} ms, computed tokens {found['computed']}"
            )
    shown.append(f"Computing a page takes {result['compute_cpu_ms']:.1f} ms of a processor.")
    return [*shown, *pool_steady.lines(result["steady"], result["page_bytes"])]
