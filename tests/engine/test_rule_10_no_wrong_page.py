"""Rule 10: a page that is not what was asked for is never read, and costs no more than a retry."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import msgspec
import numpy as np
import pytest

from pshare_jax.core import arrivals
from pshare_jax.core.arrivals import MAX_FETCHES
from pshare_jax.core.connector import Connector, TransferError, TransferState
from pshare_jax.core.dispatcher import MAX_LOST_ATTEMPTS
from pshare_jax.core.messages import PageDescriptor
from pshare_jax.core.pages.prefix_index import block_key, block_keys, root_key
from pshare_jax.core.plans import Offer, Pull
from pshare_jax.core.requests import FinishReason
from pshare_jax.kv.local import DevicePut, SamePool
from tests.engine.harness import (
    PAGE,
    Client,
    Models,
    Reply,
    running,
    serve_config,
    wait_until,
)

NUM_REQUESTS = 42
MAX_FAULTS = 2
"""Faults of transfers of the same pages, so that no request loses all of its attempts."""


class FaultyEnd:
    """A decode worker's end, of which `choose` says what goes wrong with each transfer."""

    def __init__(self, inner: Connector, choose: Callable[[Pull], str]):
        assert isinstance(inner, DevicePut | SamePool)
        self.inner = inner
        self.faults: Counter[str] = Counter()
        self.spoilt: set[int] = set()
        self._choose = choose
        self._stuck: set[int] = set()
        self._broken: set[int] = set()

    def offer(self, offer: Offer) -> list[PageDescriptor]:
        return self.inner.offer(offer)

    def accept(self, pull: Pull) -> None:
        fault = self._choose(pull)
        match fault:
            case "lost":
                self.inner._exchange.drop(pull.transfer)
            case "swapped":
                wrong = msgspec.structs.replace(pull.descriptors[0], key=b"another page")
                pull = msgspec.structs.replace(pull, descriptors=[wrong, *pull.descriptors[1:]])
            case "corrupt" if isinstance(self.inner, DevicePut):
                self._flip(pull.transfer)
            case "corrupt":
                self._broken.add(pull.transfer)
            case "stuck":
                self._stuck.add(pull.transfer)
        self.faults[fault] += 1
        if fault != "none":
            self.spoilt.add(pull.transfer)
        self.inner.accept(pull)

    def poll(self, transfer: int) -> TransferState:
        state = self.inner.poll(transfer)
        return TransferState.ARRIVING if transfer in self._stuck else state

    def commit(self, transfer: int) -> None:
        if transfer in self._broken:
            # Within one pool nothing moves that could be spoilt.
            self.inner.abort(transfer)
            raise TransferError(f"transfer {transfer}: broken")
        self.inner.commit(transfer)

    def abort(self, transfer: int) -> None:
        self.inner.abort(transfer)

    def _flip(self, transfer: int) -> None:
        """Flips one bit of the last layer of the first page, between offer and transfer."""
        staged = self.inner._exchange._offers[transfer].staged
        piece = np.array(staged[0])
        piece.view(np.uint32)[-1, 0, 1, 1, 0, 3] ^= 1 << 30
        staged[0] = jax.device_put(piece, staged[0].sharding)


@pytest.fixture(scope="module", params=["auto", "same-mesh"])
def client(models: Models, request: pytest.FixtureRequest) -> Iterator[Client]:
    with running(models, serve_config(connector=request.param)) as client:
        yield client


@contextmanager
def faults(client: Client, choose: Callable[[Pull], str]) -> Iterator[FaultyEnd]:
    executor = client.engine.workers.decode[0].executor
    end = FaultyEnd(executor.connector, choose)
    executor.connector = executor._pulls.connector = end
    try:
        yield end
    finally:
        executor.connector = executor._pulls.connector = end.inner


def failed_transfers(client: Client) -> int:
    return sum(client.engine.stats().failed_transfers.values())


def transfers_given_up(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Will hold transfers that ended with another one of their sequence, which had failed: they
    neither land nor fail themselves."""
    found: set[int] = set()
    plain = arrivals.Arrivals.remove

    def remove(self: arrivals.Arrivals, id: int) -> arrivals.Arrival | None:
        if (arrival := self._arrivals.get(id)) is not None:
            found.update(arrival.transfers)
        return plain(self, id)

    monkeypatch.setattr(arrivals.Arrivals, "remove", remove)
    return found


def check_nothing_left(client: Client, end: FaultyEnd) -> None:
    """No page is held, on offer or on its way."""
    wait_until(lambda: len(client.engine.workers.exchange) == 0)
    assert end.inner.num_arriving == 0
    client.check_idle()


def test_rule_10_no_wrong_page(
    client: Client, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of all transfers fail in some way, while models of every kind run."""
    monkeypatch.setattr(arrivals, "TRANSFER_SECONDS", 0.5)
    rng = np.random.default_rng(10)
    seen: Counter[bytes] = Counter()
    given_up = transfers_given_up(monkeypatch)

    def choose(pull: Pull) -> str:
        key = pull.keys[-1]
        if seen[key] == MAX_FAULTS or rng.random() < 0.4:
            return "none"
        seen[key] += 1
        return ("lost", "swapped", "corrupt", "stuck")[rng.integers(4)]

    contexts = rng.integers(0, 256, (4, 40)).tolist()
    names = list(models.full_weights)
    before = failed_transfers(client)
    asked: list[tuple[str, list[int], Reply]] = []
    with faults(client, choose) as end:
        for i in range(NUM_REQUESTS):
            context = contexts[rng.integers(len(contexts))]
            prompt = [*context[: rng.integers(4, 40)], *rng.integers(0, 256, i % 5).tolist()]
            name = names[i % len(names)]
            asked.append((name, prompt, client.submit(name, prompt, cache_salt="rule 10")))
        for _, _, reply in asked:
            reply.wait()
        check_nothing_left(client, end)
    for name, prompt, reply in asked:
        assert (reply.reason, reply.error) == (FinishReason.LENGTH, None)
        assert reply.tokens == models.expected(name, prompt), (name, prompt)
    done = end.faults["none"]
    assert min(done, *(end.faults[f] for f in ("lost", "swapped", "corrupt", "stuck"))) >= 3
    assert failed_transfers(client) - before == len(end.spoilt - given_up)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("lost", "nothing is on offer"),
        ("swapped", "is on offer, not"),
        ("corrupt", "(its checksum is|broken)"),
        ("stuck", "the transfer took too long"),
    ],
)
def test_a_transfer_that_always_fails_ends_its_request(
    client: Client, models: Models, monkeypatch: pytest.MonkeyPatch, fault: str, cause: str
) -> None:
    """After a bounded number of tries, with the cause; others are served meanwhile."""
    monkeypatch.setattr(arrivals, "TRANSFER_SECONDS", 0.5)
    rng = np.random.default_rng(11)
    bad, good = rng.integers(0, 256, (2, 21)).tolist()
    keys = block_keys(
        root_key(client.engine._served.specs["full"].namespace, fault), bad[:20], PAGE
    )
    chosen = {*keys, block_key(keys[-1], bad[16:20])}

    def choose(pull: Pull) -> str:
        return "none" if chosen.isdisjoint(pull.keys) else fault

    before = failed_transfers(client)
    with faults(client, choose) as end:
        replies = [client.submit("full", prompt, cache_salt=fault) for prompt in (bad, good)]
        lost, served = (reply.wait() for reply in replies)
        check_nothing_left(client, end)
    assert lost.reason is FinishReason.ERROR
    assert lost.error is not None
    assert re.match(f"tried {MAX_LOST_ATTEMPTS} times; .*{cause}", lost.error), lost.error
    assert lost.tokens == []
    assert served.tokens == models.expected("full", good)
    tries = MAX_FETCHES * MAX_LOST_ATTEMPTS
    assert end.faults == {fault: tries, "none": 1}
    assert failed_transfers(client) - before == tries
    again = client.generate("full", bad, cache_salt=fault)
    assert again.tokens == models.expected("full", bad), "what failed was not kept"
