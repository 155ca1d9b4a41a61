"""Shares of clients, models and requests: as policy, and in whole engines under a flood."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import msgspec
import pytest

from pshare_jax.core.requests import Owner
from pshare_jax.core.sequences import Sequence
from pshare_jax.core.shares import FairClock, Holdings
from tests.core.reply import Reply
from tests.core.scripted import Host
from tests.core.sequences import make_sequence
from tests.core.setting import Setting


@dataclass
class Waiting:
    sequence: Sequence


def one(
    order: int,
    key: str = "",
    request: str = "",
    *,
    weight: float = 1.0,
    priority: int = 0,
    model: str = "lora",
) -> Waiting:
    made = make_sequence(order, [1, 2], page_size=4, model=model)
    owner = Owner(key, weight, request, priority)
    return Waiting(msgspec.structs.replace(made, owner=owner))


def serve(waiting: list[Waiting], count: int) -> list[int]:
    """Orders in which sequences are taken that keep what they get."""
    held: list[Waiting] = []
    for _ in range(count):
        taken = Holdings((w.sequence, 1) for w in held).next(waiting)
        waiting.remove(taken)
        held.append(taken)
    return [taken.sequence.order for taken in held]


class TestWhoIsNext:
    def test_without_names_the_oldest(self) -> None:
        assert serve([one(3), one(1), one(2)], 3) == [1, 2, 3]

    def test_requests_take_turns_whatever_their_number_of_sequences(self) -> None:
        flood = [one(order, request="flood") for order in range(6)]
        assert serve([*flood, one(6, request="a"), one(7, request="b")], 4) == [0, 6, 7, 1]

    def test_models_take_turns_whatever_their_number_of_requests(self) -> None:
        hot = [one(order, model="hot") for order in range(6)]
        cold = [one(order, model="cold") for order in (6, 7)]
        assert serve([*hot, *cold], 5) == [0, 6, 1, 7, 2]

    def test_clients_get_what_their_weights_say(self) -> None:
        many = [one(order, "a") for order in range(30)]
        heavy = [one(order, "b", weight=3.0) for order in range(30, 60)]
        counts = Counter(order >= 30 for order in serve([*many, *heavy], 40))
        assert counts == {True: 30, False: 10}

    def test_priorities_count_within_a_client_only(self) -> None:
        waiting = [one(0, "a", priority=5), one(1, "a", priority=-5), one(2, "b", priority=-9)]
        assert serve([*waiting], 3) == [1, 2, 0]
        assert serve([one(0, "a"), one(1, "b", priority=-9)], 1) == [0]


class TestWhoGivesWay:
    def holdings(self, held: list[Waiting]) -> Holdings:
        return Holdings((w.sequence, 1) for w in held)

    def test_only_who_has_nothing_may_ask_and_only_hogs_give(self) -> None:
        held = [one(order, request="flood") for order in range(4)]
        holdings = self.holdings([*held, one(5, request="small")])
        assert holdings.hog(one(6, request="new").sequence, held, 4) is held[3]
        assert holdings.hog(one(6, request="new").sequence, held, 5) is None
        assert holdings.hog(one(6, request="small").sequence, held, 4) is None
        assert holdings.hog(one(6, request="flood").sequence, held, 4) is None

    def test_the_oldest_never_gives_way(self) -> None:
        held = [one(0, request="flood"), one(1, request="flood")]
        holdings = self.holdings(held)
        assert holdings.hog(one(6, request="new").sequence, held[:1], 2) is None
        assert holdings.victim(one(9, request="new").sequence, held) is None

    def test_a_worse_priority_makes_nobody_give_way(self) -> None:
        held = [one(order, "a", "flood") for order in range(4)]
        late = one(6, "a", "new", priority=1).sequence
        assert self.holdings(held).hog(late, held, 2) is None
        other = one(6, "b", "new", priority=1).sequence
        assert self.holdings(held).hog(other, held, 2) is held[3]

    def test_pages_are_taken_from_who_is_younger_and_holds_as_much(self) -> None:
        flood = [one(order, request="flood") for order in range(3)]
        small = one(3, request="small")
        holdings = self.holdings([*flood, small])
        assert holdings.victim(flood[1].sequence, [*flood, small]) is flood[2]
        assert holdings.victim(flood[2].sequence, [*flood, small]) is None
        assert holdings.victim(small.sequence, [*flood, small]) is None
        # The oldest takes from everybody, but first from who holds most.
        assert holdings.victim(flood[0].sequence, [*flood, small]) is flood[2]
        assert holdings.victim(flood[0].sequence, [flood[0], small]) is small


class TestClock:
    def turns(self, waiting: list[Waiting], count: int, clock: FairClock | None = None) -> str:
        """Whose turns come when each piece of work is of one unit and nobody ever ends."""
        clock, taken = clock or FairClock(), ""
        for _ in range(count):
            clock.update(w.sequence for w in waiting)
            turn = clock.next(waiting)
            clock.worked(turn.sequence, 1.0)
            taken += turn.sequence.owner.key or turn.sequence.owner.request
        return taken

    def test_weights(self) -> None:
        taken = self.turns([one(0, "a"), one(1, "b", weight=2.0), one(2, "a", "x")], 30)
        assert Counter(taken) == {"a": 10, "b": 20}

    def test_requests_of_a_client(self) -> None:
        flood = [one(order, request="f") for order in range(5)]
        assert self.turns([*flood, one(9, request="x")], 8) == "fxfxfxfx"

    def test_a_stream_of_new_requests_does_not_starve_a_long_one(self) -> None:
        clock, long, taken = FairClock(), one(0, request="long"), ""
        for i in range(20):
            both = [long, one(1 + i, request=f"new{i}")]
            for _ in range(2):
                clock.update(w.sequence for w in both)
                turn = clock.next(both)
                clock.worked(turn.sequence, 1.0)
                taken += "l" if turn is long else "n"
                if turn is not long:
                    both.remove(turn)
        assert taken.count("l") >= 20

    def test_a_client_that_comes_back_has_neither_saved_nor_lost(self) -> None:
        clock, a, b = FairClock(), one(0, "a"), one(1, "b")
        assert self.turns([a, b], 4, clock) == "abab"
        assert self.turns([a], 10, clock) == "a" * 10
        assert self.turns([a, b], 4, clock) in ("abab", "baba")
        # What b had too much of is not forgotten while it is away.
        clock.worked(b.sequence, 5.0)
        assert self.turns([a], 1, clock) == "a"
        assert self.turns([a, b], 4, clock) == "aaaa"

    def test_who_is_ahead(self) -> None:
        clock, a, b = FairClock(), one(0, "a"), one(1, "b")
        clock.update([a.sequence, b.sequence])
        clock.worked(a.sequence, 10.0)
        clock.update([a.sequence, b.sequence])
        assert clock.is_ahead(a.sequence, 9.0)
        assert not clock.is_ahead(a.sequence, 10.0)
        assert not clock.is_ahead(b.sequence, 0.0)

    def test_nothing_is_kept_of_requests_that_have_gone(self) -> None:
        clock = FairClock()
        for i in range(50):
            self.turns([one(i, "a", f"r{i}")], 1, clock)
        assert len(clock._had) <= 5
        assert len(clock._least) <= 5


def rounds_until_done(host: Host, reply: Reply) -> int:
    """Rounds of one chunk and one step each until a reply has ended."""
    for count in range(1, 500):
        host.round()
        if reply.reason is not None:
            return count
    raise AssertionError("it did not end")


FLOODS = {
    "long prompts": lambda host: [host.submit("lora", [i + 1] * 26, 4) for i in range(16)],
    "samples": lambda host: [
        host.submit("lora", [1] * 6, 24, owner=Owner("", 1, "n")) for _ in range(32)
    ],
    "many prompts": lambda host: [
        host.submit("lora", [i + 1, 2, 3], 20, owner=Owner("", 1, "p")) for i in range(60)
    ],
    "a hot model": lambda host: [host.submit("lora", [i + 1, 2, 3], 20) for i in range(30)],
}


@pytest.mark.parametrize("one_pool", [False, True], ids=["two pools", "one pool"])
@pytest.mark.parametrize("flood", FLOODS)
def test_a_small_request_does_not_wait_for_a_flood(flood: str, one_pool: bool) -> None:
    """It waits for a few turns at most, beyond the rounds that it takes alone."""
    setting = Setting(one_pool=one_pool, prefill_pages=40, decode_pages=40, max_num_seqs=8)
    alone = rounds_until_done(host := Host(setting), host.submit("identity", [9, 9], 1))
    host = Host(setting)
    FLOODS[flood](host)
    for _ in range(6):
        host.round()
    model = "identity" if flood == "a hot model" else "lora"
    small = host.submit(model, [9, 9], 1, owner=Owner("", 1, "small"))
    assert rounds_until_done(host, small) <= alone + 4
    assert sum(reply.reason is None for reply in host.replies.values()) > 10, "the flood goes on"
    host.drain()


@pytest.mark.parametrize("one_pool", [False, True], ids=["two pools", "one pool"])
def test_the_oldest_gets_on_under_an_endless_stream_of_small_requests(one_pool: bool) -> None:
    setting = Setting(one_pool=one_pool, prefill_pages=12, decode_pages=12, max_num_seqs=4)
    host = Host(setting)
    for i in range(4):
        host.submit("lora", [i, 1, 2, 3, 4], 4)
    for _ in range(3):
        host.round()
    large = host.submit("lora", [7] * 30, 4)
    for i in range(400):
        if large.reason is not None:
            break
        host.submit("lora", [50 + i, 1], 2, owner=Owner("other", 5.0))
        host.round()
    assert large.reason is not None
    assert large.tokens == large.expected
    host.drain()


def test_no_model_starves_beside_a_hot_one() -> None:
    """64 requests to one model, then one to another; see vllm#31909, sglang#15129."""
    host = Host(Setting(prefill_pages=60, decode_pages=60, max_num_seqs=8))
    hot = [host.submit("lora", [i, 3, 3], 8) for i in range(64)]
    for _ in range(10):
        host.round()
    cold = [host.submit("full", [i, 5, 5, 5, 5, 5], 8) for i in range(4)]
    while any(reply.reason is None for reply in cold):
        host.round()
    assert sum(reply.reason is not None for reply in hot) <= 24, "it got about half of the slots"
    host.drain()


def test_clients_generate_as_their_weights_say() -> None:
    host = Host(Setting(prefill_pages=200, decode_pages=200, max_num_seqs=8))
    many = [host.submit("lora", [i, 1, 1], 8, owner=Owner("a", 1.0)) for i in range(60)]
    heavy = [host.submit("lora", [i, 2, 2], 8, owner=Owner("b", 3.0)) for i in range(30)]
    while any(reply.reason is None for reply in heavy):
        host.round()
    ended = sum(reply.reason is not None for reply in many)
    assert 6 <= ended <= 16, "a third as many as of the heavier client, give or take those inside"
    host.drain()
