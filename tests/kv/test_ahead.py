"""How much is read before it is accepted, and that it is what was accepted."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from pshare_jax.kv import ahead
from pshare_jax.kv.ahead import Found, ReadAhead
from pshare_jax.kv.offers import LEASE_SECONDS
from pshare_jax.kv.reading import Read


class Ends:
    """A book of 100 bytes, and what it has had read."""

    def __init__(self) -> None:
        self.read = ReadAhead()
        self.readings: dict[int, Future[Found]] = {}

    def begin(self, transfer: int, num_bytes: int, now: float = 0.0) -> bool:
        def reads() -> Future[Found]:
            self.readings[transfer] = Future()
            return self.readings[transfer]

        return self.read.begin(transfer, "here", num_bytes, now, reads)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    monkeypatch.setattr(ahead, "MAX_BYTES", 100)
    return Ends()


def test_what_is_read_is_taken_once(ends: Ends) -> None:
    assert ends.begin(1, 10)
    assert ends.read.take(1, "here", 10) is ends.readings[1]
    assert ends.read.take(1, "here", 10) is None
    assert ends.read.take(2, "here", 10) is None


def test_what_was_read_elsewhere_is_not_taken(ends: Ends) -> None:
    for address, size in (("there", 10), ("here", 20)):
        assert ends.begin(1, 10)
        assert ends.read.take(1, address, size) is None
        assert len(ends.read) == 0


def test_nothing_is_forgotten_for_others(ends: Ends) -> None:
    """Its offer is taken: whoever accepts it a moment later could not read it again."""
    assert ends.begin(1, 20)
    assert ends.begin(2, 30)
    assert not ends.begin(3, 1), "twice 20 and twice 30 are on their way"
    assert not ends.begin(4, 51), "more than there is room for at all"
    assert set(ends.readings) == {1, 2}, "what has no room stays on offer"
    assert ends.read.take(1, "here", 20) is ends.readings[1]
    assert ends.read.take(2, "here", 30) is ends.readings[2]


def test_there_must_be_room_for_the_copy_of_what_comes_last(ends: Ends) -> None:
    assert ends.begin(1, 30)
    assert not ends.begin(2, 21), "twice 30 and twice 21"
    assert ends.begin(2, 20)


def test_what_has_come_lies_there_once(ends: Ends) -> None:
    assert ends.begin(1, 50)
    assert not ends.begin(2, 25)
    ends.readings[1].set_result(Found(Read(())))
    assert ends.begin(2, 25)


def test_the_same_transfer_is_read_once(ends: Ends) -> None:
    assert ends.begin(1, 10)
    first = ends.readings[1]
    assert not ends.begin(1, 10)
    assert ends.readings[1] is first


def test_what_nobody_comes_for_is_forgotten(ends: Ends) -> None:
    assert ends.begin(1, 50, now=5.0)
    assert not ends.begin(2, 50, now=5.0 + LEASE_SECONDS - 1.0)
    assert ends.begin(2, 50, now=5.0 + LEASE_SECONDS)
    assert ends.readings[1].cancelled()
    assert ends.read.take(1, "here", 50) is None


def test_what_is_dropped_makes_room(ends: Ends) -> None:
    assert ends.begin(1, 50)
    ends.read.drop(1)
    ends.read.drop(7)
    assert ends.readings[1].cancelled(), "nobody need read it"
    assert ends.begin(2, 50)


def test_one_that_cannot_be_read_takes_no_room(ends: Ends) -> None:
    def fails() -> Future[Found]:
        raise OSError

    with pytest.raises(OSError):
        ends.read.begin(1, "here", 50, 0.0, fails)
    assert ends.begin(1, 50)
