"""Threads that host workers: shares, messages, ends of workers. No jax, no pools."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pshare_jax.cluster.dispatcher_thread import DispatcherThread
from pshare_jax.core.messages import Abort, Message
from pshare_jax.core.pages.page_cache import PageCache
from tests.cluster.workers import FakeWorker, Hosted, running, wait_until


def test_works_while_there_is_work_and_then_sleeps() -> None:
    worker = FakeWorker("a", [], pieces=3)
    with running(worker) as hosted:
        wait_until(lambda: worker.log.count("a") == 3)
        wait_until(lambda: worker.plans == 4)
        time.sleep(0.02)
        assert worker.plans == 4, "it sleeps"
        worker.pieces = 1
        hosted.thread.post("a", Abort(1))
        wait_until(lambda: worker.log.count("a") == 4)
    assert worker.received == [Abort(1)]
    assert len(worker.threads) == 1
    assert threading.get_ident() not in worker.threads


def test_a_message_that_comes_during_planning_is_not_lost() -> None:
    worker = FakeWorker("a", [])
    with running(worker) as hosted:
        plain = worker.plan

        def plan(now: float) -> Callable[[], bool] | None:
            if worker.plans < 50:
                hosted.thread.post("a", Abort(worker.plans))
            return plain(now)

        worker.plan = plan  # type: ignore[method-assign]
        hosted.thread.post("a", Abort(-1))
        wait_until(lambda: worker.plans >= 50)
        wait_until(lambda: len(worker.received) >= 50)


def test_who_has_said_something_elsewhere_is_asked_again() -> None:
    """It may have more to do now: a prompt that is covered lets in those that waited for it."""
    worker = FakeWorker("a", [])
    plain = worker.plan

    def plan(now: float) -> Callable[[], bool] | None:
        if worker.plans < 3:
            worker.outbox.append(("elsewhere", Abort(worker.plans)))
        return plain(now)

    worker.plan = plan  # type: ignore[method-assign]
    with running(worker) as hosted:
        wait_until(lambda: worker.plans == 4)
    assert [message for _, _, message in hosted.sent] == [Abort(0), Abort(1), Abort(2)]


def test_a_fault_between_pieces_of_work_is_that_of_all_workers() -> None:
    """Without a thread nobody works: none may seem to go on."""

    class Faulty(FakeWorker):
        @property
        def first_due(self) -> bool:  # type: ignore[override]
            if self.received:
                raise RuntimeError("lost count")
            return False

    faulty, other = Faulty("a", []), FakeWorker("b", [])
    other.cache = PageCache(4, 2)
    with running(faulty, other) as hosted:
        hosted.thread.post("a", Abort(1))
        wait_until(lambda: len(hosted.failures) == 2)
    assert sorted(hosted.failures) == [
        ("a", "RuntimeError: lost count"),
        ("b", "RuntimeError: lost count"),
    ]
    assert faulty.released
    assert other.released


def test_a_worker_whose_failure_cannot_be_told_does_not_silence_the_others() -> None:
    faulty, other = FakeWorker("a", [], pieces=1), FakeWorker("b", [])
    other.cache = faulty.cache

    def fail() -> None:
        raise RuntimeError("broken")

    faulty.on_piece = fail
    hosted = Hosted(faulty, other)
    told: list[str] = []

    def on_failure(name: str, reason: str) -> None:
        told.append(name)
        raise OSError("nobody listens")

    hosted.thread._on_failure = on_failure
    hosted.thread.turn()
    assert sorted(told) == ["a", "b"]
    assert faulty.released
    assert other.released


def test_stop_wakes_a_sleeper_and_is_idempotent() -> None:
    hosted = Hosted(FakeWorker("a", []))
    hosted.thread.stop()
    hosted = Hosted(worker := FakeWorker("a", []))
    hosted.thread.start()
    wait_until(lambda: worker.plans)
    hosted.thread.stop()
    hosted.thread.stop()
    assert worker.plans == 1


def test_time_is_shared_by_weight_and_one_computes_at_a_time() -> None:
    log: list[str] = []
    prefill = FakeWorker("p", log, weight=3.0, pieces=40)
    decode = FakeWorker("d", log, weight=1.0, pieces=400)
    prefill.seconds, decode.seconds = 0.009, 0.001
    with running(decode, prefill):
        wait_until(lambda: log.count("p") >= 20)
        part = list(log)
    # A chunk of 9 ms counts 3: three steps of 1 ms, and what the clock adds to them.
    assert 1.5 <= part.count("d") / part.count("p") <= 4.5
    # Whoever has begun something is drained before the other computes.
    computed = [entry for entry in part if "hears" not in entry]
    for before, after in itertools.pairwise(computed):
        if before in ("p", "d") and after in ("p", "d"):
            assert before == after


def test_what_only_moves_pages_goes_first_and_drains_nobody() -> None:
    log: list[str] = []
    busy, other = FakeWorker("busy", log, pieces=3), FakeWorker("other", log)
    hosted = Hosted(busy, other)
    thread = hosted.thread
    assert thread.turn()
    other.urgent, other.pieces = True, 1
    other.share.virtual_seconds = 1e9
    assert thread.turn()
    assert log == ["busy", "other"]


def test_a_first_token_comes_after_each_piece_of_another_and_is_accounted_for() -> None:
    log: list[str] = []
    prefill = FakeWorker("p", log, pieces=3)
    decode = FakeWorker("d", log, weight=1e-6, pieces=9)
    decode.first_due, decode.seconds = True, 0.001
    hosted = Hosted(decode, prefill)
    while prefill.pieces or decode.pieces > 5:
        assert hosted.thread.turn()
    # Its share would not have given it a second turn, which it does not get of its own either.
    computed = [entry for entry in log if entry in ("p", "d")]
    assert computed[:7] == ["d", "p", "d", "p", "d", "p", "d"]
    assert decode.share.virtual_seconds > 1000


def test_first_tokens_of_two_workers_do_not_starve_a_third() -> None:
    log: list[str] = []
    prefill = FakeWorker("p", log, pieces=3)
    decodes = [FakeWorker(name, log, weight=1e-6, pieces=9) for name in ("d0", "d1")]
    for decode in decodes:
        # For ever: as with rows that can get no page.
        decode.first_due, decode.seconds = True, 0.001
    hosted = Hosted(prefill, *decodes)
    while prefill.pieces:
        assert hosted.thread.turn()
    computed = [entry for entry in log if entry in ("p", "d0", "d1")]
    assert computed[:4] == ["d0", "p", "d1", "p"]
    assert computed[5:] == ["p"]


def test_who_cannot_get_on_does_not_hold_others_up() -> None:
    log: list[str] = []
    prefill, decode = FakeWorker("p", log, pieces=3), FakeWorker("d", log)
    decode.first_due = True
    hosted = Hosted(decode, prefill)
    while prefill.pieces:
        assert hosted.thread.turn()
    assert [entry for entry in log if entry in ("p", "d")] == ["p"] * 3


def test_what_there_is_to_say_leaves_before_the_next_piece() -> None:
    log: list[str] = []
    prefill, decode = FakeWorker("p", log, pieces=1), FakeWorker("d", log, pieces=1)
    hosted, heard = Hosted(decode, prefill), []

    def drain() -> None:
        decode.has_begun = False
        decode.outbox += [("dispatcher", Abort(1)), ("p", Abort(2)), ("dispatcher", Abort(3))]

    decode.drain = drain  # type: ignore[method-assign]
    prefill.on_piece = lambda: heard.append((list(hosted.sent), list(prefill.received)))
    while hosted.thread.turn():
        pass
    told = [("d", "dispatcher", Abort(1)), ("d", "dispatcher", Abort(3))]
    # What has been planned is carried out before a worker here hears anything new.
    assert heard == [(told, [])]
    assert (hosted.sent, prefill.received) == (told, [Abort(2)])


def test_messages_between_workers_here_come_before_others_hear_of_anything() -> None:
    log: list[str] = []
    first, second = FakeWorker("first", log, pieces=1), FakeWorker("second", log)

    def say() -> None:
        first.outbox += [("elsewhere", Abort(1)), ("second", Abort(2))]

    first.on_piece = say
    hosted = Hosted(first, second)
    second_receive = second.receive

    def receive(message: Message) -> None:
        assert hosted.sent == []
        second_receive(message)
        second.outbox.append(("elsewhere", Abort(3)))

    second.receive = receive  # type: ignore[method-assign]
    hosted.thread.turn()
    assert second.received == [Abort(2)]
    assert hosted.sent == [("first", "elsewhere", Abort(1)), ("second", "elsewhere", Abort(3))]


def broken() -> None:
    raise ValueError("broken")


def test_a_worker_that_raises_fails_alone() -> None:
    log: list[str] = []
    bad, good = FakeWorker("bad", log, pieces=5), FakeWorker("good", log, pieces=5)
    bad.on_piece = broken
    with running(bad, good) as hosted:
        wait_until(lambda: log.count("good") == 5)
        hosted.thread.post("bad", Abort(1))
        hosted.thread.post("good", Abort(2))
        wait_until(lambda: good.received)
    assert hosted.failures == [("bad", "ValueError: broken")]
    assert bad.received == []
    assert (bad.released, good.released) == (True, False)
    assert log.count("bad") == 1


def test_workers_of_one_pool_fail_together() -> None:
    log: list[str] = []
    bad, partner, good = (FakeWorker(name, log, pieces=3) for name in ("bad", "partner", "good"))
    partner.cache = bad.cache
    bad.on_piece = broken
    with running(bad, partner, good) as hosted:
        wait_until(lambda: log.count("good") == 3)
    assert sorted(name for name, _ in hosted.failures) == ["bad", "partner"]


@pytest.mark.parametrize("where", ["receive", "plan", "drain", "setup"])
def test_wherever_it_raises_it_is_that_worker_s_failure(where: str) -> None:
    log: list[str] = []
    bad, good = FakeWorker("bad", log, pieces=2), FakeWorker("good", log, pieces=9)

    def fail(*args: Any) -> Any:
        broken()

    setattr(bad, where, fail)
    with running(bad, good) as hosted:
        hosted.thread.post("bad", Abort(1))
        wait_until(lambda: hosted.failures)
        wait_until(lambda: log.count("good") == 9)
    assert hosted.failures == [("bad", "ValueError: broken")]


def test_busy_seconds_count_pieces_that_made_progress() -> None:
    worker, idle = FakeWorker("a", [], pieces=3), FakeWorker("b", [])
    worker.seconds = 0.01
    with running(worker, idle) as hosted:
        wait_until(lambda: worker.log.count("a") == 3)
    assert hosted.thread.busy_seconds["a"] >= 0.03
    assert hosted.thread.busy_seconds["b"] == 0.0


def test_the_dispatcher_runs_actions_in_order_and_survives_one_that_raises() -> None:
    done: list[Any] = []
    failures: list[str] = []
    thread = DispatcherThread(lambda: done.append("after"), failures.append)
    thread.post(lambda: done.append(1))
    thread.post(broken)
    thread.post(lambda: done.append(2))
    thread.start()
    wait_until(lambda: 2 in done and done[-1] == "after")
    thread.post(lambda: done.append(3))
    thread.stop()
    thread.stop()
    assert [entry for entry in done if entry != "after"] == [1, 2, 3]
    assert failures == ["dispatcher: ValueError: broken"]


def test_what_nobody_waits_for_is_done_once_nobody_waits_for_anything() -> None:
    log: list[str] = []
    one, two = FakeWorker("one", log, pieces=2), FakeWorker("two", log)
    one.pieces_ahead, two.pieces_ahead = 1, 1
    two.at_rest = False
    thread = Hosted(one, two).thread
    for _ in range(4):
        thread.turn()
    assert log == ["one", "one"], "somebody waits for `two`, though it can do nothing"
    two.at_rest = True
    while thread.turn():
        pass
    assert log[2:] == ["one ahead", "two ahead"]


def test_who_worked_ahead_is_not_behind_when_there_is_work() -> None:
    log: list[str] = []
    one, two = FakeWorker("one", log), FakeWorker("two", log)
    hosted = Hosted(one, two)
    one.pieces_ahead = 3
    while hosted.thread.turn():
        pass
    assert log == ["one ahead"] * 3
    assert hosted.thread.busy_seconds["one"] > 0
    assert one.share.virtual_seconds == 0


def test_who_fails_ahead_has_failed() -> None:
    worker = FakeWorker("a", [])
    worker.pieces_ahead = 1
    worker.ahead = lambda: 1 / 0  # type: ignore[method-assign, assignment]
    hosted = Hosted(worker)
    hosted.thread.turn()
    assert hosted.failures == [("a", "ZeroDivisionError: division by zero")]
    assert not hosted.thread.turn()


def test_an_arrival_wakes_the_thread() -> None:
    """Nobody looks again and again."""
    worker = FakeWorker("a", [])
    with running(worker) as hosted:
        wait_until(lambda: worker.plans == 1)
        worker.pieces = 1
        hosted.thread.wake()
        wait_until(lambda: worker.log == ["a"])


def test_what_is_called_comes_between_pieces_in_the_thread() -> None:
    """What it raises is logged, and ends nothing."""
    worker = FakeWorker("a", [])
    called = threading.Event()

    def fail() -> None:
        raise ValueError("a bug")

    with running(worker) as hosted:
        wait_until(lambda: worker.plans)
        hosted.thread.call(fail)
        hosted.thread.call(lambda: (worker.setup(), called.set()))
        assert called.wait(30)
        assert len(worker.threads) == 1
        worker.pieces = 1
        hosted.thread.post("a", Abort(1))
        wait_until(lambda: "a" in worker.log)
        assert hosted.failures == []
