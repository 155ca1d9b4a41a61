"""Between processes pages are read when it is heard that they are on offer, by threads."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pshare_jax.core.connector import TransferError, TransferState
from pshare_jax.kv import ahead as kv_ahead
from pshare_jax.kv import remote as kv_remote
from pshare_jax.kv.offers import take
from tests.kv.ends import Link, contents_of


@pytest.mark.parametrize("link", ["shm", "http", "jax-transfer"], indirect=True)
class TestReadAhead:
    """Between processes pages are read when it is heard that they are on offer."""

    def test_they_are_there_when_they_are_accepted(self, link: Link) -> None:
        """Whoever waits is told, and has nothing more to wait for."""
        pages = list(range(1, 71))
        told = threading.Event()
        link.receiver.on_arrival = told.set
        pull = link.offer(pages)
        link.receiver.read_ahead(pull.transfer, pull.address, len(pages))
        assert told.wait(60)
        assert not link.receiver.has_arrived(), "nothing was accepted"
        link.receiver.accept(pull)
        assert link.receiver.has_arrived()
        assert link.receiver.poll(pull.transfer) is TransferState.READY
        link.receiver.commit(pull.transfer)
        there, here = contents_of(link.source), contents_of(link.target)
        assert np.array_equal(here[:, 80:150], there[:, :70])
        assert not link.receiver.has_arrived()

    def test_who_accepts_first_is_told_as_well(self, link: Link) -> None:
        told = threading.Event()
        link.receiver.on_arrival = told.set
        pull = link.offer([3, 5])
        link.receiver.accept(pull)
        assert told.wait(60)
        assert link.receiver.has_arrived()
        link.receiver.commit(pull.transfer)

    def test_what_was_flipped_is_found(self, link: Link) -> None:
        pull = link.offer([3, 5])
        link.flip(pull.transfer, 1, 2)
        link.receiver.read_ahead(pull.transfer, pull.address, 2)
        link.receiver.accept(pull)
        with pytest.raises(TransferError, match="page 1: its checksum is"):
            link.receiver.commit(pull.transfer)

    def test_nobody_wants_it(self, link: Link) -> None:
        pull = link.offer([3, 5])
        link.receiver.read_ahead(pull.transfer, pull.address, 2)
        link.receiver.abort(pull.transfer)
        assert len(link.receiver._ahead) == 0

    def test_what_is_wrong_is_said_when_it_is_accepted(self, link: Link) -> None:
        link.receiver.read_ahead(7, "no address", 1)
        link.receiver.read_ahead(77, link.pull(77).address, 1)
        with pytest.raises(TransferError, match="transfer 77"):
            link.move(link.pull(77))

    def test_what_has_no_room_is_read_when_it_is_accepted(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither of the two is lost: one was read ahead, the other one is on offer still."""
        monkeypatch.setattr(kv_ahead, "MAX_BYTES", 2 * link.receiver._size(2))
        expected = contents_of(link.source)
        pulls = [link.offer([3, 5]), link.offer([7, 9])]
        pulls[1] = msgspec.structs.replace(pulls[1], targets=[91, 92])
        for pull in pulls:
            link.receiver.read_ahead(pull.transfer, pull.address, 2)
        assert len(link.receiver._ahead) == 1
        for pull in pulls:
            link.move(pull)
        got = contents_of(link.target)
        assert np.array_equal(got[:, [80, 81, 90, 91]], expected[:, [2, 4, 6, 8]])

    def test_no_copy_stays_in_the_hosts_memory(self, link: Link) -> None:
        pull = link.offer([3, 4, 5, 6, 7])
        link.receiver.read_ahead(pull.transfer, pull.address, 5)
        link.receiver.accept(pull)
        found = link.receiver._arriving[pull.transfer].reading.result()
        assert len(found.read.pieces) == 0
        assert sum(p.nbytes for p in found.staged) == link.receiver._size(5), "with its padding"
        link.receiver.commit(pull.transfer)

    def test_an_end_that_is_closed_reads_no_more(self, link: Link) -> None:
        pull = link.offer([3, 5])
        link.receiver.close()
        link.receiver.read_ahead(pull.transfer, pull.address, 2)
        assert len(link.receiver._ahead) == 0
        with pytest.raises(TransferError, match="transfer 1: "):
            link.receiver.accept(pull)


class Taken:
    """Remembers which files of offers were opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._files: list[tuple[int, int]] = []
        monkeypatch.setattr(kv_remote, "take", self._take)

    def _take(self, folder: Path, transfer: int) -> int:
        file = take(folder, transfer)
        self._files.append((file, os.fstat(file).st_ino))
        return file

    def open(self) -> list[int]:
        """Those that are open still; their numbers may have gone to others."""
        found = []
        for file, inode in self._files:
            with contextlib.suppress(OSError):
                if os.fstat(file).st_ino == inode:
                    found.append(file)
        assert self._files, "none was opened"
        return found


@contextlib.contextmanager
def busy(threads: ThreadPoolExecutor) -> Iterator[None]:
    """All of them wait for something."""
    free, waits = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        waits.release()
        free.wait(60)

    for _ in range(kv_remote.READERS):
        threads.submit(wait)
    for _ in range(kv_remote.READERS):
        assert waits.acquire(timeout=60)
    try:
        yield
    finally:
        free.set()


@pytest.mark.parametrize("link", ["shm"], indirect=True)
class TestFilesOfTheHost:
    def test_none_is_left_open_by_an_end_that_is_closed(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken, pull = Taken(monkeypatch), link.offer([3, 5])
        link.receiver.close()
        link.receiver.read_ahead(pull.transfer, pull.address, 2)
        assert taken.open() == []

    def test_none_is_left_open_that_is_given_up_before_it_is_read(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken, pulls = Taken(monkeypatch), [link.offer([3, 5]), link.offer([7])]
        with busy(link.receiver._file_readers):
            link.receiver.read_ahead(pulls[0].transfer, pulls[0].address, 2)
            link.receiver.accept(pulls[1])
            assert len(taken.open()) == 2
            for pull in pulls:
                link.receiver.abort(pull.transfer)
            assert taken.open() == []

    def test_they_do_not_wait_for_other_processes(self, link: Link) -> None:
        with busy(link.receiver._readers):
            link.move(link.offer([3, 5]))

    def test_those_of_a_plan_are_waited_for_together(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waits: list[float] = []

        def wait(_: object, seconds: float) -> None:
            waits.append(seconds)
            now[0] += seconds

        now = [100.0]
        monkeypatch.setattr(kv_remote, "wait", wait)
        monkeypatch.setattr(link.receiver, "_clock", lambda: now[0])
        pulls = [link.offer([page]) for page in (3, 5, 7)]
        for pull in pulls[:2]:
            link.receiver.accept(pull)
        link.receiver.poll(pulls[0].transfer)
        link.receiver.accept(pulls[2])
        assert waits == pytest.approx([kv_remote.SOON_SECONDS, 0.0, kv_remote.SOON_SECONDS])
        for pull in pulls:
            link.receiver.abort(pull.transfer)


@pytest.mark.parametrize("link", ["shm"], indirect=True)
def test_a_file_of_the_host_is_waited_for_a_moment(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no piece of work comes between."""
    monkeypatch.setattr(kv_remote, "SOON_SECONDS", 60.0)
    pull = link.offer([3, 5])
    link.receiver.accept(pull)
    assert link.receiver.has_arrived()
    link.receiver.commit(pull.transfer)
