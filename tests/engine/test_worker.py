from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pshare_jax.engine.worker import Worker

from tests.engine.harness import wait_until


class Recorder(Worker):
    """Works as it is told to, and writes down in which thread."""

    def __init__(self, work: Callable[[], bool]):
        self.deaths: list[str] = []
        super().__init__("recorder", self.deaths.append)
        self._todo = work
        self.calls = 0
        self.threads: set[int] = set()

    def setup(self) -> None:
        self.threads.add(threading.get_ident())

    def work(self) -> bool:
        self.threads.add(threading.get_ident())
        self.calls += 1
        return self._todo()


def test_works_while_there_is_work_and_then_sleeps() -> None:
    left = iter([True, True, False])
    worker = Recorder(lambda: next(left, False))
    worker.start()
    wait_until(lambda: worker.calls == 3)
    worker.notify()
    wait_until(lambda: worker.calls == 4)
    worker.stop()
    assert worker.calls == 4
    assert worker.deaths == []
    assert len(worker.threads) == 1
    assert threading.get_ident() not in worker.threads


def test_a_notification_during_work_is_not_lost() -> None:
    """Between finding nothing to do and falling asleep there may be news."""

    def work() -> bool:
        if worker.calls < 50:
            worker.notify()
        return False

    worker = Recorder(work)
    worker.start()
    wait_until(lambda: worker.calls == 50)
    worker.stop()


def test_stop_wakes_a_sleeper_and_is_idempotent() -> None:
    worker = Recorder(lambda: False)
    worker.stop()
    worker = Recorder(lambda: False)
    worker.start()
    wait_until(lambda: worker.calls)
    worker.stop()
    worker.stop()
    assert worker.calls == 1


def test_an_exception_is_the_end() -> None:
    def work() -> bool:
        raise ValueError("broken")

    worker = Recorder(work)
    worker.start()
    wait_until(lambda: worker.deaths)
    worker.stop()
    assert worker.calls == 1
    assert worker.deaths == ["recorder: ValueError: broken"]


def test_busy_seconds_count_work_that_made_progress() -> None:
    def work() -> bool:
        time.sleep(0.01)
        return worker.calls <= 3

    worker = Recorder(work)
    worker.start()
    wait_until(lambda: worker.calls == 4)
    worker.stop()
    assert worker.busy_seconds >= 0.03
    spent = worker.busy_seconds
    idle = Recorder(lambda: False)
    idle.start()
    wait_until(lambda: idle.calls == 1)
    idle.stop()
    assert (idle.busy_seconds, worker.busy_seconds) == (0.0, spent)
