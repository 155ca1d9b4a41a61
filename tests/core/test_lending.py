"""A prefill worker computes of a prompt only what no other worker can give it."""

from __future__ import annotations

import pytest

from pshare_jax.core import messages as m
from pshare_jax.core.borrowing import PIECE_SECONDS
from pshare_jax.core.connector import TransferError
from pshare_jax.core.loans import LEASE_SECONDS
from pshare_jax.core.messages import DISPATCHER
from pshare_jax.core.plans import Offer
from pshare_jax.core.requests import FinishReason
from tests.core.reply import Reply
from tests.core.scripted import Host
from tests.core.setting import PAGE, Setting

CONTEXT = list(range(1, 34))
"""32 tokens that the prefill module covers: 8 pages."""

LENDS = Setting(prefill=2, decode=1, prefill_pages=40, decode_pages=60, lends=True)


def computed(host: Host) -> int:
    """Prompt tokens that were computed, by all that have lived."""
    return sum(
        count
        for worker in host.prefill.values()
        for (_, source), count in worker.core.stats.prefill_tokens.items()
        if source == "computed"
    )


def borrowed(host: Host) -> int:
    return sum(worker.core.stats.borrowed_tokens for worker in host.prefill.values())


def covering(host: Host, reply: Reply) -> str:
    """The worker that covers a reply's prompt at present."""
    sequence = host.dispatcher._live[reply.request.id].sequence
    assert sequence is not None
    return sequence.prefill_worker


def known_context(setting: Setting = LENDS) -> tuple[Host, str]:
    """A host whose decode worker has `CONTEXT`, and the prefill worker that has it."""
    host = Host(setting)
    first = host.submit("lora", CONTEXT)
    name = covering(host, first)
    host.drain()
    assert computed(host) == len(CONTEXT) - 1
    return host, name


def test_after_a_death_what_the_decode_side_has_is_not_computed_again() -> None:
    host, name = known_context()
    host.kill(name)
    longer = [*CONTEXT, *range(50, 56)]
    reply = host.submit("identity", longer)
    host.drain()
    assert reply.tokens == reply.expected
    assert reply.usage is not None
    # 38 tokens are covered, of which 8 full pages lay where the first one was generated.
    assert (reply.usage.computed_tokens, reply.usage.cached_tokens) == (38 - 32, 32)
    assert borrowed(host) == 32


@pytest.mark.parametrize("lends", [True, False])
@pytest.mark.parametrize("step", range(12))
def test_its_worker_is_killed_at_each_step_of_the_transfer(step: int, lends: bool) -> None:
    """Three models wait for the same pages; what the decode side has already stays there."""
    host, name = known_context(
        Setting(prefill=2, decode=1, prefill_pages=40, decode_pages=60, lends=lends)
    )
    before = computed(host)
    longer = [*CONTEXT, *range(60, 81)]
    replies = [host.submit(model, longer) for model in ("lora", "identity", "alora")]
    assert {covering(host, reply) for reply in replies} == {name}
    core = host.decode["decode0"].core
    for acts in range(step):
        host.deliver_all()
        host.work(name if acts % 2 else "decode0")
    host.deliver_all()
    arrived = core.cache.matched_tokens(_keys(host, replies[0]), longer)
    assert arrived >= 32
    host.kill(name)
    host.drain()
    assert [reply.tokens for reply in replies] == [reply.expected for reply in replies]
    if not lends:
        return
    again = computed(host) - before
    # At most what was not there yet: once by the dead, and once by the other one.
    assert again <= 2 * (len(longer) - 1 - 32), "what the decode side had was computed again"
    assert borrowed(host) >= 32 or all(r.usage and r.usage.cached_tokens for r in replies)


def _keys(host: Host, reply: Reply) -> list[bytes]:
    live = host.dispatcher._live[reply.request.id]
    return live.keys[: 32 // PAGE]


def test_a_lost_decode_worker_costs_no_prompt_token() -> None:
    host = Host(Setting(prefill=2, decode=2, prefill_pages=40, decode_pages=40, lends=True))
    replies = [host.submit("lora", [*CONTEXT, i], 12) for i in range(4)]
    while not all(reply.tokens for reply in replies):
        host.round()
    before = computed(host)
    host.kill("decode0")
    host.drain()
    assert [reply.tokens for reply in replies] == [reply.expected for reply in replies]
    assert computed(host) == before


@pytest.mark.parametrize("busy", [True, False])
def test_another_prefill_worker_lends_too(busy: bool) -> None:
    """Who covers a prompt because the other one is busy gets what that has."""
    host, name = known_context(Setting(prefill=2, decode=2, decode_pages=60, lends=True))
    host.kill("decode0")
    host.deliver_all()
    if busy:
        host.router._prefill[name].others = 10_000
        host.router._covering.touch(host.router._prefill[name])
    before = computed(host)
    reply = host.submit("identity", [*CONTEXT, 99])
    assert (covering(host, reply) == name) is not busy
    host.drain()
    assert reply.tokens == reply.expected
    assert computed(host) - before == 1
    assert borrowed(host) == (32 if busy else 0)


@pytest.mark.parametrize("fault", ["refused", "corrupt", "never"])
def test_what_does_not_come_is_computed(fault: str) -> None:
    host, name = known_context()
    host.kill(name)
    host.link.accept_faults.append(fault)
    reply = host.submit("identity", [*CONTEXT, 99])
    host.drain()
    assert reply.tokens == reply.expected
    assert reply.usage is not None
    assert reply.usage.computed_tokens == len(CONTEXT)
    [other] = set(host.prefill) - {name}
    assert host.prefill[other].core.stats.failed_loans == 1
    assert host.now <= PIECE_SECONDS + 3.5, "it is looked at once more, and no longer waited for"
    # Nobody waits for it again, for a while, who has not delivered in time.
    avoided = host.prefill[other].core.borrowing._avoided
    assert set(avoided) == ({"decode0"} if fault == "never" else set())


def test_who_has_evicted_the_pages_says_so() -> None:
    """What the router knows may be old; then nothing is waited for."""
    host, name = known_context()
    host.kill(name)
    host.deliver_all()
    decode = host.decode["decode0"].core
    pages = decode.cache.allocate(decode.cache.num_usable)
    assert pages is not None
    reply = host.submit("identity", [*CONTEXT, 99])
    [other] = set(host.prefill) - {name}
    host.deliver_all(DISPATCHER, other)
    host.work(other)
    host.deliver_all(other, "decode0")
    assert host.prefill[other].core.borrowing.take_ready()[0].filled == 0
    decode.cache.release(pages)
    host.abort(reply)


def test_only_pages_of_the_prefill_module_are_lent() -> None:
    """What a decode module has written is under no key, and in no index."""
    host = Host(LENDS)
    first = host.submit("lora", CONTEXT, 12)
    host.drain()
    decode = host.decode["decode0"].core
    assert decode.cache.num_indexed == 8
    text = [*CONTEXT, *first.tokens]
    name = next(n for n, w in host.prefill.items() if w.core.stats.prefill_tokens)
    host.kill(name)
    reply = host.submit("identity", text)
    host.drain()
    assert reply.tokens == reply.expected
    assert borrowed(host) == 32


def test_another_tenant_borrows_nothing() -> None:
    host, name = known_context()
    host.kill(name)
    reply = host.submit("identity", [*CONTEXT, 99], salt="tenant")
    host.drain()
    assert reply.tokens == reply.expected
    assert borrowed(host) == 0


def test_an_offer_to_one_who_has_died_is_withdrawn() -> None:
    host, name = known_context()
    host.kill(name)
    host.deliver_all()
    decode = host.decode["decode0"]
    keys, tokens = decode.cache.keys()[:1], tuple(CONTEXT[:PAGE])
    decode.receive(m.Lend("prefill9", 77, 5, keys, tokens))
    host.work("decode0")
    assert 77 in host.link.offers
    assert decode.cache.counts().used == 0
    for _ in range(3):
        host.now += LEASE_SECONDS
        host.work("decode0")
    assert host.link.offers == {}


def test_a_prompt_that_is_aborted_while_pages_are_on_their_way_holds_nothing() -> None:
    host, name = known_context()
    host.kill(name)
    host.link.accept_faults.append("never")
    reply = host.submit("identity", [*CONTEXT, 99])
    [other] = set(host.prefill) - {name}
    for _ in range(6):
        host.round()
    assert host.prefill[other].core.borrowing.is_pulling
    host.abort(reply)
    host.drain()
    assert borrowed(host) == 0


def test_a_thousand_abandoned_fetches_leave_nothing() -> None:
    """Neither pages nor offers, nor what is remembered of them."""
    host = Host(Setting(prefill_pages=60, decode_pages=60, lends=True))
    for number in range(1000):
        host.link.accept_faults.append("never")
        reply = host.submit("lora", [number, *range(200, 207)])
        while not host.decode["decode0"].core._arrivals.is_pulling:
            host.round()
        host.abort(reply)
        host.deliver_all()
        host.link.accept_faults.clear()
    host.drain()
    assert {reply.reason for reply in host.replies.values()} == {FinishReason.ABORT}
    held, arrivals = host.prefill["prefill0"].core.held, host.decode["decode0"].core._arrivals
    kept = [held._held, held._offers, held._offer_of, held._withdrawn]
    kept += [arrivals._arrivals, arrivals._transfers, arrivals.pulls, arrivals.cancelled]
    assert not any(kept), kept
    assert host.dispatcher._attempts == {}
    assert host.dispatcher._lost_workers == {}


@pytest.mark.parametrize("lends", [True, False])
def test_pages_that_cannot_be_had_from_one_come_from_another(lends: bool) -> None:
    """One retry, then another source, though the router would go on with the first."""
    host, name = known_context(Setting(prefill=2, prefill_pages=40, decode_pages=40, lends=lends))

    def offer(offer: Offer) -> list[m.PageDescriptor]:
        raise TransferError("no room")

    host.prefill[name].executor.connector.offer = offer  # type: ignore[method-assign]
    replies = [host.submit(model, [*CONTEXT, 98, 99]) for model in ("identity", "lora")]
    assert {covering(host, reply) for reply in replies} == {name}
    host.drain()
    assert [reply.tokens for reply in replies] == [reply.expected for reply in replies]
    assert host.decode["decode0"].core.stats.failed_transfers == 4
