"""A KV store in worker processes: nobody computes what any of them has computed before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pshare_jax.config import KvStoreConfig, RouterConfig
from pshare_jax.core.prices import DISK, SHARED, Prices
from pshare_jax.core.stats import EngineStats, TierStats, together
from pshare_jax.engine.kv_store import EngineStore
from tests.cluster.harness import Cluster, running_cluster
from tests.engine.harness import Client, Models, Reply, lora_module, wait_until
from tests.helpers import tiny_config

FREE = Prices(1.0, 0.0, {SHARED: 0.0, DISK: 0.0}, {SHARED: 0.0, DISK: 0.0})
"""Computing is so dear that whatever the store has is fetched."""

PAGE = 8


@pytest.fixture(scope="module")
def models() -> Models:
    config = tiny_config()
    models = Models(config)
    models.add_full("full", 1)
    models.add_lora("lora", lora_module(config, 3, rank=2, targets=("q", "v")))
    return models


@pytest.fixture(scope="module")
def cluster(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two prefill workers over one pool in memory; prompts go where least waits."""
    folder = tmp_path_factory.mktemp("store")
    settings = {
        "kv_store": KvStoreConfig(path=str(folder / "pool"), bytes=4 << 20),
        "router": RouterConfig(policy="load"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineStore, "_measure", lambda self, tiers: FREE)
        with running_cluster(models, folder, decode=1, settings=settings) as cluster:
            yield cluster
            cluster.check_idle()


def prompt_of(seed: int, length: int = 60) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def settle(cluster: Cluster) -> None:
    """Waits until what was used has been written, and the frontends have heard of it."""
    for host in cluster.hosts.values():
        for worker in host.hosted.prefill:
            store = worker.core.store
            assert store is not None
            wait_until(lambda store=store: store.behind.idle and not store.waits)
            known = store.behind.known()
            for client in cluster.clients:
                stored = client.engine._dispatcher._router._stored
                wait_until(lambda known=known, stored=stored: set(known) <= set(stored))


def computed(models: Models, client: Client, model: str, prompt: list[int]) -> tuple[int, Reply]:
    reply = client.generate(model, prompt)
    assert reply.usage is not None
    assert reply.tokens == models.expected(model, prompt)
    return reply.usage.computed_tokens, reply


def alone(cluster: Cluster, name: str) -> None:
    """Kills one prefill worker, and waits until the frontends have noticed."""
    cluster.hosts[name].kill()
    for client in cluster.clients:
        router = client.engine._dispatcher._router
        wait_until(lambda router=router: name not in router.prefill_workers)


def again(cluster: Cluster, name: str) -> None:
    cluster.again(name)
    for client in cluster.clients:
        router = client.engine._dispatcher._router
        wait_until(lambda router=router: name in router.prefill_workers)


def test_restarted_workers_know_what_was_computed(cluster: Cluster, models: Models) -> None:
    """Both have died: the prompt comes out of the pool that they have left, its end too."""
    client, prompt = cluster.clients[0], prompt_of(1)
    assert computed(models, client, "full", prompt)[0] == 59
    settle(cluster)
    for name in ("prefill0", "prefill1"):
        alone(cluster, name)
        again(cluster, name)
    assert computed(models, client, "lora", prompt)[0] == 0


@pytest.mark.parametrize("victim", ["prefill0", "prefill1"])
def test_when_a_prefill_worker_dies_another_covers_what_is_missing(
    cluster: Cluster, models: Models, victim: str
) -> None:
    """The rest comes out of the store, and what the decode worker has stays there."""
    client, prompt = cluster.clients[0], prompt_of(3 + int(victim[-1]), 57)
    (decode,) = cluster.hosts["decode0"].hosted.decode
    assert computed(models, client, "full", prompt)[0] == 56
    settle(cluster)
    pulled = decode.core.stats.handoff_pages["lora"]
    alone(cluster, victim)
    # 7 full pages are known, the last three of 10 are not.
    count, _ = computed(models, client, "lora", [*prompt, *prompt_of(9, 20)])
    assert count == 76 - 56
    assert decode.core.stats.handoff_pages["lora"] - pulled == 3
    again(cluster, victim)


def test_prompts_go_where_least_waits(cluster: Cluster, models: Models) -> None:
    """Also by a frontend that has come after all was written."""
    prompt = prompt_of(11)
    computed(models, cluster.clients[0], "full", prompt)
    settle(cluster)
    late = cluster.frontend()
    settle(cluster)
    router = late.engine._dispatcher._router
    holders = [name for name, view in router._prefill.items() if view.held]
    assert holders
    assert computed(models, late, "lora", prompt)[0] == 0
    late.engine.stop()
    cluster.clients.remove(late)


def test_what_all_have_done_with_the_store_is_added_up(cluster: Cluster, models: Models) -> None:
    """Slots of the one pool are counted once, and counters do not fall when a worker dies."""
    client = cluster.clients[0]
    computed(models, client, "full", prompt_of(12))
    settle(cluster)
    stores = [w.core.store for h in cluster.hosts.values() for w in h.hosted.prefill]
    looks = sum(store.stats.looks for store in stores if store is not None)
    hosts = [cluster.hosts[name].hosted for name in ("prefill0", "prefill1")]
    here = [host._store.stats()[1]["shared"] for host in hosts if host._store is not None]
    assert here[0].slots == here[1].slots
    assert here[0].pool == here[1].pool
    # It is heard with the next beats.
    wait_until(lambda: client.engine.stats().tiers["shared"].slots == here[0].slots)
    wait_until(lambda: client.engine.stats().tiers["shared"].stored >= here[0].stored)
    total = client.engine.stats()
    assert total.tiers["shared"].slots["ready"] > 0
    stored = total.tiers["shared"].stored
    alone(cluster, "prefill0")
    assert client.engine.stats().tiers["shared"].stored >= stored
    again(cluster, "prefill0")
    settle(cluster)
    wait_until(lambda: looked(client) >= looks)
    after = client.engine.stats()
    assert after.tiers["shared"].stored >= stored


def looked(client: Client) -> float:
    return sum(asked["looks"] for asked in client.engine.stats().store.values())


def tier(pool: str, **figures: int) -> TierStats:
    slots, missed = {"ready": figures.pop("ready", 0)}, {"missing": figures.pop("missing", 0)}
    return TierStats(slots, figures["hits"], 0, missed, {}, 0, 0, 0, 0.0, 0.0, 1, 2, pool)


def test_tiers_of_one_pool_and_of_two() -> None:
    first, second = tier("a", ready=5, hits=2, missing=1), tier("a", ready=5, hits=3, missing=4)
    other = tier("b", ready=7, hits=1)
    dead = first.of_the_dead()
    (found,) = together(
        [EngineStats(tiers={"shared": one}) for one in (first, second, other, dead)]
    ).tiers.values()
    assert found.slots == {"ready": 12}
    assert (found.hits, found.missed) == (8, {"missing": 6})
    assert (found.buried, found.rebuilt) == (2, 4)
