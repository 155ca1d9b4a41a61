"""One pool: records come back as they were written, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pshare_jax.errors import ConfigError
from pshare_jax.kv.store import locking
from pshare_jax.kv.store.file import BEING_MADE, HEADER, PoolDamagedError, PoolRequest, Regions
from pshare_jax.kv.store.pool import Pool
from tests.kv.store.pools import (
    PAGE_BYTES,
    SHAPE,
    TOKENS,
    contents,
    get,
    key,
    open_pool,
    put,
    request,
    tokens,
)


@pytest.fixture(params=[False, True], ids=["mapped", "direct"])
def pool(tmp_path: Path, request: pytest.FixtureRequest):
    opened = open_pool(tmp_path, direct=request.param)
    yield opened
    opened.check()
    opened.close()


def path_of(pool: Pool) -> Path:
    return Path(pool._file.path)


def test_a_record_comes_back_as_it_was_written(pool):
    assert get(pool, 1) == "missing"
    assert put(pool, 1)
    assert np.array_equal(get(pool, 1), contents(1))
    assert pool.holds([key(1), key(2)]) == [True, False]
    assert pool.counts() == {"free": 7, "writing": 0, "ready": 1, "pinned": 0}


def test_a_key_has_one_record(pool):
    assert put(pool, 1)
    assert pool.reserve(key(1)) is None
    reservation = pool.reserve(key(2))
    assert reservation is not None
    assert pool.reserve(key(2)) is None, "somebody is writing it"
    assert pool.holds([key(2)]) == [False]
    pool.cancel(reservation)
    assert put(pool, 2)


def test_the_record_that_was_not_used_for_longest_goes(pool):
    for number in range(8):
        put(pool, number)
    assert pool.touch([key(0), key(99), key(0)]) == [0, -1, 1]
    get(pool, 1)
    for number in range(8, 14):
        assert put(pool, number)
    assert [n for n in range(14) if pool.holds([key(n)])[0]] == [0, 1, *range(8, 14)]


def test_a_pinned_record_stays(pool):
    for number in range(8):
        put(pool, number)
    pins = pool.pin([key(n) for n in range(8)])
    assert not put(pool, 8), "all slots are being read"
    pool.unpin([pin for pin in pins[3:4] if pin])
    assert put(pool, 8)
    assert get(pool, 3) == "missing"
    pool.unpin([pin for n, pin in enumerate(pins) if n != 3 and pin])
    assert pool.counts()["pinned"] == 0


def test_a_slot_that_was_lost_is_not_published(pool):
    reservation = pool.reserve(key(1))
    assert reservation is not None
    with pool._locked() as books:
        books.bury(pool._members.me)
    assert put(pool, 2), "another has it now"
    assert not pool.publish(reservation, contents(1), TOKENS)
    pool.cancel(reservation)
    assert np.array_equal(get(pool, 2), contents(2))


def test_other_tokens_under_the_same_key_are_a_miss(pool):
    put(pool, 1)
    assert get(pool, 1, [1, 2, 3, 5]) == "tokens"
    put(pool, 1)
    assert get(pool, 1, [1, 2, 3]) == "tokens"
    assert get(pool, 1) == "missing", "what is wrong goes"


@pytest.mark.parametrize("offset", [0, 5, 15, 16, 16 + PAGE_BYTES - 1])
def test_a_flipped_bit_is_a_miss(pool, offset):
    put(pool, 1)
    (pin,) = pool.pin([key(1)])
    assert pin is not None
    pool.unpin([pin])
    at = pool._offset(pin.slot) + offset
    with path_of(pool).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
        file.flush()
        os.fsync(file.fileno())
    assert get(pool, 1) == "checksum"
    assert get(pool, 1) == "missing"
    assert put(pool, 1)
    assert np.array_equal(get(pool, 1), contents(1))


@pytest.mark.parametrize("name", [n for n in HEADER.names or () if n not in ("reserved", "used")])
def test_a_damaged_header_is_a_miss(pool, name):
    """Whatever a header's field becomes, no record is read that is not whole."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        for number in range(3):
            put(pool, number)
        with pool._locked() as books:
            slot = books.find(key(1))
            assert slot is not None
            size = HEADER[name].itemsize
            books.headers[name][slot] = int.from_bytes(rng.bytes(size), "little")
        for number in range(3):
            found = get(pool, number)
            assert isinstance(found, str) or np.array_equal(found, contents(number))
        with pool._locked() as books:
            books._rebuild()
            books.bury_dead()
        pool.check()
        assert isinstance(get(pool, 1), str | np.ndarray)
        with pool._locked() as books:
            for slot in range(8):
                books.drop(slot)
            books._rebuild()


def test_another_process_finds_what_was_written(tmp_path):
    first, second = open_pool(tmp_path), open_pool(tmp_path)
    assert (first.warm, second.warm) == (False, True)
    put(first, 1)
    assert np.array_equal(get(second, 1), contents(1))
    (pin,) = second.pin([key(1)])
    assert pin is not None
    assert first.counts()["pinned"] == 1
    second.close()
    assert first.counts()["pinned"] == 0, "who leaves gives back what it held"
    first.close()


def test_a_restart_finds_the_records(tmp_path):
    pool = open_pool(tmp_path)
    for number in range(5):
        put(pool, number)
    pool.close()
    again = open_pool(tmp_path)
    assert again.warm
    assert all(np.array_equal(get(again, number), contents(number)) for number in range(5))
    again.check()
    again.close()


def test_a_pool_that_does_not_fit_is_wiped(tmp_path):
    pool = open_pool(tmp_path)
    put(pool, 1)
    pool.close()
    other = Pool.open(str(tmp_path / "pool"), request(8, shape=(1, 2, 1, 4, 16)))
    assert not other.warm
    assert other.counts()["ready"] == 0
    other.close()


def test_a_pool_that_others_use_is_not_wiped(tmp_path):
    pool = open_pool(tmp_path)
    put(pool, 1)
    with pytest.raises(ConfigError, match=r"being used by another process.*it was made as"):
        Pool.open(str(tmp_path / "pool"), request(9))
    assert np.array_equal(get(pool, 1), contents(1))
    pool.close()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    match how:
        case "half made":
            data[: len(BEING_MADE)] = BEING_MADE
        case "empty":
            data.clear()
        case "version":
            data[8] += 1
        case "checksum":
            data[16] ^= 1
        case "spec":
            data[30] ^= 1
        case "truncated":
            del data[-4096:]
        case "longer":
            data += bytes(4096)
        case "short":
            del data[100:]
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how",
    ["half made", "empty", "version", "checksum", "spec", "truncated", "longer", "short"],
)
def test_a_damaged_or_old_file_is_made_anew(tmp_path, how):
    pool = open_pool(tmp_path)
    put(pool, 1)
    pool.close()
    damage(tmp_path / "pool", how)
    again = open_pool(tmp_path)
    assert not again.warm
    assert get(again, 1) == "missing"
    assert put(again, 1)
    again.close()


def test_books_that_hold_nonsense_are_built_anew(tmp_path):
    pool = open_pool(tmp_path)
    for number in range(5):
        put(pool, number)
    pool.close()
    regions, rng = Regions(pool.spec), np.random.default_rng(0)
    with (tmp_path / "pool").open("r+b") as file:
        for name in ("pins", "totals", "table"):
            first, end = regions.at[name]
            file.seek(first)
            file.write(rng.bytes(end - first))
        file.seek(3072)
        file.write(b"\1")
    again = open_pool(tmp_path)
    again.check()
    assert again.counts()["ready"] == 5
    assert all(np.array_equal(get(again, number), contents(number)) for number in range(5))
    again.close()


def test_a_file_that_is_cut_short_under_its_user_is_noticed(tmp_path):
    pool = open_pool(tmp_path)
    put(pool, 1)
    (pin,) = pool.pin([key(1)])
    assert pin is not None
    os.truncate(tmp_path / "pool", pool._offset(pin.slot) + 100)
    assert pool.verify(pin, pool.read(pin, pool.buffer()), tokens(1)) == "truncated"
    for call in (lambda: pool.pin([key(1)]), lambda: pool.reserve(key(2)), pool.counts):
        with pytest.raises(PoolDamagedError, match="bytes, not"):
            call()
    pool.close()


def test_room_is_looked_for_first(tmp_path):
    huge = PoolRequest(SHAPE, "float32", PAGE_BYTES, 1 << 44, ("raw",), lambda: None)
    with pytest.raises(ConfigError, match=r"bytes are wanted, but only \d+ are free"):
        Pool.open(str(tmp_path / "pool"), huge)
    with pytest.raises(ConfigError, match="do not hold one page"):
        Pool.open(
            str(tmp_path / "pool"),
            PoolRequest(SHAPE, "float32", PAGE_BYTES, 1000, ("raw",), lambda: None),
        )
    with pytest.raises(ConfigError, match="No such file or directory"):
        Pool.open(str(tmp_path / "nowhere" / "pool"), request(8))


def test_only_the_owner_may_read_the_file(tmp_path):
    pool = open_pool(tmp_path)
    assert path_of(pool).stat().st_mode & 0o777 == 0o600
    pool.close()


def test_a_lock_that_is_held_for_too_long_is_not_waited_for(tmp_path, monkeypatch):
    pool, other = open_pool(tmp_path), open_pool(tmp_path)
    monkeypatch.setattr(locking.lock, "__defaults__", (0.02,))
    with other._locked(), pytest.raises(locking.PoolBusyError, match="held by others"):
        pool.counts()
    assert pool.counts()["free"] == 8
    pool.close()
    other.close()


def test_more_members_than_there_is_room_for_are_refused(tmp_path, monkeypatch):
    pools = [open_pool(tmp_path) for _ in range(64)]
    with pytest.raises(ConfigError, match="has 64 users already"):
        open_pool(tmp_path)
    pools.pop().close()
    pools.append(open_pool(tmp_path))
    for pool in pools:
        pool.close()
