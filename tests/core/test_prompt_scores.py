"""The scorer alone: what it asks of a dispatcher, and what clients hear."""

from __future__ import annotations

import itertools
from typing import Any

from pshare_jax.core.prompt_scores import PromptScorer
from pshare_jax.core.requests import (
    FinishReason,
    PromptUsage,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

USAGE = PromptUsage(4, 3, 0, 0)


class FakeDispatcher:
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.submitted: list[Request] = []
        self.orders: list[int] = []
        self.aborted: list[str] = []

    def submit(self, request: Request, *, order: int, **_: Any) -> None:
        self.submitted.append(request)
        self.orders.append(order)

    def hold(self, model: str) -> None:
        return None

    def abort(self, id: str) -> None:
        self.aborted.append(id)

    @property
    def ids(self) -> list[str]:
        return [request.id for request in self.submitted]


def scorer(window: int = 2) -> tuple[PromptScorer, FakeDispatcher]:
    dispatcher = FakeDispatcher()
    orders = itertools.count(100)
    return PromptScorer(dispatcher, window, lambda: next(orders)), dispatcher  # type: ignore[arg-type]


def submit(scores: PromptScorer, id: str = "r", first: int = 5, **params: Any) -> None:
    sampling = SamplingParams(**{"prompt_logprobs": 0, "max_tokens": 1, **params})
    request = Request(id, "m", (first, 6, 7, 8), sampling, "salt")
    scores.submit(request, order=1, seed=2, end_token_ids=frozenset({9}))


def answer(id: str) -> RequestOutput:
    return RequestOutput(id, (42,), usage=USAGE, finish_reason=FinishReason.LENGTH)


def score(request: Request) -> RequestOutput:
    """What a probe hears: its score is its length."""
    logprobs = (TokenLogprobs(-float(len(request.prompt_token_ids))),)
    return RequestOutput(request.id, (1,), logprobs, finish_reason=FinishReason.LENGTH)


def error(id: str) -> RequestOutput:
    return RequestOutput(id, finish_reason=FinishReason.ERROR, error="broken")


def test_the_answer_is_held_until_all_positions_are_scored() -> None:
    scores, dispatcher = scorer()
    submit(scores)
    assert scores.take(answer(dispatcher.ids[0])) == []
    for _ in range(2):
        assert scores.take(score(dispatcher.submitted[-2])) == []
    # Three probes; two are at work at a time, and take their turns by order of their making.
    probes = dispatcher.submitted[1:]
    assert [len(probe.prompt_token_ids) for probe in probes] == [3, 2, 1]
    assert [list(probe.params.logit_bias) for probe in probes] == [[8], [7], [6]]
    assert all(probe.probe and probe.cache_salt == "salt" for probe in probes)
    assert dispatcher.orders == [1, 100, 101, 102]
    first, last = scores.take(score(probes[2]))
    assert first.prompt_logprobs is not None
    assert [s and s.logprob for s in first.prompt_logprobs] == [None, -1.0, -2.0, -3.0]
    assert (last.request_id, last.token_ids, last.usage) == ("r", (42,), USAGE)
    assert scores.num_probes == 0
    assert scores.abort("r") is None


def test_requests_take_turns_in_the_window() -> None:
    scores, dispatcher = scorer(window=1)
    for id, first in (("a", 1), ("b", 2)):
        submit(scores, id, first, max_tokens=0)
    for id in dispatcher.ids[:2]:
        scores.take(answer(id))
    heard = []
    for _ in range(6):
        heard += scores.take(score(dispatcher.submitted[-1]))
    owners = [request.prompt_token_ids[0] for request in dispatcher.submitted[2:]]
    assert owners == [1, 1, 2, 1, 2, 2]
    assert [output.request_id for output in heard] == ["a", "b"]
    assert all(output.finish_reason is FinishReason.LENGTH for output in heard)


def test_an_error_of_a_probe_ends_the_request_once() -> None:
    scores, dispatcher = scorer()
    submit(scores)
    scores.take(answer(dispatcher.ids[0]))
    failing, other = dispatcher.submitted[1:]
    assert scores.take(error(failing.id)) == []
    assert dispatcher.aborted == [other.id]
    assert scores.take(RequestOutput(other.id, finish_reason=FinishReason.ABORT)) == [error("r")]
    assert len(dispatcher.submitted) == 3


def test_an_error_of_the_answer_ends_the_request() -> None:
    scores, dispatcher = scorer()
    submit(scores)
    assert scores.take(error(dispatcher.ids[0])) == [error("r")]
    assert scores.abort("r") is None


def test_an_abort_waits_for_what_is_under_way() -> None:
    scores, dispatcher = scorer()
    submit(scores)
    scores.take(answer(dispatcher.ids[0]))
    assert scores.abort("r") == []
    assert set(dispatcher.aborted) == set(dispatcher.ids[1:])
    # One is aborted, the other was already done.
    end = RequestOutput(dispatcher.ids[1], finish_reason=FinishReason.ABORT)
    assert scores.take(end) == []
    [heard] = scores.take(score(dispatcher.submitted[2]))
    assert heard == RequestOutput("r", finish_reason=FinishReason.ABORT)


def test_nobody_is_forgotten_when_all_fails() -> None:
    """A request that waits for room among the probes has nothing under way."""
    scores, dispatcher = scorer(window=1)
    for id in "ab":
        submit(scores, id)
    for id in dispatcher.ids[:2]:
        scores.take(answer(id))
    [heard] = scores.fail_all("stopped")
    assert (heard.request_id, heard.error) == ("b", "stopped")
    [heard] = scores.take(error(dispatcher.ids[2]))
    assert (heard.request_id, heard.error) == ("a", "stopped")
    assert len(dispatcher.submitted) == 3


def test_others_are_passed_on() -> None:
    scores, _ = scorer()
    output = answer("somebody")
    assert scores.take(output) == [output]
    assert scores.abort("somebody") is None
