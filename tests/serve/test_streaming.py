import concurrent.futures

import pytest

from tests.serve.fake import fake_engine
from tests.serve.server import eventually, running_server
from tests.serve.test_completions import script


def test_completion_chunks_add_up(client):
    script(client.engine, "naïve café 你好 🙂")
    answer = client.complete(stream=True)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    *chunks, done = answer.events
    assert done == "[DONE]"
    assert "".join(c["choices"][0]["text"] for c in chunks) == "naïve café 你好 🙂"
    assert not any("\ufffd" in c["choices"][0]["text"] for c in chunks)
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len({c["id"] for c in chunks}) == 1
    assert all(c["object"] == "text_completion" and "usage" not in c for c in chunks)


def test_chat_chunks_open_with_the_role(client):
    *chunks, done = client.chat(stream=True).events
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("content", "") for d in deltas) == "hello world"
    assert not any("role" in d for d in deltas[1:])
    assert all(c["object"] == "chat.completion.chunk" for c in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("kind", ["complete", "chat"])
def test_include_usage_adds_one_last_chunk(client, kind):
    whole = getattr(client, kind)(cache_salt="a").json["usage"]
    answer = getattr(client, kind)(
        cache_salt="b", stream=True, stream_options={"include_usage": True}
    )
    *chunks, last, done = answer.events
    assert done == "[DONE]"
    assert all(c["usage"] is None for c in chunks)
    assert (last["choices"], last["usage"]) == ([], whole)


def test_choices_are_interleaved_by_index(client):
    script(client.engine, "one", "two", "three")
    *chunks, _ = client.chat(n=3, stream=True).events
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "one", 1: "two", 2: "three"}
    assert sum(c["choices"][0]["finish_reason"] == "stop" for c in chunks) == 3


def test_a_stop_string_across_tokens_is_never_shown(client):
    script(client.engine, "hello world, how are you", end=False)
    *chunks, _ = client.complete(stop=" world,", stream=True, max_tokens=99).events
    assert "".join(c["choices"][0]["text"] for c in chunks) == "hello"
    last = chunks[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", " world,")
    assert client.engine.running_ids == []


def test_tokens_arrive_while_others_are_still_to_come(client):
    script(client.engine, "hello world", end=False)
    client.engine.gate.clear()
    with client.raw_request(
        "/v1/chat/completions",
        {
            "model": "planner",
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "max_tokens": 200,
        },
    ) as sock:
        received = b""
        while b"\r\n\r\n" not in received:
            received += sock.recv(4096)
        assert b"200 OK" in received
        assert b"data:" not in received
        client.engine.gate.set()
        while b'"content":"h' not in received:
            received += sock.recv(4096)
        while b"[DONE]" not in received:
            received += sock.recv(65536)


def test_an_engine_that_dies_ends_the_stream_with_an_error_event(client):
    client.engine.gate.clear()
    with client.raw_request(
        "/v1/completions", {"model": "planner", "prompt": "x", "stream": True}
    ) as sock:
        received = b""
        while b"\r\n\r\n" not in received:
            received += sock.recv(4096)
        eventually(lambda: client.engine.running_ids != [])
        client.engine.fail("out of memory")
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += sock.recv(4096)
    assert b'data: {"error":{"message":"the engine has failed: out of memory"' in received
    assert b'"code":"engine_dead"' in received
    assert b"[DONE]" not in received


def test_a_bug_while_streaming_is_an_error_event_and_the_server_lives(client, caplog):
    script(client.engine, "hello")
    decode = type(client.engine.tokenizer).token_text
    try:
        type(client.engine.tokenizer).token_text = None
        *_, error = client.complete(stream=True, logprobs=1).events
    finally:
        type(client.engine.tokenizer).token_text = decode
    assert error["error"]["message"] == "internal error"
    assert "a bug while answering cmpl-" in caplog.text
    assert client.complete().status == 200


def test_many_streams_at_once_share_wake_ups(tokenizer):
    engine = fake_engine(tokenizer)
    script(engine, "the quick brown fox jumps over the lazy dog")
    with (
        running_server(engine) as client,
        concurrent.futures.ThreadPoolExecutor(32) as pool,
    ):
        answers = list(pool.map(lambda _: client.complete(stream=True), range(32)))
    for answer in answers:
        *chunks, done = answer.events
        assert done == "[DONE]"
        text = "".join(c["choices"][0]["text"] for c in chunks)
        assert text.startswith("the quick")
