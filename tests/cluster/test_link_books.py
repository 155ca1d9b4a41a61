"""What a frontend remembers of its links: whose word counts, and what those have done that died."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from pshare_jax.cluster import wire
from pshare_jax.cluster.link import Link, LinkTimes
from pshare_jax.cluster.links import Links
from pshare_jax.core import messages as m
from pshare_jax.core.messages import DISPATCHER, Message
from pshare_jax.core.requests import PromptUsage
from pshare_jax.core.router import WorkerInfo
from pshare_jax.core.stats import EngineStats, TierStats, together
from tests.cluster.symbolic import Frontend, serve_config
from tests.core.sequences import make_sequence

OF_NOW = {"running", "waiting", "pools", "working", "moved_rows"}
"""What ends with a process; rows do not move with their KV between processes."""

OF_FRONTENDS = {"prompt_tokens", "finished"}


class Books:
    """Links to two addresses, of which a test says what is heard; nothing is connected."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Message]] = []
        self.lost: list[str] = []
        hello = wire.Hello(wire.PROTOCOL, 1, wire.Shape("", 1, (1, 1, 1, 1), "", {}))
        self.links = Links(
            ["127.0.0.1:1", "127.0.0.1:2"],
            hello,
            "",
            None,
            LinkTimes(),
            on_join=lambda part: None,
            on_message=lambda worker, message: self.heard.append((worker, message)),
            on_load=lambda worker, load: None,
            on_drain=lambda worker: None,
            on_lost=lambda worker, reason: self.lost.append(worker),
            may_pass=lambda worker, message: True,
            on_modules=lambda frame: None,
            each_beat=lambda: None,
        )
        self.sent: dict[str, list[wire.Frame]] = {}
        for link in self.links._links:
            link.send = self.sent.setdefault(link.address, []).append  # type: ignore[method-assign]

    def join(self, number: int, name: str, incarnation: str = "first") -> Link:
        """A process with one worker comes at an address."""
        link = self.links._links[number]
        part = wire.Part(WorkerInfo(name, 9, 4), "decode")
        link.welcome = wire.Welcome(incarnation, [part], "float32")
        self.links._joined(link)
        return link

    def beat(self, link: Link, stats: EngineStats) -> None:
        link.last = wire.Beat(stats, 0.0, {})

    def lose(self, link: Link) -> None:
        self.links._lost(link, "gone")
        link.welcome, link.last = None, None

    def stats(self) -> EngineStats:
        return together(self.links.stats())


@pytest.fixture
def books() -> Iterator[Books]:
    books = Books()
    yield books
    books.links._loop.close()


def test_only_the_link_of_a_worker_speaks_for_it(books: Books) -> None:
    """Its name may have gone to another process since."""
    first, second = books.join(0, "decode0"), books.join(1, "decode1")
    said = wire.Carry("decode0", DISPATCHER, m.Pending(3, 0))
    books.links._heard(second, said)
    assert books.heard == []
    books.links._heard(first, said)
    assert books.heard == [("decode0", m.Pending(3, 0))]
    books.links._heard(second, wire.Carry("decode0", "decode1", m.Release(3)))
    assert books.sent == {first.address: [], second.address: []}
    books.links._heard(first, wire.Carry("decode0", "decode1", m.Release(3)))
    assert books.sent[second.address] == [wire.Carry("decode0", "decode1", m.Release(3))]


def test_with_a_link_its_own_workers_are_lost_and_no_others(books: Books) -> None:
    first, second = books.join(0, "decode0"), books.join(1, "decode1")
    books.lose(first)
    assert books.lost == ["decode0"]
    books.links._heard(first, wire.Carry("decode0", DISPATCHER, m.Pending(3, 0)))
    assert books.heard == [], "what is still on its way is nobody's"
    books.links.send(DISPATCHER, "decode0", m.Abort(3))
    books.links.send(DISPATCHER, "decode1", m.Abort(3))
    assert books.sent == {
        first.address: [],
        second.address: [wire.Carry(DISPATCHER, "decode1", m.Abort(3))],
    }
    books.join(0, "decode0", "second")
    books.links.send(DISPATCHER, "decode0", m.Abort(4))
    assert books.sent[first.address] == [wire.Carry(DISPATCHER, "decode0", m.Abort(4))]


def test_what_one_has_done_who_was_lost_and_came_again_counts_once(books: Books) -> None:
    link = books.join(0, "decode0")
    books.beat(link, EngineStats(generation_tokens={"lora": 5}))
    books.lose(link)
    assert books.stats().generation_tokens == {"lora": 5}
    # It was cut off, and has gone on meanwhile.
    link = books.join(0, "decode0")
    books.beat(link, EngineStats(generation_tokens={"lora": 7}))
    assert books.stats().generation_tokens == {"lora": 7}
    books.lose(link)
    # Another process has the name now, and has begun anew.
    link = books.join(0, "decode0", "second")
    books.beat(link, EngineStats(generation_tokens={"lora": 2}))
    assert books.stats().generation_tokens == {"lora": 9}


def some(field: str) -> Any:
    """What a counter of that name might have come to."""
    match field:
        case "compiles":
            return 3
        case "store":
            return {"prefill0": {"looks": 2}}
        case "tiers":
            return {"disk": TierStats({}, 1, 2, {"gone": 3}, {}, 4, 5, 6, 0.5, 0.5, 0, 0)}
        case _:
            return {field: 5}


def test_no_counter_falls_when_a_process_dies(books: Books) -> None:
    """All that are shown of it but what is of the moment; one that is new has to be kept, too."""
    counters = {field.name for field in dataclasses.fields(EngineStats)} - OF_NOW - OF_FRONTENDS
    done = EngineStats(**{name: some(name) for name in counters})
    link = books.join(0, "decode0")
    books.beat(link, done)
    books.lose(link)
    after = books.stats()
    assert {n: getattr(after, n) for n in counters} == {n: getattr(done, n) for n in counters}


def test_a_prompt_that_is_covered_for_nobody_goes_to_no_decode_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its request has gone on with another attempt, or has ended; who holds it is told."""
    engine, sent = Frontend(serve_config()).engine, []
    monkeypatch.setattr(engine._links, "send", lambda *said: sent.append(said))
    covered = m.Covered(make_sequence(7, [1, 2, 3], page_size=4), PromptUsage(3, 2, 0, 0))
    assert not engine._may_pass("prefill0", covered)
    assert sent == [(DISPATCHER, "prefill0", m.Release(7))]
    monkeypatch.setattr(engine._dispatcher, "is_current", lambda id: id == 7)
    assert engine._may_pass("prefill0", covered)
    assert len(sent) == 1
    engine._links._loop.close()
