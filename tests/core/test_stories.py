"""What the state machines meet by chance, told one by one."""

from __future__ import annotations

import msgspec
import pytest

from pshare_jax.core import messages as m
from pshare_jax.core.arrivals import TRANSFER_SECONDS
from pshare_jax.core.messages import DISPATCHER
from pshare_jax.core.pages.prefix_index import PageState
from pshare_jax.core.plans import DecodePlan, DecodeResult
from pshare_jax.core.requests import FinishReason
from tests.core.scripted import Host
from tests.core.setting import PAGE, Setting

PROMPT = list(range(1, 14))


def cover(host: Host, *prefill: str) -> None:
    """Prompts are covered; decode workers have heard of it and asked for the pages."""
    for _ in range(20):
        host.deliver_all(DISPATCHER, *host.prefill, *host.decode)
        for name in prefill or host.prefill:
            host.work(name)


def test_an_undisturbed_session_computes_nothing_twice() -> None:
    host = Host(Setting(steps_per_dispatch=2))
    first = host.submit("lora", PROMPT, 6)
    host.drain()
    context = [*PROMPT, *first.tokens, 99]
    second, third = host.submit("full", context, 6), host.submit("identity", context, 6)
    host.drain()
    assert first.usage is not None
    assert second.usage is not None
    assert third.usage is not None
    assert first.usage.computed_tokens == 12
    assert second.usage.cached_tokens == 12
    # Positions 0 .. 14 for the one with a tail of 5, then 15 .. 18.
    assert (second.usage.computed_tokens, third.usage.computed_tokens) == (3, 4)
    assert host.decode["decode0"].core.stats.failed_transfers == 0


def test_a_filler_that_is_aborted_hands_its_pages_to_who_waits_for_them() -> None:
    host = Host(Setting(decode_pages=40))
    first, second = host.submit("lora", PROMPT), host.submit("identity", PROMPT)
    cover(host)
    core = host.decode["decode0"].core
    one, two = core._arrivals._arrivals.values()
    assert (sorted(one.filling), sorted(two.awaited)) == ([0, 1, 2], [0, 1, 2])
    host.abort(first)
    host.deliver(DISPATCHER, "prefill0")
    host.deliver("prefill0", "decode0")
    assert (sorted(two.filling), two.awaited) == ([0, 1, 2], {})
    assert {node.filler for node in two.filling.values()} == {two.sequence.id}
    host.drain()
    assert (first.reason, second.reason) == (FinishReason.ABORT, FinishReason.LENGTH)
    assert second.tokens == second.expected


def test_a_failed_page_that_nobody_waits_for_leaves_the_index_with_what_follows() -> None:
    """The second page of a prompt never comes; the third has come with another transfer."""
    host = Host(Setting())
    reply = host.submit("lora", PROMPT)
    cover(host)
    core = host.decode["decode0"].core
    [arrival] = core._arrivals._arrivals.values()
    [transfer] = arrival.transfers
    core._arrivals._transfers[transfer].numbers = [0, 1]
    core._arrivals._fetch(arrival, [2])
    later = max(arrival.transfers)
    nodes = dict(arrival.filling)
    core._arrivals.landed(later)
    assert nodes[2].state is PageState.READY
    host.abort(reply)
    host.drain()
    assert [nodes[n].state for n in (0, 1)] == [PageState.FAILED] * 2
    assert core.cache.counts().cached == 0


@pytest.mark.parametrize("fault", ["refused", "corrupt", "never", "late", "lost"])
def test_a_transfer_that_goes_wrong_is_tried_again(fault: str) -> None:
    host = Host(Setting())
    (host.link.offer_faults if fault == "lost" else host.link.accept_faults).append(fault)
    reply = host.submit("lora", PROMPT)
    host.drain()
    assert reply.tokens == reply.expected
    assert host.decode["decode0"].core.stats.failed_transfers == (fault != "late")
    assert host.now < 2 * TRANSFER_SECONDS


def test_a_transfer_that_never_succeeds_fails_the_request_and_says_so() -> None:
    host = Host(Setting())
    host.link.accept_faults.extend(["corrupt"] * 100)
    reply = host.submit("lora", PROMPT)
    host.drain()
    assert reply.reason is FinishReason.ERROR
    assert "corrupt" in str(reply.error)
    assert host.decode["decode0"].core.stats.failed_transfers == 6


def test_a_chunk_that_fails_is_computed_again_and_then_given_up() -> None:
    host = Host(Setting())
    host.prefill["prefill0"].executor.failures = 1
    once = host.submit("lora", PROMPT)
    host.drain()
    assert once.tokens == once.expected
    host.prefill["prefill0"].executor.failures = 2
    twice = host.submit("lora", [50, *PROMPT])
    host.drain()
    assert twice.reason is FinishReason.ERROR
    assert twice.error == "prefill0: the chunk has failed"


def test_in_one_pool_a_younger_prompt_gives_way_to_a_sequence_that_runs() -> None:
    host = Host(Setting(one_pool=True, decode_pages=10))
    old = host.submit("lora", [1] * 12, 20)
    for _ in range(12):
        host.round()
    assert old.tokens, "it runs"
    young = host.submit("lora", [2] * 20, 8)
    host.drain()
    assert (old.tokens, young.tokens) == (old.expected, young.expected)
    assert host.decode["decode0"].core.stats.preemptions.total() == 0


def test_in_one_pool_the_only_sequence_that_runs_gives_way_to_an_older_prompt() -> None:
    """It came in while the older one was being covered, and grew into the last pages."""
    host = Host(Setting(one_pool=True, decode_pages=10))
    old, young = host.submit("lora", [1] * 21, 4), host.submit("lora", [2], 24)
    host.deliver_all()
    host.work("prefill0")
    for _ in range(30):
        host.work("decode0")
    host.drain()
    assert (old.tokens, young.tokens) == (old.expected, young.expected)
    assert host.decode["decode0"].core.stats.preemptions["lora"] >= 1


def test_an_abort_that_crosses_the_handoff_ends_the_request_once() -> None:
    host = Host(Setting())
    reply = host.submit("lora", PROMPT)
    for _ in range(4):
        host.deliver_all(DISPATCHER, "prefill0")
        host.work("prefill0")
    assert host.queues["prefill0", "decode0"], "it has been covered, but decode has not heard of it"
    host.abort(reply)
    host.deliver(DISPATCHER, "prefill0")
    held = host.prefill["prefill0"].core.held_ids()
    host.drain()
    assert len(held) == 1
    assert (reply.reason, reply.tokens) == (FinishReason.ABORT, [])


def test_the_requests_of_a_lost_decode_worker_go_on_from_the_last_delivered_token() -> None:
    host = Host(Setting(decode=2))
    replies = [host.submit("lora", [*PROMPT, i], 16) for i in range(4)]
    while not all(reply.tokens for reply in replies):
        host.round()
    assert not any(reply.reason for reply in replies)
    host.kill("decode0")
    host.drain()
    assert [reply.tokens for reply in replies] == [reply.expected for reply in replies]
    generated = [worker.core.stats.generation_tokens["lora"] for worker in host.decode.values()]
    assert generated[0] > 0
    assert sum(generated) == 4 * 16, "what was delivered is not generated anew"


def test_a_prompt_that_becomes_complete_while_its_decode_worker_is_lost_is_not_held() -> None:
    host = Host(Setting(decode=2))
    replies = [host.submit("lora", [i, *PROMPT]) for i in range(2)]
    host.deliver_all(DISPATCHER, "prefill0")
    host.work("prefill0")
    for name in ("decode0", "decode1"):
        host.kill(name)
        host.deliver(name, DISPATCHER)
    # Between any two of the dispatcher's messages the prompts may be covered.
    while host.queues[DISPATCHER, "prefill0"]:
        host.deliver(DISPATCHER, "prefill0")
        host.work("prefill0")
    host.drain()
    assert [reply.reason for reply in replies] == [FinishReason.ERROR] * 2


@pytest.mark.parametrize("name", ["prefill0", "decode0"])
def test_without_workers_requests_end_with_an_error_that_says_why(name: str) -> None:
    host = Host(Setting())
    reply = host.submit("lora", PROMPT, 8)
    host.round()
    host.kill(name)
    host.drain()
    later = host.submit("lora", PROMPT, 8)
    host.drain()
    for ended in (reply, later):
        assert ended.reason is FinishReason.ERROR
        assert f"{name}: killed" in str(ended.error)


def test_what_a_worker_says_of_an_old_attempt_is_ignored() -> None:
    host = Host(Setting(decode=2))
    reply = host.submit("lora", PROMPT, 8)
    while len(reply.tokens) < 2:
        host.round()
    live = host.dispatcher._live["r0"]
    assert live.sequence is not None
    old = live.sequence.id
    host.kill(live.sequence.decode_worker)
    host.deliver_all()
    assert live.sequence.id != old
    for message in (
        m.Tokens(old, (1, 2, 3)),
        m.Returned(old, "preempted"),
        m.Dropped(old),
        m.Failed(old, "broken"),
    ):
        host.dispatcher.receive("decode0", message)
    assert host.dispatcher.outputs == []
    host.drain()
    assert reply.tokens == reply.expected


def test_a_decode_worker_that_waits_for_a_transfer_hands_out_its_last_tokens() -> None:
    host = Host(Setting(steps_ahead=1))
    first = host.submit("lora", PROMPT, 2)
    cover(host)
    host.link.accept_faults.extend(["", "never"])
    second = host.submit("lora", [0] * PAGE * 2, 2)
    for _ in range(30):
        host.round()
    assert first.tokens == first.expected
    assert (second.tokens, host.now) == ([], 0.0)
    host.drain()


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_forced_tokens_are_told_at_once_and_computed_in_chunks(steps_ahead: int) -> None:
    """Their KV and all that follows is as if each had been sampled; steps are saved."""
    host = Host(Setting(decode_pages=60, prefill_pages=60, steps_ahead=steps_ahead))
    replies = [
        host.submit(model, [*PROMPT, i], 40, grammar=True)
        for i in range(3)
        for model in ("lora", "full")
    ]
    host.drain()
    assert all(reply.tokens == reply.expected for reply in replies)
    stats = host.decode["decode0"].core.stats
    assert sum(stats.forced_tokens.values()) > 40
    assert sum(stats.generation_tokens.values()) == 240


def test_a_row_that_fails_ends_alone() -> None:
    host = Host(Setting())
    first, second = host.submit("lora", PROMPT), host.submit("identity", PROMPT)
    executor = host.decode["decode0"].executor
    plain = executor.finish

    def finish() -> tuple[DecodePlan, DecodeResult]:
        plan, result = plain()
        assert plan.step is not None
        rows = [row.id for row in plan.step.rows]
        failed = {rows.index(0): "too complex"} if 0 in rows else {}
        return plan, msgspec.structs.replace(result, failed=failed)

    executor.finish = finish  # type: ignore[method-assign]
    host.drain()
    assert (first.reason, first.error) == (FinishReason.ERROR, "too complex")
    assert second.tokens == second.expected
