"""Threads that host workers take turns with those of other processes."""

from __future__ import annotations

from collections.abc import Callable

from pshare_jax.core.messages import Abort, Covered, Message
from pshare_jax.core.requests import PromptUsage
from tests.cluster.workers import FakeWorker, Hosted
from tests.core.sequences import make_sequence


class FakeTurns:
    """Writes down what a thread asks for."""

    def __init__(self, log: list[str]):
        self.log = log
        self.is_wanted = False
        self.on_begin: Callable[[], None] = lambda: None

    def begin(self, interrupted: Callable[[], bool]) -> bool:
        if interrupted():
            self.log.append("interrupted")
            return False
        self.on_begin()
        self.log.append("begins")
        return True

    def end(self, *, hands_over: bool) -> None:
        self.log.append("hands over" if hands_over else "ends")

    def rests(self) -> None:
        self.log.append("rests")


def test_pieces_are_done_in_turns_with_other_processes() -> None:
    """But not what only moves pages; and what was begun is ended before another's turn."""
    log: list[str] = []
    worker = FakeWorker("a", log, pieces=3)
    turns = FakeTurns(log)
    thread = Hosted(worker).thread
    thread._host_turns = turns
    assert thread.turn()
    turns.is_wanted = True
    assert thread.turn()
    worker.urgent = True
    assert thread.turn()
    assert not thread.turn()
    assert log == ["begins", "a", "ends", "begins", "a", "a drained", "ends", "a", "rests"]


def in_turns(worker: FakeWorker) -> tuple[Hosted, FakeTurns]:
    hosted, turns = Hosted(worker), FakeTurns(worker.log)
    hosted.thread._host_turns = turns
    return hosted, turns


def test_what_is_computed_is_decided_once_there_is_a_turn() -> None:
    """With all that has been heard while it was waited for."""
    worker = FakeWorker("a", [], pieces=1)
    hosted, turns = in_turns(worker)
    planned: list[list[Message]] = []
    plain = worker.plan

    def plan(now: float) -> Callable[[], bool] | None:
        planned.append(list(worker.received))
        return plain(now)

    worker.plan = plan  # type: ignore[method-assign]
    turns.on_begin = lambda: hosted.thread.post("a", Abort(1))
    assert hosted.thread.turn()
    assert planned == [[Abort(1)]]
    assert worker.log == ["begins", "a hears", "a", "ends"]


def test_who_waits_for_a_turn_hears_what_comes() -> None:
    """And moves pages meanwhile, for which no turn is needed."""
    worker = FakeWorker("a", [], pieces=2)
    hosted, turns = in_turns(worker)

    def receive(message: Message) -> None:
        worker.log.append("a hears")
        worker.urgent = True

    worker.receive = receive  # type: ignore[method-assign]
    plain = turns.begin

    def begin(interrupted: Callable[[], bool]) -> bool:
        if "a hears" not in worker.log:
            hosted.thread.post("a", Abort(1))
        return plain(interrupted)

    turns.begin = begin  # type: ignore[method-assign]
    for _ in range(3):
        assert hosted.thread.turn()
    assert worker.log == ["interrupted", "a hears", "a", "begins", "a", "ends"]


def test_what_others_wait_for_is_done_before_a_turn_is_given_up() -> None:
    """Such as an offer of what has just been computed; and they are told."""
    worker = FakeWorker("a", [], pieces=2)
    hosted, turns = in_turns(worker)

    def compute() -> None:
        worker.urgent = "a" not in worker.log[:-1]
        worker.outbox.append(("elsewhere", Abort(len(worker.log))))

    worker.on_piece = compute
    sent = hosted.sent
    plain = turns.end

    def end(*, hands_over: bool) -> None:
        worker.log.append(f"{len(sent)} sent")
        plain(hands_over=hands_over)

    turns.end = end  # type: ignore[method-assign]
    assert hosted.thread.turn()
    assert worker.log == ["begins", "a", "a", "2 sent", "ends"]


def test_a_prompt_that_is_covered_is_handed_over() -> None:
    """So that who goes on with it may wait for the news before he computes something else."""
    worker = FakeWorker("a", [], pieces=2)
    hosted, _ = in_turns(worker)
    covered = Covered(make_sequence(1, [1, 2, 3], page_size=2), PromptUsage(3, 2, 0, 0))
    worker.on_piece = lambda: worker.outbox.append(("decode0", covered))
    assert hosted.thread.turn()
    worker.on_piece = lambda: None
    assert hosted.thread.turn()
    assert worker.log == ["begins", "a", "hands over", "begins", "a", "ends"]


def test_who_hears_something_in_a_turn_is_asked_again() -> None:
    """A prompt that turned out to be cached is told of while it is planned, after its decode worker
    was asked for work: nothing else would wake that."""
    log: list[str] = []
    decode, prefill = FakeWorker("decode", log), FakeWorker("prefill", log, pieces=1)
    hosted = Hosted(decode, prefill)
    hosted.thread._host_turns = FakeTurns(log)

    def plan(now: float) -> None:
        prefill.pieces = 0
        prefill.outbox += [("decode", Abort(1))]
        prefill.plan = lambda now: None  # type: ignore[method-assign]

    prefill.plan = plan  # type: ignore[method-assign]
    assert hosted.thread.turn()
    asked = decode.plans
    assert decode.received == [Abort(1)]
    assert not hosted.thread.turn()
    assert decode.plans > asked


def test_looking_for_what_needs_no_computation_takes_no_turn() -> None:
    worker = FakeWorker("a", [])
    hosted, _ = in_turns(worker)
    looked: list[bool] = []

    def look(now: float) -> Callable[[], bool]:
        return lambda: bool(looked.append(True))

    worker.plan = look  # type: ignore[method-assign]
    assert not hosted.thread.turn()
    assert looked == [True]
    assert worker.log == ["rests"]


def test_nothing_is_done_ahead_while_another_process_has_work() -> None:
    log: list[str] = []
    worker = FakeWorker("a", log)
    worker.pieces_ahead = 1
    turns = FakeTurns(log)
    thread = Hosted(worker).thread
    thread._host_turns = turns
    turns.is_wanted = True
    assert not thread.turn()
    turns.is_wanted = False
    assert thread.turn()
    assert log == ["rests", "a ahead"]
