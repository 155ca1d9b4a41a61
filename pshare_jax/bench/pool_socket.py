"""Pages that one process has and another one gets over a loopback socket, for `bench pool`.

Both sides use what workers of different hosts use: offers, the route that serves them over HTTP,
and the connector's checks. Here it stands where else the pool in shared memory would, so that
nothing but the way of the pages differs.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from aiohttp import web

from pshare_jax.core import messages as m
from pshare_jax.core.connector import TransferError, TransferState
from pshare_jax.core.plans import Commit, Load, Look, Offer, Pull, StorePlan
from pshare_jax.core.prices import SHARED
from pshare_jax.core.store_end import StoreEnd
from pshare_jax.kv.remote import RemotePages
from pshare_jax.kv.store.end import WorkerEnd
from pshare_jax.serve.worker_app import send_pages

OWNER = "first"
LEASE_SECONDS = 3600.0
_START_SECONDS = 10.0
_POLL_SECONDS = 0.0005
_WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class Piece:
    """Pages that are on offer together: their chain keys, tokens and descriptors, and where."""

    transfer: int
    keys: list[bytes]
    tokens: list[tuple[int, ...]]
    descriptors: list[m.PageDescriptor]
    address: str

    def pull(self) -> Pull:
        """A pull of it; `targets` are filled in when they are known."""
        targets = [0] * len(self.keys)
        return Pull(self.transfer, OWNER, self.descriptors, self.keys, targets, self.address)


class OfferingEnd:
    """A worker's end of the store that puts on offer what it is told to write.

    Args:
        inner: what does all else.
        remote: the worker's end of the connector; its name is `OWNER`.
    """

    def __init__(self, inner: StoreEnd, remote: RemotePages):
        self.offering = False
        self._inner = inner
        self._remote = remote
        self._transfers = itertools.count(1)
        self._pieces: list[Piece] = []

    def run(self, plan: StorePlan) -> None:
        """See `StoreEnd.run`."""
        if self.offering and plan.saves:
            transfer = next(self._transfers)
            keys = [save.key for save in plan.saves]
            pages = [save.page for save in plan.saves]
            descriptors = self._remote.offer(Offer(transfer, "second", pages, keys))
            tokens = [save.tokens for save in plan.saves]
            address = self._remote.address_of(transfer)
            self._pieces.append(Piece(transfer, keys, tokens, descriptors, address))
        self._inner.run(plan)

    def taken(self) -> list[Piece]:
        """What has been put on offer since the last call; while nothing is written."""
        pieces, self._pieces = self._pieces, []
        return pieces


class SocketEnd:
    """A worker's end of the store that gets what is on offer elsewhere from there.

    What others have on offer it knows beforehand: nobody is asked, which favours the socket.

    Args:
        inner: what does all else.
        remote: the worker's end of the connector.
        send: carries a message to the worker, from any thread.
    """

    def __init__(self, inner: WorkerEnd, remote: RemotePages, send: Callable[[m.Message], None]):
        self.store_keys = inner.store_keys
        self._inner = inner
        self._remote = remote
        self._send = send
        self._pieces: dict[bytes, Piece] = {}
        self._keys: set[bytes] = set()
        self._pulls: dict[int, Pull] = {}
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="bench-pool-pulls")

    def know(self, pieces: Sequence[Piece]) -> None:
        """Pieces that are on offer; before anybody asks for them."""
        for piece in pieces:
            self._pieces[piece.keys[0]] = piece
            self._keys.update(piece.keys)

    def run(self, plan: StorePlan) -> None:
        """See `StoreEnd.run`."""
        self._inner.run(
            msgspec.structs.replace(
                plan,
                looks=[look for look in plan.looks if not self._look(look)],
                loads=[load for load in plan.loads if not self._load(load)],
                commits=[commit for commit in plan.commits if not self._commit(commit)],
                dropped=[transfer for transfer in plan.dropped if not self._drop(transfer)],
            )
        )

    def close(self) -> None:
        """Ends the thread that waits for pulls."""
        self._waiter.shutdown()
        self._remote.close()

    def _look(self, look: Look) -> bool:
        held = list(itertools.takewhile(self._keys.__contains__, look.keys))
        if held:
            self._send(m.Looked(look.id, [SHARED] * len(held)))
        return bool(held)

    def _load(self, load: Load) -> bool:
        if load.keys[0] not in self._keys:
            return False
        piece = self._pieces.get(load.keys[0])
        if piece is None or piece.keys != load.keys:
            self._send(m.Loaded(load.transfer, "these pages are not on offer together"))
            return True
        pull = piece.pull()
        try:
            self._remote.accept(pull)
        except TransferError as error:
            self._send(m.Loaded(load.transfer, str(error)))
        else:
            self._pulls[load.transfer] = pull
            self._waiter.submit(self._wait, load.transfer, pull)
        return True

    def _wait(self, transfer: int, pull: Pull) -> None:
        try:
            wait_for(self._remote, pull.transfer)
        except TransferError as error:
            self._pulls.pop(transfer, None)
            self._send(m.Loaded(transfer, str(error)))
        else:
            self._send(m.Loaded(transfer))

    def _commit(self, commit: Commit) -> bool:
        pull = self._pulls.pop(commit.transfer, None)
        if pull is None:
            return False
        pull.targets[:] = commit.pages
        self._remote.commit(pull.transfer)
        return True

    def _drop(self, transfer: int) -> bool:
        pull = self._pulls.pop(transfer, None)
        if pull is not None:
            self._remote.abort(pull.transfer)
        return pull is not None


def wait_for(remote: RemotePages, transfer: int) -> None:
    """Waits until a transfer that was accepted is there.

    Raises:
        TransferError: it does not come.
    """
    end = time.monotonic() + _WAIT_SECONDS
    while remote.poll(transfer) is not TransferState.READY:
        if time.monotonic() > end:
            raise TransferError(f"transfer {transfer}: nothing has come for {_WAIT_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)


@contextmanager
def page_server(folder: Path) -> Iterator[str]:
    """Serves what a folder has on offer, from a thread; gives the URL, of 127.0.0.1."""

    async def serve(request: web.Request) -> web.StreamResponse:
        return await send_pages(request, folder)

    app = web.Application()
    app.router.add_get("/pages/{transfer:[0-9a-f]{16}}", serve)
    runner = web.AppRunner(app, access_log=None)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner.addresses[0][1]

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="bench-pool-pages", daemon=True)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(start(), loop).result(_START_SECONDS)
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(_START_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
