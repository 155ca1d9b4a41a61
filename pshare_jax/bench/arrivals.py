"""`bench arrivals`: first tokens of sessions that arrive together, and of who comes behind them.

Over HTTP, against a server that is started for it, or one that runs already. Prompts as long as
the sessions' are first asked for one token each, one after the other: what they take together is
what the sessions' first tokens are compared with. Then all sessions arrive at once, each with a
prompt of its own, their models in turn; and a moment later somebody else with a short prompt.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import numpy as np

from pshare_jax.bench.crowds import VOCAB, Body, all_at_once, client, completion, server_at
from pshare_jax.bench.machine import describe
from pshare_jax.errors import BenchmarkError, ConfigError


@dataclass(frozen=True)
class ArrivalsOptions:
    """What is measured.

    Args:
        serve: arguments of the server that is started, its configuration first.
        checkout: folder of other code that the server is to run, an older one for comparison.
        url: of a server that runs already, instead.
        models: that are asked in turn.
        sessions: that arrive together.
        prompt_tokens: of each of them.
        reply_tokens: of each of their replies.
        short_tokens: of the prompt that comes behind them.
        behind: seconds after which that one comes.
        chunk: tokens of the server's largest prefill chunk.
        rounds: of all of it; medians are reported.
        seed: of the random prompts.
        timeout: seconds that a request may take.

    Raises:
        ConfigError: no models, or a number that is too small.
    """

    serve: list[str] = field(
        default_factory=lambda: [
            "--config=configs/serve/smollm2-135m.yaml",
            "--prefill.num_pages=0",
            "--decode.num_pages=0",
        ]
    )
    checkout: str | None = None
    url: str | None = None
    models: list[str] = field(default_factory=lambda: ["base", "family", "tools", "code"])
    sessions: int = 16
    prompt_tokens: int = 1000
    reply_tokens: int = 128
    short_tokens: int = 50
    behind: float = 0.1
    chunk: int = 512
    rounds: int = 1
    seed: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        numbers = self.sessions, self.prompt_tokens, self.reply_tokens, self.short_tokens
        if not self.models or min(*numbers, self.chunk, self.rounds) < 1 or self.behind < 0:
            raise ConfigError("bench arrivals: needs models, and numbers of 1 or more")


def run(options: ArrivalsOptions) -> dict[str, Any]:
    """Measures.

    Returns:
        `{"options", "machine", "rounds": [{"alone", "chunk", "first", "short_alone", "short"}]}`,
        in seconds: of all prompts one after the other, of a chunk, until each session's first
        token, and of the short request's, alone and behind the others.

    Raises:
        BenchmarkError: a request failed.
    """
    with server_at(options.url, options.serve, options.checkout) as url:
        rounds = asyncio.run(_measure(options, url))
    return {"options": asdict(options), "machine": describe(), "rounds": rounds}


async def _measure(options: ArrivalsOptions, url: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(options.seed)
    async with client(url, options.timeout) as http:
        for model in options.models:  # whose first request may be their first of all
            await _first_token(http, _body(rng, model, options.short_tokens, 2))
        return [await _round(options, http, rng) for _ in range(options.rounds)]


async def _round(
    options: ArrivalsOptions, http: aiohttp.ClientSession, rng: np.random.Generator
) -> dict[str, Any]:
    def bodies(reply: int) -> list[Body]:
        models = [options.models[i % len(options.models)] for i in range(options.sessions)]
        return [_body(rng, model, options.prompt_tokens, reply) for model in models]

    last = options.models[-1]
    alone = [await _first_token(http, body) for body in bodies(1)]
    chunk = await _first_token(http, _body(rng, last, options.chunk + 1, 1))
    short_alone = await _first_token(http, _body(rng, last, options.short_tokens, 1))
    many = bodies(options.reply_tokens)
    async with all_at_once(lambda body: _first_token(http, body), many) as sessions:
        await asyncio.sleep(options.behind)
        short = await _first_token(http, _body(rng, last, options.short_tokens, 8))
        first = await asyncio.gather(*sessions)
    return {
        "alone": sum(alone),
        "chunk": chunk,
        "first": sorted(first),
        "short_alone": short_alone,
        "short": short,
    }


def _body(rng: np.random.Generator, model: str, prompt: int, reply: int) -> Body:
    tokens = rng.integers(3, VOCAB, prompt).tolist()
    return {
        "model": model,
        "prompt": tokens,
        "max_tokens": reply,
        "ignore_eos": True,
        "stream": True,
    }


async def _first_token(http: aiohttp.ClientSession, body: Body) -> float:
    """Seconds until a stream's first event with tokens; then it is read to its end."""
    began, first = time.perf_counter(), None
    async with completion(http, body) as response:
        async for line in response.content:
            if line.startswith(b"data: {") and first is None:
                first = time.perf_counter() - began
    if first is None:
        raise BenchmarkError(f"{response.url.path}: a stream ended without a token")
    return first


def lines(result: dict[str, Any]) -> list[str]:
    """A Markdown table of a result, a line a round."""
    options = result["options"]
    rows = [
        f"{options['sessions']} sessions at once, {options['prompt_tokens']:,} tokens each, of "
        f"{len(options['models'])} models; behind them {options['short_tokens']} tokens.",
        "",
        "| prompts one by one, s | first tokens: p50 | p95 | p95 / one by one | "
        "short one alone | behind the others | chunks waited |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for found in result["rounds"]:
        p50, p95 = np.percentile(found["first"], [50, 95])
        waited = (found["short"] - found["short_alone"]) / found["chunk"]
        rows.append(
            f"| {found['alone']:.2f} | {p50:.2f} | {p95:.2f} | {p95 / found['alone']:.2f} | "
            f"{found['short_alone']:.2f} | {found['short']:.2f} | {waited:.1f} |"
        )
    return rows
