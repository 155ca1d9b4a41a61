"""The cores do the same whether parts share objects or bytes."""

from __future__ import annotations

import dataclasses

import pytest

from tests.core.scripted import Host
from tests.core.setting import INVOKED_BY, Setting

SETTINGS = {
    "one of each": Setting(),
    "several workers": Setting(prefill=2, decode=2, steps_per_dispatch=2),
    "offered unasked": Setting(prefill=2, unasked=True),
    "one pool": Setting(one_pool=True, decode_pages=14),
    "preemptions": Setting(decode_pages=10, steps_ahead=2),
}


def session(setting: Setting) -> list[tuple[object, ...]]:
    """Three turns of a task that asks every model; one request is aborted."""
    host = Host(setting)
    context = [1, 2, 3, 4, 5, *INVOKED_BY, 6]
    for turn in range(3):
        replies = [host.submit(model, context, 5, logprobs=1) for model in host.models]
        if turn == 1:
            host.round()
            host.abort(replies[1])
        for _ in range(200):
            host.round()
        context = [*context, *replies[0].tokens]
    host.drain()
    return [(r.tokens, r.logprobs, r.usage, r.reason) for r in host.replies.values()]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_session_through_the_wire_is_the_session_without(name: str) -> None:
    setting = SETTINGS[name]
    sent = session(setting)
    assert sent == session(dataclasses.replace(setting, wire=False))
    assert sum(len(tokens) for tokens, *_ in sent) > 60  # type: ignore[arg-type]
