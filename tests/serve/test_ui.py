"""The page in the browser: its files, its stream, and what watching costs."""

import asyncio
import json
import re
import threading
import time
from contextlib import contextmanager

import pytest

from pshare_jax.errors import QueueFullError
from pshare_jax.serve import live, ui
from pshare_jax.serve.live import Live
from pshare_jax.serve.offload import Offload
from pshare_jax.serve.session_log import SessionLog
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import eventually, running_server
from tests.serve.test_completions import script


@contextmanager
def watching(client, **headers):
    """A function that gives the next event of `/ui/events`."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = f"GET /ui/events HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()
    with client.raw(request) as sock, sock.makefile("rb") as reader:
        assert reader.readline().startswith(b"HTTP/1.1 200 ")

        def following(kind: str) -> dict:
            for line in reader:
                if line == b"0\r\n":  # the last chunk
                    break
                if line.startswith(b"data: "):
                    event = json.loads(line.removeprefix(b"data: "))
                    if event["type"] == kind:
                        return event
            raise AssertionError("the stream has ended")

        yield following


@pytest.fixture
def quick(monkeypatch):
    """Looks follow each other without a pause."""
    monkeypatch.setattr(live, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(live, "SHARE", 1.0)


def test_every_file_is_there_and_has_its_policy(client):
    page = client.get("/ui")
    assert page.status == 200
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:src|href)="(/[^"]+)"', page.body.decode()))
    assert named <= ui.PUBLIC_PATHS
    for path in ui.PUBLIC_PATHS:
        answer = client.get(path)
        assert answer.status == 200, path
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        # Nothing comes from elsewhere, and nothing that was generated is taken as HTML.
        text = answer.body.decode()
        assert "http://" not in text
        assert "https://" not in text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
    assert client.get("/ui/").body == page.body
    assert client.get("/ui/__init__.py").status == 404
    assert client.request("HEAD", "/ui").status == 200


def test_modules_import_files_that_are_served():
    for path in ui.PUBLIC_PATHS:
        if path.endswith(".js"):
            text = (ui.resources.files(ui) / path.rpartition("/")[2]).read_text()
            imported = re.findall(r'from "\./([^"]+)"', text)
            assert {f"/ui/{name}" for name in imported} <= ui.PUBLIC_PATHS


def test_the_page_needs_no_key_and_its_stream_does(tokenizer):
    with running_server(fake_engine(tokenizer, fake_config(api_key="secret"))) as client:
        assert client.get("/ui").status == 200
        assert client.get("/ui/events").status == 401
        with watching(client, Authorization="Bearer secret") as following:
            assert following("state")["ready"] is True


def test_of_several_keys_it_tells_admins_of_all(tokenizer, tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys: [{name: a, key: one}, {name: b, key: two, admin: true}]")
    config = fake_config(api_keys_file=str(keys))
    with running_server(fake_engine(tokenizer, config)) as client:
        assert client.get("/ui").status == 200
        assert client.get("/ui/events", Authorization="Bearer one").status == 403
        with watching(client, Authorization="Bearer two") as following:
            assert following("state")["ready"] is True


def test_it_can_be_turned_off(tokenizer):
    with running_server(fake_engine(tokenizer, fake_config(ui=False))) as client:
        assert client.get("/ui").status == 404
        assert client.get("/ui/events").status == 404


def test_the_stream_shows_what_happens(client, quick):
    with watching(client) as following:
        before = following("state")
        assert before["models"]["planner"]["generated"] == 0
        assert following("map")["contexts"] == []
        client.engine.gate.clear()
        script(client.engine, "x", end=False)
        body = {"model": "planner", "prompt": "hello there", "max_tokens": 5}
        with client.raw_request("/v1/completions", body) as sock:
            shown = following("map")
            assert shown["contexts"][0]["pages"] == [
                [4, [["planner", 4]], ["planner"], ["p"], False, []]
            ]
            client.engine.gate.set()
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
            # A map that is the same is not sent again; this one is without a reader.
            (context,) = following("map")["contexts"]
            assert context["pages"] == [[4, [["planner", 4]], [], ["p"], False, []]]
        after = following("state")
        assert after["time"] > before["time"]
        planner = after["models"]["planner"]
        assert (planner["generated"], planner["running"]) == (5, 0)
        assert planner["computed"] > 0
        assert after["workers"]["prefill0"]["total"] == 99
        assert after["workers"]["decode0"]["failed_transfers"] == 0
        assert after["tiers"] == {}


def test_the_stream_shows_sessions(client, quick):
    script(client.engine, "xyz")
    body = {"model": "planner", "prompt": "hello there and once more", "max_tokens": 5}
    with watching(client) as following:
        assert following("sessions")["sessions"] == []
        assert client.complete(**body).status == 200  # which names none
        assert client.complete(**body, session_id="<b>one").status == 200
        for _ in range(20):  # when it began, and when it ended
            (session,) = following("sessions")["sessions"]
            if not session["running"]:
                break
        assert (session["id"], session["calls"]) == ("<b>one", {"planner": 1})
        assert session["prompt"] > session["cached"] > 0
        assert (session["shared"], session["generated"]) == (0, 4)
        assert client.complete(**body | {"model": "coder"}, session_id="<b>one").status == 200
        while session["running"] or session["calls"] != {"planner": 1, "coder": 1}:
            (session,) = following("sessions")["sessions"]
        assert session["shared"] > 0
        assert session["last"] <= following("state")["time"]


def test_draining_ends_the_stream(client, quick):
    with watching(client) as following:
        following("state")
        loop = client.server.service._bridge._loop
        drained = asyncio.run_coroutine_threadsafe(client.server.service.drain(5), loop)
        assert drained.result(5)
        with pytest.raises(AssertionError, match="the stream has ended"):
            following("never")


def test_nobody_looks_when_nobody_watches(client, quick):
    looks = []
    see = client.engine.sharing_map
    client.engine.sharing_map = lambda: looks.append(1) or see()
    assert client.complete().status == 200
    assert looks == []
    with watching(client) as following:
        following("state")
    eventually(lambda: client.server.service.live._task is None)
    count = len(looks)
    assert count >= 1
    assert client.complete().status == 200
    assert len(looks) <= count + 1  # one may have been under way


async def collect(engine, count: int) -> None:
    offload = Offload(1)
    watched = Live(engine, offload, SessionLog())
    try:
        async for _ in watched.watch():
            count -= 1
            if not count:
                return
    finally:
        watched.close()
        offload.close()


async def test_a_look_that_takes_long_is_followed_by_a_long_pause(tokenizer, monkeypatch):
    engine = fake_engine(tokenizer)
    pauses = []
    sleep = asyncio.sleep

    def looking():
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        return fake_engine(tokenizer).sharing_map()

    async def pause(seconds):
        pauses.append(seconds)
        await sleep(0)

    engine.sharing_map = looking
    monkeypatch.setattr(asyncio, "sleep", pause)
    await collect(engine, 3)
    # Two hundredths of a second of work: a hundred times as long until the next.
    assert len(pauses) >= 2
    assert all(seconds >= 2.0 for seconds in pauses)


async def test_watchers_share_looks_and_are_limited(tokenizer, quick):
    engine = fake_engine(tokenizer)
    threads = set()
    see = engine.sharing_map
    engine.sharing_map = lambda: threads.add(threading.current_thread().name) or see()
    offload = Offload(1)
    watched = Live(engine, offload, SessionLog())
    watchers = [watched.watch() for _ in range(live.MAX_WATCHERS)]
    first = await asyncio.gather(*(anext(watcher) for watcher in watchers))
    assert all(events == first[0] for events in first)
    with pytest.raises(QueueFullError, match="16 pages watch already"):
        await anext(watched.watch())
    assert all("MainThread" not in name for name in threads)
    await watchers.pop().aclose()
    assert len(await anext(watched.watch())) >= 1
    for watcher in watchers:
        await watcher.aclose()
    watched.close()
    offload.close()


async def test_a_bug_in_looking_is_logged_and_over_with_the_next(tokenizer, quick, caplog):
    engine = fake_engine(tokenizer)
    see, failures = engine.sharing_map, iter([True, False, False])

    def looking():
        if next(failures, False):
            raise RuntimeError("broken")
        return see()

    engine.sharing_map = looking
    await collect(engine, 2)
    assert "a bug while looking at the engine" in caplog.text
