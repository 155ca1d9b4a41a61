"""Completions over HTTP, many at once, of a server that is started for it or runs already."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import aiohttp

from pshare_jax.errors import BenchmarkError
from pshare_jax.serve.process import running_server

VOCAB = 250
"""Token ids of prompts are below it: every tokenizer has them."""

_PATH = "/v1/completions"

Body = dict[str, Any]
R = TypeVar("R")


@contextmanager
def server_at(url: str | None, serve: Sequence[str], checkout: str | None) -> Iterator[str]:
    """The URL of a server: of `url`, or else of one that is started with the arguments `serve` and
    the code in the folder `checkout`, for as long as the block lasts."""
    if url is not None:
        yield url
        return
    with running_server(serve, checkout=checkout) as started:
        yield started


def client(url: str, timeout: float) -> aiohttp.ClientSession:
    """A client with as many connections as there are requests, which may take `timeout` seconds."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(
        url, timeout=aiohttp.ClientTimeout(total=timeout), connector=connector
    )


@asynccontextmanager
async def completion(
    http: aiohttp.ClientSession, body: Mapping[str, Any]
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer to a request, to be read in the block.

    Raises:
        BenchmarkError: the server refused it, or the connection broke.
    """
    try:
        async with http.post(_PATH, json=body) as response:
            if response.status != 200:
                text = await response.text()
                raise BenchmarkError(f"{_PATH}: {response.status}: {text[:500]}")
            yield response
    except (aiohttp.ClientError, TimeoutError) as error:
        raise BenchmarkError(f"{_PATH}: {type(error).__name__}: {error}") from error


@asynccontextmanager
async def all_at_once(
    ask: Callable[[Body], Awaitable[R]], bodies: Sequence[Body]
) -> AsyncIterator[list[asyncio.Task[R]]]:
    """Requests at once; those that go on when the block ends are given up.

    Raises:
        BenchmarkError: one of them failed.
    """

    async def one(body: Body) -> R:
        return await ask(body)

    tasks = [asyncio.create_task(one(body)) for body in bodies]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, BenchmarkError):
            raise outcome
