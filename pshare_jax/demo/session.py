"""A short multi-agent session over HTTP: four models in turn over one growing context."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

AGENTS = {
    "planner": "Planner: name the first thing that should be done, and why.",
    "coder": "Coder: say how the nightly script should read the status column.",
    "critic": "Critic: name one weakness of what was said so far.",
    "writer": "Writer: sum up the situation for the passengers in one sentence.",
}
ROUNDS = 2
MAX_TOKENS = 32

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
class SessionResult:
    """A session's calls, the bytes handed over for each model, and the time of it all."""

    calls: list[Call]
    handoff_bytes: dict[str, int]
    seconds: float


async def play(url: str, names: Sequence[str], show: Print) -> SessionResult:
    """Plays the session with the models `names`, one for each agent; `show` gets the output.

    Raises:
        RuntimeError: the server answered with an error.
    """
    context = resources.files("pshare_jax.demo").joinpath("context.txt").read_text()
    messages: list[dict[str, str]] = [{"role": "system", "content": context}]
    calls: list[Call] = []
    started = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(url, timeout=timeout) as http:
        for _ in range(ROUNDS):
            for name, task in zip(names, AGENTS.values(), strict=True):
                messages.append({"role": "user", "content": task})
                show(f"\n[bold]{name}[/bold] > ")
                call = await _call(http, name, messages, show)
                messages.append({"role": "assistant", "content": call.answer})
                calls.append(call)
        seconds = time.perf_counter() - started
        handoff = await _handoff_bytes(http)
    return SessionResult(calls, handoff, seconds)


async def _call(
    http: aiohttp.ClientSession, model: str, messages: list[dict[str, str]], show: Print
) -> Call:
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "repetition_penalty": 1.2,
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
                    show(text.replace("[", r"\["))
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
