"""`bench starve`: how long a request of 2 tokens takes while one client floods the server.

Over HTTP, against a server that is started for it, or one that runs already. Each flood is begun,
given a head start, and asked past; then it is cut off. All requests are of one client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import numpy as np

from pshare_jax.bench.crowds import VOCAB, Body, all_at_once, client, completion, server_at
from pshare_jax.bench.machine import describe
from pshare_jax.errors import BenchmarkError


@dataclass(frozen=True)
class StarveOptions:
    """What is measured.

    Args:
        serve: arguments of the server that is started, its configuration first.
        checkout: folder of other code that the server is to run, an older one for comparison.
        url: of a server that runs already, instead.
        floods: which; all by default.
        model: that is asked.
        other_model: that the small request asks when the flood is of one hot model.
        long_prompts: of the flood of long prompts.
        long_tokens: tokens of each of them.
        samples: of the flood of samples.
        prompts: of the flood of one request of many prompts.
        hot_requests: of the flood of one model.
        reply_tokens: tokens of each reply of a flood.
        head_start: seconds that a flood has before the first small request.
        probes: small requests, one after the other, while the flood goes on.
        seed: of the random prompts.
        timeout: seconds that a request may take.
    """

    serve: list[str] = field(default_factory=lambda: ["--config=configs/serve/smollm2-135m.yaml"])
    checkout: str | None = None
    url: str | None = None
    floods: list[str] = field(default_factory=lambda: list(FLOODS))
    model: str = "base"
    other_model: str = "family"
    long_prompts: int = 32
    long_tokens: int = 1900
    samples: int = 128
    prompts: int = 250
    hot_requests: int = 64
    reply_tokens: int = 128
    head_start: float = 2.0
    probes: int = 3
    seed: int = 0
    timeout: float = 600.0


FLOODS = ("long prompts", "samples", "many prompts", "hot model")


def run(options: StarveOptions) -> dict[str, Any]:
    """Measures all floods, one after the other.

    Returns:
        `{"options", "machine", "idle": seconds, "floods": {name: {"seconds": [...], "left": n}}}`:
        of each small request, and requests of the flood that had not ended after the last.

    Raises:
        BenchmarkError: a request failed, or there is no such flood.
    """
    if unknown := [name for name in options.floods if name not in FLOODS]:
        raise BenchmarkError(f"no such flood: {unknown[0]!r}; there are {', '.join(FLOODS)}")
    with server_at(options.url, options.serve, options.checkout) as url:
        measured = asyncio.run(_measure(options, url))
    return {"options": asdict(options), "machine": describe(), **measured}


async def _measure(options: StarveOptions, url: str) -> dict[str, Any]:
    rng = np.random.default_rng(options.seed)
    async with client(url, options.timeout) as http:
        idle = [await _probe(http, options.model) for _ in range(1 + options.probes)]
        floods: dict[str, Any] = {}
        for name in options.floods:
            asked = options.other_model if name == "hot model" else options.model
            # Its first request may be the first of its model.
            await _probe(http, asked)
            flood = flood_bodies(name, options, rng)
            async with all_at_once(lambda body: _ask(http, body), flood) as tasks:
                await asyncio.sleep(options.head_start)
                seconds = [await _probe(http, asked) for _ in range(options.probes)]
                floods[name] = {"seconds": seconds, "left": _running(tasks)}
    # The first one of all opens the connection.
    return {"idle": float(np.median(idle[1:])), "floods": floods}


def flood_bodies(name: str, options: StarveOptions, rng: np.random.Generator) -> list[Body]:
    """The requests of a flood."""

    def prompts(count: int, length: int) -> list[list[int]]:
        return rng.integers(3, VOCAB, (count, length)).tolist()

    def body(prompt: Sequence[Any], **fields: Any) -> Body:
        more = {"max_tokens": options.reply_tokens, "ignore_eos": True, **fields}
        return {"model": options.model, "prompt": prompt, **more}

    match name:
        case "long prompts":
            return [body(p) for p in prompts(options.long_prompts, options.long_tokens)]
        case "samples":
            return [body(prompts(1, 64)[0], n=options.samples, temperature=1.0)]
        case "many prompts":
            return [body(prompts(options.prompts, 64))]
        case _:
            return [body(p) for p in prompts(options.hot_requests, 64)]


async def _probe(http: aiohttp.ClientSession, model: str) -> float:
    """Seconds until a prompt of 2 tokens has got 2."""
    began = time.perf_counter()
    body = {"model": model, "prompt": [5, 6], "max_tokens": 2, "ignore_eos": True}
    await _ask(http, body)
    return time.perf_counter() - began


async def _ask(http: aiohttp.ClientSession, body: Mapping[str, Any]) -> None:
    async with completion(http, body) as response:
        await response.read()


def _running(tasks: Sequence[asyncio.Task[None]]) -> int:
    return sum(not task.done() for task in tasks)


def lines(result: dict[str, Any]) -> list[str]:
    """A Markdown table of a result."""
    options = result["options"]
    what = {
        "long prompts": f"{options['long_prompts']} prompts of {options['long_tokens']:,} tokens",
        "samples": f"`n: {options['samples']}`",
        "many prompts": f"one request of {options['prompts']} prompts",
        "hot model": f"{options['hot_requests']} requests to one model, the small one to another",
    }
    rows = ["| flood | small request, s | the slowest, s |", "|---|--:|--:|"]
    rows.append(f"| none | {result['idle']:.2f} | |")
    for name, measured in result["floods"].items():
        seconds = measured["seconds"]
        rows.append(f"| {what[name]} | {seconds[0]:.2f} | {max(seconds):.2f} |")
    return rows
