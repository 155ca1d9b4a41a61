"""`bench ui`: processor time that a server spends on those who watch its page.

The pools of a server that is started for it are filled. Then requests come slowly, one after the
other, so that what the page shows changes; for half of the time somebody watches `/ui/events`. What
the server's processes take more of the processor then is what the page costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from pshare_jax.bench.agents_targets import exiting_on_sigterm
from pshare_jax.bench.machine import describe
from pshare_jax.errors import BenchmarkError
from pshare_jax.serve.process import running_server

_VOCAB = 250
"""Token ids of prompts are below it: every tokenizer has them."""

_TICKS = os.sysconf("SC_CLK_TCK")

_now = time.monotonic


@dataclass(frozen=True)
class WatchingOptions:
    """What is measured.

    Args:
        serve: arguments of the server that is started, its configuration first.
        model: that is asked.
        contexts: prompts that fill the pools.
        tokens: of each of them.
        watchers: streams that are open at once.
        seconds: of each part, with watchers or without.
        rounds: parts with and without, in turn.
        pause: seconds between two requests.
        seed: of the random prompts.
    """

    serve: list[str] = field(default_factory=lambda: ["--config=configs/bench/lora-cluster.yaml"])
    model: str = "family"
    contexts: int = 30
    tokens: int = 1900
    watchers: int = 1
    seconds: float = 20.0
    rounds: int = 2
    pause: float = 0.5
    seed: int = 0


@dataclass
class _Seen:
    """What watchers have got, and how many of them have got anything."""

    events: int = 0
    num_bytes: int = 0
    watchers: int = 0


def run(options: WatchingOptions) -> dict[str, Any]:
    """Measures a server.

    Returns:
        `{"options", "machine", "cores": {process: [without, with]}, "events", "bytes"}`: cores that
        each process took, and what a watcher got a second.

    Raises:
        BenchmarkError: a request or a stream failed.
        EngineDeadError: the server did not start.
    """
    with exiting_on_sigterm(), running_server(options.serve) as url:
        measured = asyncio.run(_measure(options, url))
    return {"options": asdict(options), "machine": describe(), **measured}


async def _measure(options: WatchingOptions, url: str) -> dict[str, Any]:
    rng = np.random.default_rng(options.seed)
    used: dict[bool, dict[str, float]] = {False: {}, True: {}}
    spent, seen = {False: 0.0, True: 0.0}, _Seen()
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as http:
        for _ in range(options.contexts):
            await _ask(http, options.model, rng.integers(3, _VOCAB, options.tokens).tolist())
        for part in range(2 * options.rounds):
            watched = part % 2 == 1
            watching = [
                asyncio.create_task(_watch(http, seen))
                for _ in range(options.watchers if watched else 0)
            ]
            await _until_all_see(watching, seen)
            before, began, lasted = processor_seconds(os.getpid()), _now(), 0.0
            while lasted < options.seconds:
                await _ask(http, options.model, rng.integers(3, _VOCAB, 64).tolist())
                await asyncio.sleep(options.pause)
                _raise_of(watching)
                lasted = _now() - began
            spent[watched] += lasted
            for name, seconds in processor_seconds(os.getpid()).items():
                total = used[watched].get(name, 0.0)
                used[watched][name] = total + seconds - before.get(name, 0.0)
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
    per_watcher = options.watchers * spent[True]
    return {
        "cores": {
            name: [used[watched].get(name, 0.0) / spent[watched] for watched in (False, True)]
            for name in used[True]
        },
        "events": seen.events / per_watcher,
        "bytes": seen.num_bytes / per_watcher,
    }


async def _until_all_see(watching: Sequence[asyncio.Task[None]], seen: _Seen) -> None:
    """Waits until each watcher has got something."""
    while seen.watchers < len(watching):
        _raise_of(watching)
        await asyncio.sleep(0.01)
    seen.watchers = 0


def _raise_of(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()


async def _ask(http: aiohttp.ClientSession, model: str, prompt: Sequence[int]) -> None:
    body = {"model": model, "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
    async with http.post("/v1/completions", json=body) as response:
        if response.status != 200:
            raise BenchmarkError(f"{response.status}: {(await response.text())[:500]}")


async def _watch(http: aiohttp.ClientSession, seen: _Seen) -> None:
    timeout = aiohttp.ClientTimeout(total=None)
    async with http.get("/ui/events", timeout=timeout) as response:
        if response.status != 200:
            raise BenchmarkError(f"/ui/events: {response.status}: {await response.text()}")
        first = True
        async for line in response.content:
            seen.watchers += first
            first = False
            seen.events += line.startswith(b"data:")
            seen.num_bytes += len(line)
    raise BenchmarkError("/ui/events has ended")


def processor_seconds(root: int) -> dict[str, float]:
    """Processor time of the servers among a process's descendants, by their names: workers have
    theirs, what others are is known by their place."""
    found: dict[str, float] = {}
    waiting = _children(root)
    while waiting:
        pid = waiting.pop(0)
        with contextlib.suppress(OSError):
            waiting += _children(pid)
            command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[_name(command, found)] = (int(fields[11]) + int(fields[12])) / _TICKS
    return found


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _name(command: Sequence[str], taken: Mapping[str, float]) -> str:
    given = dict(flag.split("=", 1) for flag in command if flag.startswith("--") and "=" in flag)
    name = given.get("--name") or ("frontend" if "--cluster.workers" in given else "server")
    return name if name not in taken else f"{name} {len(taken)}"


def lines(result: dict[str, Any]) -> list[str]:
    """The figures, a line for each process."""
    cores = result["cores"]
    width = max(map(len, cores))
    table = [
        f"{name:{width}}  {100 * without:6.2f} %  {100 * watched:6.2f} %  "
        f"{100 * (watched - without):+6.2f} %"
        for name, (without, watched) in sorted(cores.items())
    ]
    return [
        f"{'of one core':{width}}  unwatched   watched     more",
        *table,
        f"a watcher gets {result['events']:.1f} events and {result['bytes'] / 1e3:.1f} kB a second",
    ]
