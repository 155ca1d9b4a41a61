"""Workers that come and go while requests are on their way."""

from __future__ import annotations

import itertools

from pshare_jax.core import messages as m
from pshare_jax.core.dispatcher import Dispatcher
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.requests import FinishReason, PromptUsage, Request
from pshare_jax.core.router import Router, WorkerInfo
from pshare_jax.core.split_rule import LAST_TOKEN

SPEC = ModelSpec("a", "identity", "shared", LAST_TOKEN, "base", "print", "base", decode_workers=())


def dispatcher(**options) -> Dispatcher:
    return Dispatcher({"a": SPEC}, Router([], []), 4, **options)


def submit(core: Dispatcher, id: str = "r") -> None:
    core.submit(Request(id, "a", (1, 2, 3, 4, 5)), order=0, seed=0, end_token_ids=frozenset())


def add(core: Dispatcher, *names: str, models=("a",)) -> None:
    for name in names:
        info = WorkerInfo(name, 100, 4)
        prefill = name.startswith("prefill")
        core.add_worker(info, prefill=prefill, models=() if prefill else models)


def sent(core: Dispatcher) -> list[tuple[str, str]]:
    outbox, core.outbox = core.outbox, []
    return [(to, type(message).__name__) for to, message in outbox]


def test_requests_wait_for_the_workers_that_they_need() -> None:
    core = dispatcher(patience=10.0)
    submit(core)
    add(core, "prefill0")
    assert sent(core) == []
    add(core, "decode0", models=("other",))
    assert sent(core) == []
    add(core, "decode1")
    assert sent(core) == [("prefill0", "Prefill")]
    assert core.needs("prefill0")
    assert core.needs("decode1")
    assert not core.needs("decode0")


def test_who_waits_too_long_is_told_so() -> None:
    core = dispatcher(patience=10.0)
    add(core, "prefill0", "decode0")
    core.lose_worker("decode0", "killed")
    submit(core)
    core.tick(100.0)
    core.tick(109.0)
    add(core, "prefill1")
    core.tick(109.9)
    assert core.outputs == []
    core.tick(110.0)
    (output,) = core.outputs
    assert output.finish_reason is FinishReason.ERROR
    assert output.error == "no worker of model a has come (decode0: killed)"
    assert core.num_live == 0
    add(core, "decode0")
    assert sent(core) == []


def test_without_patience_nobody_waits() -> None:
    core = dispatcher()
    submit(core)
    assert core.outputs[0].error == "no decode worker of model a is alive ()"


def test_a_request_that_waits_can_be_aborted() -> None:
    core = dispatcher(patience=10.0)
    submit(core)
    core.abort("r")
    assert [output.finish_reason for output in core.outputs] == [FinishReason.ABORT]
    add(core, "prefill0", "decode0")
    assert sent(core) == []


def test_a_worker_that_wants_to_go_gets_nothing_more() -> None:
    core = dispatcher(patience=10.0)
    add(core, "prefill0", "decode0")
    submit(core, "first")
    ((_, prefill),) = core.outbox
    assert isinstance(prefill, m.Prefill)
    id = prefill.sequence.id
    sent(core)
    core.drain_worker("prefill0")
    submit(core, "second")
    assert sent(core) == []
    assert core.needs("prefill0")
    core.receive("decode0", m.Started(id, PromptUsage(5, 4, 0, 0)))
    assert not core.needs("prefill0")
    assert core.running() == {"a": 1}
    core.lose_worker("prefill0", "it has gone")
    assert sent(core) == []
    add(core, "prefill0")
    assert sent(core) == [("prefill0", "Prefill")]


def test_what_the_dead_say_is_nobody_s() -> None:
    """The same name, another process: attempts have ids of their own."""
    core = dispatcher(patience=10.0, ids=itertools.count(40))
    add(core, "prefill0", "decode0")
    submit(core)
    sent(core)
    assert core.is_current(40)
    core.lose_worker("decode0", "killed")
    assert not core.is_current(40)
    add(core, "decode0")
    abort, release, (_, prefill) = core.outbox
    assert (abort, release) == (("prefill0", m.Abort(40)), ("prefill0", m.Release(40)))
    assert isinstance(prefill, m.Prefill)
    core.receive("decode0", m.Tokens(40, (9,)))
    assert core.outputs == []
    core.receive("decode0", m.Tokens(prefill.sequence.id, (8,)))
    assert [output.token_ids for output in core.outputs] == [(8,)]


def test_attempts_may_be_lost_as_often_as_is_said() -> None:
    core = dispatcher(patience=10.0, max_lost=4)
    add(core, "prefill0", "decode0")
    submit(core)
    for _ in range(3):
        core.lose_worker("decode0", "killed")
        add(core, "decode0")
    assert core.outputs == []
    core.lose_worker("decode0", "killed")
    assert core.outputs[0].error == "tried 4 times; decode0: killed"


def test_pairs_and_others_do_not_mix() -> None:
    """A decode worker of a pair gets only what was covered in its pool."""
    core = dispatcher(patience=10.0)
    core.add_worker(WorkerInfo("prefill.x", 100, 4, "decode.x"), prefill=True)
    core.add_worker(WorkerInfo("prefill0", 100, 4), prefill=True)
    core.add_worker(WorkerInfo("decode.x", 100, 4, "prefill.x"), prefill=False, models=("a",))
    for i in range(4):
        submit(core, f"r{i}")
    assert {to for to, _ in sent(core)} == {"prefill.x"}
    add(core, "decode0")
    core.lose_worker("prefill.x", "killed")
    outbox, core.outbox = core.outbox, []
    routed = [message.sequence for _, message in outbox if isinstance(message, m.Prefill)]
    assert {(s.prefill_worker, s.decode_worker) for s in routed} == {("prefill0", "decode0")}


def test_what_others_have_sent_counts() -> None:
    core = dispatcher(patience=10.0)
    add(core, "prefill0", "prefill1", "decode0", "decode1")
    core.note_others("prefill0", 50)
    core.note_others("decode1", 50)
    core.note_others("gone", 1)
    submit(core)
    ((to, prefill),) = core.outbox
    assert isinstance(prefill, m.Prefill)
    assert (to, prefill.sequence.decode_worker) == ("prefill1", "decode0")
