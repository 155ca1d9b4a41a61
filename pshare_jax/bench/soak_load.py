"""The traffic of `bench soak`: what its clients send, and whether the answers are right."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from pshare_jax.bench.soak_options import SoakOptions

_WORDS = (
    *("harbour", "ferry", "morning", "letter", "engine", "garden", "number", "winter", "market"),
    *("signal", "orange", "river", "paper", "window", "station", "silver", "answer", "kitchen"),
    *("mountain", "doctor", "seven", "ticket", "theatre", "bridge"),
)
_SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "seed": 5},
    {"temperature": 1, "seed": 6, "top_p": 0.9, "top_k": 40},
    {"temperature": 0, "presence_penalty": 0.7, "repetition_penalty": 1.1},
)
_NONSENSE: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[1, 2]",
    b'{"model": "nobody", "prompt": "x"}',
    b'{"prompt": "x", "max_tokens": 1e99, "model": 5}',
    b'{"model": "x", "prompt": ' + b"[" * 2000,
    json.dumps({"model": "x", "prompt": ["a"] * 60_000}).encode(),
)
_MAX_FAULTS = 50
# How often each kind of request is chosen.
_KINDS = {"probe": 8, "session": 4, "drop": 4, "slow": 2, "samples": 2, "nonsense": 3}
_SLOW_SECONDS = 0.03
_HOT_PAUSE_SECONDS = 1.0
_HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Probe:
    """A completion and the token ids that it had when nothing else ran."""

    body: dict[str, Any]
    answer: list[int]


async def record(
    session: aiohttp.ClientSession, models: list[str], options: SoakOptions
) -> list[Probe]:
    """Probes over a few contexts, so that they share pages with each other; one after the other."""
    rng = random.Random(f"probes {options.seed}")
    contexts = [_text(rng, options.longest_prompt // 2) for _ in range(3)]
    probes = []
    for index in range(options.probes):
        body = {
            "model": models[index % len(models)],
            "prompt": f"{rng.choice(contexts)} {_text(rng, rng.randint(1, 30))}",
            "max_tokens": rng.randint(1, options.longest_answer),
            "return_token_ids": True,
            "ignore_eos": True,
            **rng.choice(_SAMPLING),
        }
        probes.append(Probe(body, await _whole(session, body)))
    return probes


class Load:
    """Clients that send requests until their time is over.

    Attributes:
        outcomes: what became of requests, by kind.
        compared: probes whose answers were compared.
        faults: what went wrong, in words; the first few.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        models: list[str],
        probes: list[Probe],
        options: SoakOptions,
    ):
        self.outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.compared = 0
        self.faults: list[str] = []
        self._session = session
        self._models = models
        self._probes = probes
        self._options = options
        self._do: dict[str, Callable[[random.Random], Awaitable[str]]] = {
            "probe": self._probe,
            "session": self._agents,
            "drop": self._drop,
            "slow": self._slow,
            "samples": self._samples,
            "nonsense": self._nonsense,
        }

    async def client(self, number: int, end: float) -> None:
        """One request after the other, until `end` (of `time.monotonic`)."""
        rng = random.Random(f"client {self._options.seed} {number}")
        while time.monotonic() < end:
            [kind] = rng.choices(list(_KINDS), list(_KINDS.values()))
            try:
                outcome = await self._do[kind](rng)
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
                outcome = "failed"
                self._fault(f"{kind}: {type(error).__name__}: {str(error)[:200]}")
            self.outcomes[kind][outcome] += 1

    async def hot_loads(self, end: float) -> None:
        """Loads modules, asks each once and unloads it, until `end`."""
        rng = random.Random(f"hot {self._options.seed}")
        while time.monotonic() < end:
            for number, folder in enumerate(self._options.hot):
                name = f"soak-{number}"
                try:
                    await self._say("load", {"lora_name": name, "lora_path": folder})
                    await _whole(self._session, {**self._body(rng), "model": name})
                    await self._say("unload", {"lora_name": name})
                    outcome = "loaded"
                except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
                    outcome = "failed"
                    self._fault(f"hot: {folder}: {type(error).__name__}: {str(error)[:200]}")
                self.outcomes["hot"][outcome] += 1
            await asyncio.sleep(_HOT_PAUSE_SECONDS)

    async def _say(self, what: str, body: dict[str, Any]) -> None:
        path = f"/v1/{what}_lora_adapter"
        async with self._session.post(path, json=body) as response:
            response.raise_for_status()

    def _fault(self, text: str) -> None:
        if len(self.faults) < _MAX_FAULTS:
            self.faults.append(text)

    async def _probe(self, rng: random.Random) -> str:
        probe = rng.choice(self._probes)
        if rng.random() < 0.5:
            got = await _whole(self._session, probe.body)
        else:
            got = [i async for ids in _stream(self._session, probe.body) for i in ids]
        self.compared += 1
        if got != probe.answer:
            self._fault(f"{got} instead of {probe.answer} for {str(probe.body)[:300]}")
            return "differs"
        return "equal"

    async def _agents(self, rng: random.Random) -> str:
        """Calls of several models over one growing conversation."""
        messages = [{"role": "user", "content": _text(rng, rng.randint(20, 120))}]
        for _ in range(rng.randint(2, 4)):
            body = {
                "model": rng.choice(self._models),
                "messages": messages,
                "max_tokens": rng.randint(1, self._options.longest_answer),
            }
            async with self._session.post("/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                answer = await response.json()
            text = answer["choices"][0]["message"]["content"]
            messages = [
                *messages,
                {"role": "assistant", "content": text or "-"},
                {"role": "user", "content": _text(rng, rng.randint(2, 20))},
            ]
        return "answered"

    async def _drop(self, rng: random.Random) -> str:
        """A stream whose client goes away: at once, or after some tokens."""
        left = rng.choice((0, 0, 1, 2, 5))
        stream = _stream(self._session, self._body(rng))
        try:
            async for _ in stream:
                if left == 0:
                    break
                left -= 1
        finally:
            await stream.aclose()
        return "dropped"

    async def _slow(self, rng: random.Random) -> str:
        body = {**self._body(rng), "logprobs": 5}
        async for _ in _stream(self._session, body):
            await asyncio.sleep(_SLOW_SECONDS)
        return "answered"

    async def _samples(self, rng: random.Random) -> str:
        body = {**self._body(rng), "n": rng.randint(2, 4), "temperature": 0.9}
        body["prompt"] = [body["prompt"]] * rng.randint(1, 2)
        async with self._session.post("/v1/completions", json=body) as response:
            response.raise_for_status()
            choices = (await response.json())["choices"]
        if len(choices) != body["n"] * len(body["prompt"]):
            self._fault(f"{len(choices)} choices for {str(body)[:200]}")
            return "differs"
        return "answered"

    async def _nonsense(self, rng: random.Random) -> str:
        path = rng.choice(("/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize"))
        data = rng.choice(_NONSENSE)
        async with self._session.post(path, data=data, headers=_HEADERS) as response:
            await response.read()
        if not 400 <= response.status < 500:
            self._fault(f"{response.status} for nonsense: {data[:100]!r}")
            return "not refused"
        return "refused"

    def _body(self, rng: random.Random) -> dict[str, Any]:
        return {
            "model": rng.choice(self._models),
            "prompt": _text(rng, rng.randint(1, self._options.longest_prompt)),
            "max_tokens": self._options.longest_answer,
            "ignore_eos": True,
        }


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=words))


async def _whole(session: aiohttp.ClientSession, body: dict[str, Any]) -> list[int]:
    asked = {**body, "return_token_ids": True}
    async with session.post("/v1/completions", json=asked) as response:
        response.raise_for_status()
        return (await response.json())["choices"][0]["token_ids"]


async def _stream(
    session: aiohttp.ClientSession, body: dict[str, Any]
) -> AsyncGenerator[list[int], None]:
    """The token ids of each chunk, of a body that asks for them."""
    async with session.post("/v1/completions", json={**body, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise ValueError(f"an error in the stream: {event['error']}")
            for choice in event["choices"]:
                yield choice.get("token_ids") or []
