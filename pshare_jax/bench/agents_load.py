"""Plays sessions against servers: who calls when, and what each call and session took."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pshare_jax.bench.agents_client import CompletionClient, Endpoint, Reply
from pshare_jax.bench.agents_workload import TextSource, Workload
from pshare_jax.errors import BenchmarkError

Replies = Literal["own", "scripted"]
# A session's heading is its own from the first few tokens on; more in a cache is an old run's.
_FORESEEN_CACHED = 32


@dataclass(frozen=True)
class Load:
    """How sessions come.

    Args:
        sessions: how many are played.
        concurrency: most sessions that are live at once.
        rate: sessions that arrive a second (a Poisson process); 0 starts one when another ends.
        seed: of the text and of the arrivals.
    """

    sessions: int
    concurrency: int
    rate: float
    seed: int


@dataclass(frozen=True)
class CallRecord:
    """One call; times in seconds of `time.perf_counter`.

    `asked` is when it could have been sent: a session's first call waits from its arrival on.
    """

    model: str
    prompt: int
    generated: int
    asked: float
    arrivals: list[float]
    end: float
    cached: int | None
    shared: int | None


@dataclass(frozen=True)
class SessionRecord:
    """One session from its arrival to its last reply."""

    arrival: float
    end: float
    calls: list[CallRecord]


class Player:
    """Plays the sessions of a workload.

    Args:
        client: asks for the completions.
        endpoints: at least as many as the workload has models.
        workload: the shape of every session.
        encode: text to token ids, without special tokens.
        replies: `own` appends the generated tokens to the context; `scripted` text of the same
            length instead.
        on_call: called after each call.
        reply_tokens: tokens to generate a call where they are not the workload's; the context
            grows by the workload's all the same, so `replies` must be `scripted`.
    """

    def __init__(
        self,
        client: CompletionClient,
        endpoints: Sequence[Endpoint],
        workload: Workload,
        encode: Callable[[str], list[int]],
        replies: Replies = "own",
        on_call: Callable[[], None] = lambda: None,
        reply_tokens: int | None = None,
    ):
        self._client = client
        self._endpoints = endpoints
        self._workload = workload
        self._encode = encode
        self._scripted = replies == "scripted"
        self._on_call = on_call
        self._tokens = workload.generated if reply_tokens is None else reply_tokens

    async def play(self, load: Load, warm_cache: bool = False) -> list[SessionRecord]:
        """Plays all sessions; the first failure ends the run.

        Args:
            load: how sessions come.
            warm_cache: whether the servers may know the text already.

        Raises:
            BenchmarkError: a call failed or was not what was asked for, or the text was in a
                cache already.
        """
        offsets = arrivals(load)
        slots = asyncio.Semaphore(load.concurrency)
        start = time.perf_counter()

        async def one(number: int) -> SessionRecord:
            if load.rate > 0:
                await asyncio.sleep(start + offsets[number] - time.perf_counter())
            async with slots:
                arrival = start + offsets[number] if load.rate > 0 else time.perf_counter()
                return await self._session(load.seed, number, arrival, warm_cache)

        tasks = [asyncio.create_task(one(number)) for number in range(load.sessions)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _session(
        self, seed: int, number: int, arrival: float, warm_cache: bool
    ) -> SessionRecord:
        source = TextSource(self._encode, seed, number)
        context = source.take(self._workload.prompt)
        asked, calls = arrival, []
        for step in self._workload.steps():
            if calls:
                await asyncio.sleep(self._workload.pause)
                asked = time.perf_counter()
            pairs = await asyncio.gather(
                *(self._call(self._endpoints[model], context, asked) for model in step.models)
            )
            if not calls and not warm_cache:
                _check_cold([record for record, _ in pairs])
            for record, reply in pairs:
                calls.append(record)
                context = context + self._appended(reply, source)
            context = context + source.take(step.observed)
        return SessionRecord(arrival, max(call.end for call in calls), calls)

    async def _call(
        self, endpoint: Endpoint, prompt: list[int], asked: float
    ) -> tuple[CallRecord, Reply]:
        reply = await self._client.complete(endpoint, prompt, self._tokens)
        self._on_call()
        record = CallRecord(
            model=endpoint.model,
            prompt=len(prompt),
            generated=self._tokens,
            asked=asked,
            arrivals=reply.arrivals,
            end=reply.end,
            cached=reply.cached,
            shared=reply.shared,
        )
        return record, reply

    def _appended(self, reply: Reply, source: TextSource) -> list[int]:
        if self._scripted:
            return source.take(self._workload.generated)
        assert reply.token_ids is not None  # the client was told to want them
        return reply.token_ids


def arrivals(load: Load) -> list[float]:
    """Seconds from the start to each session's arrival."""
    if load.rate <= 0:
        return [0.0] * load.sessions
    gaps, now, times = random.Random(f"arrivals/{load.seed}"), 0.0, []
    for _ in range(load.sessions):
        now += gaps.expovariate(load.rate)
        times.append(now)
    return times


def _check_cold(first: list[CallRecord]) -> None:
    cached = min(call.cached or 0 for call in first)
    if cached > _FORESEEN_CACHED:
        raise BenchmarkError(
            f"{cached} tokens of a session's first prompt were in the server's cache before it "
            f"came: an earlier run had the same text; give another --seed"
        )
