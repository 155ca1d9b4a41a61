"""The store's threads: what is found, fetched and written, on which tier, and what goes wrong."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pshare_jax.core.plans import Load
from pshare_jax.core.prices import DISK, SHARED
from pshare_jax.kernels.kv_codec.codebook import Codebook, calibrate
from pshare_jax.kv.store.file import PoolRequest
from pshare_jax.kv.store.pool import Pool
from pshare_jax.kv.store.service import Batch, StoreService
from pshare_jax.kv.store.tier import Tier
from tests.kernels.test_kv_codec import realistic
from tests.kv.store.pools import SHAPE, key, request, tokens


def page(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=SHAPE).astype(np.float32)


def batch(*numbers: int) -> Batch:
    staged = np.stack([page(number) for number in numbers], axis=1)
    return Batch(staged, [key(n) for n in numbers], [tuple(tokens(n)) for n in numbers])


class Asked:
    """A service, asked one thing after the other."""

    def __init__(self, service: StoreService):
        self.service = service

    def _wait(self, call: Callable[..., None], *arguments: Any) -> Any:
        answers: list[Any] = []
        done = threading.Event()

        def answer(result: Any) -> None:
            answers.append(result)
            done.set()

        call(*arguments, answer)
        assert done.wait(30)
        return answers[0]

    def look(self, *numbers: int) -> list[int]:
        return self._wait(self.service.look, [key(n) for n in numbers])

    def save(self, *numbers: int) -> list[bytes]:
        return self._wait(self.service.save, [batch(*numbers)])

    def touch(self, *numbers: int) -> list[int]:
        gone = self._wait(self.service.touch, [key(n) for n in numbers])
        # What it brought about is done, too.
        self._wait(self.service.touch, [])
        return gone

    def load(self, places: list[int], *numbers: int, wanted: bool = True) -> Any:
        keys = [key(n) for n in numbers]
        load = Load(1, keys, [tuple(tokens(n)) for n in numbers], places)
        found = self._wait(self.service.load, load, keys, lambda: wanted)
        self._wait(self.service.touch, [])
        return found


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    """Four slots in shared memory, eight on disk."""
    tiers = [
        Tier("shared", Pool.open(str(tmp_path / "shared"), request(4))),
        Tier("disk", Pool.open(str(tmp_path / "disk"), request(8, direct=True))),
    ]
    service = StoreService(tiers, SHAPE, np.dtype(np.float32))
    yield Asked(service)
    service.close()


def check(found: Any, *numbers: int) -> None:
    pages = np.concatenate(found, axis=1)
    for i, number in enumerate(numbers):
        assert np.array_equal(pages[:, i], page(number)), number
    assert not pages[:, len(numbers) :].any(), "padding is zeros"


def test_pages_come_back_as_they_were_written(asked):
    assert asked.look(1, 2, 3) == []
    assert asked.save(1, 2, 3) == [key(1), key(2), key(3)]
    assert asked.look(1, 2, 9, 3) == [SHARED, SHARED]
    check(asked.load([SHARED] * 3, 1, 2, 3), 1, 2, 3)
    stats = asked.service.stats()["shared"]
    assert (stats.hits, stats.stored) == (3, 3)
    assert stats.raw_bytes_written == 3 * page(1).nbytes
    assert stats.slots == {"free": 1, "writing": 0, "ready": 3, "pinned": 0}


def test_the_disk_takes_what_is_used_a_second_time(asked):
    asked.save(1, 2, 3)
    assert asked.service.stats()["disk"].stored == 0
    asked.load([SHARED], 1)
    assert asked.touch(2, 9) == [1], "what is not there is said"
    stats = asked.service.stats()["disk"]
    assert stats.stored == 2
    asked.load([SHARED], 1)
    asked.touch(2)
    assert asked.service.stats()["disk"].stored == 2, "once"
    asked.save(11, 12, 13, 14)
    assert asked.look(1) == [DISK]
    assert asked.look(3) == [], "it was used once, and is gone"
    check(asked.load([DISK, DISK], 1, 2), 1, 2)


def test_who_asks_what_is_held_changes_nothing(asked):
    """In more goes than one, and of a service that has ended nothing."""
    asked.service.always = True
    asked.save(1, 2)
    before = asked.service.stats()
    keys = [key(n) for n in range(100)]
    expected = [n in (1, 2) for n in range(100)]
    held = asked.service.held(keys)
    assert held == {"shared": expected, "disk": expected}
    assert all(type(is_there) is bool for is_there in held["disk"]), "it is sent as JSON"
    assert asked.service.stats() == before
    asked.service.close()
    assert asked.service.held(keys) == {}


def test_the_disk_takes_everything_if_that_is_wanted(asked):
    asked.service.always = True
    asked.save(1, 2)
    assert asked.service.stats()["disk"].stored == 2


def test_a_page_that_has_gone_meanwhile_is_missing(asked):
    asked.save(1, 2)
    assert "missing" in asked.load([SHARED] * 3, 1, 2, 3)
    assert asked.service.stats()["shared"].missed == {"missing": 1}


def test_what_nobody_wants_is_not_read(asked):
    asked.save(1)
    assert "nobody wants it" in asked.load([SHARED], 1, wanted=False)
    assert asked.service.stats()["shared"].hits == 0


def test_a_full_disk_is_counted_and_loses_no_slot(asked, monkeypatch):
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    assert asked.save(1, 2) == []
    stats = asked.service.stats()["shared"]
    assert stats.refused == {"io": 2}
    assert stats.slots["free"] == 4
    monkeypatch.undo()
    assert asked.save(1, 2) == [key(1), key(2)]


def test_a_medium_that_cannot_be_read_is_a_miss(asked, monkeypatch):
    asked.save(1)

    def broken(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    assert "io" in asked.load([SHARED], 1)
    monkeypatch.undo()
    assert asked.service.stats()["shared"].slots["pinned"] == 0


def test_a_damaged_tier_is_left_out_and_the_other_goes_on(asked, tmp_path):
    asked.service.always = True
    asked.save(1, 2)
    os.truncate(tmp_path / "shared", 100)
    assert asked.look(1, 2) == [DISK, DISK]
    check(asked.load([DISK, DISK], 1, 2), 1, 2)
    stats = asked.service.stats()
    assert stats["shared"].missed["io"] == 1
    assert stats["shared"].slots == {}


def test_a_thread_that_fails_at_something_goes_on(asked, monkeypatch, caplog):
    asked.save(1)
    monkeypatch.setattr(Tier, "get", lambda *arguments: 1 / 0)
    assert asked.load([SHARED], 1) == "ZeroDivisionError: division by zero"
    monkeypatch.undo()
    check(asked.load([SHARED], 1), 1)
    # The thread has gone on, so what it had to say of the failure is said.
    assert "has failed at something" in caplog.text


def compressed(folder: Path, book: Codebook, shape: tuple[int, ...]) -> Tier:
    page_bytes = 2 * int(np.prod(shape))
    wanted = PoolRequest(
        shape, "bfloat16", page_bytes, 1 << 21, (book.codec,), lambda: book, direct=False
    )
    return Tier("shared", Pool.open(str(folder / "pool"), wanted))


@pytest.mark.parametrize("codec", ["planes", "top16"])
def test_compressed_pages_come_back_and_a_restart_keeps_the_codebook(tmp_path, codec):
    shape = (4, 2, 3, 32, 64)
    book = calibrate(codec, realistic(shape, 0))
    pages = np.ascontiguousarray(np.moveaxis(realistic(shape, 1), 0, 1))
    incompressible = np.random.default_rng(0).integers(0, 65536, shape).astype(np.uint16)
    tier = compressed(tmp_path, book, shape)
    buffer = tier.pool.buffer()
    whole = [list(range(i, i + shape[-2])) for i in range(4)]
    for i in range(4):
        assert tier.put(key(i), whole[i], pages, i, buffer) is None
    assert tier.put(key(9), whole[0], incompressible[:, None], 0, buffer) == "large"
    assert tier.pool.counts()["writing"] == 0
    partly = pages[:, :1].copy()
    partly[..., 5:, :] = incompressible[:, None][..., 5:, :]
    assert tier.put(key(8), tokens(8)[:1] * 5, partly, 0, buffer) is None, "5 tokens of the page"
    back = np.zeros_like(partly)
    assert tier.get([key(8)], [tokens(8)[:1] * 5], back, [0], buffer)[0] == [None]
    assert np.array_equal(back[..., :5, :], partly[..., :5, :])
    assert np.array_equal(back[..., 5:, :], np.repeat(back[..., 4:5, :], 27, axis=-2))
    ratio = tier.counters.raw_bytes_written / tier.counters.bytes_written
    assert ratio > {"planes": 1.4, "top16": 1.25}[codec]
    tier.close()
    other = calibrate(codec, realistic(shape, 5))
    again = compressed(tmp_path, other, shape)
    assert again.pool.book is not None
    assert np.array_equal(again.pool.book.table, book.table), "the pool's own, not the new one"
    back = np.zeros_like(pages)
    reasons, _ = again.get([key(i) for i in range(4)], whole, back, range(4), buffer)
    assert reasons == [None] * 4
    assert np.array_equal(back, pages)
    again.close()
