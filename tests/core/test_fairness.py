from __future__ import annotations

from collections import Counter

from pshare_jax.core.fairness import FairTurns, Share
from pshare_jax.core.scheduling import DECODE_WEIGHT, PREFILL_WEIGHT


def take(turns: FairTurns, pieces: list[tuple[Share, float]]) -> Share:
    """One piece of work of the member whose turn it is; all of `pieces` have some."""
    seconds = {id(share): seconds for share, seconds in pieces}
    first = turns.order(share for share, _ in pieces)[0]
    turns.worked(first, seconds[id(first)])
    return first


def test_time_is_shared_by_weight() -> None:
    turns, prefill, decode = FairTurns(), Share(PREFILL_WEIGHT), Share(DECODE_WEIGHT)
    seconds: Counter[int] = Counter()
    for _ in range(1100):
        member = take(turns, [(prefill, 0.4), (decode, 0.01)])
        seconds[id(member)] += 40 if member is prefill else 1
    # A chunk of 0.4 s counts 0.1: ten steps of 0.01 s.
    assert seconds[id(prefill)] == 4 * seconds[id(decode)] == 4000


def test_no_member_waits_longer_than_one_piece_of_each_other() -> None:
    turns, members = FairTurns(), [Share(1.0) for _ in range(5)]
    order = [members.index(take(turns, [(m, 1.0) for m in members])) for _ in range(20)]
    assert all(sorted(order[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5))


def test_a_member_alone_keeps_its_turn() -> None:
    turns, member, resting = FairTurns(), Share(1.0), Share(3.0)
    for _ in range(5):
        assert turns.order([resting, member])[0] is resting, "it has had less, and is asked first"
        turns.rests(resting)
        turns.worked(member, 5.0)
    assert member.virtual_seconds == 25.0


def test_idle_time_is_not_made_up_for() -> None:
    turns, busy, late = FairTurns(), Share(1.0), Share(1.0)
    turns.order([busy])
    turns.worked(busy, 100.0)
    turns.worked(busy, 1.0)
    # It comes as if it had had as much as the other one when that last began.
    assert turns.order([busy, late]) == [late, busy]
    assert (busy.virtual_seconds, late.virtual_seconds) == (101.0, 100.0)
    # After one piece of 3 s it has had more than the other, who has waited.
    turns.worked(late, 3.0)
    assert turns.order([busy, late]) == [busy, late]


def test_a_member_that_rests_gets_no_credit_for_it() -> None:
    turns, busy, other = FairTurns(), Share(1.0), Share(1.0)
    turns.order([other, busy])
    turns.worked(other, 1.0)
    turns.rests(other)
    for _ in range(10):
        turns.worked(busy, 1.0)
    order = [take(turns, [(busy, 1.0), (other, 1.0)]) is other for _ in range(8)]
    assert sum(order[:2]) == 1, "not ten turns in a row"
    assert sum(order) == 4


def test_a_member_that_rests_keeps_what_it_has_had() -> None:
    """To have nothing to do for a moment does not make a member's past undone."""
    turns, greedy, modest = FairTurns(), Share(1.0), Share(1.0)
    turns.order([greedy, modest])
    turns.worked(modest, 0.1)
    turns.worked(greedy, 50.0)
    turns.rests(greedy)
    assert turns.order([greedy, modest]) == [modest, greedy]
    assert greedy.virtual_seconds == 50.0
