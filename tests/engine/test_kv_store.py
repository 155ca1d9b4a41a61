"""Engines with a KV store: tokens are the oracle's, and what is known is not computed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.config import (
    DecodeConfig,
    KvStoreConfig,
    PrefillConfig,
    RouterConfig,
    ServeConfig,
)
from pshare_jax.core.prices import DISK, SHARED, Prices
from pshare_jax.core.requests import FinishReason, Session
from pshare_jax.engine import numerics
from pshare_jax.engine.kv_store import EngineStore, page_shape, store_root
from pshare_jax.engine.numerics import code_digest
from pshare_jax.errors import ConfigError
from pshare_jax.kernels.native.library import require_library
from pshare_jax.kv.store.file import HEADER, PoolRequest, Regions
from pshare_jax.runtime.layout import PageLayout
from tests.engine.harness import PAGE, Client, Models, Reply, running, serve_config, wait_until

FREE = Prices(1.0, 0.0, {SHARED: 0.0, DISK: 0.0}, {SHARED: 0.0, DISK: 0.0})
"""Computing is so dear that whatever the store has is fetched."""

MEASURE = EngineStore._measure


@pytest.fixture(autouse=True)
def _prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineStore, "_measure", lambda self, tiers: FREE)


def with_store(folder: Path, **settings: Any) -> ServeConfig:
    """The configuration of most tests with a store, and pools so small that pages are evicted."""
    overrides = {k: settings.pop(k) for k in ("connector", "dtype") if k in settings}
    settings = {"path": str(folder / "pool"), "bytes": 4 << 20, **settings}
    return serve_config(
        prefill=PrefillConfig(chunk_buckets=[4, 16], num_pages=20),
        decode=DecodeConfig(
            batch_buckets=[1, 4],
            max_num_seqs=8,
            replay_buckets=[4],
            num_pages=28,
            steps_per_dispatch=4,
        ),
        kv_store=KvStoreConfig(**settings),
        **overrides,
    )


def asked(client: Client) -> dict[str, float]:
    return dict(client.engine.stats().store["prefill0"])


def settle(client: Client) -> None:
    """Waits until what was used has been written."""
    for worker in client.engine.workers.prefill:
        store = worker.core.store
        assert store is not None
        wait_until(lambda store=store: store.behind.idle and not store.waits)


def held_slots(client: Client) -> int:
    """Slots of all tiers that are pinned or being written."""
    tiers = client.engine.stats().tiers.values()
    return sum(tier.slots["pinned"] + tier.slots["writing"] for tier in tiers)


@contextmanager
def served(models: Models, config: ServeConfig) -> Iterator[Client]:
    """An engine that has written everything, staged nothing and pinned nothing when it ends."""
    with running(models, config) as client:
        yield client
        settle(client)
        for worker in client.engine.workers.prefill:
            wait_until(lambda worker=worker: worker.executor.store.num_staged == 0)  # type: ignore[union-attr]
        # What has left the staging memory may still be on its way to the disk.
        wait_until(lambda: not held_slots(client))
        client.check_idle()


def context(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def computed_for(client: Client, model: str, prompt: list[int], **params: Any) -> tuple[int, Reply]:
    reply = client.generate(model, prompt, **params)
    assert reply.usage is not None
    return reply.usage.computed_tokens, reply


@pytest.mark.parametrize("connector", ["auto", "same-mesh"])
def test_rule_2_oracle_with_a_store(tmp_path: Path, models: Models, connector: str) -> None:
    """Contexts that the pools do not hold go round; half of what is asked is in the store."""
    rng = np.random.default_rng(0)
    contexts = [context(seed, 100) for seed in range(6)]
    names = list(models.full_weights)
    requests = []
    for i in range(60):
        prompt = contexts[rng.integers(6)][: rng.integers(9, 100)]
        requests.append((names[i % len(names)], [*prompt, *context(i, i % 4)]))
    expected = [models.expected(name, prompt) for name, prompt in requests]
    config = with_store(tmp_path, connector=connector, disk_path=str(tmp_path / "disk"))
    config = replace(config, kv_store=replace(config.kv_store, disk_bytes=4 << 20))
    with served(models, config) as client:
        for first in range(0, len(requests), 12):
            replies = [client.submit(*request) for request in requests[first : first + 12]]
            for reply, tokens in zip(replies, expected[first : first + 12], strict=True):
                assert reply.wait().reason is FinishReason.LENGTH
                assert reply.tokens == tokens
            settle(client)
        assert asked(client)["fetched_tokens"] > 300
        stats = client.engine.stats()
        assert stats.compiles == 0
        assert stats.tiers["shared"].hits > 30
        assert stats.tiers["disk"].stored > 10
        shown = [page for c in client.engine.sharing_map().contexts for page in c.pages]
        assert shown
        # All was written that is full, and the disk has what was used twice.
        assert all("shared" in page.tiers for page in shown if page.tokens == PAGE)
        assert {tuple(page.tiers) for page in shown} <= {(), ("shared",), ("shared", "disk")}
        assert any("disk" in page.tiers for page in shown)


def test_a_restarted_engine_knows_what_it_has_computed(tmp_path: Path, models: Models) -> None:
    """Without computing anything, also the end of a prompt that does not fill its page."""
    config = with_store(tmp_path)
    prompts = {
        "identity": context(1, 100),
        "full-tail2": context(1, 77),
        "isolated": context(2, 90),
    }
    with served(models, config) as client:
        for name, prompt in prompts.items():
            client.generate(name, prompt)
    with served(models, config) as client:
        for name, prompt in prompts.items():
            computed, reply = computed_for(client, name, prompt)
            assert computed == 0
            assert reply.tokens == models.expected(name, prompt)
        branch = [*prompts["identity"][:50], *context(3, 20)]
        computed, reply = computed_for(client, "full", branch)
        assert computed == len(branch) - 1 - 48, "the full pages of the common beginning are there"
        assert reply.tokens == models.expected("full", branch)


def test_pages_of_others_are_not_found(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tenant's, and another base's."""
    prompt = context(1, 60)
    with served(models, with_store(tmp_path)) as client:
        client.generate("identity", prompt)
        settle(client)
        assert computed_for(client, "identity", prompt, cache_salt="another")[0] == 59
        assert client.engine.stats().tiers["shared"].missed == {"missing": 16}
    base = replace(models.base_source, fingerprint="another base")
    monkeypatch.setattr(Models, "base_source", base)
    monkeypatch.setattr(models, "sources", [s for s in models.sources if not s.certificate])
    with served(models, with_store(tmp_path)) as client:
        computed, reply = computed_for(client, "identity", prompt)
        assert computed == 59
        assert asked(client)["looks"] == 1
        assert client.engine.stats().tiers["shared"].missed == {"missing": 8}
        assert reply.tokens == models.expected("identity", prompt)


def test_damaged_pages_are_computed_again(tmp_path: Path, models: Models) -> None:
    """Whether a record is not what it was, or its tokens, or its checksum."""
    prompt, config = context(1, 100), with_store(tmp_path)
    with served(models, config) as client:
        client.generate("identity", prompt)
        shape = page_shape(client.engine._layout)
    damage(tmp_path / "pool", shape)
    with served(models, config) as client:
        computed, reply = computed_for(client, "identity", prompt)
        assert computed == 99
        assert reply.tokens == models.expected("identity", prompt)
        missed = client.engine.stats().tiers["shared"].missed
        assert missed["checksum"] == 13
        settle(client)
        assert client.engine.stats().tiers["shared"].stored == 13, "what was wrong is replaced"


def damage(path: Path, shape: tuple[int, ...]) -> None:
    """Flips a bit of every record: of its page, of its tokens, or of its checksum."""
    page_bytes = 4 * int(np.prod(shape))
    request = PoolRequest(shape, "float32", page_bytes, 4 << 20, ("raw",), lambda: None)
    spec = request.spec("raw")
    regions = Regions(spec)
    data = np.memmap(path, np.uint8, "r+")
    first, end = regions.at["headers"]
    headers = data[first:end].view(HEADER)
    records = data[regions.records :].reshape(spec.slots, spec.slot_bytes)
    records[::3, 4 * PAGE + 1000] ^= 16
    records[1::3, 0] ^= 1
    headers["checksum"][2::3] ^= 1
    data.flush()


def test_two_engines_share_a_pool(tmp_path: Path, models: Models) -> None:
    """What one has computed the other has at once, and nothing is computed twice."""
    config = with_store(tmp_path)
    with served(models, config) as first, served(models, config) as second:
        for seed, (asks, finds) in enumerate([(first, second), (second, first)]):
            prompt = context(seed, 90)
            assert computed_for(asks, "lora", prompt)[0] == 89
            settle(asks)
            computed, reply = computed_for(finds, "full", prompt)
            assert computed == 0
            assert reply.tokens == models.expected("full", prompt)
        assert second.engine.stats().tiers["shared"].slots["ready"] == 24


@pytest.mark.parametrize("hints", [True, False])
def test_the_next_agents_pages_are_fetched_before_they_are_asked_for(
    tmp_path: Path, models: Models, hints: bool
) -> None:
    """Four agents of a session with contexts of their own, of which the pool holds two."""
    agents = ["identity", "full", "lora", "full-tail2"]
    contexts = {name: context(i, 60) for i, name in enumerate(agents)}
    config = with_store(tmp_path, prefetch="next-agent")
    replies: list[tuple[str, list[int], list[int]]] = []
    with served(models, config) as client:
        page_bytes = client.engine._layout.bytes_per_page
        for turn in range(3):
            for i, name in enumerate(agents):
                before = asked(client)
                following = agents[(i + 1) % 4]
                session = Session("s", next_models=(following,) if hints else ())
                reply = client.generate(name, contexts[name], session=session)
                replies.append((name, contexts[name], reply.tokens))
                knows = turn > 0 or (hints and i == 3)
                if knows:
                    last = len(contexts[following]) - 4
                    arrived = before["early_bytes"] + -(-(last - 1) // PAGE) * page_bytes
                    wait_until(lambda arrived=arrived: asked(client)["early_bytes"] == arrived)
                if turn and (turn, i) != (1, 0):
                    fetched = asked(client)["fetched_tokens"] - before["fetched_tokens"]
                    assert fetched == 0, "it was there"
                    assert reply.usage is not None
                    assert reply.usage.computed_tokens <= 4
                settle(client)
                contexts[name] = [*contexts[name], *context(100 * turn + i, 4)]
        found = asked(client)
        assert found["early_used_bytes"] + found["early_wasted_bytes"] <= found["early_bytes"]
        assert found["early_used_bytes"] >= 7 * 7 * page_bytes
        assert client.engine.stats().compiles == 0
    for name, prompt, tokens in replies:
        assert tokens == models.expected(name, prompt)


def test_by_load_engines_use_what_others_have_computed(tmp_path: Path, models: Models) -> None:
    config = with_store(tmp_path)
    config = replace(
        config,
        prefill=replace(config.prefill, engines=2),
        router=RouterConfig("load"),
    )
    prompt = context(1, 60)
    with served(models, config) as client:
        client.generate("identity", prompt)
        settle(client)
        wait_until(lambda: client.engine._dispatcher._router._stored)
        requests = [("identity", [*prompt, *context(i, 20)]) for i in range(12)]
        replies = [client.submit(*request) for request in requests]
        replies = [reply.wait() for reply in replies]
        assert client.engine.stats().compiles == 0
        workers = client.engine.stats().store
        assert client.computed() <= 59 + 12 * 24
        assert max(workers[name]["fetched_tokens"] for name in workers) >= 56
    for request, reply in zip(requests, replies, strict=True):
        assert reply.tokens == models.expected(*request)


def test_bfloat16_pages_are_compressed_and_come_back_bit_for_bit(
    tmp_path: Path, models: Models
) -> None:
    """A random model's KV has no structure but that it is normal: still it takes less."""
    config = with_store(tmp_path, dtype="bfloat16", codec="planes")
    models = Models(models.config)
    models.base = {name: array.astype(jnp.bfloat16) for name, array in models.base.items()}
    models.add_identity("identity")
    prompts = [context(seed, 100) for seed in range(3)]
    with served(models, config) as client:
        before = [client.generate("identity", prompt, logprobs=3) for prompt in prompts]
        settle(client)
        tier = client.engine.stats().tiers["shared"]
    assert tier.stored == 39
    assert tier.raw_bytes_written / tier.bytes_written > 1.3
    with served(models, config) as client:
        for prompt, reply in zip(prompts, before, strict=True):
            computed, again = computed_for(client, "identity", prompt, logprobs=3)
            assert computed == 0
            assert (again.tokens, again.logprobs) == (reply.tokens, reply.logprobs)


def test_a_file_that_is_cut_short_while_serving_is_left_out(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prices are measured here, too."""
    measured: list[Prices] = []
    monkeypatch.setattr(
        EngineStore, "_measure", lambda self, t: measured.append(MEASURE(self, t)) or FREE
    )
    with running(models, with_store(tmp_path)) as client:
        (prices,) = measured
        assert 0 < prices.token < 1
        assert prices.pair >= 0
        assert 0 < prices.page[SHARED] < 1
        assert 0 < prices.call[SHARED] < 1
        assert client.engine.stats().tiers["shared"].slots["ready"] == 0, "probes are gone"
        prompt = context(1, 100)
        client.generate("identity", prompt)
        settle(client)
        (tmp_path / "pool").write_bytes(b"")
        for seed in range(2, 5):
            prompt = context(seed, 100)
            computed, reply = computed_for(client, "full", prompt)
            assert computed == 99
            assert reply.tokens == models.expected("full", prompt)
        stats = client.engine.stats()
        assert stats.tiers["shared"].missed["io"] >= 1
        assert client.engine.failed_workers == {}


def test_settings_that_cannot_be_served_are_refused_by_name(tmp_path: Path, models: Models) -> None:
    cases = {
        "kv_store: needs a `path`": {"path": "", "bytes": 0, "disk_path": "/x"},
        r"kv_store\.bytes: must be the size": {"bytes": 0},
        r"kv_store\.disk_bytes: must be the size": {"disk_path": "/x"},
        "are the same file": {"disk_path": str(tmp_path / "pool"), "disk_bytes": 1},
        r"kv_store\.prefetch: needs": {"prefetch": "next-agent", "prefetch_bytes": 0},
    }
    for message, settings in cases.items():
        with (
            pytest.raises(ConfigError, match=message),
            running(models, with_store(tmp_path, **settings)),
        ):
            pass


def test_roots_tell_layouts_and_kernels_apart(models: Models) -> None:
    layout = PageLayout.of(models.config, PAGE, jnp.dtype(jnp.float32))
    roots = {
        store_root(layout, "float32", "xla", 1),
        store_root(layout, "float32", "cpu_ffi", 1),
        store_root(layout, "float32", "xla", 2),
        store_root(replace(layout, page_size=16), "float32", "xla", 1),
        store_root(replace(layout, dtype=jnp.dtype(jnp.bfloat16)), "float32", "xla", 1),
        store_root(replace(layout, num_layers=9), "float32", "xla", 1),
        store_root(layout, "bfloat16", "xla", 1),
    }
    with jax.default_matmul_precision("highest"):
        roots.add(store_root(layout, "float32", "xla", 1))
    assert len(roots) == 8


def test_roots_tell_units_of_one_cpu_apart(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PSHARE_AMX=0 the same library sums in another order than without."""
    layout = PageLayout.of(models.config, PAGE, jnp.dtype(jnp.bfloat16))
    roots = set()
    for multiplier in ("vectors", "amx"):
        library = replace(require_library(), multiplier=multiplier)
        monkeypatch.setattr(numerics, "load_library", lambda found=library: found)
        roots.add(store_root(layout, "float32", "cpu_ffi", 1))
    assert len(roots) == 2


def test_roots_tell_versions_of_the_code_apart(tmp_path: Path) -> None:
    """A pool of an earlier version may hold what a mistake of that has computed."""
    (tmp_path / "models").mkdir()
    (tmp_path / "serve").mkdir()
    (tmp_path / "models/rope.py").write_text("BASE = 10_000")
    digests = [code_digest.__wrapped__(tmp_path)]
    (tmp_path / "serve/app.py").write_text("PORT = 8000")
    assert code_digest.__wrapped__(tmp_path) == digests[0], "it computes nothing"
    (tmp_path / "models/rope.py").write_text("BASE = 500_000")
    digests.append(code_digest.__wrapped__(tmp_path))
    (tmp_path / "models/rope.py").rename(tmp_path / "models/rotary.py")
    digests.append(code_digest.__wrapped__(tmp_path))
    assert len(set(digests)) == 3
