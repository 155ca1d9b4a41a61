"""Streams that ask the same request again and again, for `bench failover`: what came of it when."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from pshare_jax.errors import BenchmarkError

_DATA = b"data:"
_DONE = b"[DONE]"
_LONGEST_LINE = 2**20
_AFTER_FAILURE = 0.2
"""Seconds before a stream whose request has failed asks again."""


@dataclass
class Answer:
    """What has come of one request so far; times in seconds of `time.perf_counter`.

    Attributes:
        arrivals: when each event came that brought tokens, and how many.
        token_ids: all of them.
        text: likewise.
        reason: why it ended.
        error: what went wrong; empty while nothing has.
    """

    arrivals: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    error: str = ""

    def take(self, event: dict[str, Any]) -> None:
        """Adds an event of the stream.

        Raises:
            BenchmarkError: it is an error.
        """
        if "error" in event:
            raise BenchmarkError(f"an error in the stream: {str(event['error'])[:500]}")
        for choice in event.get("choices", ()):
            ids = choice.get("token_ids") or []
            if ids:
                self.arrivals.append((time.perf_counter(), len(ids)))
            self.token_ids += ids
            self.text += choice.get("text") or ""
            self.reason = choice.get("finish_reason") or self.reason

    def same_as(self, other: Answer) -> bool:
        """Whether both have brought the same."""
        return (self.token_ids, self.text) == (other.token_ids, other.text)


class Stream:
    """One client: as soon as its request is answered, it asks the same again.

    Args:
        http: an open session with the server's address.
        body: of the request, without what makes it a stream of tokens of exact number.
    """

    def __init__(self, http: aiohttp.ClientSession, body: dict[str, Any]):
        self.model: str = body["model"]
        self.answers: list[Answer] = []
        self._http = http
        self._body = {
            **body,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }

    @property
    def now(self) -> tuple[int, int]:
        """Requests so far, and how many tokens of the last one have come."""
        return len(self.answers), len(self.answers[-1].token_ids) if self.answers else 0

    async def play(self, start: float, stop: asyncio.Event) -> None:
        """Asks until `stop` is set; `start` is how many seconds to wait before the first time."""
        await asyncio.sleep(start)
        while not stop.is_set():
            self.answers.append(Answer())
            await self._ask(self.answers[-1], self._body)
            if self.answers[-1].error:
                await asyncio.sleep(_AFTER_FAILURE)

    async def alone(self, salt: str) -> Answer:
        """What the request is answered when nothing else runs, and nothing cached is of use.

        Raises:
            BenchmarkError: it failed.
        """
        answer = Answer()
        await self._ask(answer, {**self._body, "cache_salt": salt})
        if answer.error:
            raise BenchmarkError(f"model {self.model}, asked alone: {answer.error}")
        return answer

    async def _ask(self, answer: Answer, body: dict[str, Any]) -> None:
        try:
            await self._read(answer, body)
        except (aiohttp.ClientError, TimeoutError, ValueError, BenchmarkError) as error:
            answer.error = f"{type(error).__name__}: {error}"

    async def _read(self, answer: Answer, body: dict[str, Any]) -> None:
        done = False
        async with self._http.post(
            "/v1/completions", json=body, read_bufsize=_LONGEST_LINE
        ) as response:
            if response.status != 200:
                raise BenchmarkError(f"status {response.status}: {(await response.text())[:500]}")
            async for line in response.content:
                data = line.removeprefix(_DATA).strip() if line.startswith(_DATA) else b""
                if data == _DONE:
                    done = True
                elif data:
                    answer.take(json.loads(data))
        got, wanted = len(answer.token_ids), body["max_tokens"]
        if not done or answer.reason != "length" or got != wanted:
            raise BenchmarkError(
                f"the stream has {got} tokens of {wanted}, ended with {answer.reason!r} and "
                f"{'with' if done else 'without'} [DONE]"
            )


def gap_around(times: Sequence[float], at: float, slack: float) -> float | None:
    """The longest time without a token that began before `at` and ended after it, in seconds.

    Args:
        times: of a request's tokens, in order.
        at: when the worker was killed.
        slack: a gap may begin so much later, too: tokens may have been on their way.

    Returns:
        None where no token came after `at`, or none before.
    """
    gaps = [
        later - earlier
        for earlier, later in itertools.pairwise(times)
        if earlier <= at + slack and later > at
    ]
    return max(gaps, default=None)


def tokens_between(answers: Sequence[Answer], start: float, end: float) -> int:
    """How many tokens came in that time."""
    return sum(
        count for answer in answers for when, count in answer.arrivals if start <= when < end
    )
