"""Frontends and workers over links: whoever dies or hangs, each request ends with its tokens."""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from pshare_jax.cluster import wire
from pshare_jax.core import messages as m
from pshare_jax.core.requests import FinishReason
from tests.cluster.symbolic import NAMES, Cluster, Frontend, Reply, symbolic_cluster
from tests.engine.harness import wait_until


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has lost a link makes it again as soon as it can."""
    monkeypatch.setattr("pshare_jax.cluster.link.AGAIN_SECONDS", 0.02)
    monkeypatch.setattr("pshare_jax.cluster.link.MAX_AGAIN_SECONDS", 0.1)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """2 x 2 x 2; at the end nobody holds anything."""
    with symbolic_cluster(max_attempts=50) as cluster:
        yield cluster
        cluster.check_idle()


def prompts_of(seed: int, count: int) -> list[list[int]]:
    """Prompts that begin like others of the same seed, as far as they go."""
    rng = random.Random(seed)
    contexts = [[rng.randrange(100) for _ in range(40)] for _ in range(3)]
    return [
        [*rng.choice(contexts)[: rng.randrange(2, 40)], rng.randrange(100)] for _ in range(count)
    ]


def ask(frontends: list[Frontend], seed: int, count: int, tokens: int = 12) -> list[Reply]:
    """Models and frontends in turn."""
    return [
        frontends[i % len(frontends)].submit(NAMES[i % len(NAMES)], prompt, tokens)
        for i, prompt in enumerate(prompts_of(seed, count))
    ]


def check(replies: list[Reply]) -> None:
    for reply in replies:
        reply.check()


def counters(frontend: Frontend) -> dict[str, Any]:
    return dict(frontend.engine.stats().generation_tokens)


def test_all_frontends_use_all_workers(cluster: Cluster) -> None:
    check(ask(cluster.frontends, 1, 60))
    for host in cluster.hosts.values():
        assert host.worker.cache.num_indexed > 0


def test_the_second_model_computes_nothing(cluster: Cluster) -> None:
    """Though it is asked by way of the other frontend, which hears of pages from the worker."""
    first, second = cluster.frontends
    prompt = prompts_of(2, 1)[0][:1] * 33
    check([first.submit("full", prompt)])
    router = second.engine._dispatcher._router
    wait_until(lambda: any(len(w.held) >= 8 for w in router._prefill.values()))
    reply = second.submit("identity", prompt).wait()
    assert reply.usage is not None
    assert (reply.usage.computed_tokens, reply.usage.shared_tokens) == (0, 32)


def test_a_frontend_that_comes_late_knows_what_is_there(cluster: Cluster) -> None:
    check(ask(cluster.frontends, 3, 20))
    late = cluster.frontend()
    # Looked up each time: a worker that comes again has a new view, and may still index pages.
    views = late.engine._dispatcher._router._prefill
    for name in ("prefill0", "prefill1"):
        cache = cluster.hosts[name].worker.cache
        wait_until(lambda n=name, c=cache: n in views and views[n].held == set(c.keys()))
    assert any(view.held for view in views.values())


@pytest.mark.parametrize("victim", ["prefill0", "decode1"])
def test_a_worker_dies_and_another_comes(cluster: Cluster, victim: str) -> None:
    replies = ask(cluster.frontends, 4, 40)
    replies[3].next_event()
    cluster.hosts[victim].kill()
    check(replies)
    cluster.again(victim)
    cluster.linked()
    check(ask(cluster.frontends, 5, 40))
    assert cluster.hosts[victim].worker.cache.num_indexed > 0


def test_random_deaths(cluster: Cluster) -> None:
    """Again and again, with requests all the while; the last ones are not attacked."""
    rng = random.Random(6)
    over = threading.Event()
    deaths: list[str] = []

    def attack() -> None:
        while not over.wait(rng.uniform(0.02, 0.1)):
            name = rng.choice(list(cluster.hosts))
            cluster.hosts[name].kill()
            deaths.append(name)
            if rng.random() < 0.5:
                over.wait(0.05)
            cluster.again(name)
            # With nobody to be attacked nothing is shown.
            cluster.linked()

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        rounds = 0
        while len(deaths) < 12 or rounds < 8:
            check(ask(cluster.frontends, 100 + rounds, 40))
            rounds += 1
    finally:
        over.set()
        attacker.join()
    finished = [f.engine._dispatcher.stats.finished.total() for f in cluster.frontends]
    assert finished == [20 * rounds, 20 * rounds]


def test_random_hangs() -> None:
    """Workers that stand still are given up; what they say afterwards is nobody's."""
    rng = random.Random(7)
    with symbolic_cluster(lost_seconds=0.6, max_attempts=50) as cluster:
        for number in range(4):
            replies = ask(cluster.frontends, 200 + number, 30)
            replies[rng.randrange(30)].next_event()
            host = cluster.hosts[rng.choice(list(cluster.hosts))]
            host.hang()
            check(replies)
            missing = [f.engine.failed_workers for f in cluster.frontends]
            host.go_on()
            # Unless nothing of what was asked needed it, it was missed.
            assert all(set(found) <= {host.address} for found in missing)
            wait_until(lambda: not any(f.engine.failed_workers for f in cluster.frontends))
        cluster.check_idle()
        # Who was lost and has come again is not counted twice.
        done = Counter(
            {
                name: sum(
                    host.worker.core.stats.generation_tokens[name]
                    for host in cluster.hosts.values()
                    if not host.worker.covers
                )
                for name in NAMES
            }
        )
        wait_until(lambda: all(counters(f) == done for f in cluster.frontends))


def test_a_frontend_dies(cluster: Cluster) -> None:
    """What it had is given up, in whatever state it was; others go on."""
    doomed = cluster.frontend()
    lost = ask([doomed], 8, 40, 80)
    others = ask(cluster.frontends[:2], 9, 20)
    lost[0].next_event()
    doomed.die()
    check(others)
    cluster.linked(2)
    cluster.frontends.remove(doomed)
    cluster.check_idle()
    doomed.stop()
    assert {reply.wait().reason for reply in lost} <= {FinishReason.ERROR, FinishReason.LENGTH}


def test_aborted_requests_hold_nothing(cluster: Cluster) -> None:
    rng = random.Random(10)
    for number in range(5):
        replies = ask(cluster.frontends, 300 + number, 40, 30)
        for i, reply in enumerate(replies):
            if rng.random() < 0.7:
                cluster.frontends[i % 2].engine.abort(reply.request.id)
                if rng.random() < 0.2:
                    time.sleep(0.002)
        for reply in replies:
            assert reply.wait().reason in (FinishReason.ABORT, FinishReason.LENGTH)
    cluster.check_idle()


@pytest.mark.parametrize("fault", ["refused", "late", "corrupt", "never"])
def test_transfers_that_go_wrong_are_tried_again(
    cluster: Cluster, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once more by the same way, then by another; nobody reads what did not come as it was."""
    monkeypatch.setattr("pshare_jax.core.arrivals.TRANSFER_SECONDS", 0.3)
    cluster.link.accept_faults.extend([fault] * 6)
    if fault == "refused":
        cluster.link.offer_faults.extend(["refused", "lost"] * 3)
    check(ask(cluster.frontends, 11, 20))

    def failed() -> int:
        stats = cluster.frontends[0].engine.stats()
        return sum(stats.failed_transfers.values())

    if fault != "late":
        wait_until(lambda: failed() >= 6)


def test_a_rolling_restart_fails_nothing(cluster: Cluster) -> None:
    replies: list[Reply] = []
    for number, name in enumerate(("prefill0", "decode0", "prefill1", "decode1")):
        replies += ask(cluster.frontends, 400 + number, 30, 40)
        host = cluster.hosts[name]
        assert host.drain(), "what ran there has ended"
        assert not host.worker.core.held_ids() or host.worker.covers
        host.stop()
        cluster.again(name)
        cluster.linked()
    check(replies)


def test_requests_wait_for_a_worker_to_come() -> None:
    with symbolic_cluster(prefill=1, decode=1, frontends=1, patience_seconds=60.0) as cluster:
        frontend = cluster.frontends[0]
        for name in ("decode0", "prefill0"):
            cluster.hosts[name].kill()
            wait_until(lambda: frontend.engine.failed_workers)
            replies = ask([frontend], 12, 5)
            gone = frontend.submit("full", [1, 2, 3])
            frontend.engine.abort(gone.request.id)
            assert gone.wait().reason is FinishReason.ABORT
            cluster.again(name)
            check(replies)
        cluster.check_idle()


def test_who_has_waited_in_vain_is_told_why() -> None:
    with symbolic_cluster(prefill=1, decode=1, frontends=1, patience_seconds=0.2) as cluster:
        cluster.hosts["decode0"].kill()
        wait_until(lambda: cluster.frontends[0].engine.failed_workers)
        reply = cluster.frontends[0].submit("full", [1, 2, 3]).wait()
        assert reply.reason is FinishReason.ERROR
        assert "no worker of model full has come (decode0:" in (reply.error or "")
        assert cluster.frontends[0].engine.dead is None


def test_a_model_is_generated_for_where_it_is_hosted() -> None:
    with symbolic_cluster(decode=0, frontends=0) as cluster:
        cluster.host("decode0", hosts=("identity",))
        cluster.host("decode1", hosts=("full", "tail3"))
        frontend = cluster.frontend()
        for name, host in (("identity", "decode0"), ("full", "decode1"), ("tail3", "decode1")):
            worker = cluster.hosts[host].worker
            before = worker.core.stats.generation_tokens[name]
            check([frontend.submit(name, [1, 2, 3, 4, 5, 6], 5)])
            assert worker.core.stats.generation_tokens[name] == before + 5


def test_two_of_one_name_are_one_too_many() -> None:
    with symbolic_cluster(decode=1, prefill=1, frontends=0) as cluster:
        first = cluster.hosts.pop("decode0")
        twin = cluster.host("decode0")
        cluster.hosts["twin"] = first
        frontend = cluster.frontend()
        wait_until(lambda: "it calls itself decode0" in str(frontend.engine.failed_workers))
        check([frontend.submit("full", [1, 2, 3])])
        used = [h.worker.core.stats.generation_tokens["full"] for h in (first, twin)]
        assert sorted(used) == [0, 8]


def test_pages_of_another_dtype_are_refused_before_any_is_sent() -> None:
    with symbolic_cluster(decode=1, prefill=1, frontends=0) as cluster:
        frontend = cluster.frontend()
        other = cluster.host("decode1", dtype="float64")
        # Whichever comes first, those of another kind do not go with it.
        late = cluster.frontend(wait=False)
        why = "its pages are (float64|int64), those of .* are (int64|float64)"
        wait_until(lambda: re.search(why, str(late.engine.failed_workers)))
        check(ask([frontend], 17, 6))
        cluster.hosts.pop("decode1")
        other.stop()


def test_a_frontend_waits_until_it_can_serve_everything() -> None:
    with symbolic_cluster(prefill=1, decode=0, frontends=0) as cluster:
        cluster.host("decode0", hosts=("identity", "full"))
        cluster.host("decode1", hosts=("tail3",))
        cluster.hosts["decode1"].kill()
        frontend = cluster.frontend(wait=False)
        wait_until(lambda: len(frontend.engine._hosts["full"]) == 1)
        assert not frontend.engine.ready
        port = cluster.hosts.pop("decode1").port
        cluster.host("decode1", port, hosts=("tail3",))
        wait_until(lambda: frontend.engine.ready)
        check(ask([frontend], 13, 6))


def test_counters_do_not_fall_when_a_worker_dies(cluster: Cluster) -> None:
    frontend = cluster.frontends[0]
    check(ask([frontend], 14, 9, 10))
    wait_until(lambda: counters(frontend) == {"identity": 30, "full": 30, "tail3": 30})
    for name in ("decode0", "decode1"):
        cluster.hosts[name].kill()
        cluster.again(name)
    cluster.linked()
    check(ask([frontend], 15, 3, 10))
    wait_until(lambda: counters(frontend) == {"identity": 40, "full": 40, "tail3": 40})


def test_a_worker_whose_work_takes_long_is_not_lost() -> None:
    """Its beats say how long it may be silent."""
    with symbolic_cluster(prefill=1, decode=1, frontends=1, lost_seconds=0.5) as cluster:
        frontend, host = cluster.frontends[0], cluster.hosts["decode0"]
        host.thread.longest_seconds = 20.0
        link = frontend.engine._links._links[1]
        wait_until(lambda: link.last is not None and link.last.longest_seconds == 20.0)
        welcome = link.welcome
        host.hang()
        time.sleep(1.5)
        host.go_on()
        check([frontend.submit("full", [1, 2, 3])])
        assert link.welcome is welcome


def test_frontends_hear_what_others_have_sent(cluster: Cluster) -> None:
    """They do not know of each other, but workers say it; their own is not in it."""
    first, second = cluster.frontends
    busy = ask([first], 16, 30, 80)
    mine, theirs = (f.engine._dispatcher._router for f in (first, second))
    wait_until(lambda: any(worker.others for worker in theirs._decode.values()))
    assert not any(worker.others for worker in mine._decode.values())
    check(busy)
    for workers in (theirs._decode, theirs._prefill):
        wait_until(lambda workers=workers: not any(w.others for w in workers.values()))


def test_what_is_of_no_sequence_is_told_to_all(cluster: Cluster) -> None:
    host = cluster.hosts["prefill0"]
    changed = m.StoreChanged([b"key"], [])
    host.thread.call(lambda: host.station.send(host.name, m.DISPATCHER, changed))
    for frontend in cluster.frontends:
        router = frontend.engine._dispatcher._router
        wait_until(lambda router=router: b"key" in router._stored)


def test_a_frontend_says_when_a_side_is_lacking() -> None:
    """Probes then send clients elsewhere; those that come all the same wait."""
    with symbolic_cluster(prefill=2, decode=1, frontends=1) as cluster:
        frontend = cluster.frontends[0]
        assert frontend.engine.lacking == ""
        cluster.hosts["prefill1"].kill()
        wait_until(lambda: frontend.engine.failed_workers)
        assert frontend.engine.lacking == "", "one of two is enough"
        for name, lacking in (("prefill0", "cover prompts"), ("decode0", "generate for identity")):
            cluster.hosts[name].kill()
            wait_until(lambda lacking=lacking: frontend.engine.lacking == lacking)
            assert frontend.engine.ready
            replies = ask([frontend], 18, 3)
            cluster.again(name)
            check(replies)
            wait_until(lambda: frontend.engine.lacking == "")
        cluster.again("prefill1")
        cluster.check_idle()


def test_two_frontends_of_one_incarnation_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gets what is the other one's; the second is refused until the first has gone."""
    monkeypatch.setattr(wire, "new_incarnation", lambda: 12345)
    with symbolic_cluster(prefill=1, decode=1, frontends=1) as cluster:
        first = cluster.frontends[0]
        second = cluster.frontend(wait=False)
        wait_until(lambda: "has the incarnation 12345" in str(second.engine.failed_workers))
        check(ask([first], 19, 20))
        assert not second.engine.ready
        first.die()
        wait_until(lambda: second.engine.ready)
        check(ask([second], 20, 20))
        cluster.linked(1)
        cluster.frontends.remove(first)
        cluster.check_idle()
        first.stop()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fingerprint": "other"}, "fingerprint is base-print at the frontend and other at the"),
        ({"max_model_len": 64}, "max_model_len is 128 at the frontend and 64 at the worker"),
        ({"models": {"identity": "0" * 16}}, "model 'identity' is .* at the frontend and 0000"),
    ],
)
def test_a_worker_comes_again_as_another(
    cluster: Cluster, change: dict[str, Any], why: str
) -> None:
    """It is refused by name, and what it had goes on elsewhere; as itself it is taken back."""
    replies = ask(cluster.frontends, 21, 20)
    replies[0].next_event()
    cluster.hosts["prefill0"].kill()
    check(replies)
    port = cluster.hosts.pop("prefill0").port
    other = cluster.host("prefill0", port, change=change)
    for frontend in cluster.frontends:
        wait_until(lambda f=frontend: re.search(why, str(f.engine.failed_workers)))
    check(ask(cluster.frontends, 22, 10))
    assert other.worker.cache.num_indexed == 0
    other.kill()
    cluster.again("prefill0")
    cluster.linked()
    check(ask(cluster.frontends, 23, 30))


def test_who_would_borrow_from_one_that_is_not_here_is_told_at_once(cluster: Cluster) -> None:
    host, frontend = cluster.hosts["prefill0"], cluster.frontends[0]
    heard: list[m.Message] = []
    plain = host.worker.receive
    host.worker.receive = lambda message: (heard.append(message), plain(message))
    wanted = m.Lend("prefill0", 7, next(frontend.engine._dispatcher._ids), [b"key"], (1, 2, 3, 4))
    host.thread.call(lambda: host.station.send("prefill0", "decode9", wanted))
    wait_until(lambda: m.NotOffered(7, "decode9 is not here", wanted.id) in heard)
