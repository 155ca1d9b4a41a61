"""Routers that know things late find nearly all that one finds that knows everything."""

from __future__ import annotations

import json

import pytest

from pshare_jax.bench.fleet.command import RoutersOptions, SessionOptions, lines, run, simulate
from pshare_jax.bench.fleet.engines import EngineOptions, Pool, PrefillEngine
from pshare_jax.bench.fleet.system import FleetOptions
from pshare_jax.bench.plan.clock import Clock
from pshare_jax.core import messages as m
from pshare_jax.core.router import WorkerInfo
from tests.core.sequences import make_sequence

SESSIONS = SessionOptions(
    seconds=2.0, per_second=60.0, system_tokens=2048, turns=4, turn_tokens=1024
)
ENGINE = EngineOptions()


def options(**fleet) -> RoutersOptions:
    return RoutersOptions(fleet=FleetOptions(engine=ENGINE, **fleet), sessions=SESSIONS)


def calls() -> int:
    """Requests of all sessions, which are the same whatever routes them."""
    return simulate(options(failures_per_minute=0.0), 0)["requests"]


@pytest.fixture(scope="module")
def found() -> dict:
    return run(options())


def test_four_routers_of_a_thousand_engines_find_what_could_be_found(found) -> None:
    fleet = found["options"]["fleet"]
    assert fleet["prefill"] + fleet["decode"] == 1000
    assert (fleet["beat_seconds"], fleet["failures_per_minute"]) == (0.25, 0.01)
    assert found["options"]["routers"] == 4
    assert found["of_all_knowing"] >= 0.95
    assert found["routers"]["hit_ratio"] > 0.85


def test_every_request_is_answered(found) -> None:
    for name in ("routers", "all_knowing"):
        assert found[name]["errors"] == []
        assert found[name]["requests"] == calls()


def test_engines_that_fail_all_the_time_cost_time_but_no_request() -> None:
    hurt = simulate(options(failures_per_minute=0.5), 4)
    assert hurt["failures"] > 20
    assert hurt["errors"] == []
    assert hurt["requests"] == calls()
    assert hurt["hit_ratio"] > 0.8


def test_figures_are_plain_and_told(found) -> None:
    json.dumps(found)
    first, second, last = lines(found)
    assert first.startswith(f"4 routers: {found['routers']['requests']} requests, ")
    assert second.startswith("one that knows all: ")
    assert last.startswith("400 prefill and 600 decode engines, beats of 250 ms, 1.0% failing")


def test_a_pool_gives_up_the_ends_of_what_was_used_least_recently() -> None:
    pool = Pool(3)
    pool.use([b"a", b"b"])
    assert list(pool.added) == [b"b", b"a"]
    pool.added.clear()
    pool.use([b"c", b"d"])
    assert pool.run([b"a", b"b"]) == 1
    assert (set(pool.added), set(pool.removed)) == ({b"c", b"d"}, {b"b"})
    pool.use([b"a", b"b"])
    assert pool.run([b"c", b"d"]) == 1
    # What has come and gone, or gone and come, before anybody looked is not told.
    assert (set(pool.added), set(pool.removed)) == ({b"c"}, set())


def test_an_engine_says_what_its_index_holds() -> None:
    said: list[tuple[str, str, m.Message]] = []
    clock = Clock()
    engine = PrefillEngine(
        WorkerInfo("prefill0", 10, 4),
        clock,
        ENGINE,
        lambda *message: said.append(message),
        lambda engine: None,
    )
    sequence = make_sequence(3, list(range(9)), page_size=4)
    engine.receive("router0", m.Prefill(sequence))
    clock.run()
    assert [type(message).__name__ for _, _, message in said] == ["Pending", "Pending", "Covered"]
    change = engine.change()
    assert change is not None
    assert sorted(change.added) == sorted(sequence.keys)
    engine.receive("router0", m.IndexWanted())
    _, to, snapshot = said[-1]
    assert to == "router0"
    assert isinstance(snapshot, m.IndexSnapshot)
    assert (sorted(snapshot.keys), snapshot.number) == (sorted(sequence.keys), 1)
    engine.fail()
    engine.restart()
    assert (engine.incarnation, engine.change()) == (2, None)
