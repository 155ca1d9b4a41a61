"""Files that are not what they should be, and books that are not to be had when they are wanted."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pshare_jax.errors import ConfigError
from pshare_jax.kv.store import file as pool_file
from pshare_jax.kv.store import locking, private
from pshare_jax.kv.store.file import Regions
from pshare_jax.kv.store.locking import PoolBusyError
from pshare_jax.kv.store.pool import Pool
from pshare_jax.kv.store.tier import Tier
from tests.kv.store.pools import SHAPE, TOKENS, contents, get, key, open_pool, put, request, tokens


def test_what_is_no_pool_is_not_overwritten(tmp_path: Path):
    """A path that names something else is a mistake, and what is there is somebody's."""
    for content in (b"x", b"something else", bytes(8192)):
        (tmp_path / "pool").write_bytes(content)
        (tmp_path / "pool").chmod(0o600)
        with pytest.raises(ConfigError, match=r"something else than a pool.*not overwritten"):
            open_pool(tmp_path)
        assert (tmp_path / "pool").read_bytes() == content


def test_links_are_not_followed(tmp_path: Path):
    """Whoever may write to the folder could make this user overwrite a file of his own."""
    target = tmp_path / "target"
    target.touch(mode=0o600)
    (tmp_path / "pool").symlink_to(target)
    with pytest.raises(ConfigError, match="is a symbolic link"):
        open_pool(tmp_path)
    assert target.stat().st_size == 0
    target.unlink()
    with pytest.raises(ConfigError, match="is a symbolic link"):
        open_pool(tmp_path)
    assert not target.exists()


def test_pipes_and_folders_are_no_pools(tmp_path: Path):
    os.mkfifo(tmp_path / "pool", 0o600)
    with pytest.raises(ConfigError, match="no ordinary file"):
        open_pool(tmp_path)
    (tmp_path / "pool").unlink()
    (tmp_path / "pool").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        open_pool(tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o602, 0o666])
def test_a_pool_that_others_may_use_is_refused(tmp_path: Path, mode: int):
    """They could write pages of their own into it, and read all prompts."""
    open_pool(tmp_path).close()
    (tmp_path / "pool").chmod(mode)
    with pytest.raises(ConfigError, match=rf"can be used by others \(its mode is {mode:o}\)"):
        open_pool(tmp_path)


def test_a_pool_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    open_pool(tmp_path).close()
    monkeypatch.setattr(private.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match=rf"belongs to user {os.getuid()}, and this server runs"):
        open_pool(tmp_path)


def test_a_file_that_is_replaced_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its headers would be guarded by the lock of another file."""
    open_pool(tmp_path).close()
    read_head = pool_file.read_head

    def replaced(descriptor, wanted):
        (tmp_path / "pool").unlink()
        (tmp_path / "pool").touch(mode=0o600)
        return read_head(descriptor, wanted)

    monkeypatch.setattr(pool_file, "read_head", replaced)
    with pytest.raises(ConfigError, match="was replaced while it was opened"):
        open_pool(tmp_path)


def test_a_pool_that_somebody_has_just_opened_is_not_wiped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whoever has opened it is known to use it before others can look at it."""
    file = pool_file.open_file(str(tmp_path / "pool"), request(8))
    with pytest.raises(ConfigError, match="being used by another process"):
        Pool.open(str(tmp_path / "pool"), request(9))
    file.close()
    Pool.open(str(tmp_path / "pool"), request(9)).close()


def test_a_server_waits_for_another_one_that_makes_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Which takes longer than anybody waits for the books of a pool that is in use."""
    other = pool_file.open_file(str(tmp_path / "pool"), request(8))
    locking.lock(other.lock)
    clock = itertools.count(step=locking.LOCK_SECONDS)
    left = iter(range(5))

    def passes(_: float) -> None:
        if next(left, None) is None:
            locking.unlock(other.lock)

    monkeypatch.setattr(
        locking, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=passes)
    )
    pool = open_pool(tmp_path)
    assert pool.warm
    pool.close()
    other.close()


def test_what_fails_leaves_nothing_open(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "pool").write_bytes(b"something else")
    (tmp_path / "pool").chmod(0o600)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError):
            open_pool(folder)
    (tmp_path / "pool").unlink()
    pools = [open_pool(tmp_path) for _ in range(64)]
    with pytest.raises(ConfigError, match="has 64 users already"):
        open_pool(tmp_path)
    for pool in pools:
        pool.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking.lock, "__defaults__", (0.02,))


@pytest.mark.usefixtures("impatient")
def test_a_reader_that_cannot_say_that_it_is_done(tmp_path: Path):
    """Its pins go when the books are to be had again, and the record can be replaced."""
    pool, other = open_pool(tmp_path, slots=1), open_pool(tmp_path, slots=1)
    put(pool, 1)
    tier = Tier("shared", pool)
    staged = np.zeros((SHAPE[0], 1, *SHAPE[1:]), np.float32)
    read = pool.read

    def held(pin, buffer):
        stopped.__enter__()
        return read(pin, buffer)

    stopped = other._locked()
    pool.read = held  # type: ignore[method-assign]
    with pytest.raises(locking.PoolBusyError):
        tier.get([key(1)], [tokens(1)], staged, [0], pool.buffer())
    stopped.__exit__(None, None, None)
    assert pool.counts()["pinned"] == 0
    assert put(other, 2), "nobody reads the slot any more"
    for one in (pool, other):
        one.check()
        one.close()


@pytest.mark.usefixtures("impatient")
def test_a_writer_that_cannot_publish(tmp_path: Path):
    """The record is readable as soon as the books are to be had, and nothing stays half-written."""
    pool, other = open_pool(tmp_path), open_pool(tmp_path)
    first, second = pool.reserve(key(1)), pool.reserve(key(2))
    assert first is not None
    assert second is not None
    buffer, record = pool.buffer(), contents(1)
    buffer.bytes[: len(record)] = record
    pool.write(first, buffer, len(record))
    with other._locked():
        with pytest.raises(locking.PoolBusyError):
            pool.publish(first, record, TOKENS)
        with pytest.raises(locking.PoolBusyError):
            pool.cancel(second)
    assert pool.counts() == {"free": 7, "writing": 0, "ready": 1, "pinned": 0}
    assert np.array_equal(get(other, 1), contents(1))
    assert put(other, 2), "the key can be written again"
    for one in (pool, other):
        one.check()
        one.close()


def test_a_codec_that_fails_unexpectedly_leaves_no_pins(tmp_path: Path):
    pool = open_pool(tmp_path)
    put(pool, 1)
    tier = Tier("shared", pool)

    def fails(*_):
        raise MemoryError

    tier.codec = SimpleNamespace(decode=fails)  # type: ignore[assignment]
    staged = np.zeros((SHAPE[0], 1, *SHAPE[1:]), np.float32)
    with pytest.raises(MemoryError):
        tier.get([key(1)], [tokens(1)], staged, [0], pool.buffer())
    assert pool.counts()["pinned"] == 0
    pool.close()


@pytest.mark.parametrize("contents_of_table", [1, 2**31 - 1, -2, 2**20])
def test_a_table_of_nonsense_is_a_miss_and_is_built_anew(tmp_path: Path, contents_of_table: int):
    """Whoever looks something up in it, or enters something, holds the lock of all processes."""
    pool = open_pool(tmp_path)
    for number in range(4):
        put(pool, number)
    first, end = Regions(pool.spec).at["table"]
    with (tmp_path / "pool").open("r+b") as file:
        file.seek(first)
        file.write(np.full((end - first) // 4, contents_of_table, np.int32).tobytes())
    busy = 0
    for number in range(40):
        try:
            put(pool, 4 + number)
            found = get(pool, number % 4)
        except PoolBusyError:
            busy += 1
        else:
            assert isinstance(found, str) or np.array_equal(found, contents(number % 4))
    assert busy <= 1
    assert pool.recoveries()[1] == busy
    put(pool, 99)
    assert np.array_equal(get(pool, 99), contents(99))
    assert pool.counts()["writing"] == 0
    pool.check()
    pool.close()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_written_over_a_pool_nothing_wrong_is_read(tmp_path: Path, seed: int):
    """Bytes anywhere in the file while it is used: a miss, or the record that was asked for."""
    rng, found = np.random.default_rng(seed), 0
    for round in range(8):
        folder = tmp_path / str(round)
        folder.mkdir()
        pool = open_pool(folder)
        for number in range(6):
            put(pool, number)
        regions = [at for at in Regions(pool.spec).at.values() if at[1] > at[0]]
        with (folder / "pool").open("r+b", buffering=0) as file:
            for _ in range(30):
                first, end = regions[rng.integers(len(regions))]
                size = int(rng.integers(1, 65))
                file.seek(int(rng.integers(first, max(first + 1, end - size))))
                file.write(rng.bytes(size))
                for number in rng.integers(8, size=4).tolist():
                    with contextlib.suppress(PoolBusyError):
                        put(pool, number)
                        record = get(pool, number)
                        if not isinstance(record, str):
                            assert np.array_equal(record, contents(number))
                            found += 1
        pool.close()
    assert found > 50
