"""Replies covered before anybody asks: what the next prompt finds, and what that may not cost."""

from __future__ import annotations

import msgspec
import pytest

from pshare_jax.core import messages as m
from pshare_jax.core.reply_prefill import MAX_REPLIES
from pshare_jax.core.requests import FinishReason, Session
from pshare_jax.core.sequences import Sequence
from tests.core.reply import Reply
from tests.core.scripted import Host
from tests.core.setting import PAGE, Setting

PROMPT = list(range(1, 14))
AHEAD = Setting(reply_ahead=True, prefill_pages=40, decode_pages=40)


def context(reply: Reply) -> list[int]:
    return [*reply.request.prompt_token_ids, *reply.tokens]


@pytest.mark.parametrize("one_pool", [False, True])
@pytest.mark.parametrize("appended", [1, 2, 9])
def test_the_next_call_computes_only_what_was_appended(one_pool: bool, appended: int) -> None:
    host = Host(Setting(reply_ahead=True, one_pool=one_pool, decode_pages=40))
    first = host.submit("lora", PROMPT, 6)
    host.drain()
    second = host.submit("identity", [*context(first), *range(50, 50 + appended)], 3)
    host.drain()
    usage = second.usage
    assert usage is not None
    # 13 + 6 tokens are there; the last appended one is the decode module's.
    assert (usage.computed_tokens, usage.cached_tokens) == (appended - 1, 19)
    assert usage.shared_tokens == 19, "computed for the other model, the reply as well"
    stats = host.prefill["prefill0"].core.stats
    # 12 of the prompt were covered for the first call; 7 more, and those of the second reply.
    assert stats.ahead_tokens == {"lora": 7, "identity": 1 + 3}
    assert stats.foreseen_tokens["identity"] == 7


@pytest.mark.parametrize("bucket", [1, 2, 3, 7])
def test_chunks_that_end_within_pages_give_the_same(bucket: int) -> None:
    host = Host(Setting(reply_ahead=True, prefill_pages=40, chunk_buckets=(bucket, 8)))
    first = host.submit("lora", PROMPT, 15)
    host.drain()
    assert host.prefill["prefill0"].core.stats.ahead_tokens["lora"] == 16
    assert host.prefill["prefill0"].cache.counts().cached == 7, "28 tokens, in pages of 4"
    second = host.submit("identity", [*context(first), 50, 51], 3)
    host.drain()
    assert second.usage is not None
    assert (second.usage.computed_tokens, second.usage.cached_tokens) == (1, 28)


def test_tokens_of_a_module_with_a_tail_are_covered_too() -> None:
    host = Host(AHEAD)
    first = host.submit("full", PROMPT, 6)
    host.drain()
    second = host.submit("full", [*context(first), *range(50, 56)], 3)
    host.drain()
    assert second.usage is not None
    assert (second.usage.computed_tokens, second.usage.cached_tokens) == (1, 19)


def test_an_isolated_model_covers_with_its_own_weights() -> None:
    host = Host(AHEAD)
    first = host.submit("isolated", PROMPT, 6)
    host.drain()
    shared = host.submit("identity", [*context(first), 50], 3)
    second = host.submit("isolated", [*context(first), 50, 51], 3)
    host.drain()
    assert second.usage is not None
    assert shared.usage is not None
    assert second.usage.cached_tokens == 19
    assert shared.usage.cached_tokens == 0


def test_a_covered_token_counts_as_used_once() -> None:
    host = Host(AHEAD)
    first = host.submit("lora", PROMPT, 6)
    host.drain()
    for token in (50, 51, 52):
        host.submit("full", [*context(first), token], 3, goes_on=False)
        host.drain()
    stats = host.prefill["prefill0"].core.stats
    assert stats.foreseen_tokens["full"] == 3, "its tail of 5 reads the rest"
    host.submit("identity", [*context(first), 60], 3, goes_on=False)
    host.drain()
    assert (stats.foreseen_tokens["identity"], stats.ahead_tokens["lora"]) == (4, 7)


def test_nothing_is_covered_ahead_unless_it_is_configured_and_the_reply_may_go_on() -> None:
    off, on = Host(Setting()), Host(AHEAD)
    off.submit("lora", PROMPT, 6)
    on.submit("lora", PROMPT, 6, goes_on=False)
    for host in (off, on):
        host.drain()
        assert host.prefill["prefill0"].core.stats.ahead_tokens.total() == 0


@pytest.mark.parametrize(("complete", "covered"), [(False, 0), (True, 1)])
def test_a_reply_cut_at_a_stop_string_is_covered_and_an_abandoned_one_is_not(
    complete: bool, covered: int
) -> None:
    host = Host(AHEAD)
    reply = host.submit("lora", PROMPT, 20)
    while len(reply.tokens) < 5:
        host.round()
    delivered = len(reply.tokens)
    host.abort(reply, complete=complete)
    host.drain()
    assert reply.reason is FinishReason.ABORT
    stats = host.prefill["prefill0"].core.stats
    assert stats.ahead_tokens["lora"] == covered * (1 + delivered)


def test_a_request_that_comes_meanwhile_waits_for_one_small_chunk_at_most() -> None:
    host = Host(AHEAD)
    first = host.submit("lora", PROMPT, 19)
    while first.reason is None:
        host.round()
    host.deliver_all()
    worker = host.prefill["prefill0"]
    while host.work("prefill0"):
        host.deliver_all()
    assert host.work_ahead("prefill0")
    # It began within a page, and ended with the next.
    assert worker.core.stats.ahead_tokens["lora"] == PAGE
    second = host.submit("lora", [99] * 9, 2)
    host.deliver_all()
    assert not host.work_ahead("prefill0"), "somebody waits"
    assert worker.core.schedule_ahead() is None
    host.drain()
    assert second.tokens == second.expected
    assert worker.core.stats.ahead_tokens["lora"] == 20 + 3, "it went on afterwards"


def test_what_the_next_call_has_computed_itself_is_not_computed_again() -> None:
    host = Host(AHEAD)
    first = host.submit("lora", PROMPT, 6)
    while first.reason is None:
        host.round()
    second = host.submit("lora", [*context(first), 50], 2, goes_on=False)
    host.drain()
    stats = host.prefill["prefill0"].core.stats
    assert second.usage is not None
    assert second.usage.computed_tokens == 7
    assert stats.ahead_tokens.total() == stats.foreseen_tokens.total() == 0


def test_a_context_that_has_been_evicted_is_not_computed_for_the_sake_of_a_reply() -> None:
    host = Host(Setting(reply_ahead=True, prefill_pages=9, decode_pages=9))
    first = host.submit("lora", PROMPT, 6)
    while first.reason is None:
        host.round()
    host.submit("lora", [99] * 28, 2, goes_on=False)
    host.drain()
    assert host.prefill["prefill0"].core.stats.ahead_tokens.total() == 0


def test_pages_that_others_have_pinned_are_spared() -> None:
    host = Host(Setting(reply_ahead=True, prefill_pages=9, decode_pages=20, pinned_share=1.0))
    kept = host.submit("lora", [7] * 17, 2, session=Session("a", 20.0), goes_on=False)
    host.drain()
    first = host.submit("lora", PROMPT, 10)
    host.drain()
    stats = host.prefill["prefill0"].core.stats
    # 5 pages of 8 are pinned, so that 2 to 3 are left: not enough for 23 tokens.
    assert stats.ahead_tokens["lora"] < 11
    again = host.submit("lora", [7] * 17, 2)
    host.drain()
    assert again.usage is not None
    assert again.usage.computed_tokens == 0
    assert (kept.tokens, first.tokens) == (kept.expected, first.expected)


def test_a_chunk_that_fails_is_given_up_and_leaves_nothing_behind() -> None:
    host = Host(AHEAD)
    first = host.submit("lora", PROMPT, 6)
    while first.reason is None:
        host.round()
    while host.work("prefill0") or host.pending:
        host.deliver_all()
    host.prefill["prefill0"].executor.failures = 1
    host.drain()
    assert host.prefill["prefill0"].core.stats.ahead_tokens.total() == 0
    second = host.submit("identity", [*context(first), 50], 3)
    host.drain()
    assert second.tokens == second.expected
    assert second.usage is not None
    assert second.usage.computed_tokens == 7


def test_replies_that_pile_up_are_bounded_and_the_newest_are_covered() -> None:
    host = Host(AHEAD)
    core = host.prefill["prefill0"].core
    reply = host.submit("lora", PROMPT, 2)
    host.drain()
    keys = host.dispatcher
    assert keys.num_live == 0
    sequence = Sequence(
        id=-1,
        order=0,
        model="lora",
        prompt=tuple(context(reply)),
        covered=15,
        root=b"",
        keys=[],
        last_key=b"",
        params=reply.request.params,
    )
    for order in range(MAX_REPLIES + 5):
        core.receive(m.Replied(msgspec.structs.replace(sequence, order=order), 0, True))
    core.schedule(0.0)
    assert len(core._replies._jobs) == MAX_REPLIES
    # The same one, when it is longer, takes no place of another.
    core.receive(m.Replied(msgspec.structs.replace(sequence, order=order), 0, True))
    core.schedule(0.0)
    assert [job.reply.sequence.order for job in core._replies._jobs] == list(range(5, order + 1))


@pytest.mark.parametrize("step", [0, 1, 3, 8])
def test_a_reply_is_covered_while_it_is_generated(step: int) -> None:
    """Where prefill has a processor of its own: the next call may come as soon as it has ended."""
    host = Host(Setting(reply_ahead=True, streaming_step=step, prefill_pages=40, decode_pages=40))
    first = host.submit("lora", PROMPT, 20)
    while first.reason is None:
        host.round()
        # A processor of its own has nothing else to do.
        host.work_ahead("prefill0")
    second = host.submit("identity", [*context(first), 50], 3)
    host.drain()
    assert (first.tokens, second.tokens) == (first.expected, second.expected)
    assert second.usage is not None
    # 12 tokens of 33 were covered for the first call, the rest of them was not there at once.
    left = second.usage.computed_tokens
    assert left == 21 if step == 0 else left <= step + PAGE + 1
    stats = host.prefill["prefill0"].core.stats
    assert stats.ahead_tokens["lora"] == 21 - left, "nothing is computed twice"


def test_a_reply_that_is_given_up_was_covered_as_far_as_it_came() -> None:
    setting = Setting(reply_ahead=True, streaming_step=4, prefill_pages=40, decode_pages=40)
    host = Host(setting)
    reply = host.submit("lora", PROMPT, 20)
    while len(reply.tokens) < 9:
        host.round()
        host.work_ahead("prefill0")
    host.abort(reply)
    host.drain()
    covered = host.prefill["prefill0"].core.stats.ahead_tokens["lora"]
    assert 1 + 4 <= covered <= 1 + len(reply.tokens)
