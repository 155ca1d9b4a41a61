"""Hosts in virtual time: workers of one processor take turns as the engine's threads have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pshare_jax.bench.plan.clock import Clock, Processor
from pshare_jax.cluster.thread import WorkerThread
from pshare_jax.cluster.worker import PrefillWorker, Worker
from pshare_jax.core.messages import Message


class SimHost:
    """Gives workers of one processor their turns as the engine's threads do, in virtual time."""

    def __init__(
        self,
        clock: Clock,
        processor: Processor,
        workers: Sequence[Worker],
        carry: Callable[[Sequence[tuple[str, str, Message]]], None],
    ):
        self.workers = workers
        self._clock = clock
        self._processor = processor
        self._carry = carry
        self._said: dict[float, list[tuple[str, str, Message]]] = {}
        self._idle = True
        self._thread = WorkerThread("host", workers, self._send, _failed, lambda: processor.now)

    def post(self, to: str, message: Message) -> None:
        """Gives a worker a message, now."""
        self._thread.post(to, message)
        if self._idle:
            self._idle = False
            self._clock.at(self._clock.now, self._turn)

    def _turn(self) -> None:
        self._processor.wait(self._clock.now)
        if self._thread.turn():
            self._clock.at(self._processor.now, self._turn)
            return
        self._idle = True
        waits = [w.patience for w in self.workers if isinstance(w, PrefillWorker)]
        for seconds in waits:
            # What the store owes is waited for until a deadline, as in the engine.
            if seconds is not None:
                self._clock.at(self._processor.now + seconds, self._wake)

    def _wake(self) -> None:
        if self._idle:
            self._idle = False
            self._turn()

    def _send(self, source: str, to: str, message: Message) -> None:
        """Messages of one moment go together."""
        now = self._processor.now
        if now not in self._said:
            self._said[now] = []
            self._clock.at(now, self._carry_said)
        self._said[now].append((source, to, message))

    def _carry_said(self) -> None:
        self._carry(self._said.pop(self._clock.now))


def _failed(worker: str, reason: str) -> None:
    raise RuntimeError(f"{worker} of the simulation has failed: {reason}")
