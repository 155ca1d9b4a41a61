"""A short session over HTTP: questions over one growing context, to the base and to specialists."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from pshare_jax.evals.grading import grade
from pshare_jax.evals.items import Item, parse_item

BASE = "base"
MAX_TOKENS = 64

Print = Callable[[str], None]


@dataclass(frozen=True)
class Call:
    """One model call as the client saw it; times in seconds."""

    model: str
    prompt_tokens: int
    cached_tokens: int
    shared_tokens: int
    completion_tokens: int
    answer: str
    time_to_first_token: float
    decode_time: float


@dataclass(frozen=True)
class Question:
    """A question that a decode module was trained for, but not on, and how to grade its answer."""

    model: str
    item: Item

    @property
    def text(self) -> str:
        """What is asked."""
        return self.item.messages[-1]["content"]


@dataclass(frozen=True)
class Answer:
    """What the base and the question's own decode module answered, and whether that is right."""

    question: Question
    base: str
    own: str
    base_right: bool
    own_right: bool


@dataclass(frozen=True)
class SessionResult:
    """A session's calls and answers, the bytes handed over for each model, and its seconds."""

    calls: list[Call]
    answers: list[Answer]
    handoff_bytes: dict[str, int]
    seconds: float


def questions() -> list[Question]:
    """The session's questions, in their order."""
    lines = resources.files("pshare_jax.demo").joinpath("questions.jsonl").read_bytes().splitlines()
    return [Question(json.loads(line)["model"], parse_item(line)) for line in lines]


async def play(url: str, show: Print) -> SessionResult:
    """Plays the session; `show` gets the output.

    Each question goes to the base, whose answer is set aside, and to the decode module that was
    trained for such questions, whose answer becomes part of the context.

    Raises:
        RuntimeError: the server answered with an error.
    """
    context = resources.files("pshare_jax.demo").joinpath("context.txt").read_text()
    messages: list[dict[str, str]] = [{"role": "system", "content": context}]
    calls: list[Call] = []
    pairs: list[tuple[Question, str, str]] = []
    started = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(url, timeout=timeout) as http:
        for question in questions():
            messages.append({"role": "user", "content": question.text})
            show(f"\n[bold]question[/bold] > {_escaped(question.text)}")
            for model in (BASE, question.model):
                show(f"\n[bold]{model}[/bold] > ")
                calls.append(await _call(http, model, messages, show))
            base, own = calls[-2].answer, calls[-1].answer
            messages.append({"role": "assistant", "content": own})
            pairs.append((question, base, own))
        seconds = time.perf_counter() - started
        handoff = await _handoff_bytes(http)
    answers = [
        Answer(q, base, own, grade(q.item, base).correct, grade(q.item, own).correct)
        for q, base, own in pairs
    ]
    return SessionResult(calls, answers, handoff, seconds)


async def _call(
    http: aiohttp.ClientSession, model: str, messages: list[dict[str, str]], show: Print
) -> Call:
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    sent = time.perf_counter()
    first = last = sent
    async with http.post("/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{model}: {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RuntimeError(f"{model}: {event['error']['message']}")
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    last = time.perf_counter()
                    first = first if pieces else last
                    pieces.append(text)
                    show(_escaped(text))
    details = usage["prompt_tokens_details"]
    return Call(
        model=model,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=details["cached_tokens"],
        shared_tokens=details["shared_tokens"],
        completion_tokens=usage["completion_tokens"],
        answer="".join(pieces),
        time_to_first_token=first - sent,
        decode_time=last - first,
    )


async def _handoff_bytes(http: aiohttp.ClientSession) -> dict[str, int]:
    async with http.get("/metrics") as response:
        text = await response.text()
    return {
        sample.labels["model_name"]: int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "pshare_handoff_bytes_total"
    }


def _escaped(text: str) -> str:
    """For a console that reads markup."""
    return text.replace("[", r"\[")
