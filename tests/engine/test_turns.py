"""Turns on one processor: one at a time, by weight, and without credit for idle time."""

from __future__ import annotations

import threading
import time

from pshare_jax.engine.turns import Member, Turns
from pshare_jax.engine.worker import Worker

from tests.engine.harness import Client, wait_until


def test_time_is_shared_by_weight_and_one_works_at_a_time() -> None:
    turns, log, working = Turns(), [], []
    pieces = {"prefill": (Member(3.0), 0.3), "decode": (Member(1.0), 0.01)}
    ready = threading.Barrier(2)

    def run(name: str) -> None:
        member, seconds = pieces[name]
        ready.wait()
        while len(log) < 600:
            turns.take(member)
            while True:
                working.append(name)
                time.sleep(1e-3)  # time for the other one to queue
                assert working == [name]
                log.append(name)
                working.remove(name)
                if not turns.end(member, seconds, more=len(log) < 600):
                    break

    threads = [threading.Thread(target=run, args=(name,)) for name in pieces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    busy = log[50:550]
    # A chunk of 0.3 s counts 0.1: ten steps of 0.01 s.
    assert 7 <= busy.count("decode") / busy.count("prefill") <= 13


def test_a_member_alone_keeps_its_turn() -> None:
    turns, member = Turns(), Member(1.0)
    turns.take(member)
    assert turns.end(member, 5.0, more=True)
    assert not turns.end(member, 5.0, more=False)


def test_idle_time_is_not_made_up_for() -> None:
    turns, busy, idle = Turns(), Member(1.0), Member(1.0)
    turns.take(busy)
    assert turns.end(busy, 100.0, more=True)
    assert turns.end(busy, 1.0, more=True)
    came = threading.Event()
    thread = threading.Thread(target=lambda: (turns.take(idle), came.set()))
    thread.start()
    wait_until(lambda: len(turns._queue.waiting) == 1)
    assert idle.virtual_seconds == 100.0  # that of the turn it waits for, not 0
    assert not turns.end(busy, 1.0, more=True)
    assert came.wait(10)
    thread.join()
    # After one piece of 3 s it has had more than the other, who has waited.
    waiting = threading.Thread(target=lambda: turns.take(busy))
    waiting.start()
    wait_until(lambda: len(turns._queue.waiting) == 1)
    assert not turns.end(idle, 3.0, more=True)
    waiting.join(10)
    assert not turns.end(busy, 1.0, more=False)


class Busy(Worker):
    """Counts its pieces of work, and who else is at work meanwhile."""

    def __init__(self, working: list[str], overlaps: list[str], fails: bool = False):
        super().__init__(f"busy{len(overlaps)}", lambda _: None)
        self.working, self.overlaps, self.fails, self.calls = working, overlaps, fails, 0

    def work(self) -> bool:
        self.overlaps += self.working
        self.working.append(self.name)
        time.sleep(1e-3)
        self.working.remove(self.name)
        self.calls += 1
        if self.fails:
            raise RuntimeError("broken")
        return True


def test_workers_that_share_a_processor_do_not_work_at_once_and_all_get_on() -> None:
    turns, working, overlaps = Turns(), [], []
    workers = [Busy(working, overlaps, fails) for fails in (False, False, True)]
    for worker in workers:
        worker.share_processor(turns)
        worker.start()
    # One that fails gives its turn back.
    wait_until(lambda: workers[2].calls == 1 and min(w.calls for w in workers[:2]) >= 20)
    for worker in workers:
        worker.stop()
    assert overlaps == []


def test_the_engines_of_one_cpu_share_their_turns(client2x2: Client) -> None:
    engine = client2x2.engine
    engines = [*engine._prefill, *engine._decode]
    assert len(engines) == 4
    assert len({id(worker._turns) for worker in engines}) == 1
    assert [worker._member.weight for worker in engines] == [3.0, 3.0, 1.0, 1.0]
