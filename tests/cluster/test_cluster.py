"""Real engines over links: the tokens of one process, whoever dies."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pshare_jax.cluster import wire
from pshare_jax.core.requests import FinishReason
from pshare_jax.kv import offers
from tests.cluster.harness import Cluster, ask, running_cluster
from tests.engine.harness import Models, lora_module, running, two_by_two, wait_until
from tests.helpers import tiny_config

TOKENS = 24
NAMES = ("full", "tail3", "lora")


@pytest.fixture(scope="module")
def models() -> Models:
    config = tiny_config()
    models = Models(config)
    models.add_full("full", 1)
    models.add_full("tail3", 2, tail=3)
    models.add_lora("lora", lora_module(config, 3, rank=2, targets=("q", "v")))
    return models


def prompts_of(seed: int, count: int, least: int = 3, most: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(least, most, count)
    return [rng.integers(0, 256, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def cluster(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """2 x 2 x 2, which all tests share that end nobody; it is idle at the end."""
    folder = tmp_path_factory.mktemp("cluster")
    with running_cluster(models, folder, frontends=2) as cluster:
        yield cluster
        cluster.check_idle()


def check(models: Models, asked: list[Any], tokens: int = TOKENS) -> None:
    for name, prompt, reply in asked:
        reply.wait(120)
        assert reply.reason is FinishReason.LENGTH, reply.error
        assert reply.tokens == models.expected(name, prompt, tokens), (name, len(prompt))


def test_greedy_tokens_are_the_oracle_s(cluster: Cluster, models: Models) -> None:
    asked = []
    for i, client in enumerate(cluster.clients):
        asked += ask(client, NAMES, prompts_of(i, 9), TOKENS)
    check(models, asked)


def test_seeded_tokens_are_those_of_one_process(cluster: Cluster, models: Models) -> None:
    prompts = prompts_of(5, 6)
    params = {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.1}
    with running(models, two_by_two()) as one:
        expected = [
            one.generate(NAMES[i % 3], prompt, TOKENS, seed=i, **params).tokens
            for i, prompt in enumerate(prompts)
        ]
    replies = [
        cluster.clients[i % 2].submit(NAMES[i % 3], prompt, TOKENS, seed=i, **params)
        for i, prompt in enumerate(prompts)
    ]
    assert [reply.wait().tokens for reply in replies] == expected


def test_the_second_model_computes_nothing(cluster: Cluster) -> None:
    """Though it is asked by way of the other frontend."""
    prompt = prompts_of(7, 1, 40, 60)[0]
    first = cluster.clients[0].generate("full", prompt, 4, cache_salt="twice")
    assert first.usage is not None
    assert first.usage.computed_tokens == len(prompt) - 1
    # The other frontend hears of what is there with the next message of the worker.
    router = cluster.clients[1].engine._dispatcher._router
    held = first.usage.prompt_tokens // 8 - 1
    wait_until(lambda: any(len(w.held) >= held for w in router._prefill.values()))
    second = cluster.clients[1].generate("lora", prompt, 4, cache_salt="twice")
    assert second.usage is not None
    assert second.usage.computed_tokens == 0
    assert second.usage.shared_tokens == len(prompt) - 1


def test_what_workers_do_is_counted_at_the_frontend(cluster: Cluster) -> None:
    client = cluster.clients[0]
    client.generate("tail3", [1, 2, 3], 7)
    workers = [worker for host in cluster.hosts.values() for worker in host.hosted.decode]
    done = sum(worker.core.stats.generation_tokens["tail3"] for worker in workers)
    assert done >= 7
    wait_until(lambda: client.engine.stats().generation_tokens["tail3"] == done)
    assert set(client.engine.stats().pools) == {"prefill0", "prefill1", "decode0", "decode1"}


def test_an_unlucky_byte_is_found(
    cluster: Cluster, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flipped on its way once, it is found, counted, and fetched again; nobody gets its token."""
    plain, flips = offers._write, itertools.count()

    def write(descriptor: int, data: memoryview) -> None:
        data = memoryview(bytearray(data))
        if next(flips) == 1:
            data[5] ^= 4
        plain(descriptor, data)

    monkeypatch.setattr(offers, "_write", write)
    client = cluster.clients[0]

    def failed() -> int:
        return sum(client.engine.stats().failed_transfers.values())

    before = failed()
    prompt = prompts_of(11, 1, 40, 50)[0]
    reply = client.generate("full", prompt, TOKENS)
    assert reply.tokens == models.expected("full", prompt, TOKENS)
    wait_until(lambda: failed() == before + 1)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"protocol": 99}, "protocol is 99 at the frontend and 4 at the worker"),
        ({"fingerprint": "other"}, "fingerprint is other at the frontend and base-print at the"),
        ({"max_model_len": 64}, "max_model_len is 64 at the frontend and 128"),
        ({"page": (2, 2, 16, 16)}, r"page is \(2, 2, 16, 16\) at the frontend"),
        ({"models": {"full": "0" * 16}}, "model 'full' is 0{16} at the frontend"),
        ({"models": {"new": "0" * 16}}, "model 'new' is not known at the worker"),
    ],
)
async def test_who_does_not_fit_is_told_why(
    cluster: Cluster, change: dict[str, Any], error: str
) -> None:
    station = cluster.hosts["prefill0"].station
    shape = msgspec.structs.replace(station._shape, dtype="")
    protocol = change.pop("protocol", wire.PROTOCOL)
    hello = wire.Hello(protocol, 1, msgspec.structs.replace(shape, **change))
    refusal = station._refusal(hello)
    assert refusal is not None
    assert not refusal.again
    assert re.search(error, refusal.reason), refusal.reason


def test_without_the_token_there_is_no_link(cluster: Cluster, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("another secret of some length")
    config = replace(cluster.config, cluster=replace(cluster.config.cluster, token_file=str(wrong)))
    client = cluster.frontend(config, ready=False)
    engine = client.engine
    wait_until(lambda: all("401" in why for why in engine.failed_workers.values()))
    assert not engine.ready
    engine.stop()
    cluster.clients.remove(client)


def test_workers_die_and_others_come(models: Models, tmp_path: Path) -> None:
    """Half-done requests go on elsewhere, each token once; what comes anew is used."""
    with running_cluster(models, tmp_path) as cluster:
        client = cluster.clients[0]
        for victim in ("decode1", "prefill0"):
            asked = ask(client, NAMES, prompts_of(len(victim), 9), 40)
            for _, _, reply in asked[:3]:
                reply.next_event()
            cluster.hosts[victim].kill()
            check(models, asked, 40)
            host = cluster.again(victim)
            wait_until(lambda host=host: host.station.num_frontends == 1)
        check(models, ask(client, NAMES, prompts_of(18, 6), 8), 8)
        cluster.check_idle()


def computed(cluster: Cluster) -> dict[str, int]:
    """Prompt tokens that each prefill worker has computed."""
    cores = {
        name: worker.core for name, host in cluster.hosts.items() for worker in host.hosted.prefill
    }
    return {
        name: sum(n for (_, source), n in core.stats.prefill_tokens.items() if source == "computed")
        for name, core in cores.items()
    }


def test_a_death_costs_only_what_is_missing(models: Models, tmp_path: Path) -> None:
    """A prefill worker gets what the decode side has; a decode worker's end costs no prompt."""
    prompt = prompts_of(51, 1, 50, 56)[0]
    pages = (len(prompt) - 1) // 8
    with running_cluster(models, tmp_path) as cluster:
        client = cluster.clients[0]
        client.generate("full", prompt, 4)
        router = client.engine._dispatcher._router
        wait_until(lambda: any(len(view.held) >= pages for view in router._decode.values()))
        [victim] = [name for name, count in computed(cluster).items() if count]
        cluster.hosts.pop(victim).kill()
        wait_until(lambda: client.engine.failed_workers)
        longer = [*prompt, *range(20)]
        reply = client.generate("lora", longer, TOKENS)
        assert reply.tokens == models.expected("lora", longer, TOKENS)
        assert reply.usage is not None
        assert reply.usage.computed_tokens == len(longer) - 1 - 8 * pages
        assert reply.usage.cached_tokens == 8 * pages
        [other] = {"prefill0", "prefill1"} - {victim}
        wait_until(lambda: client.engine.stats().borrowed_tokens == {other: 8 * pages})
        assert sum(client.engine.stats().failed_transfers.values()) == 0

        before = computed(cluster)
        params = {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5}
        asked = [client.submit("lora", longer, 30, **params) for _ in range(4)]
        for one in asked:
            one.next_event()
        hosts = [cluster.hosts[name] for name in ("decode0", "decode1")]
        lost = max(hosts, key=lambda host: len(host.call(host.hosted.decode[0].held_ids)))
        lost.kill()
        cluster.hosts.pop(lost.name)
        assert len({(one.wait().reason, *one.tokens) for one in asked}) == 1
        assert asked[0].tokens == client.generate("lora", longer, 30, **params).tokens
        assert computed(cluster) == before
        cluster.check_idle()


def test_a_pair_over_one_pool(models: Models, tmp_path: Path) -> None:
    """One chip does both: nothing is moved but the ends of prompts, within the process."""
    with running_cluster(models, tmp_path, prefill=0, decode=0, frontends=0) as cluster:
        hosts = [cluster.host("both", f"both{i}") for i in range(2)]
        client = cluster.frontend()
        asked = ask(client, NAMES, prompts_of(41, 8), TOKENS)
        check(models, asked)
        assert {name for host in hosts for name in [w.name for w in host.hosted.workers]} == {
            "prefill.both0",
            "decode.both0",
            "prefill.both1",
            "decode.both1",
        }
        cluster.check_idle()


def test_pages_cross_hosts(models: Models, tmp_path: Path) -> None:
    """Where folders in memory are not the same, pages come over HTTP."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with running_cluster(models, tmp_path, prefill=1, decode=0, frontends=0) as cluster:
        cluster.host("decode", "decode0", shm_path=str(elsewhere))
        client = cluster.frontend()
        check(models, ask(client, NAMES, prompts_of(43, 6), TOKENS))
        assert client.engine.stats().failed_transfers == {"decode0": 0}
        cluster.check_idle()
