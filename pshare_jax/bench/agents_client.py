"""One streamed completion of any OpenAI-compatible server, timed and checked."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from pshare_jax.errors import BenchmarkError

_DATA = b"data:"
_DONE = b"[DONE]"
_LONGEST_LINE = 2**20


@dataclass(frozen=True)
class Endpoint:
    """A model and the server that has it; `url` comes without `/v1`."""

    url: str
    model: str


@dataclass(frozen=True)
class Reply:
    """A whole reply; times in seconds of `time.perf_counter`.

    Attributes:
        token_ids: the generated tokens, where the server lists them.
        arrivals: when each chunk came that brought tokens.
        end: when the stream ended.
        cached: prompt tokens that were not computed, where the server says so.
        shared: those of them that another model's call had computed.
    """

    token_ids: list[int] | None
    arrivals: list[float]
    end: float
    cached: int | None
    shared: int | None


@dataclass
class _Stream:
    """What has come of a stream so far."""

    arrivals: list[float] = field(default_factory=list)
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    done: bool = False

    def take(self, data: bytes) -> None:
        if data == _DONE:
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            raise BenchmarkError(f"an error in the stream: {str(event['error'])[:500]}")
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            ids = choice.get("token_ids")
            if ids is not None:
                self.token_ids = (self.token_ids or []) + ids
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            # The last token of a reply may have no text and come with nothing but the reason.
            if ids or choice.get("text") or (self.finish_reason and not self.arrivals):
                self.arrivals.append(time.perf_counter())


class CompletionClient:
    """Asks for completions of exact length.

    Args:
        http: an open session; it outlives the client.
        extra_body: further fields of every request.
        want_ids: whether replies must list their token ids.
        apart: whether models must not share KV though their weights may be the same, as those of
            benchmarks are: each gets a cache salt of its own.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        extra_body: Mapping[str, Any],
        want_ids: bool,
        apart: bool = False,
    ):
        self._http = http
        self._extra_body = dict(extra_body)
        if want_ids:
            self._extra_body["return_token_ids"] = True
        self._want_ids = want_ids
        self._apart = apart

    async def complete(self, endpoint: Endpoint, prompt: Sequence[int], tokens: int) -> Reply:
        """Streams a completion of `tokens` tokens after the prompt's token ids.

        Raises:
            BenchmarkError: it failed, or is not exactly what was asked for.
        """
        try:
            stream = await self._stream(endpoint, prompt, tokens)
            end = time.perf_counter()
            self._check(stream, len(prompt), tokens)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            message = f"{type(error).__name__}: {error}"
            raise BenchmarkError(f"{endpoint.url}, model {endpoint.model}: {message}") from error
        except BenchmarkError as error:
            raise BenchmarkError(f"{endpoint.url}, model {endpoint.model}: {error}") from None
        details = (stream.usage or {}).get("prompt_tokens_details") or {}
        return Reply(
            token_ids=stream.token_ids,
            arrivals=stream.arrivals,
            end=end,
            cached=details.get("cached_tokens"),
            shared=details.get("shared_tokens"),
        )

    async def _stream(self, endpoint: Endpoint, prompt: Sequence[int], tokens: int) -> _Stream:
        body = {
            "model": endpoint.model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"cache_salt": endpoint.model} if self._apart else {}),
            **self._extra_body,
        }
        stream = _Stream()
        url = f"{endpoint.url}/v1/completions"
        async with self._http.post(url, json=body, read_bufsize=_LONGEST_LINE) as response:
            if response.status != 200:
                raise BenchmarkError(f"status {response.status}: {(await response.text())[:500]}")
            async for line in response.content:
                if line.startswith(_DATA):
                    stream.take(line.removeprefix(_DATA).strip())
        return stream

    def _check(self, stream: _Stream, prompt: int, tokens: int) -> None:
        """A reply that is short, or of another prompt, would make a server look fast."""
        if not stream.done:
            raise BenchmarkError("the stream ended without [DONE]")
        if stream.usage is None:
            raise BenchmarkError("the stream has no usage, so its length cannot be checked")
        if stream.finish_reason != "length":
            raise BenchmarkError(
                f"finish_reason is {stream.finish_reason!r} where 'length' was asked for"
            )
        ids = None if stream.token_ids is None else len(stream.token_ids)
        if ids is None and self._want_ids:
            raise BenchmarkError(
                "the server lists no token_ids (it does not know return_token_ids): use "
                "--replies=scripted"
            )
        for name, got, wanted in (
            ("usage.completion_tokens", stream.usage.get("completion_tokens"), tokens),
            ("usage.prompt_tokens", stream.usage.get("prompt_tokens"), prompt),
            ("the number of token_ids", tokens if ids is None else ids, tokens),
        ):
            if got != wanted:
                raise BenchmarkError(f"{name} is {got} where {wanted} was asked for")
