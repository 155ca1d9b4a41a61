"""Pages from device to device: what was claimed and never pulled, and pulls that never end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.core.connector import TransferError
from pshare_jax.kv import direct
from pshare_jax.kv.direct import CLAIM_SECONDS, LEASE_SECONDS, PULL_SECONDS, DirectOffers
from pshare_jax.kv.offers import PREFIX, OfferFolder
from pshare_jax.kv.peers import Claimed
from pshare_jax.kv.ways import Reader, choose

PIECES = [jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)]
WANTED = [
    jax.ShapeDtypeStruct((2, 3, 4), jnp.float32, sharding=PIECES[0].sharding),
]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def offers(clock: Clock) -> DirectOffers:
    return DirectOffers("127.0.0.1", clock=clock)


def test_what_was_claimed_comes_to_who_has_claimed_it(offers: DirectOffers) -> None:
    reader = DirectOffers("127.0.0.1")
    offers.put(7, "prefill0", PIECES, 3)
    claimed = offers.claim(7)
    assert claimed.pages == 3
    assert len(offers) == 0
    (found,) = reader.pull(claimed, WANTED)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(PIECES[0]))
    with pytest.raises(TransferError, match="transfer 7: nothing is on offer"):
        offers.claim(7)


def test_a_pull_that_never_ends_has_a_deadline(clock: Clock, offers: DirectOffers) -> None:
    """Of what was never offered; the next one has a connection of its own, and comes."""
    reader = DirectOffers("127.0.0.1", clock=clock)
    clock.step = PULL_SECONDS / 10
    address = offers._server.address()
    with pytest.raises(TransferError, match="it has not come within 4 s"):
        reader.pull(Claimed(address, 12345, 3), WANTED)
    assert reader._lost == PIECES[0].nbytes
    clock.step = 0.0
    offers.put(8, "prefill0", PIECES, 3)
    (found,) = reader.pull(offers.claim(8), WANTED)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(PIECES[0]))


def test_an_offer_has_a_lease(clock: Clock, offers: DirectOffers) -> None:
    for number in range(1000):
        offers.put(number, "prefill0", PIECES, 3)
    clock.now = LEASE_SECONDS
    offers.put(1000, "prefill0", PIECES, 3)
    assert len(offers) == 1
    assert offers.usable, "what nobody has claimed was never given away"


def test_readers_that_die_with_claims_are_not_believed_for_ever(
    clock: Clock,
    offers: DirectOffers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is lost with them is bounded; what has come is not lost."""
    size = PIECES[0].nbytes
    monkeypatch.setattr(direct, "MAX_LOST_BYTES", 3 * size)
    for number in range(20):
        offers.put(number, "prefill0", PIECES, 3)
        offers.claim(number)
        offers.settle(number)
    clock.now += CLAIM_SECONDS
    assert offers.usable
    for number in range(20, 24):
        assert offers.usable
        offers.put(number, "prefill0", PIECES, 3)
        offers.claim(number)
        clock.now += CLAIM_SECONDS
    assert not offers.usable
    assert f"died with {4 * size} bytes" in caplog.text


def test_the_way_is_chosen_for_who_reads(tmp_path_factory: pytest.TempPathFactory) -> None:
    shared, other = (tmp_path_factory.mktemp(name) for name in ("shared", "other"))
    mine, near, far = OfferFolder(shared), OfferFolder(shared), OfferFolder(other)
    here, there = Reader(str(near.path)).encode(), Reader(str(far.path)).encode()
    direct_here = Reader(str(near.path), direct=True).encode()
    invented = Reader(str(shared / f"{PREFIX}none")).encode()
    for reader, ways in {
        "": ("shm", "shm", "http", "shm"),
        here: ("shm", "shm", "http", "shm"),
        there: ("http", None, "http", "http"),
        invented: ("http", None, "http", "http"),
        direct_here: ("shm", "shm", "http", "jax-transfer"),
    }.items():
        for transport, way in zip(("auto", "shm", "http", "jax-transfer"), ways, strict=True):
            if way is None:
                with pytest.raises(TransferError, match=r"another host, and cluster\.transport is"):
                    choose(transport, reader, mine.path, direct=True)
            else:
                assert choose(transport, reader, mine.path, direct=True) == way
    assert choose("jax-transfer", direct_here, mine.path, direct=False) == "shm"
    with pytest.raises(TransferError, match="is no reader"):
        choose("auto", "nonsense", mine.path, direct=True)
    for folder in (mine, near, far):
        folder.close()
