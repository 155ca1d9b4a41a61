"""Workers that do nothing but say so, and threads that host them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pshare_jax.cluster.thread import WorkerThread
from pshare_jax.core.fairness import Share
from pshare_jax.core.messages import Message, Outbox
from pshare_jax.core.pages.page_cache import PageCache


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


class FakeWorker:
    """Has as many pieces of work as it is told to, and writes down what happens in `log`."""

    patience = None
    at_rest = True
    first_due = False

    @property
    def computes(self) -> bool:
        return self.pieces > 0

    def __init__(self, name: str, log: list[str], *, weight: float = 1.0, pieces: int = 0):
        self.name = name
        self.share = Share(weight)
        self.outbox: Outbox = []
        self.cache = PageCache(4, 2)
        self.log = log
        self.pieces = pieces
        self.pieces_ahead = 0
        self.seconds = 0.0
        self.urgent = False
        self.has_begun = False
        self.received: list[Message] = []
        self.on_piece: Callable[[], None] = lambda: None
        self.plans = 0
        self.released = False
        self.threads: set[int] = set()

    def setup(self) -> None:
        self.threads.add(threading.get_ident())

    def receive(self, message: Message) -> None:
        self.received.append(message)
        self.log.append(f"{self.name} hears")

    def plan(self, now: float) -> Callable[[], bool] | None:
        self.plans += 1
        if not self.pieces:
            return None
        self.pieces -= 1
        return self.work

    def plan_ahead(self) -> Callable[[], bool] | None:
        if not self.pieces_ahead:
            return None
        self.pieces_ahead -= 1
        return self.ahead

    def ahead(self) -> bool:
        self.log.append(f"{self.name} ahead")
        return True

    def work(self) -> bool:
        self.threads.add(threading.get_ident())
        self.urgent = False
        self.has_begun = True
        self.log.append(self.name)
        time.sleep(self.seconds)
        self.on_piece()
        return True

    def drain(self) -> None:
        self.log.append(f"{self.name} drained")
        self.has_begun = False

    def release_all(self) -> None:
        self.released = True


class Hosted:
    """A thread over workers; `sent` and `failures` are what it has told others."""

    def __init__(self, *workers: FakeWorker):
        self.sent: list[tuple[str, str, Message]] = []
        self.failures: list[tuple[str, str]] = []
        self.thread = WorkerThread(
            "host",
            workers,
            lambda *message: self.sent.append(message),
            lambda *failure: self.failures.append(failure),
        )


@contextmanager
def running(*workers: FakeWorker) -> Iterator[Hosted]:
    hosted = Hosted(*workers)
    hosted.thread.start()
    try:
        yield hosted
    finally:
        hosted.thread.stop()
