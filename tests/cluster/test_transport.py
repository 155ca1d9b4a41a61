"""Ways for pages between real engines: from device to device, and what is done when that fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.core.connector import TransferError
from pshare_jax.kv import direct, remote
from pshare_jax.kv.direct import DirectOffers
from pshare_jax.kv.peers import Claimed
from tests.cluster.harness import Cluster, running_cluster
from tests.engine.harness import Models, wait_until
from tests.helpers import tiny_config

TOKENS = 8


@pytest.fixture(scope="module")
def models() -> Models:
    models = Models(tiny_config())
    models.add_full("full", 1)
    return models


@pytest.fixture(scope="module")
def cluster(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A pair of workers that both say that they would have pages go from device to device."""
    folder = tmp_path_factory.mktemp("transport")
    with pytest.MonkeyPatch.context() as patch:
        # The machine may be busy.
        patch.setattr(direct, "PULL_SECONDS", 60.0)
        with running_cluster(
            models, folder, prefill=1, decode=1, transport="jax-transfer"
        ) as cluster:
            yield cluster
            cluster.check_idle()


@pytest.fixture(autouse=True)
def _trusts(cluster: Cluster) -> None:
    """What one test has made of the way is not another one's."""
    cluster.hosts["decode0"].hosted.pages.ends["decode0"]._avoided.clear()


def counts(cluster: Cluster) -> tuple[int, int, int]:
    """Transfers from device to device, by file, and those that failed."""
    hosted = cluster.hosts["decode0"].hosted
    moved = hosted.pages.ends["decode0"].moved
    return moved["jax-transfer"], moved["shm"], hosted.decode[0].core.stats.failed_transfers


def ask(cluster: Cluster, models: Models, seed: int) -> tuple[int, int, int]:
    """Asks for a prompt that nobody has seen; by how much the counts have grown."""
    before = counts(cluster)
    prompt = np.random.default_rng(seed).integers(0, 256, 50).tolist()
    reply = cluster.clients[0].generate("full", prompt, TOKENS)
    assert reply.tokens == models.expected("full", prompt, TOKENS)
    moved, files, failed = (new - old for new, old in zip(counts(cluster), before, strict=True))
    return moved, files, failed


def test_pages_go_from_device_to_device(cluster: Cluster, models: Models) -> None:
    """What has come is said to have come, so that nothing counts as lost."""
    assert ask(cluster, models, 1) == (1, 0, 0)
    offers = cluster.hosts["prefill0"].hosted.pages.direct
    assert offers is not None
    wait_until(lambda: not offers._claimed)
    assert len(offers) == 0


def test_what_does_not_come_goes_by_file(
    cluster: Cluster, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and for a while at once; then it is tried again."""

    def pull(self: DirectOffers, claimed: Claimed, pieces: Sequence[Any]) -> list[jax.Array]:
        raise TransferError("it has not come")

    with monkeypatch.context() as patch:
        patch.setattr(DirectOffers, "pull", pull)
        assert ask(cluster, models, 2) == (0, 1, 1)
        assert ask(cluster, models, 3) == (0, 1, 0)
    assert ask(cluster, models, 4) == (0, 1, 0)
    end = cluster.hosts["decode0"].hosted.pages.ends["decode0"]
    now = end._clock()
    monkeypatch.setattr(end, "_clock", lambda: now + remote.AVOID_SECONDS)
    # Who offers hears of it with the release of a transfer, and offers the next one directly.
    assert ask(cluster, models, 5) == (0, 1, 0)
    assert ask(cluster, models, 6) == (1, 0, 0)


def test_a_flipped_bit_is_found(
    cluster: Cluster, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = DirectOffers.pull

    def pull(self: DirectOffers, claimed: Claimed, pieces: Sequence[Any]) -> list[jax.Array]:
        found = plain(self, claimed, pieces)
        first = np.array(found[0])
        first.view(np.uint32)[0, 0, 0, 0, 0, 0] ^= 1
        return [jax.device_put(first, found[0].sharding), *found[1:]]

    monkeypatch.setattr(DirectOffers, "pull", pull)
    assert ask(cluster, models, 6) == (0, 1, 1)


def test_who_has_lost_too_much_offers_files(
    cluster: Cluster, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    offers = cluster.hosts["prefill0"].hosted.pages.direct
    monkeypatch.setattr(offers, "_lost", 2**31)
    assert ask(cluster, models, 7) == (0, 1, 0)


def test_pages_come_back_from_the_decode_side(cluster: Cluster, models: Models) -> None:
    """A prefill worker that has started anew gets them by the same way."""
    assert come_back(cluster, models, 8) == {"shm": 0, "http": 0, "jax-transfer": 1}


def come_back(cluster: Cluster, models: Models, seed: int) -> dict[Any, int]:
    """Has the prefill worker end and another come, which borrows a prompt; and by which way."""
    prompt = np.random.default_rng(seed).integers(0, 256, 50).tolist()
    client = cluster.clients[0]
    client.generate("full", prompt, TOKENS)
    view = client.engine._dispatcher._router._decode["decode0"]
    wait_until(lambda: len(view.held) >= 6)
    cluster.hosts["prefill0"].kill()
    host = cluster.again("prefill0")
    wait_until(lambda: not client.engine.failed_workers)
    longer = [*prompt, *range(10)]
    reply = client.generate("full", longer, TOKENS)
    assert reply.tokens == models.expected("full", longer, TOKENS)
    assert reply.usage is not None
    assert reply.usage.cached_tokens == 48
    return host.hosted.pages.ends["prefill0"].moved


def test_by_http_alone(models: Models, tmp_path: Path) -> None:
    """On one host, too, if that is asked for."""
    with running_cluster(models, tmp_path, prefill=1, decode=1, transport="http") as cluster:
        client = cluster.clients[0]
        assert client.generate("full", [*range(30)], 4).tokens == models.expected(
            "full", [*range(30)], 4
        )
        assert cluster.hosts["decode0"].hosted.pages.ends["decode0"].moved == {
            "shm": 0,
            "http": 1,
            "jax-transfer": 0,
        }
        assert come_back(cluster, models, 9) == {"shm": 0, "http": 1, "jax-transfer": 0}
        cluster.check_idle()


def test_pages_that_come_coded_give_the_same_tokens(models: Models, tmp_path: Path) -> None:
    """From another host in bfloat16: as they are, and by `planes`."""
    models = Models(models.config)
    models.base = {name: array.astype(jnp.bfloat16) for name, array in models.base.items()}
    models.add_identity("identity")
    prompts = [np.random.default_rng(seed).integers(0, 256, 50).tolist() for seed in (1, 2)]
    found: dict[str, list[list[int]]] = {}
    for codec in ("raw", "planes"):
        folder = tmp_path / codec
        folder.mkdir()
        ways: Any = {"transport": "http", "codec": codec, "settings": {"dtype": "bfloat16"}}
        with running_cluster(models, folder, prefill=1, decode=1, **ways) as cluster:
            client = cluster.clients[0]
            found[codec] = [client.generate("identity", p, TOKENS).tokens for p in prompts]
            stats = cluster.hosts["decode0"].hosted.stats()
            assert {key[:3] for key in stats.transfer_bytes} == {("decode0", "http", codec)}
            raw, wire = (
                stats.transfer_bytes["decode0", "http", codec, kind] for kind in ("raw", "wire")
            )
            assert (wire < raw) is (codec == "planes")
            assert stats.transfers == {("decode0", "http"): 2}
            assert (stats.miscoded, stats.failed_transfers) == ({}, {"decode0": 0})
            cluster.check_idle()
    assert found["raw"] == found["planes"]
