"""Folders of offers: what is taken, withdrawn, late, or left behind by the dead."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pshare_jax.core.connector import TransferError
from pshare_jax.errors import ConfigError
from pshare_jax.kv import offers
from pshare_jax.kv.offers import PREFIX, OfferFolder, file_of, take

PIECES = [np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)]
"""Two layers of four pages, of which the last is padding."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[OfferFolder]:
    folder = OfferFolder(tmp_path, lease_seconds=10.0)
    yield folder
    folder.close()


def put(folder: OfferFolder, transfer: int, worker: str = "prefill0", now: float = 0.0) -> None:
    folder.put(transfer, worker, PIECES, 3, now)


def test_pages_lie_layer_by_layer_without_padding(folder: OfferFolder) -> None:
    put(folder, 5)
    descriptor = take(folder.path, 5)
    read = np.frombuffer(os.read(descriptor, 1000), np.float32)
    os.close(descriptor)
    np.testing.assert_array_equal(read, PIECES[0][:, :3].reshape(-1))
    assert len(folder) == 0
    with pytest.raises(TransferError, match="transfer 5: nothing is on offer"):
        take(folder.path, 5)


def test_who_reads_has_what_was_withdrawn_meanwhile(folder: OfferFolder) -> None:
    put(folder, 5)
    descriptor = take(folder.path, 5)
    folder.drop(5)
    assert os.fstat(descriptor).st_size == 2 * 3 * 3 * 4
    os.close(descriptor)


def test_a_thousand_that_nobody_takes_are_gone_after_their_lease(folder: OfferFolder) -> None:
    for transfer in range(1000):
        put(folder, transfer)
    assert len(folder) == 1000
    put(folder, 1000, now=9.9)
    assert len(folder) == 1001
    put(folder, 1001, now=10.0)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        file_of(folder.path, 1000).name,
        file_of(folder.path, 1001).name,
        "owner",
    ]


def test_one_of_the_same_id_takes_nothing_from_the_first(folder: OfferFolder) -> None:
    put(folder, 5)
    with pytest.raises(TransferError, match="transfer 5 is on offer already"):
        put(folder, 5)
    assert len(folder) == 1
    os.close(take(folder.path, 5))


def test_a_worker_s_offers_go_with_it(folder: OfferFolder) -> None:
    put(folder, 1, "prefill0")
    put(folder, 2, "prefill1")
    folder.drop_worker("prefill0")
    folder.drop(7)
    assert not file_of(folder.path, 1).exists()
    assert file_of(folder.path, 2).exists()


def test_a_full_memory_is_an_error_of_one_transfer(
    folder: OfferFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(descriptor: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(offers, "_write", write)
        with pytest.raises(TransferError, match=r"has no room for it: No space left"):
            put(folder, 3)
    assert len(folder) == 0
    assert not file_of(folder.path, 3).exists()
    put(folder, 3)


def test_others_may_not_look(folder: OfferFolder) -> None:
    put(folder, 1)
    assert folder.path.stat().st_mode & 0o077 == 0
    assert file_of(folder.path, 1).stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_made_is_a_wrong_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.shm_path: .*none: No such file"):
        OfferFolder(tmp_path / "none")


def test_what_the_dead_have_left_is_removed(tmp_path: Path) -> None:
    """By the next who comes, and nothing of the living."""
    program = (
        "import os, signal, sys, numpy as np\n"
        "from pshare_jax.kv.offers import OfferFolder\n"
        "folder = OfferFolder(sys.argv[1])\n"
        "folder.put(1, 'w', [np.zeros((1, 1, 4))], 1, 0.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    alive = OfferFolder(tmp_path)
    put(alive, 1)
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    left = set(tmp_path.glob(f"{PREFIX}*")) - {alive.path}
    assert len(left) == 1
    last = OfferFolder(tmp_path)
    assert set(tmp_path.glob(f"{PREFIX}*")) == {alive.path, last.path}
    assert file_of(alive.path, 1).exists()
    last.close()
    alive.close()
    assert list(tmp_path.iterdir()) == []


def test_who_comes_at_the_same_moment_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = offers.fcntl.flock

    def another_comes(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(offers.fcntl, "flock", flock)
        OfferFolder(tmp_path).close()
        flock(descriptor, operation)

    monkeypatch.setattr(offers.fcntl, "flock", another_comes)
    folder = OfferFolder(tmp_path)
    put(folder, 1)
    assert file_of(folder.path, 1).exists()
    folder.close()


def test_what_others_have_put_there_is_neither_opened_nor_removed(tmp_path: Path) -> None:
    """Opening some files does something, and a lock that is a link would be somebody else's."""
    link, pipe = tmp_path / f"{PREFIX}link", tmp_path / f"{PREFIX}pipe"
    for folder in (link, pipe):
        folder.mkdir()
    (tmp_path / "elsewhere").touch()
    (link / "owner").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(pipe / "owner")
    OfferFolder(tmp_path).close()
    assert link.exists()
