"""Threads that host workers.

Workers of one processor (on a CPU all of them, on one chip its prefill and its decode worker) are
hosted by one thread, and take turns by weighted fair queueing. On a CPU both use all cores, and two
computations at once would take each other's caches and threads: nothing is won, and decode steps
with few rows take half of the time that prompts wait for. Workers with devices of their own have a
thread each. When nobody waits for anything in a thread, it does what may be asked for next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from pshare_jax.cluster.turns import Turns
from pshare_jax.cluster.worker import Worker
from pshare_jax.core.fairness import FairTurns
from pshare_jax.core.messages import Covered, Message

logger = logging.getLogger(__name__)

_FORGETS = 0.98
"""What is left of a long piece after each further one."""

Send = Callable[[str, str, Message], None]
"""Carries a message: from whom, to whom, what."""


class WorkerThread:
    """Hosts workers in one thread.

    A worker that raises has failed, and with it those that use the same pool, whose arrays may have
    been given away; the others go on.

    Args:
        name: of the thread.
        workers: who is hosted.
        send: carries messages to parts that are elsewhere.
        on_failure: called with a worker's name and the reason when it has failed.
        clock: seconds, from any start.
        host_turns: asked before each piece of work, where other processes use the same processor.

    Attributes:
        busy_seconds: time spent in pieces of work, by worker; written by the thread alone.
        longest_seconds: about the longest piece of work of late.
    """

    def __init__(
        self,
        name: str,
        workers: Sequence[Worker],
        send: Send,
        on_failure: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
        host_turns: Turns | None = None,
    ):
        self.name = name
        self.workers = list(workers)
        self.busy_seconds = {worker.name: 0.0 for worker in workers}
        self.longest_seconds = 0.0
        self._alive = {worker.name: worker for worker in workers}
        self._send = send
        self._on_failure = on_failure
        self._clock = clock
        self._host_turns = host_turns
        self._turns = FairTurns()
        self._last: Worker | None = None
        self._pieces = 0
        self._piece_out_of_turn = -1
        self._inbox: list[tuple[str, Message]] = []
        self._calls: list[Callable[[], None]] = []
        self._condition = threading.Condition()
        self._stopping = False
        self._hands_over = False
        self._carried = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def post(self, to: str, message: Message) -> None:
        """Gives a hosted worker a message; from any thread."""
        with self._condition:
            self._inbox.append((to, message))
            self._condition.notify()

    def call(self, action: Callable[[], None]) -> None:
        """Has the thread call `action` between two pieces of work; from any thread.

        What raises there is a bug, and ends nothing but the action.
        """
        with self._condition:
            self._calls.append(action)
            self._condition.notify()

    def wake(self) -> None:
        """Has the thread look again for what there is to do; from any thread."""
        self.call(lambda: None)

    def stop(self) -> None:
        """Ends the thread after its present piece of work and waits for it."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def turn(self) -> bool:
        """Takes in what has come and does one piece of work; what the thread does again and again.

        Called from elsewhere only where the thread is not started: time then is the caller's.

        Returns:
            Whether it got on; otherwise there is nothing to do until something is heard.
        """
        self._take_in()
        self._carried = False
        progress = self._work() or self._work_ahead()
        if not progress and self._host_turns is not None:
            self._host_turns.rests()
        # Planning alone may have something to say, such as that a prompt was all cached.
        self._flush()
        return progress or self._carried

    def _run(self) -> None:
        for worker in self.workers:
            self._guard(worker, worker.setup)
        try:
            self._take_turns()
        except BaseException as error:
            # Between pieces of work, which are guarded. Nobody may seem to go on without a thread.
            logger.exception("%s has failed", self.name)
            for worker in tuple(self._alive.values()):
                self._fail(worker, f"{type(error).__name__}: {error}")

    def _take_turns(self) -> None:
        """Works and sleeps until the thread is to end."""
        idle = False
        while True:
            with self._condition:
                if idle and not self._is_asked:
                    self._condition.wait(self._patience())
                if self._stopping:
                    break
            idle = not self.turn()
        self._drain()

    @property
    def _is_asked(self) -> bool:
        """Whether there is something to take in; also a hint, without the lock."""
        return bool(self._inbox or self._calls or self._stopping)

    def _take_in(self) -> None:
        """Takes in what has come, and carries what that has brought about."""
        with self._condition:
            inbox, self._inbox = self._inbox, []
            calls, self._calls = self._calls, []
        self._carried |= bool(inbox or calls)
        for to, message in inbox:
            self._receive(to, message)
        for action in calls:
            self._call(action)
        self._flush()

    def _patience(self) -> float | None:
        waits = [worker.patience for worker in self._alive.values()]
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def _receive(self, to: str, message: Message) -> None:
        worker = self._alive.get(to)
        if worker is not None:
            self._guard(worker, lambda: worker.receive(message))

    def _call(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            logger.exception("%s: what it was asked to do has failed", self.name)

    def _flush(self) -> None:
        """Carries messages: first those to workers here, until none of them has more to say.

        So what others hear of is complete. Notes whether there were any: who has heard something,
        or had something to say, may have more to do now, such as prompts that waited for one that
        is covered. It may have been asked for work before that.
        """
        others: list[tuple[str, str, Message]] = []
        more = True
        while more:
            more = False
            for worker in tuple(self._alive.values()):
                while worker.outbox:
                    to, message = worker.outbox.pop(0)
                    if to in self.busy_seconds:
                        self._receive(to, message)
                        more = self._carried = True
                    else:
                        others.append((worker.name, to, message))
        for source, to, message in others:
            self._send(source, to, message)
            self._hands_over |= isinstance(message, Covered)
        self._carried |= bool(others)

    def _work(self) -> bool:
        """One piece of work of the worker whose turn it is; False when nobody has any."""
        if self._work_urgent():
            return True
        if self._work_out_of_turn():
            return True
        by_share = {id(worker.share): worker for worker in self._alive.values()}
        for share in self._turns.order([worker.share for worker in self._alive.values()]):
            worker = by_share[id(share)]
            if worker.name in self._alive and self._give_turn(worker):
                return True
            self._turns.rests(share)
        # Planning may have found that all is there that somebody waits for.
        return self._work_urgent()

    def _work_out_of_turn(self) -> bool:
        """A piece of work that a first token waits for, once after each piece of another worker's
        in turn; it counts as its worker's time all the same. Never two of them in a row, whoever
        has them: a row that can get no page keeps its worker here, and others would starve."""
        if self._pieces == self._piece_out_of_turn:
            return False
        due = [one for one in self._alive.values() if one.first_due and one is not self._last]
        for worker in sorted(due, key=lambda one: one.share.virtual_seconds):
            before = self._pieces
            if worker.name in self._alive and self._give_turn(worker):
                if self._pieces > before:
                    self._piece_out_of_turn = self._pieces
                return True
        return False

    def _work_urgent(self) -> bool:
        workers = tuple(self._alive.values())
        return any(worker.urgent and self._give_turn(worker) for worker in workers)

    def _work_ahead(self) -> bool:
        """A piece of work that nobody waits for yet, while nobody waits for anything here."""
        workers = tuple(self._alive.values())
        if self._inbox or not all(worker.at_rest for worker in workers):
            return False
        if self._host_turns is not None and self._host_turns.is_wanted:
            return False
        return any(self._guard(worker, lambda w=worker: self._piece_ahead(w)) for worker in workers)

    def _piece_ahead(self, worker: Worker) -> bool:
        piece = worker.plan_ahead()
        if piece is None:
            return False
        self._last = worker
        self._pieces += 1
        # Who has worked for nobody is not behind when there is work for somebody again.
        return self._timed(worker, piece, counts=False)

    def _give_turn(self, worker: Worker) -> bool:
        progress = self._guard(worker, lambda: self._piece(worker))
        return bool(progress) or worker.name not in self._alive

    def _piece(self, worker: Worker) -> bool:
        turns = self._host_turns
        if turns is not None and worker.computes and not worker.urgent:
            return self._in_turn(turns, worker)
        return self._planned(worker)

    def _planned(self, worker: Worker) -> bool:
        """Plans a piece and does it."""
        urgent = worker.urgent
        piece = worker.plan(self._clock())
        if piece is None:
            return False
        if not urgent and self._last is not worker:
            # One computes at a time; what only moves pages need not wait for that.
            self._drain()
            self._last = worker
        progress = self._timed(worker, piece)
        self._pieces += progress and not urgent
        return progress

    def _in_turn(self, turns: Turns, worker: Worker) -> bool:
        """A piece of work that no other process's engine works beside.

        What others wait for, and needs no computation, is done while the turn is waited for, and
        before it is given up. What to compute is decided when there is a turn, and with all that
        has been heard until then.
        """
        if not turns.begin(lambda: self._is_asked):
            return True
        self._hands_over = False
        try:
            self._take_in()
            self._do_urgent(worker)
            progress = worker.name in self._alive and self._planned(worker)
            self._do_urgent(worker)
            self._flush()
            if turns.is_wanted:
                self._drain()
            return progress
        finally:
            turns.end(hands_over=self._hands_over)

    def _do_urgent(self, worker: Worker) -> None:
        """Moves what pages there are to be moved."""
        while worker.name in self._alive and worker.urgent and self._planned(worker):
            self._flush()

    def _drain(self) -> None:
        """Finishes what the last worker has begun, in its time."""
        last = self._last
        if last is not None and last.name in self._alive and last.has_begun:
            self._guard(last, lambda: self._timed(last, last.drain))
            self._tell(last)

    def _tell(self, worker: Worker) -> None:
        """Carries what a worker has to say to others elsewhere, before a long piece of work of
        another one: tokens, for example. Messages to workers here wait until that has ended, since
        it has been planned."""
        here = [message for message in worker.outbox if message[0] in self.busy_seconds]
        others = [message for message in worker.outbox if message[0] not in self.busy_seconds]
        worker.outbox[:] = here
        for to, message in others:
            self._send(worker.name, to, message)

    def _timed(
        self, worker: Worker, piece: Callable[[], bool | None], *, counts: bool = True
    ) -> bool:
        started = self._clock()
        progress = piece()
        seconds = self._clock() - started
        if progress is False:
            return False
        self.longest_seconds = max(seconds, _FORGETS * self.longest_seconds)
        self.busy_seconds[worker.name] += seconds
        if counts:
            self._turns.worked(worker.share, seconds)
        return True

    def _guard(self, worker: Worker | None, action: Callable[[], bool | None]) -> bool | None:
        """Does something on behalf of a worker, which has failed if that raises."""
        try:
            return action()
        except BaseException as error:
            logger.exception("%s has failed", self.name if worker is None else worker.name)
            reason = f"{type(error).__name__}: {error}"
            for other in tuple(self._alive.values()):
                if worker is not None and other.cache is worker.cache:
                    self._fail(other, reason)
            return None

    def _fail(self, worker: Worker, reason: str) -> None:
        """A worker has failed: it gets no more work, and who asked for it is told."""
        del self._alive[worker.name]
        try:
            worker.release_all()
        except Exception:
            logger.exception("%s: its pages", worker.name)
        try:
            self._on_failure(worker.name, reason)
        except Exception:
            logger.exception("%s: who asked for it was not told", worker.name)
