from __future__ import annotations

import pytest

from pshare_jax.core import messages as m
from pshare_jax.core.decode import DecodeRow
from pshare_jax.core.dispatcher import MAX_LOST_ATTEMPTS, Dispatcher
from pshare_jax.core.pages.prefix_index import block_keys
from pshare_jax.core.requests import (
    FinishReason,
    PromptUsage,
    Request,
    RequestOutput,
    RequestTimes,
    SamplingParams,
    TokenLogprobs,
)
from pshare_jax.core.router import Router, WorkerInfo
from pshare_jax.core.sequences import Sequence
from tests.core.sequences import make_sequence
from tests.core.setting import INVOKED_BY, PAGE, model_specs

USAGE = PromptUsage(6, 5, 0, 0)


class Desk:
    """A dispatcher; a test is its workers, two of each kind, and its clients."""

    def __init__(self) -> None:
        decode = ["decode0", "decode1"]
        router = Router(
            [WorkerInfo(f"prefill{i}", 100, PAGE) for i in range(2)],
            [WorkerInfo(name, 100, PAGE) for name in decode],
        )
        self.dispatcher = Dispatcher(model_specs(decode), router, PAGE)

    def submit(self, prompt: list[int], model: str = "identity", *, salt: str = "") -> Sequence:
        """Submits a request; returns its first attempt."""
        order = self.dispatcher.num_live
        params = SamplingParams(max_tokens=3)
        request = Request(f"r{order}", model, tuple(prompt), params, salt)
        self.dispatcher.submit(request, order=order, seed=7, end_token_ids=frozenset({50}))
        return self.attempt()

    def attempt(self) -> Sequence:
        """The one prefill message that the dispatcher has sent."""
        [(to, message)] = self.sent()
        assert isinstance(message, m.Prefill)
        assert to == message.sequence.prefill_worker
        return message.sequence

    def say(self, *messages: m.ToDispatcher, worker: str = "decode0") -> None:
        for message in messages:
            self.dispatcher.receive(worker, message)

    def sent(self) -> m.Outbox:
        sent, self.dispatcher.outbox = self.dispatcher.outbox, []
        return sent

    def events(self) -> list[RequestOutput]:
        events, self.dispatcher.outputs = self.dispatcher.outputs, []
        return events

    def check_nothing_is_left(self) -> None:
        assert self.dispatcher.num_live == 0
        assert self.dispatcher._attempts == {}
        assert self.dispatcher._router._assigned == {}


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.mark.parametrize(
    ("model", "prompt", "covered", "adapted"),
    [
        ("identity", [1], 0, True),
        ("identity", [1] * 4, 3, True),
        ("identity", [1] * 5, 4, True),
        ("identity", [1] * 9, 8, True),
        ("full", [1] * 9, 4, True),
        ("full", [1] * 3, 0, True),
        ("alora", [1, 2, 3, 4, 5, *INVOKED_BY, 6], 5, True),
        ("alora", [1, *INVOKED_BY, 2, *INVOKED_BY, 6], 4, True),
        ("alora", [1, 2, 3, 4, 5, 6], 5, False),
    ],
)
def test_a_split_rule_says_what_is_covered(
    desk: Desk, model: str, prompt: list[int], covered: int, adapted: bool
) -> None:
    sequence = desk.submit(prompt, model)
    assert (sequence.covered, sequence.adapted) == (covered, adapted)
    assert len(sequence.keys) == covered // PAGE
    assert sequence.keys == block_keys(sequence.root, prompt[:covered], PAGE)
    assert len(sequence.chain) == covered // PAGE + 1


def test_the_chain_tells_prompts_apart_to_the_last_token(desk: Desk) -> None:
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7, 8], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 9]]
    chains = [desk.submit(prompt).chain for prompt in prompts]
    # Covered are 12345, 123457, 1234 and 123456.
    assert len({chain[-1] for chain in chains}) == 4
    assert {len(chain) for chain in chains} == {2}
    assert len({chain[0] for chain in chains}) == 1
    assert desk.submit([1, 2, 3, 4, 5, 0]).chain == chains[0], "the tail does not count"
    assert desk.submit(prompts[0], "lora").chain == chains[0], "models share what the base covers"
    others = [desk.submit(prompts[0], salt="x"), desk.submit([*prompts[0], 7], "isolated")]
    assert len({chains[0][0], *(other.chain[0] for other in others)}) == 3


def test_known_tokens_and_parents() -> None:
    sequence = make_sequence(0, list(range(10, 17)), page_size=PAGE, output=(1, 2))
    row = DecodeRow(sequence, 0, [], sequence.covered, list(sequence.output))
    assert [sequence.parent_key(i) for i in range(2)] == [sequence.root, sequence.keys[0]]
    assert sequence.num_tokens == 9
    row.accept([3])
    assert row.known_tokens(5, 9) == (15, 16, 1, 2)
    assert row.known_tokens(8, 10) == (2, 3)
    assert row.known_tokens(0, 7) == tuple(range(10, 17))


@pytest.mark.parametrize(
    ("fed", "kept", "reason"),
    [
        ([5, 6, 50, 7], [5, 6, 50], FinishReason.STOP),
        ([51, 50], [51], FinishReason.STOP),
        ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5], FinishReason.LENGTH),
        ([1, 2, 3, 4, 50, 6], [1, 2, 3, 4, 50], FinishReason.STOP),
        ([1, 2], [1, 2], None),
    ],
)
def test_tokens_after_the_end_are_cut_off(
    fed: list[int], kept: list[int], reason: FinishReason | None
) -> None:
    ends = frozenset({50, 51})
    sequence = make_sequence(0, [1], page_size=PAGE, max_tokens=5, end_token_ids=ends)
    row = DecodeRow(sequence, 0, [], 0)
    assert row.accept(fed) == (kept, reason)
    assert (row.output, row.remaining) == (kept, 5 - len(kept))


def test_events(desk: Desk) -> None:
    id = desk.submit([1, 2, 3]).id
    entries = (TokenLogprobs(-8.0), TokenLogprobs(-50.0))
    desk.say(m.Started(id, USAGE), m.Tokens(id, (7,)))
    desk.say(m.Tokens(id, (8, 50), entries, FinishReason.STOP))
    first, last = desk.events()
    times = RequestTimes(0.0, started=0.0, prefill_worker="prefill0", decode_worker="decode0")
    assert first == RequestOutput("r0", (7,), usage=USAGE, times=times)
    assert last == RequestOutput(
        "r0",
        (8, 50),
        entries,
        finish_reason=FinishReason.STOP,
        stop_token=50,
        times=times,
    )
    assert desk.dispatcher.stats.finished == {("identity", FinishReason.STOP): 1}
    desk.check_nothing_is_left()


def test_the_last_event_says_when_what_was_heard(desk: Desk) -> None:
    dispatcher = desk.dispatcher
    id = desk.submit([1, 2, 3]).id
    dispatcher.routed("r0", 0.5)
    dispatcher.routed("unknown", 0.6)
    for now, message in (
        (1.0, m.Pending(id, 2)),
        (2.0, m.Pending(id, 1)),
        (3.0, m.Pending(id, 0)),
        (4.0, m.Started(id, USAGE)),
        (5.0, m.Returned(id, "preempted")),
    ):
        dispatcher.receive("decode0", message, now)
    again = desk.attempt().id
    for now, message in (
        (6.0, m.Pending(again, 0)),
        (7.0, m.Started(again, USAGE)),
        (8.0, m.Tokens(again, (8,), (), FinishReason.LENGTH)),
    ):
        dispatcher.receive("decode0", message, now)
    [event] = desk.events()
    assert event.times == RequestTimes(0.0, 1.0, 3.0, 4.0, 0.5, "prefill0", "decode0")


def test_what_was_found_has_no_time_of_its_own(desk: Desk) -> None:
    id = desk.submit([1, 2, 3]).id
    desk.dispatcher.receive("prefill0", m.Pending(id, 0), 2.0)
    desk.dispatcher.receive("prefill0", m.Dropped(id), 3.0)
    [event] = desk.events()
    assert (event.times.prefill, event.times.covered, event.times.started) == (2.0, 2.0, None)


def test_only_a_stop_token_is_named(desk: Desk) -> None:
    id = desk.submit([1, 2, 3]).id
    desk.say(m.Started(id, USAGE), m.Tokens(id, (7, 8, 9), (), FinishReason.LENGTH))
    [event] = desk.events()
    assert (event.finish_reason, event.stop_token) == (FinishReason.LENGTH, None)


@pytest.mark.parametrize("end", ["tokens", "failure", "abort"])
def test_nothing_follows_the_last_event(desk: Desk, end: str) -> None:
    id = desk.submit([1, 2, 3]).id
    last = {
        "tokens": m.Tokens(id, (50,), (), FinishReason.STOP),
        "failure": m.Failed(id, "broken"),
        "abort": m.Dropped(id),
    }[end]
    desk.say(m.Started(id, USAGE), last)
    [event] = desk.events()
    assert event.finish_reason is not None
    assert event.error == ("broken" if end == "failure" else None)
    desk.say(last, m.Tokens(id, (1,)), m.Failed(id, "x"), m.Returned(id, "preempted"))
    desk.dispatcher.abort("r0")
    desk.dispatcher.fail_all("too late")
    assert (desk.events(), desk.sent()) == ([], [])
    assert desk.dispatcher.stats.finished.total() == 1
    desk.check_nothing_is_left()


def test_a_preempted_request_goes_on_where_it_was(desk: Desk) -> None:
    first = desk.submit([1, 2, 3, 4, 5, 6])
    desk.say(
        m.Started(first.id, USAGE), m.Tokens(first.id, (7,)), m.Returned(first.id, "preempted")
    )
    second = desk.attempt()
    assert second.id != first.id
    assert (second.output, second.order, second.seed) == ((7,), first.order, 7)
    assert (second.covered, second.chain) == (first.covered, first.chain)
    desk.say(m.Started(second.id, PromptUsage(6, 0, 5, 0)))
    desk.say(m.Tokens(second.id, (8,)), m.Tokens(second.id, (9,), (), FinishReason.LENGTH))
    events = desk.events()
    assert [event.token_ids for event in events] == [(7,), (8,), (9,)]
    assert [event.usage for event in events] == [USAGE, None, None], "that of the first attempt"
    desk.check_nothing_is_left()


def test_what_is_said_of_an_earlier_attempt_is_ignored(desk: Desk) -> None:
    old = desk.submit([1, 2, 3]).id
    desk.say(m.Returned(old, "preempted"))
    new = desk.attempt().id
    desk.say(m.Started(old, USAGE), m.Tokens(old, (1, 2)), m.Dropped(old), m.Failed(old, "x"))
    desk.say(m.Returned(old, "fetch", "gone"), m.Pending(old, 1000), worker="prefill0")
    assert (desk.events(), desk.sent()) == ([], [])
    assert list(desk.dispatcher._attempts) == [new]


@pytest.mark.parametrize("started", [False, True])
def test_an_abort_goes_to_who_has_the_sequence(desk: Desk, started: bool) -> None:
    sequence = desk.submit([1, 2, 3])
    if started:
        desk.say(m.Started(sequence.id, USAGE))
    desk.dispatcher.abort("r0")
    desk.dispatcher.abort("r0")
    desk.dispatcher.abort("unknown")
    to = sequence.decode_worker if started else sequence.prefill_worker
    assert desk.sent() == [(to, m.Abort(sequence.id, sequence.decode_worker))]
    assert desk.events() == []
    # What was generated before the worker heard of it is still delivered.
    desk.say(m.Tokens(sequence.id, (7,)), m.Dropped(sequence.id))
    assert [(e.token_ids, e.finish_reason) for e in desk.events()] == [
        ((7,), None),
        ((), FinishReason.ABORT),
    ]
    desk.check_nothing_is_left()


@pytest.mark.parametrize("cause", ["preempted", "fetch"])
def test_an_aborted_request_that_is_given_back_is_not_tried_again(desk: Desk, cause: str) -> None:
    sequence = desk.submit([1, 2, 3])
    desk.dispatcher.abort("r0")
    desk.sent()
    desk.say(m.Returned(sequence.id, cause))  # type: ignore[arg-type]
    assert [event.finish_reason for event in desk.events()] == [FinishReason.ABORT]
    assert desk.sent() == []
    desk.check_nothing_is_left()


def test_lost_attempts_are_bounded_and_preemptions_are_not(desk: Desk) -> None:
    sequence = desk.submit([1, 2, 3])
    for _ in range(MAX_LOST_ATTEMPTS - 1):
        for cause in ("preempted", "preempted", "fetch"):
            desk.say(m.Returned(sequence.id, cause, "bad page"))
            sequence = desk.attempt()
    assert desk.events() == []
    desk.say(m.Returned(sequence.id, "fetch", "bad page"))
    [event] = desk.events()
    assert (event.finish_reason, event.error) == (FinishReason.ERROR, "tried 3 times; bad page")
    desk.check_nothing_is_left()


def test_a_lost_decode_worker_is_told_to_the_prefill_worker(desk: Desk) -> None:
    first = desk.submit([1, 2, 3])
    desk.dispatcher.lose_worker(first.decode_worker, "killed")
    abort, release, (to, again) = desk.sent()
    # In this order, so that a prompt that becomes complete between the two is not held.
    assert abort == (first.prefill_worker, m.Abort(first.id))
    assert release == (first.prefill_worker, m.Release(first.id))
    assert isinstance(again, m.Prefill)
    assert to == first.prefill_worker
    assert again.sequence.decode_worker != first.decode_worker


@pytest.mark.parametrize("started", [False, True])
def test_a_lost_prefill_worker_matters_until_the_prompt_has_moved(
    desk: Desk, started: bool
) -> None:
    first = desk.submit([1, 2, 3])
    if started:
        desk.say(m.Started(first.id, USAGE))
    desk.dispatcher.lose_worker(first.prefill_worker, "killed")
    if started:
        assert desk.sent() == []
        return
    abort, (to, again) = desk.sent()
    assert abort == (first.decode_worker, m.Abort(first.id))
    assert isinstance(again, m.Prefill)
    assert to != first.prefill_worker


def test_without_workers_a_request_ends_and_says_why(desk: Desk) -> None:
    desk.submit([1, 2, 3])
    for name in ("prefill0", "prefill1"):
        desk.dispatcher.lose_worker(name, "broken")
    [event] = desk.events()
    assert event.finish_reason is FinishReason.ERROR
    assert event.error == "no prefill worker is alive (prefill0: broken; prefill1: broken)"
    desk.check_nothing_is_left()


def test_all_requests_can_be_failed(desk: Desk) -> None:
    for _ in range(3):
        desk.submit([1, 2, 3])
    desk.dispatcher.fail_all("the end")
    events = desk.events()
    assert [(e.request_id, e.error) for e in events] == [(f"r{i}", "the end") for i in range(3)]
    desk.check_nothing_is_left()
