"""A teacher behind a server: asked once for each prompt, and its texts are learned."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from aiohttp import web

from pshare_jax.errors import ConfigError, DataError, TrainingError
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.train import endpoint
from pshare_jax.train.config import DistillConfig
from pshare_jax.train.endpoint import ANSWERS_FILE
from pshare_jax.train.inputs import read_inputs
from pshare_jax.train.loop import train
from pshare_jax.train.report import Reporter
from tests.train.helpers import chats, losses, train_config, write_jsonl

CALL = {"type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}, "id": "c"}


class Server:
    """Answers every question with the last word of it; `script` says what to do otherwise."""

    def __init__(self):
        self.requests: list[dict] = []
        self.headers: list[str] = []
        self.script: list[web.Response] = []
        self.answer = lambda body: {"content": body["messages"][-1]["content"].split()[-1]}
        self.finish = "stop"
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(30)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)

        async def start() -> None:
            app = web.Application()
            app.router.add_post("/v1/chat/completions", self._handle)
            app.router.add_post("/v1/completions", self._handle)
            self._runner = web.AppRunner(app)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
            self._ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(request.headers.get("Authorization", ""))
        if self.script:
            return self.script.pop(0)
        if "prompt" in body:
            choice = {"text": " fox", "finish_reason": self.finish}
        else:
            choice = {"message": self.answer(body), "finish_reason": self.finish}
        return web.json_response({"choices": [choice]})

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def said(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(Reporter, "say", lambda self, line: lines.append(line))
    return lines


def config_of(base, path, output, server, **overrides):
    distill = DistillConfig(server.url, model="big", max_tokens=7, concurrency=2)
    return train_config(base, path, output, mode="distill", distill=distill, **overrides)


def questions(count: int) -> list[dict]:
    return [{"messages": chat["messages"][:-1]} for chat in chats(count, seed=4)]


def test_its_answers_are_learned(base, server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    lines = [*questions(15), {"prompt": "the lazy dog"}, *chats(2, seed=9)]
    path = write_jsonl(tmp_path / "p.jsonl", lines)
    config = config_of(base, path, tmp_path / "run", server, optimizer={"epochs": 3})
    train(config, Reporter(active=False))
    assert len(server.requests) == 16
    assert set(server.headers) == {"Bearer secret"}
    first = next(r for r in server.requests if "messages" in r)
    assert first["model"] == "big"
    assert (first["temperature"], first["max_tokens"]) == (0, 7)
    curve = losses(tmp_path / "run")
    assert curve[-1] < 0.8 * curve[0]
    assert "secret" not in (tmp_path / "run" / "run.json").read_text()


def test_examples_are_the_questions_with_the_answers(base, server, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [*questions(3), {"prompt": "the lazy dog"}])
    config = config_of(base, path, tmp_path / "run", server)
    inputs = read_inputs(config, Reporter(active=False))
    answers = [
        inputs.tokenizer.decode(e.tokens[e.turns[0].start :].tolist(), skip_special_tokens=False)
        for e in inputs.train.examples
    ]
    words = [q["messages"][-1]["content"].split()[-1] for q in questions(3)]
    assert answers == [*(f"{word}<|im_end|>" for word in words), " fox<|im_end|>"]
    # What is kept is not asked for again; half a line that a kill has left is.
    kept = tmp_path / "run" / ANSWERS_FILE
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:-1]) + lines[-1][:20])
    asked = len(server.requests)
    again = read_inputs(config, Reporter(active=False))
    assert len(server.requests) == asked + 1
    assert [e.tokens.tolist() for e in again.train.examples] == [
        e.tokens.tolist() for e in inputs.train.examples
    ]


def test_empty_answers_are_left_out_and_cut_ones_do_not_end(base, server, tmp_path, said):
    path = write_jsonl(tmp_path / "p.jsonl", [*questions(3), {"prompt": "the lazy dog"}])
    words = [q["messages"][-1]["content"] for q in questions(3)]
    server.answer = lambda body: {
        "content": " " if body["messages"][-1]["content"] == words[0] else "and then"
    }
    server.finish = "length"
    inputs = read_inputs(config_of(base, path, tmp_path / "run", server), Reporter(active=False))
    assert [e.source.rpartition(":")[2] for e in inputs.train.examples] == ["2", "3", "4"]
    ends = inputs.tokenizer.eos_token_ids
    assert not any(e.tokens[-1] in ends for e in inputs.train.examples)
    assert "warning: 1 of 4 answers of the teacher are empty; left out" in said
    assert any(line.startswith("warning: 4 of 4 answers of the teacher were cut") for line in said)
    server.answer = lambda body: {"content": None}
    empty = write_jsonl(tmp_path / "e.jsonl", questions(2)[:1])
    with pytest.raises(DataError, match="all 1 answers are empty"):
        read_inputs(config_of(base, empty, tmp_path / "other", server), Reporter(active=False))


def test_calls_of_tools_are_learned(base, server, tmp_path):
    server.answer = lambda body: {"content": None, "tool_calls": [CALL]}
    tools = [{"name": "look", "parameters": {"type": "object", "properties": {}}}]
    path = write_jsonl(tmp_path / "p.jsonl", [{**questions(1)[0], "tools": tools}])
    config = config_of(base, path, tmp_path / "run", server)
    with pytest.raises(DataError, match=r"p.jsonl:1: messages\[1\]: the chat template does not"):
        read_inputs(config, Reporter(active=False))  # this base's template drops them
    assert server.requests[0]["tools"][0]["function"]["name"] == "look"


def test_a_busy_server_is_asked_again_and_an_error_is_told(base, server, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_WAIT_SECONDS", 0.01)
    path = write_jsonl(tmp_path / "p.jsonl", questions(1))
    config = config_of(base, path, tmp_path / "run", server)
    server.script = [web.Response(status=503), web.Response(status=429)]
    assert len(read_inputs(config, Reporter(active=False)).train.examples) == 1
    assert len(server.requests) == 3
    for response, message in (
        (web.json_response({"error": "no such model"}, status=404), "404 .*no such model"),
        (web.json_response({"choices": []}), "not an answer of OpenAI's API"),
        (web.Response(text="<html>"), "not an answer of OpenAI's API"),
    ):
        server.script = [response]
        other = config_of(base, path, tmp_path / message[:3], server)
        with pytest.raises(TrainingError, match=rf"distill.teacher: http://127.*{message}"):
            read_inputs(other, Reporter(active=False))


def test_nothing_to_answer_is_said(base, data, server, tmp_path):
    config = config_of(base, data, tmp_path / "run", server)
    with pytest.raises(ConfigError, match="has nothing to answer: every line has an answer"):
        read_inputs(config, Reporter(active=False))
    assert not server.requests


def test_a_line_that_is_no_question_is_not_sent(base, server, tmp_path):
    lines = [json.dumps(questions(1)[0]), "nonsense", json.dumps({"messages": "hello"})]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines) + "\n")
    config = config_of(base, str(path), tmp_path / "run", server, data={"on_bad_line": "skip"})
    inputs = read_inputs(config, Reporter(active=False))
    assert len(inputs.train.examples) == 1
    assert inputs.train.num_bad_lines == 2
    assert len(server.requests) == 1
    assert isinstance(inputs.tokenizer, Tokenizer)
