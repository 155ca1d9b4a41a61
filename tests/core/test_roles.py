"""Meshes that may do either: rows go on elsewhere with their KV, and nobody notices."""

from __future__ import annotations

import msgspec
import pytest

from pshare_jax.core.requests import FinishReason
from pshare_jax.core.router import NoWorkerError
from tests.core.reply import Reply
from tests.core.scripted import Host
from tests.core.setting import Setting

EITHER = Setting(either=True, prefill=1, decode=2, decode_pages=40)


def busy(host: Host, count: int = 4, tokens: int = 12) -> list[Reply]:
    """Rows that have generated something, on both decode workers."""
    replies = [host.submit("full", [i] * 9, tokens) for i in range(count)]
    for _ in range(100):
        host.round()
        if all(len(reply.tokens) > 2 for reply in replies):
            return replies
    raise AssertionError("nothing was generated")


def rows(host: Host, name: str) -> int:
    return len(host.decode[name].core.rows.all())


def test_rows_move_with_their_kv() -> None:
    """Nothing is computed again: neither a prompt nor what was generated."""
    host = Host(EITHER)
    replies = busy(host)
    moving = rows(host, "decode2")
    assert moving > 0
    assert rows(host, "decode1") > 0
    computed = sum(w.core.stats.prefill_tokens.total() for w in host.prefill.values())
    replays: list[str] = []
    for worker in host.decode.values():
        begin = worker.executor.begin

        def spy(plan, begin=begin, name=worker.name):
            replays.extend([name] if plan.replay is not None else [])
            return begin(plan)

        worker.executor.begin = spy  # type: ignore[method-assign]
    assert host.give_mesh("prefill2")
    host.drain()
    host.check_idle()
    assert host.decode["decode2"].core.stats.moved_rows == moving
    assert replays == []
    assert sum(w.core.stats.prefill_tokens.total() for w in host.prefill.values()) == computed
    for reply in replies:
        reply.check_ended()
    after = host.submit("full", [9] * 9)
    host.drain()
    after.check_ended()


@pytest.mark.parametrize("fault", ["refused", "corrupt", "never"])
def test_what_does_not_arrive_is_replayed(fault: str) -> None:
    host = Host(EITHER)
    replies = busy(host)
    host.link.accept_faults.extend([fault] * 20)
    assert host.give_mesh("prefill2")
    host.drain()
    host.check_idle()
    for reply in replies:
        reply.check_ended()


def test_a_client_that_goes_while_its_row_moves() -> None:
    host = Host(EITHER)
    replies = busy(host)
    assert host.give_mesh("prefill2")
    for _ in range(3):
        host.work("decode2")
    host.abort(replies[0])
    host.deliver_all()
    host.abort(replies[1])
    host.drain()
    host.check_idle()
    for reply in replies:
        reply.check_ended()


@pytest.mark.parametrize("victim", ["decode1", "decode2"])
def test_a_mesh_that_fails_while_rows_move(victim: str) -> None:
    host = Host(EITHER)
    replies = busy(host)
    assert host.give_mesh("prefill2")
    host.work("decode2")
    host.deliver_all("decode2", "dispatcher")
    host.kill(victim)
    host.drain()
    for reply in replies:
        reply.check_ended()
        assert reply.reason is FinishReason.LENGTH, "there is always one who can"


def test_prompts_that_wait_are_given_back() -> None:
    host = Host(Setting(either=True, prefill=2, decode=1, decode_pages=40))
    replies = [host.submit("full", [i] * 30, 3) for i in range(6)]
    host.deliver_all()
    assert host.prefill["prefill1"].core.held_ids()
    assert host.give_mesh("decode1")
    host.deliver_all("dispatcher", "prefill1")
    host.drain()
    host.check_idle()
    for reply in replies:
        reply.check_ended()
    assert all(reply.reason is FinishReason.LENGTH for reply in replies)


def test_somebody_is_left_for_everything() -> None:
    host = Host(Setting(either=True, prefill=1, decode=1))
    assert not host.give_mesh("prefill1"), "the only one that generates"
    assert not host.give_mesh("decode0"), "the only one that covers prompts"
    assert host.give_mesh("prefill0"), "it does that already"
    with pytest.raises(NoWorkerError, match="without decode1 nobody could generate for"):
        host.dispatcher.give_mesh("prefill1")
    host = Host(EITHER)
    spec = msgspec.structs.replace(host.models["isolated"], decode_workers=("decode2",))
    host.dispatcher.set_model("isolated", spec)
    with pytest.raises(NoWorkerError, match="generate for isolated"):
        host.dispatcher.give_mesh("prefill2")


def test_who_rests_takes_over_when_others_fail() -> None:
    host = Host(EITHER)
    replies = busy(host)
    host.kill("prefill0")
    host.drain()
    more = host.submit("identity", [5] * 9)
    host.drain()
    for reply in (*replies, more):
        reply.check_ended()
        assert reply.reason is FinishReason.LENGTH
