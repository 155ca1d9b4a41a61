"""The cores under random arrivals, aborts, failures and orders of events; and the stories in it.

After each step every page is free, referenced or indexed, and every page that somebody waits for
has one who brings it. Whatever happened, in the end each request has ended once, with the oracle's
tokens, each delivered once, or because it was aborted, or with an error; and nothing is held.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pshare_jax.core import store_runs
from pshare_jax.core.arrivals import TRANSFER_SECONDS
from pshare_jax.core.requests import Owner, Session
from tests.core.scripted import MAX_TTL, Host
from tests.core.setting import Setting

EXAMPLES = int(os.environ.get("STATE_MACHINE_EXAMPLES", "0"))
"""Of each setting, other ones each time, as `make attack` has them; 0: few, and always the same."""

LONGEST = 32
"""Tokens of a prompt and its reply together; each pool holds one such sequence."""

CROWD = 24
"""Requests that may be alive when others come: a pool holds few, and the rest of a crowd waits."""

MODELS = ["identity", "lora", "alora", "full", "isolated"]

SETTINGS = {
    "one of each": Setting(),
    "tiny pools": Setting(prefill_pages=9, decode_pages=9, steps_per_dispatch=2),
    "tiny decode pool, far ahead": Setting(decode_pages=11, steps_ahead=2),
    "nothing ahead": Setting(prefill_pages=12, decode_pages=12, steps_ahead=0),
    "several": Setting(prefill=2, decode=2, prefill_pages=12, decode_pages=12),
    "many": Setting(prefill=3, decode=2, decode_pages=14, steps_per_dispatch=3, steps_ahead=2),
    "one pool": Setting(one_pool=True, decode_pages=20, steps_per_dispatch=2),
    "tiny pool for both": Setting(one_pool=True, decode_pages=10),
    "tiny pool for both, far ahead": Setting(
        one_pool=True, decode_pages=12, steps_ahead=2, steps_per_dispatch=3, max_num_seqs=3
    ),
    "two pools for both": Setting(one_pool=True, decode=2, decode_pages=14, steps_ahead=0),
    "a store": Setting(prefill_pages=12, store=True),
    "a store for several, tiny pools": Setting(
        prefill=2, decode=2, prefill_pages=9, decode_pages=12, store=True
    ),
    "a store and one pool": Setting(one_pool=True, decode_pages=13, store=True),
    "a store that is read ahead": Setting(prefill_pages=11, store=True, prefetched=3),
    "a store that is read ahead, one pool": Setting(
        one_pool=True, decode_pages=15, store=True, prefetched=4
    ),
    "meshes for either, tiny pools": Setting(
        either=True, prefill=2, decode=2, decode_pages=11, steps_per_dispatch=2, steps_ahead=2
    ),
    "meshes for either and a store": Setting(
        either=True, prefill=1, decode=2, decode_pages=15, store=True, prefetched=3, balanced=10
    ),
    "pages are lent": Setting(prefill=2, decode=2, prefill_pages=9, decode_pages=40, lends=True),
    "pages are lent, a store": Setting(
        prefill=3, decode=2, prefill_pages=9, decode_pages=20, store=True, lends=True
    ),
    "pages are offered unasked": Setting(decode_pages=12, unasked=True),
    "pages are offered unasked, several": Setting(
        prefill=2, decode=2, prefill_pages=12, decode_pages=14, lends=True, unasked=True
    ),
    "pages are offered unasked, a store": Setting(
        prefill_pages=9, decode_pages=9, store=True, steps_ahead=2, unasked=True
    ),
    "replies ahead, tiny pools": Setting(
        reply_ahead=True, prefill_pages=9, decode_pages=9, pinned_share=1.0
    ),
    "replies ahead, several": Setting(
        reply_ahead=True,
        prefill=2,
        decode=2,
        streaming_step=2,
        prefill_pages=12,
        decode_pages=12,
        pinned_share=0.2,
        chunk_buckets=(3, 8),
    ),
    "replies ahead, tiny pool for both": Setting(
        reply_ahead=True, one_pool=True, decode_pages=11, pinned_share=0.7
    ),
}

SESSIONS = [
    Session(),
    Session("a"),
    Session("a", 1.0),
    Session("b", MAX_TTL, ("full", "isolated")),
    Session("", 10 * MAX_TTL, ("lora",)),
]


T = TypeVar("T")


def combined(*factors: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of each, by a single choice of Hypothesis: those are most of what a step costs."""
    return st.sampled_from(list(itertools.product(*factors)))


def runs(values: Sequence[T], shortest: int, longest: int) -> st.SearchStrategy[tuple[T, ...]]:
    """Values in a row, each length as often, by a single choice."""
    return st.sampled_from(
        [
            run
            for length in range(shortest, longest + 1)
            for run in itertools.product(values, repeat=length)
            for _ in range(len(values) ** (longest - length))
        ]
    )


def one_of(of: Sequence[T], which: int) -> T:
    """The one that `WHICH` stands for of what there is at this moment."""
    return of[which % len(of)]


WHICH = st.integers(0, 2**20 - 1)
PROMPTS = st.builds(
    lambda length, bits: [bits >> i & 1 for i in range(length)],
    st.sampled_from([*range(1, 9), *range(1, 9), 10, 12, 14, 16, 20, 24]),
    st.integers(0, 2**24 - 1),
)
MODEL_RUNS = runs(MODELS, 1, 3)
TURNS = runs([0, 1, 7], 0, 6)
SAMPLED = combined(range(1, 9), range(17))
"""Tokens that are asked for, and after how many of them the end comes."""
OWNERS = combined(["", "a", "b"], [0.1, 1.0, 3.0], ["", "many", "few"], [0, 1, -1]).map(
    lambda owner: Owner(*owner)
)
"""Clients, which change their weights as they go, and requests of many sequences."""


class Machine(RuleBasedStateMachine):
    """Random actions; prompts are of few different tokens and go on from earlier ones."""

    setting = Setting()

    @initialize()
    def start(self) -> None:
        self.host = Host(self.setting)

    def _submit(
        self,
        prompt: Sequence[int],
        model: str,
        count: int,
        end: int,
        salted: int,
        owner: Owner,
        session: Session,
    ) -> None:
        self.host.submit(
            model,
            prompt[: LONGEST - count],
            count,
            salt="tenant" if salted == 0 else "",
            end_after=end if end < count else None,
            logprobs=1 if end % 2 else None,
            grammar=end % 3 == 0,
            owner=owner,
            session=session,
            goes_on=end != 3,
        )

    @precondition(lambda self: len(self.host.live) <= CROWD)
    @rule(
        prompt=PROMPTS,
        models=MODEL_RUNS,
        sampled=SAMPLED,
        of=combined(range(4), [1, 1, 1, 5], SESSIONS),
        owner=OWNERS,
    )
    def ask(
        self,
        prompt: list[int],
        models: tuple[str, ...],
        sampled: tuple[int, int],
        of: tuple[int, int, Session],
        owner: Owner,
    ) -> None:
        salted, samples, session = of
        for model in models * samples:
            self._submit(prompt, model, *sampled, salted, owner, session)

    @precondition(lambda self: self.host.replies and len(self.host.live) <= CROWD)
    @rule(
        before=WHICH,
        more=TURNS,
        of=combined(range(10), MODELS, SESSIONS),
        sampled=SAMPLED,
        owner=OWNERS,
    )
    def go_on(
        self,
        before: int,
        more: tuple[int, ...],
        of: tuple[int, str, Session],
        sampled: tuple[int, int],
        owner: Owner,
    ) -> None:
        """A session's next turn, or one that branches off."""
        cut, model, session = of
        reply = one_of([*self.host.replies.values()], before)
        known = [*reply.request.prompt_token_ids, *reply.tokens]
        known = known[: max(len(known) - cut, 1)]
        self._submit([*known, *more], model, *sampled, 1, owner, session)

    @precondition(lambda self: self.host.live)
    @rule(which=WHICH, complete=st.booleans())
    def abort(self, which: int, complete: bool) -> None:
        self.host.abort(one_of(self.host.live, which), complete=complete)

    @precondition(lambda self: self.host.pending)
    @rule(which=WHICH, count=st.integers(1, 4))
    def deliver(self, which: int, count: int) -> None:
        for _ in range(count):
            if pairs := self.host.pending:
                self.host.deliver(*one_of(pairs, which))
                which //= len(pairs)

    @precondition(lambda self: self.host.alive)
    @rule(which=WHICH, count=st.integers(1, 4))
    def work(self, which: int, count: int) -> None:
        name = one_of(self.host.alive, which)
        for _ in range(count):
            self.host.work(name)

    @precondition(lambda self: self.setting.reply_ahead and self.host.alive)
    @rule(count=st.integers(1, 4))
    def work_ahead(self, count: int) -> None:
        for name in self.host.alive:
            for _ in range(count):
                self.host.work_ahead(name)

    @precondition(lambda self: self.setting.either and self.host.alive)
    @rule(which=WHICH)
    def give_mesh(self, which: int) -> None:
        self.host.give_mesh(one_of(self.host.alive, which))

    @rule(count=st.integers(1, 4))
    def everybody(self, count: int) -> None:
        for _ in range(count):
            self.host.round()

    @rule(seconds=st.sampled_from([0.5, TRANSFER_SECONDS, MAX_TTL]))
    def wait(self, seconds: float) -> None:
        self.host.now += seconds

    @rule(faults=runs(["", "refused", "lost"], 1, 3))
    def spoil_offers(self, faults: tuple[str, ...]) -> None:
        self.host.link.offer_faults.extend(faults)

    @rule(faults=runs(["", "refused", "late", "never", "corrupt"], 1, 3))
    def spoil_transfers(self, faults: tuple[str, ...]) -> None:
        self.host.link.accept_faults.extend(faults)

    @precondition(lambda self: self.setting.store)
    @rule(faults=runs(["", "lost", "failed", "refused", "forgotten"], 1, 3))
    def spoil_store(self, faults: tuple[str, ...]) -> None:
        self.host.store.faults.extend(faults)

    @rule(which=WHICH, count=st.integers(1, 3))
    def spoil_chunks(self, which: int, count: int) -> None:
        name = one_of([*self.host.prefill], which)
        self.host.prefill[name].executor.failures += count

    @precondition(lambda self: len(self.host.replies) > 3 and self.host.alive)
    @rule(which=WHICH, really=st.integers(0, 3))
    def kill(self, which: int, really: int) -> None:
        if really == 0:
            self.host.kill(one_of(self.host.alive, which))

    @invariant()
    def nothing_is_lost_on_the_way(self) -> None:
        if hasattr(self, "host"):
            self.host.check()

    def teardown(self) -> None:
        if hasattr(self, "host"):
            self.host.drain(leap=TRANSFER_SECONDS)


PIECES = {
    "a store": SETTINGS["a store"],
    "two pools for both and a store": Setting(
        one_pool=True, decode=2, decode_pages=14, store=True, chunk_buckets=(4, 8)
    ),
}
"""Where runs of pages come in several pieces, of one page each, of which some fail."""


def machine(name: str, setting: Setting) -> type[Machine]:
    """By its name Hypothesis gives each setting actions of its own."""
    return type(f"Machine of {name}", (Machine,), {"setting": setting})


@pytest.mark.parametrize("name", SETTINGS)
def test_whatever_happens_every_request_ends_once_and_nothing_is_held(name: str) -> None:
    run_machine(name, SETTINGS[name])


@pytest.mark.parametrize("name", PIECES)
def test_runs_may_come_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_runs, "PIECE_PAGES", 1)
    run_machine(f"{name} in pieces", PIECES[name])


def run_machine(name: str, setting: Setting) -> None:
    run_state_machine_as_test(
        machine(name, setting),
        settings=settings(
            max_examples=EXAMPLES or 30,
            stateful_step_count=80,
            deadline=None,
            derandomize=not EXAMPLES,
            suppress_health_check=list(HealthCheck),
        ),
    )
