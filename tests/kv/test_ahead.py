"""How much is read before it is accepted, and that it is what was accepted."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from pshare_jax.kv import ahead
from pshare_jax.kv.ahead import Found, ReadAhead


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> ReadAhead:
    monkeypatch.setattr(ahead, "MAX_BYTES", 100)
    return ReadAhead()


def test_what_is_read_is_taken_once(read: ReadAhead) -> None:
    reading: Future[Found] = Future()
    read.put(1, "here", 10, reading)
    assert read.take(1, "here", 10) is reading
    assert read.take(1, "here", 10) is None
    assert read.take(2, "here", 10) is None


def test_what_was_read_elsewhere_is_not_taken(read: ReadAhead) -> None:
    for address, size in (("there", 10), ("here", 20)):
        read.put(1, "here", 10, Future())
        assert read.take(1, address, size) is None
        assert len(read) == 0


def test_what_has_waited_longest_is_forgotten(read: ReadAhead) -> None:
    """Somebody may never come for it."""
    for transfer in range(3):
        assert read.has_room(40)
        read.put(transfer, "here", 40, Future())
    assert len(read) == 2
    assert read.take(0, "here", 40) is None
    assert not read.has_room(101), "it would be all there is"
    assert read.has_room(100)
    assert len(read) == 0
