from __future__ import annotations

from pshare_jax.core.requests import Owner
from pshare_jax.engine.queue_room import QueueRoom


def fill(room: QueueRoom, count: int, owner: Owner, start: int = 0) -> None:
    for i in range(start, start + count):
        room.add(f"{owner.key}{owner.request}{i}", owner)


def test_a_full_queue_refuses_who_fills_it_and_has_room_for_a_new_request() -> None:
    room, flood = QueueRoom(8), Owner(request="flood")
    fill(room, 8, flood)
    assert not room.is_full(flood, 7)
    assert room.is_full(flood, 8)
    assert not room.is_full(Owner(request="other"), 8)
    assert not room.is_full(Owner(), 9), "one without a name is of its own"
    assert room.is_full(Owner(request="other"), 10), "that room is a quarter of the queue"


def test_a_client_below_its_share_finds_room_behind_a_flood() -> None:
    room, flood, other = QueueRoom(8), Owner("a", 3.0, "f"), Owner("b", 1.0, "o")
    fill(room, 8, flood)
    fill(room, 1, other)
    assert room.is_full(flood, 9)
    assert not room.is_full(other, 9), "its share is 2 of 8"
    fill(room, 1, other, 1)
    assert room.is_full(other, 10)
    room.ended("bo0")
    assert not room.is_full(other, 10)


def test_how_long_to_stay_away_is_what_the_queue_takes() -> None:
    room, owner = QueueRoom(100), Owner(request="r")
    assert room.retry_after(5.0) == 1.0
    fill(room, 100, owner)
    for i in range(10):
        room.started(f"r{i}", 2.0 * i)
    room.started("r0", 20.0)
    # 90 wait, and 10 have started in 20 seconds.
    assert room.retry_after(20.0) == 120.0
    for i in range(10, 90):
        room.ended(f"r{i}")
    assert room.retry_after(20.0) == 20.0
    for i in range(90, 100):
        room.ended(f"r{i}")
    assert room.retry_after(20.0) == 1.0
    assert not room._by_key
    assert not room._weights
