"""When meshes change: what lasts counts, and nothing goes to and fro."""

from __future__ import annotations

from pshare_jax.core.balance import (
    LASTING_SECONDS,
    REST_SECONDS,
    BalancePolicy,
    Balancer,
)
from tests.core.scripted import Host
from tests.core.setting import Setting

POLICY = BalancePolicy(backlog=100, slots=8)
ROWS = {"decode1": 4, "decode2": 3}


def test_prefill_gets_the_mesh_with_fewest_rows_when_a_lack_lasts() -> None:
    balancer = Balancer(POLICY)
    assert balancer.decide({"prefill0": 101}, ROWS, 0.0) is None
    assert balancer.decide({"prefill0": 101}, ROWS, LASTING_SECONDS) == "decode2"


def test_a_lack_that_does_not_last_is_forgotten() -> None:
    balancer = Balancer(POLICY)
    assert balancer.decide({"prefill0": 101}, ROWS, 0.0) is None
    assert balancer.decide({"prefill0": 99}, ROWS, 0.9) is None
    assert balancer.decide({"prefill0": 101}, ROWS, 1.0) is None
    assert balancer.decide({"prefill0": 101}, ROWS, 1.9) is None


def test_after_a_change_nothing_changes_for_a_while() -> None:
    balancer = Balancer(POLICY)
    rows = {**ROWS, "decode3": 0}
    balancer.decide({"prefill0": 1000}, rows, 0.0)
    assert balancer.decide({"prefill0": 1000}, rows, 1.0) == "decode3"
    two = {"prefill0": 1000, "prefill3": 0}
    assert balancer.decide(two, ROWS, 2.5) is None
    assert balancer.decide(two, ROWS, 1.0 + REST_SECONDS) == "decode2"


def test_rows_must_have_room_elsewhere_and_one_is_left() -> None:
    for rows in ({"decode1": 5, "decode2": 4}, {"decode1": 1}):
        balancer = Balancer(POLICY)
        balancer.decide({"prefill0": 1000}, rows, 0.0)
        assert balancer.decide({"prefill0": 1000}, rows, 9.0) is None


def test_decode_gets_it_back_when_prefill_has_nothing_to_do() -> None:
    balancer = Balancer(POLICY)
    idle, busy = {"prefill0": 10, "prefill2": 2}, {"decode1": 5}
    balancer.decide(idle, busy, 0.0)
    assert balancer.decide(idle, {"decode1": 4}, 2.0) is None, "its slots are half free"
    balancer.decide(idle, busy, 3.0)
    assert balancer.decide(idle, busy, 4.0) == "prefill2"
    balancer = Balancer(POLICY)
    balancer.decide({"prefill0": 0}, busy, 0.0)
    assert balancer.decide({"prefill0": 0}, busy, 9.0) is None, "one is left"


def test_meshes_follow_the_load_by_themselves() -> None:
    host = Host(Setting(either=True, prefill=1, decode=2, decode_pages=60, balanced=20))
    replies = [host.submit("full", [i, 1] * 20, 3) for i in range(6)]
    for _ in range(6):
        host.round()
        host.now += 0.5
    assert len(host.router.working(host.prefill)) == 2
    host.drain()
    host.check_idle()
    for reply in replies:
        reply.check_ended()
