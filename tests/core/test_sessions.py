"""Sessions: where their calls go, how long their pages stay, and that no tenant meets another."""

from __future__ import annotations

import pytest

from pshare_jax.core.requests import Request, Session
from pshare_jax.core.router import STAY_TOKENS
from pshare_jax.core.sessions import MAX_SESSIONS, SessionTable, session_key
from tests.core.reply import Reply
from tests.core.scripted import MAX_TTL, Host
from tests.core.setting import Setting
from tests.core.test_router import BOTH, Fleet, other

PROMPT = list(range(1, 14))
SESSION = ("", "s")


def computed(reply: Reply) -> int:
    assert reply.usage is not None
    return reply.usage.computed_tokens


def test_calls_of_a_session_stay_together_though_others_have_less_to_do() -> None:
    fleet = Fleet()
    first = fleet.send([1] * 20, session=SESSION)
    # Short ones, that share nothing with the first, and would spread.
    rest = [fleet.send([100 + i] * 4, session=SESSION) for i in range(6)]
    assert {s.prefill_worker for s in rest} == {first.prefill_worker}
    assert {s.decode_worker for s in rest[:2]} == {first.decode_worker}
    alone = [fleet.send([200 + i] * 4) for i in range(4)]
    assert other(first.prefill_worker) in {s.prefill_worker for s in alone}


def test_a_session_leaves_a_worker_that_is_overloaded_and_stays_where_it_went() -> None:
    fleet = Fleet()
    first = fleet.send([1] * 20, session=SESSION)
    fleet.send([3] * (STAY_TOKENS + 100), session=SESSION)
    moved = fleet.send([2] * 4, session=SESSION)
    assert moved.prefill_worker == other(first.prefill_worker)
    fleet.work_off()
    assert fleet.send([5] * 4, session=SESSION).prefill_worker == moved.prefill_worker


def test_a_session_goes_on_elsewhere_when_its_worker_is_lost() -> None:
    fleet = Fleet()
    first = fleet.send([1] * 20, session=SESSION)
    fleet.router.lose(first.prefill_worker)
    fleet.router.lose(first.decode_worker)
    second = fleet.send([1] * 24, session=SESSION)
    assert second.prefill_worker == other(first.prefill_worker)
    assert second.decode_worker == other(first.decode_worker)


def test_a_session_stays_with_the_decode_worker_that_can() -> None:
    fleet = Fleet()
    first = fleet.send([1] * 20, session=SESSION)
    elsewhere = (other(first.decode_worker),)
    assert fleet.send([1] * 21, session=SESSION, hosts=elsewhere).decode_worker == elsewhere[0]
    for sequence in fleet.waiting:
        fleet.router.forget(sequence.id)
    assert fleet.send([1] * 22, session=SESSION).decode_worker == elsewhere[0], "the latest"
    only = (first.decode_worker,)
    assert fleet.send([1] * 23, session=SESSION, hosts=only).decode_worker == only[0]


@pytest.mark.parametrize("host", BOTH)
def test_a_session_begins_where_the_models_that_are_asked_next_are(host: str) -> None:
    fleet = Fleet()
    assert fleet.send([1] * 20, next_hosts={host: 2, other(host): 1}).decode_worker == host


def test_tenants_do_not_meet_in_a_session_of_one_name() -> None:
    key = session_key(Request("r", "m", (1,), cache_salt="one", session=Session("s")))
    assert key == ("one", "s")
    assert session_key(Request("r", "m", (1,), cache_salt="two", session=Session("s"))) != key
    assert session_key(Request("r", "m", (1,), session=Session(ttl=3.0))) is None
    host = Host(Setting(reply_ahead=True, prefill_pages=40, decode_pages=40))
    first = host.submit("lora", PROMPT, 6, salt="one", session=Session("s", 20.0))
    host.drain()
    prompt = [*PROMPT, *first.tokens, 50]
    second = host.submit("lora", prompt, 2, salt="two", session=Session("s", 20.0))
    host.drain()
    assert second.usage is not None
    assert second.usage.cached_tokens == 0


def test_sessions_that_were_not_heard_of_for_longest_are_forgotten() -> None:
    table = SessionTable()
    for number in range(MAX_SESSIONS):
        table.went(("", str(number)), "prefill0", "decode0")
    table.went(("", "0"), "prefill1", "decode0")
    table.went(("", "new"), "prefill0", "decode0")
    assert len(table) == MAX_SESSIONS
    assert table.find(("", "1")) is None
    stay = table.find(("", "0"))
    assert stay is not None
    assert stay.prefill == "prefill1"
    table.went(None, "prefill0", "decode0")
    assert table.find(None) is None


@pytest.mark.parametrize("one_pool", [False, True])
def test_pages_outlive_the_call_for_as_long_as_the_session_asks(one_pool: bool) -> None:
    host = Host(Setting(one_pool=one_pool, prefill_pages=13, decode_pages=13))

    def others() -> None:
        for token in (60, 61, 62):
            host.submit("identity", [token] * 16, 1)
            host.drain()

    host.submit("identity", PROMPT, 2, session=Session("s", 20.0))
    host.drain()
    others()
    kept = host.submit("identity", [*PROMPT, 99], 2, session=Session("s", 5.0))
    host.drain()
    assert computed(kept) == 1, "13 tokens were there, and the last one is the module's"
    host.now += 25.0
    others()
    lost = host.submit("identity", [*PROMPT, 98], 2)
    host.drain()
    assert computed(lost) == 13


def test_no_session_keeps_pages_for_longer_than_the_operator_allows() -> None:
    host = Host(Setting())
    host.submit("identity", [*PROMPT, 14], 2, session=Session("s", 1e9))
    host.drain()
    caches = [host.prefill["prefill0"].cache, host.decode["decode0"].cache]
    # Four pages in the prefill pool, the last of them begun; three are shared in decode.
    assert [cache.num_pinned for cache in caches] == [4, 3]
    host.now += MAX_TTL + 1
    host.submit("identity", [77], 1)
    host.drain()
    assert [cache.num_pinned for cache in caches] == [0, 0]


def test_what_a_session_has_pinned_does_not_hold_up_a_request_that_needs_the_pool() -> None:
    host = Host(Setting(prefill_pages=9, decode_pages=9, pinned_share=1.0))
    host.submit("identity", [7] * 20, 2, session=Session("s", MAX_TTL))
    host.drain()
    assert host.prefill["prefill0"].cache.num_pinned == 5
    large = host.submit("lora", [8] * 28, 4)
    host.drain()
    assert large.tokens == large.expected
