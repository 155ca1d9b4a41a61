"""Pages that a process has on offer to others: a file each transfer, in a folder of shared memory.

A file holds the pieces of a transfer one after the other, each layer by layer, without padding. It
is there until somebody takes it, it is withdrawn, or its lease is over. The folder's name is random
and never used again, so whoever finds it is on the same host. Its owner holds a lock for as long as
he lives: folders of the dead are removed by whoever comes next.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from pshare_jax.core.connector import TransferError
from pshare_jax.errors import ConfigError

logger = logging.getLogger(__name__)

PREFIX = "pshare-offers-"
_LOCK = "owner"

LEASE_SECONDS = 60.0
"""After this an offer that nobody has taken or withdrawn is forgotten."""


class OfferFolder:
    """What one process has on offer. Thread-safe.

    Args:
        parent: folder in memory that all processes of the host see, such as `/dev/shm`.
        lease_seconds: how long an offer stands.

    Raises:
        ConfigError: no folder can be made there.
    """

    def __init__(self, parent: str | Path, lease_seconds: float = LEASE_SECONDS):
        self.path = Path(parent) / f"{PREFIX}{secrets.token_hex(8)}"
        self._lease_seconds = lease_seconds
        self._lock = threading.Lock()
        self._offers: OrderedDict[int, tuple[str, float]] = OrderedDict()
        try:
            _bury_the_dead(Path(parent))
            self.path.mkdir(mode=0o700)
            made = self.path / f"{_LOCK}.new"
            self._owner = os.open(made, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._owner, fcntl.LOCK_EX)
            # Not before it is locked, or others would take its owner for dead.
            made.rename(self.path / _LOCK)
        except OSError as error:
            raise ConfigError(f"cluster.shm_path: {parent}: {error.strerror}") from error

    def __len__(self) -> int:
        """Transfers on offer."""
        with self._lock:
            return sum(file_of(self.path, transfer).exists() for transfer in self._offers)

    def put(
        self, transfer: int, worker: str, staged: list[np.ndarray], count: int, now: float
    ) -> None:
        """Offers pages.

        Args:
            transfer: its id.
            worker: who offers them.
            staged: pieces `[L, bucket, ...]`; what exceeds `count` pages is padding.
            count: number of pages.
            now: seconds, from any start.

        Raises:
            TransferError: there is an offer of that id, or no room for it.
        """
        self.expire(now)
        file = file_of(self.path, transfer)
        with self._lock:
            if transfer in self._offers:
                raise TransferError(f"transfer {transfer} is on offer already")
            self._offers[transfer] = worker, now + self._lease_seconds
        try:
            with open(file, "xb", buffering=0, opener=_private) as out:
                for piece in staged:
                    length = min(piece.shape[1], count)
                    count -= length
                    for layer in piece:
                        _write(out.fileno(), _bytes(layer[:length]))
        except OSError as error:
            self.drop(transfer)
            raise TransferError(
                f"transfer {transfer}: {file.parent} has no room for it: {error.strerror}"
            ) from error

    def drop(self, transfer: int) -> None:
        """Withdraws an offer; unknown ones and those that were taken are ignored."""
        with self._lock:
            known = self._offers.pop(transfer, None)
        if known is not None:
            file_of(self.path, transfer).unlink(missing_ok=True)

    def drop_worker(self, worker: str) -> None:
        """Withdraws all offers of a worker that has failed."""
        with self._lock:
            transfers = [t for t, (owner, _) in self._offers.items() if owner == worker]
        for transfer in transfers:
            self.drop(transfer)

    def expire(self, now: float) -> None:
        """Forgets offers whose lease is over."""
        with self._lock:
            late = [t for t, (_, until) in self._offers.items() if until <= now]
        for transfer in late:
            self.drop(transfer)

    def close(self) -> None:
        """Withdraws everything, and removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._owner)


def file_of(folder: Path, transfer: int) -> Path:
    """Where a transfer's pages lie."""
    return folder / f"{transfer:016x}"


def take(folder: Path, transfer: int) -> int:
    """Takes an offer: a descriptor of its file, which nobody else can take any more.

    Raises:
        TransferError: there is none.
    """
    file = file_of(folder, transfer)
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        file.unlink()
    except OSError:
        raise TransferError(f"transfer {transfer}: nothing is on offer") from None
    return descriptor


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array, whatever its dtype."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _bury_the_dead(parent: Path) -> None:
    """Removes folders whose owners do not live any more."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            # Whatever others put there under such a name is not opened.
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            owner = os.open(folder / _LOCK, flags)
        except OSError:
            continue  # it is being made, or another user's
        try:
            if os.fstat(owner).st_uid != os.geteuid():
                continue
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            logger.info("removing %s, whose owner has died", folder)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(owner)
