"""Sessions as the page shows them: numbers of calls that name one, the latest, and no others."""

from __future__ import annotations

import pytest

from pshare_jax.core.requests import Owner, Request, SamplingParams, Session
from pshare_jax.serve import session_log
from pshare_jax.serve.protocol import PromptTokensDetails, Usage
from pshare_jax.serve.session_log import SessionLog


def request(session: str, model: str = "m", salt: str = "", key: str = "") -> Request:
    return Request(
        id="r",
        model=model,
        prompt_token_ids=(1, 2),
        params=SamplingParams(),
        cache_salt=salt,
        owner=Owner(key, 1.0, "r", 0),
        session=Session(session),
    )


def usage(prompt: int, cached: int, shared: int, written: int):
    return lambda: Usage(prompt, written, prompt + written, PromptTokensDetails(cached, shared))


def test_calls_add_up():
    log = SessionLog()
    with log.call(request("a", key="team"), usage(10, 4, 3, 2)):
        (running,) = log.newest()
        assert (running["running"], running["prompt"], running["key"]) == (1, 0, "team")
    with (
        log.call(request("a", "n", key="team"), usage(20, 15, 5, 3)),
        log.call(request("a", "n", key="team"), usage(1, 0, 0, 1)),
    ):
        assert log.newest()[0]["running"] == 2
    (session,) = log.newest()
    last = session.pop("last")
    assert last > running["last"]
    assert session == {
        "id": "a",
        "key": "team",
        "calls": {"m": 1, "n": 2},
        "running": 0,
        "prompt": 31,
        "cached": 19,
        "shared": 8,
        "generated": 6,
    }


def test_a_call_without_a_session_is_not_noted():
    log = SessionLog()
    with log.call(request(""), usage(1, 0, 0, 1)):
        assert log.newest() == []
    assert log.newest() == []


def test_tenants_do_not_meet_in_a_session():
    log = SessionLog()
    for salt in ("one", "two"):
        with log.call(request("a", salt=salt), usage(1, 0, 0, 1)):
            pass
    assert [s["calls"] for s in log.newest()] == [{"m": 1}, {"m": 1}]


def test_a_call_that_fails_ends_too():
    log = SessionLog()
    with pytest.raises(ConnectionError), log.call(request("a"), usage(9, 0, 0, 0)):
        raise ConnectionError
    (session,) = log.newest()
    # What was found of its prompt is not known.
    assert (session["running"], session["prompt"], session["calls"]) == (0, 0, {"m": 1})


def test_the_latest_are_kept_and_one_that_was_forgotten_may_end(monkeypatch):
    monkeypatch.setattr(session_log, "MAX_SESSIONS", 2)
    log = SessionLog()
    with log.call(request("old"), usage(1, 0, 0, 1)):
        for name in ("b", "c"):
            with log.call(request(name), usage(1, 0, 0, 1)):
                pass
        assert [s["id"] for s in log.newest()] == ["c", "b"]
    assert [(s["id"], s["running"]) for s in log.newest()] == [("old", 0), ("c", 0)]
